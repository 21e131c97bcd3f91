//! Processes as the system sees them: who started whom, who lives, what one has been told to do.

use super::Running;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{read, read_dir, read_to_string};
use std::time::{Duration, Instant};

/// Longer than any process here needs to leave.
const LEAVING: Duration = Duration::from_secs(60);

fn read_about(pid: Pid, what: &str) -> String {
    read_to_string(format!("/proc/{}/{what}", pid.as_raw_nonzero())).unwrap_or_default()
}

/// Processes that one has started, by any of its threads, and that are not buried yet.
pub fn children(pid: Pid) -> Vec<Pid> {
    let tasks = read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> =
        lists.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    pids.into_iter().filter_map(Pid::from_raw).collect()
}

/// A variable of the environment that a process was started with.
pub fn variable(pid: Pid, name: &str) -> Option<String> {
    let environment = read(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok()?;
    let mut variables = environment.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    variables.find_map(|text| Some(text.strip_prefix(name)?.strip_prefix('=')?.to_string()))
}

/// The ranks that a launcher runs at present, with their numbers.
pub fn ranks_of(launcher: Pid) -> Vec<(usize, Pid)> {
    let number = |pid| variable(pid, "RANK")?.parse().ok();
    let mut ranks: Vec<_> = children(launcher).into_iter().filter_map(|pid| Some((number(pid)?, pid))).collect();
    ranks.sort_by_key(|(rank, _)| *rank);
    ranks
}

/// Whether a process is there and not merely unburied.
pub fn lives(pid: Pid) -> bool {
    read_about(pid, "stat").rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Waits until none of these processes lives; gives how long that took.
pub fn until_gone(pids: &[Pid]) -> Duration {
    let start = Instant::now();
    while pids.iter().any(|pid| lives(*pid)) {
        assert!(start.elapsed() < LEAVING, "{pids:?} live on");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

/// The names of a process's threads.
pub fn threads(pid: Pid) -> Vec<String> {
    let tasks = read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).into_iter().flatten().flatten();
    tasks.filter_map(|task| Some(read_to_string(task.path().join("comm")).ok()?.trim_end().to_string())).collect()
}

/// A line of the `status` of each thread of a process.
fn status(pid: Pid, key: &str) -> Vec<String> {
    let tasks = read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).into_iter().flatten().flatten();
    let texts = tasks.filter_map(|task| read_to_string(task.path().join("status")).ok());
    let value = |text: String| {
        text.lines().find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim().to_string()))
    };
    texts.filter_map(value).collect()
}

/// Whether a process has a handler for a signal.
pub fn catches(pid: Pid, signal: Signal) -> bool {
    let masks = status(pid, "SigCgt");
    let mask = masks.first().and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    mask >> (signal.as_raw() - 1) & 1 == 1
}

/// Whether all threads of a process are stopped, by a signal or by who traces it.
pub fn is_stopped(pid: Pid) -> bool {
    status(pid, "State").iter().all(|state| state.starts_with(['T', 't']))
}

/// Whether all threads of a process are traced by another.
pub fn is_traced(pid: Pid) -> bool {
    let tracers = status(pid, "TracerPid");
    !tracers.is_empty() && tracers.iter().all(|tracer| tracer != "0")
}

/// Sends a signal to a process that is there.
pub fn send(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap_or_else(|error| panic!("{signal:?} to {pid:?}: {error}"));
}

impl Running {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// The ranks that this launcher runs at present, by their numbers from 0.
    pub fn ranks(&self) -> Vec<Pid> {
        let ranks = ranks_of(self.pid());
        assert!(ranks.iter().enumerate().all(|(i, (rank, _))| i == *rank), "{ranks:?}");
        ranks.into_iter().map(|(_, pid)| pid).collect()
    }
}
