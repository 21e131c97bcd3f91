//! Saving in the background.

use super::config::CheckpointConfig;
use super::error::CheckpointError;
use super::io::{Disk, Io};
use super::layout::Layout;
use super::newest::{clean_stale, retain};
use super::save::Job;
use super::snapshot::{Buffers, Snapshot};
use super::team::{Meetings, Team};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Writes snapshots on a thread of its own, one at a time, while training goes on. With several ranks each has a saver, which writes the
/// rank's share.
///
/// A loop calls [`buffers`](Saver::buffers), copies its state into them, calls [`save`](Saver::save), and asks
/// [`poll`](Saver::poll) once a step. A save that fails (disk full, read-only, a rank that is gone) comes back as the error in a
/// [`SaveReport`]: an alarm to show, not a reason to stop; its temporary directory is gone and the checkpoints before it are untouched.
/// At most one save runs: the caller that is due for the next one may [`wait`](Saver::wait) or skip it. Dropping the saver
/// waits for the save that runs.
///
/// The ranks of a team must save the same steps. Whether a saver is busy differs between ranks for a moment, so one of them has to decide
/// for all, or all wait before they save. A step that not all save fails for those that do, within the team's patience.
pub struct Saver {
    io: Arc<dyn Io>,
    checkpoints: PathBuf,
    config: CheckpointConfig,
    team: Option<Arc<Mutex<Meetings>>>,
    /// Which shard of how many is this rank's.
    place: (usize, usize),
    called_off: Arc<AtomicBool>,
    running: Option<Running>,
    spare: Option<Buffers>,
}

struct Running {
    step: u64,
    /// An error where the system would not start the thread.
    thread: std::io::Result<JoinHandle<(Buffers, Result<Saved, CheckpointError>)>>,
}

/// What became of a save: the same on all ranks.
#[derive(Debug)]
pub struct SaveReport {
    /// The step of the snapshot.
    pub step: u64,
    /// Where it is, or the alarm.
    pub result: Result<Saved, CheckpointError>,
}

/// A committed checkpoint.
#[derive(Debug)]
pub struct Saved {
    /// Its directory.
    pub path: PathBuf,
    /// Bytes of all its shards.
    pub bytes: u64,
    /// How long this rank's writer took.
    pub duration: Duration,
    /// Older checkpoints that were removed for it: by rank 0, and only it says so.
    pub removed: Vec<PathBuf>,
    /// Older checkpoints that should have been removed (by rank 0), and why they are still there.
    pub not_removed: Vec<CheckpointError>,
}

/// A snapshot handed back because a save is still running.
#[derive(Debug, thiserror::Error)]
#[error("the save of step {running} is still being written")]
pub struct SaveRefused {
    /// The step being written.
    pub running: u64,
    /// What was to be saved.
    pub snapshot: Box<Snapshot>,
}

impl Saver {
    /// The saver of a run of one rank. Makes the directory of the checkpoints and removes what killed saves left in it. The caller holds
    /// the run's lock.
    pub fn new(checkpoints: &Path, config: &CheckpointConfig) -> Result<Saver, CheckpointError> {
        prepare(checkpoints)?;
        Ok(Saver::with_io(Arc::new(Disk), checkpoints, config, None))
    }

    /// The saver of one rank of a team. Rank 0 holds the run's lock and does what [`Saver::new`] does; the others touch nothing yet.
    ///
    /// # Panics
    /// If the team has no such rank.
    pub fn with_team(checkpoints: &Path, config: &CheckpointConfig, team: Team) -> Result<Saver, CheckpointError> {
        if team.rank == 0 {
            prepare(checkpoints)?;
        }
        Ok(Saver::with_io(Arc::new(Disk), checkpoints, config, Some(team)))
    }

    pub(super) fn with_io(io: Arc<dyn Io>, checkpoints: &Path, config: &CheckpointConfig, team: Option<Team>) -> Saver {
        let place = team.as_ref().map_or((0, 1), |team| (team.rank, team.size));
        assert!(place.0 < place.1, "rank {} of {}", place.0, place.1);
        // A team of one has nobody to meet.
        let team = team.filter(|team| team.size > 1).map(|team| Arc::new(Mutex::new(Meetings::new(team))));
        let (checkpoints, config) = (checkpoints.to_path_buf(), config.clone());
        Saver { io, checkpoints, config, team, place, called_off: Arc::default(), running: None, spare: None }
    }

    /// The elements of the flat buffers that this rank saves.
    pub fn share(&self, layout: &Layout) -> Range<usize> {
        layout.shard(self.place.0, self.place.1)
    }

    /// Takes the memory of a snapshot now, so that the first save holds up a loop no longer than the others do.
    pub fn prepare(&mut self, layout: &Layout) {
        self.spare = Some(self.buffers(layout));
    }

    /// Buffers for this rank's [`share`](Saver::share), to copy the state into: those of the last save that was reported, or new ones.
    /// Their content is unspecified.
    pub fn buffers(&mut self, layout: &Layout) -> Buffers {
        let range = self.share(layout);
        match self.spare.take() {
            Some(spare) if spare.range == range && spare.params.len() == range.len() => spare,
            _ => Buffers::zeroed(range),
        }
    }

    /// Calls off the save that runs, if it is not committed yet, and all later ones: for a rank that ends because another is lost. The
    /// writer then waits for nobody, and [`wait`](Saver::wait) takes no longer than one tensor and one flush to disk do. Rank 0, if it has
    /// the whole state, may then save it with a saver of its own ([`Saver::new`]).
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Relaxed);
    }

    /// Whether a save is being written or its report is still to be fetched.
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Begins to write a snapshot and returns at once. While an earlier save is unreported the snapshot is handed back:
    /// [`wait`](Saver::wait) and call again, or drop it and let the next interval save.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<(), SaveRefused> {
        if let Some(running) = &self.running {
            return Err(SaveRefused { running: running.step, snapshot: Box::new(snapshot) });
        }
        let step = snapshot.meta.step;
        let (io, checkpoints, config) = (self.io.clone(), self.checkpoints.clone(), self.config.clone());
        let (team, called_off) = (self.team.clone(), self.called_off.clone());
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            yield_to_training();
            let job = Job { io: &io, checkpoints: &checkpoints, called_off: &called_off };
            let result = save_now(&job, &config, team.as_deref(), &snapshot);
            (snapshot.into_buffers(), result)
        });
        self.running = Some(Running { step, thread });
        Ok(())
    }

    /// The report of a save that has ended since the last call.
    pub fn poll(&mut self) -> Option<SaveReport> {
        let ended = self.running.as_ref()?.thread.as_ref().map_or(true, JoinHandle::is_finished);
        if ended { self.wait() } else { None }
    }

    /// Waits for the save that runs; `None` where there is none.
    pub fn wait(&mut self) -> Option<SaveReport> {
        let Running { step, thread } = self.running.take()?;
        let result = match thread.map(JoinHandle::join) {
            Ok(Ok((buffers, result))) => {
                self.spare = Some(buffers);
                result
            }
            Ok(Err(panic)) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let reason = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_string();
                Err(CheckpointError::WriterLost { step, reason })
            }
            Err(e) => Err(CheckpointError::WriterLost { step, reason: e.to_string() }),
        };
        Some(SaveReport { step, result })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.wait();
    }
}

/// Compute threads wait for each other at every op, so the writer must not push one of them aside. Lower priority is a
/// courtesy: where it is refused the save is as good.
fn yield_to_training() {
    #[cfg(target_os = "linux")] // elsewhere it would slow the whole process
    let _ = rustix::process::nice(10);
}

/// Makes the directory of the checkpoints, and removes what killed saves left in it.
fn prepare(checkpoints: &Path) -> Result<(), CheckpointError> {
    std::fs::create_dir_all(checkpoints).map_err(CheckpointError::io("create", checkpoints))?;
    clean_stale(checkpoints)?;
    Ok(())
}

fn save_now(
    job: &Job<'_>,
    config: &CheckpointConfig,
    team: Option<&Mutex<Meetings>>,
    snapshot: &Snapshot,
) -> Result<Saved, CheckpointError> {
    let (start, step) = (Instant::now(), snapshot.meta.step);
    let mut team = match team.map(Mutex::lock).transpose() {
        Ok(team) => team,
        Err(_) => {
            // The connection may be in the middle of an answer to what the dead writer had asked.
            let reason = "an earlier writer died while it was talking to the other ranks".to_string();
            return Err(CheckpointError::WriterLost { step, reason });
        }
    };
    let leads = team.as_ref().is_none_or(|team| team.rank() == 0);
    let mut meeting = team.as_mut().map(|team| team.begin(step, job.called_off));
    let (path, bytes) = job.save(snapshot, meeting.as_mut())?;
    let (removed, not_removed) =
        if leads { retain(&**job.io, job.checkpoints, step, config) } else { Default::default() };
    Ok(Saved { path, bytes, duration: start.elapsed(), removed, not_removed })
}
