//! One rank as a process of this node.

use super::ends::{Asked, How, Place, RankEnd};
use super::error_file::{self, ERROR_FILE};
use super::voice::{Target, Voice};
use super::winding::Act;
use super::{Command, parent};
use crate::files::unique_id;
use crate::machine::since_1970;
use crate::rendezvous::{OWN_ATTEMPT, OWN_RUN_ID, OWN_STARTED};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// The variable that tells a rank which of the node's places it has. It differs from `LOCAL_RANK` once places were given up.
pub const SLOT: &str = "DDPM_DIST_SLOT";
/// How long the last output of an ended rank may take to arrive; only a process that it left behind can hold it up.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What all ranks of an attempt have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Attempt {
    /// How often the ranks were started before.
    pub number: u32,
    /// A name for the run.
    pub run_id: String,
    /// Rank r runs at place r.
    pub places: Vec<Place>,
    /// Where the store is.
    pub host: String,
    pub port: u16,
}

/// Where ranks leave files: `attempt-0/rank-00003/`.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Logs are kept, and so is everything.
    is_log: bool,
}

impl Folder {
    /// The folder a user has asked for, or a private one that vanishes.
    pub(super) fn create(log_dir: Option<&Path>) -> Result<Folder, (PathBuf, io::Error)> {
        let path = match log_dir {
            Some(dir) => dir.to_path_buf(),
            None => std::env::temp_dir().join(format!("ddpm-dist-{}", unique_id())),
        };
        let is_log = log_dir.is_some();
        let made = match is_log {
            true => fs::create_dir_all(&path),
            false => DirBuilder::new().mode(0o700).create(&path),
        };
        made.map_err(|error| (path.clone(), error))?;
        Ok(Folder { path, is_log })
    }

    fn of_rank(&self, attempt: u32, rank: usize) -> io::Result<PathBuf> {
        let path = self.path.join(format!("attempt-{attempt}")).join(format!("rank-{rank:05}"));
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.is_log {
            // What cannot be removed from the temporary folder is small.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A rank that runs. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Rank {
    rank: usize,
    place: Place,
    host: String,
    child: Child,
    is_reaped: bool,
    asked: Asked,
    /// Whether it has been sent SIGKILL.
    is_killed: bool,
    error_file: PathBuf,
    output: Vec<Receiver<()>>,
}

/// What a node adds to an attempt.
pub(super) struct Site<'a> {
    pub node: usize,
    /// The node's name.
    pub host: &'a str,
    pub command: &'a Command,
    pub folder: &'a Folder,
    pub voice: &'a Voice,
    /// When the launcher began, in seconds since 1970.
    pub started: u64,
}

impl Site<'_> {
    /// Starts the ranks of this node. Those that cannot be started have ended.
    pub(super) fn start(&self, attempt: &Attempt) -> (Vec<Rank>, Vec<RankEnd>) {
        let here = || attempt.places.iter().enumerate().filter(|(_, place)| place.node == self.node);
        let local_size = here().count();
        let (mut ranks, mut ends) = (Vec::new(), Vec::new());
        for (local_rank, (rank, place)) in here().enumerate() {
            match self.start_one(attempt, rank, *place, [local_rank, local_size]) {
                Ok(started) => ranks.push(started),
                Err(error) => {
                    let how = How::NotStarted(error.to_string());
                    let host = self.host.to_string();
                    ends.push(RankEnd { rank, place: *place, host, how, asked: Asked::No, at: now(), message: None });
                    break;
                }
            }
        }
        (ranks, ends)
    }

    fn start_one(
        &self,
        attempt: &Attempt,
        rank: usize,
        place: Place,
        [local_rank, local_size]: [usize; 2],
    ) -> io::Result<Rank> {
        let dir = self.folder.of_rank(attempt.number, rank)?;
        let error_file = dir.join("error.json");
        // One of an earlier run would pass for this one's.
        match fs::remove_file(&error_file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let log = |name: &str| -> io::Result<Option<File>> {
            let open = |path| OpenOptions::new().create(true).append(true).open(path);
            self.folder.is_log.then(|| open(dir.join(name))).transpose()
        };
        let (stdout_log, stderr_log) = (log("stdout.log")?, log("stderr.log")?);
        // Rank 0 has the terminal to itself, for its progress bar. With logs it has a pipe: the bar then is plain lines.
        let is_direct = rank == 0 && self.voice.is_own() && !self.folder.is_log;
        let stdio = || if is_direct { Stdio::inherit() } else { Stdio::piped() };
        let mut command = std::process::Command::new(&self.command.program);
        command.args(&self.command.arguments);
        command.stdin(Stdio::null()).stdout(stdio()).stderr(stdio());
        // A group of its own: Ctrl-C reaches the ranks once, by way of the launcher, and a rank ends together with what it started.
        command.process_group(0);
        for (name, value) in [
            (OWN_RUN_ID, attempt.run_id.clone()),
            (OWN_ATTEMPT, attempt.number.to_string()),
            (OWN_STARTED, self.started.to_string()),
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", attempt.places.len().to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", local_size.to_string()),
            (SLOT, place.slot.to_string()),
            ("MASTER_ADDR", attempt.host.clone()),
            ("MASTER_PORT", attempt.port.to_string()),
            (parent::LAUNCHER_PID, std::process::id().to_string()),
        ] {
            command.env(name, value);
        }
        command.env(ERROR_FILE, std::path::absolute(&error_file)?);
        let mut child = command.spawn()?;
        let pipes = (child.stdout.take(), child.stderr.take());
        let (asked, host) = (Asked::No, self.host.to_string());
        let (is_reaped, is_killed, output) = (false, false, Vec::new());
        let mut started = Rank { rank, place, host, child, is_reaped, asked, is_killed, error_file, output };
        let [to_stdout, to_stderr] = match rank {
            0 => [Target::Stdout, Target::Stderr],
            // Alarms must be seen; results are those of rank 0.
            _ => [(); 2].map(|()| Target::Prefixed(format!("[rank {rank}] "))),
        };
        if let Some(pipe) = pipes.0 {
            started.output.push(self.voice.pass_on(pipe, to_stdout, stdout_log)?);
        }
        if let Some(pipe) = pipes.1 {
            started.output.push(self.voice.pass_on(pipe, to_stderr, stderr_log)?);
        }
        Ok(started)
    }
}

impl Rank {
    /// How it ended, if it did.
    pub(super) fn poll(&mut self) -> Option<RankEnd> {
        // Looks, and leaves the process as it is: until it is reaped, its number is that of its group and of no other process.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match waitid(WaitId::Pid(self.group()), look) {
            Ok(None) => return None,
            Err(rustix::io::Errno::INTR) => return None,
            Ok(Some(_)) | Err(_) => {}
        }
        let at = now();
        self.signal_group(Signal::KILL);
        let status = match self.child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => How::Exit(code),
                (None, signal) => How::Signal(signal.unwrap_or(0)),
            },
            Err(error) => How::NotStarted(format!("the system does not tell how it ended: {error}")),
        };
        self.is_reaped = true;
        let deadline = Instant::now() + LAST_WORDS;
        for end in &self.output {
            // Nothing is ever sent: the thread's end is what ends this.
            let _ = end.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let message = (status != How::Exit(0)).then(|| error_file::read(&self.error_file)).flatten();
        let (rank, place) = (self.rank, self.place);
        // Who is to leave and falls, or is killed by someone else, has not left. Those whom a failure leaves over may fall because of it.
        let asked = match (self.asked, &status) {
            (Asked::ToLeave, How::Signal(signal)) if !self.may_end_by(*signal) => Asked::No,
            (asked, _) => asked,
        };
        Some(RankEnd { rank, place, host: self.host.clone(), how: status, asked, at, message })
    }

    /// Tells it, and whatever it started, to end.
    pub(super) fn act(&mut self, act: Act) {
        match act {
            Act::Ask(signal, asked) => {
                self.asked = asked;
                self.signal_group(Signal::from_named_raw(signal).unwrap_or(Signal::TERM));
                // A rank that was stopped hears it, too.
                self.signal_group(Signal::CONT);
            }
            Act::Kill(asked) => {
                self.asked = asked;
                self.is_killed = true;
                self.signal_group(Signal::KILL);
            }
        }
    }

    /// Whether a rank that is told to end may end by this signal: it need not know what to do with the one that tells it.
    fn may_end_by(&self, signal: i32) -> bool {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2};
        match signal {
            SIGKILL => self.is_killed,
            signal => [SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2].contains(&signal),
        }
    }

    fn group(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal_group(&self, signal: Signal) {
        // It fails only if nobody is there any more.
        let _ = kill_process_group(self.group(), signal);
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if !self.is_reaped {
            self.signal_group(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    since_1970().as_secs_f64()
}
