//! Saving in the background.

use super::config::CheckpointConfig;
use super::error::CheckpointError;
use super::io::{Disk, Io};
use super::newest::{clean_stale, retain};
use super::snapshot::{Buffers, Snapshot};
use super::write::write_snapshot;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Writes snapshots on a thread of its own, one at a time, while training goes on.
///
/// A loop calls [`buffers`](Saver::buffers), copies its state into them, calls [`save`](Saver::save), and asks
/// [`poll`](Saver::poll) once a step. A save that fails (disk full, read-only) comes back as the error in a [`SaveReport`]: an
/// alarm to show, not a reason to stop; its temporary directory is gone and the checkpoints before it are untouched.
/// At most one save runs: the caller that is due for the next one may [`wait`](Saver::wait) or skip it. Dropping the saver
/// waits for the save that runs.
pub struct Saver {
    io: Arc<dyn Io>,
    checkpoints: PathBuf,
    config: CheckpointConfig,
    running: Option<Running>,
    spare: Option<Buffers>,
}

struct Running {
    step: u64,
    /// An error where the system would not start the thread.
    thread: std::io::Result<JoinHandle<(Buffers, Result<Saved, CheckpointError>)>>,
}

/// What became of a save.
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
    /// Bytes of its shards.
    pub bytes: u64,
    /// How long the writer took.
    pub duration: Duration,
    /// Older checkpoints that were removed for it.
    pub removed: Vec<PathBuf>,
    /// Older checkpoints that should have been removed, and why they are still there.
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
    /// Makes the directory of the checkpoints and removes what killed saves left in it. The caller holds the run's lock.
    pub fn new(checkpoints: &Path, config: &CheckpointConfig) -> Result<Saver, CheckpointError> {
        std::fs::create_dir_all(checkpoints).map_err(CheckpointError::io("create", checkpoints))?;
        clean_stale(checkpoints)?;
        Ok(Saver::with_io(Arc::new(Disk), checkpoints, config))
    }

    pub(super) fn with_io(io: Arc<dyn Io>, checkpoints: &Path, config: &CheckpointConfig) -> Saver {
        Saver { io, checkpoints: checkpoints.to_path_buf(), config: config.clone(), running: None, spare: None }
    }

    /// Four buffers of `elements` values to copy the state into: those of the last save that was reported, or new ones. Their
    /// content is unspecified.
    pub fn buffers(&mut self, elements: usize) -> Buffers {
        match self.spare.take() {
            Some(spare) if spare.params.len() == elements => spare,
            _ => Buffers::zeroed(elements),
        }
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
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            yield_to_training();
            let result = save_now(&io, &checkpoints, &config, &snapshot);
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

fn save_now(
    io: &Arc<dyn Io>,
    checkpoints: &Path,
    config: &CheckpointConfig,
    snapshot: &Snapshot,
) -> Result<Saved, CheckpointError> {
    let start = Instant::now();
    let (path, bytes) = write_snapshot(io, checkpoints, snapshot)?;
    let (removed, not_removed) = retain(&**io, checkpoints, snapshot.meta.step, config);
    Ok(Saved { path, bytes, duration: start.elapsed(), removed, not_removed })
}
