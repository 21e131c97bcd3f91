//! `kill -9` at each call by which a save changes the disk: what is left verifies, no more than one interval is lost, and the run goes on to
//! the same bits.
//!
//! strace attaches to a rank that is stopped between two saves, lets it go on, and kills it at the N-th call of a kind. It counts the calls
//! of each thread and of each kind for themselves, and every save is written by a thread of its own: so N = 1, 2, 3 … are the calls of one
//! save, until there are no more. With one checkpoint to keep, the removal of the one before belongs to the save.

mod common;

use common::processes::{is_stopped, is_traced, lives, send, threads, until_gone};
use common::ranks::{FOR_LONG, SHARDS, alone, is_saved, launch, train, uninterrupted};
use common::{Project, Running};
use ddpm_dist::checkpoint::{list, verify};
use rustix::process::{Pid, Signal};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What a save does to the disk: each under the names that some machine has for it.
const KINDS: [&str; 6] =
    ["?mkdir,?mkdirat", "write", "fsync", "?rename,?renameat,?renameat2", "?unlink,?unlinkat", "?rmdir"];

const PATIENCE: Duration = Duration::from_secs(60);

/// A rank of a run that is to be killed.
#[derive(Clone, Copy, Debug)]
struct Victim {
    ranks: usize,
    rank: usize,
}

/// What became of a run whose rank was to be killed at a call.
enum Outcome {
    /// Nobody made so many calls of that kind.
    Survived,
    /// It went on from the checkpoint before the save that was cut.
    WentBack,
    /// It went on from the save that was cut, or from what the other rank saved.
    WentOn,
}

#[test]
fn one_rank_is_killed_at_every_call_of_a_save() {
    let Some([back, on]) = at_every_call(Victim { ranks: 1, rank: 0 }) else { return };
    // The directory, two files written and flushed, the directory flushed and renamed; then the parent flushed, and the removal.
    assert!(back >= 7 && on >= 5, "{back} kills before the save was committed and {on} after it");
}

#[test]
fn the_first_of_two_ranks_is_killed_at_every_call_of_a_save() {
    let Some([back, on]) = at_every_call(Victim { ranks: 2, rank: 0 }) else { return };
    assert!(back >= 7 && on >= 6, "{back} kills before the save was committed and {on} after it");
}

/// Rank 0 has the whole state too, and saves it when it is left alone.
#[test]
fn the_second_of_two_ranks_is_killed_at_every_call_of_a_save() {
    let Some([back, on]) = at_every_call(Victim { ranks: 2, rank: 1 }) else { return };
    assert!(back + on >= 3, "{back} and {on} kills: its file written and flushed, the directory flushed");
}

/// Kills at each call of each kind; gives how often a run went back to the checkpoint before and how often not, if strace may be used.
fn at_every_call(victim: Victim) -> Option<[usize; 2]> {
    let (_alone, project) = (alone(), Project::new());
    if let Err(why) = may_trace() {
        common::not_tested(&format!("kills at every call of a save: {why}"));
        return None;
    }
    let mut times = [0; 2];
    for kind in KINDS {
        for n in 1.. {
            match killed_at(&project, victim, kind, n) {
                Outcome::Survived => break,
                Outcome::WentBack => times[0] += 1,
                Outcome::WentOn => times[1] += 1,
            }
        }
    }
    Some(times)
}

/// Whether strace is there and may attach to a process that it has not started.
fn may_trace() -> Result<(), String> {
    let mut sleeping = Command::new("sleep").arg("60").spawn().map_err(|error| format!("sleep: {error}"))?;
    let attached = attach(Pid::from_child(&sleeping), "write", 1).map(drop);
    let _ = sleeping.kill().and_then(|()| sleeping.wait());
    attached
}

/// Ends with its tracing.
struct Strace(std::process::Child);

impl Strace {
    /// Lets go of a process that goes on: threads that are stopped at a call go on too, which those of a killed strace need not.
    fn let_go(&mut self) {
        send(Pid::from_child(&self.0), Signal::INT);
        let start = Instant::now();
        // One that is killed just now may keep strace 6.1 for ever.
        while self.0.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets strace kill a process at the `n`-th call of a kind that one of its threads makes from now on.
fn attach(pid: Pid, kind: &str, n: usize) -> Result<Strace, String> {
    let (trace, inject) = (format!("trace={kind}"), format!("inject={kind}:signal=SIGKILL:when={n}"));
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
    command.args(["-p", &pid.as_raw_nonzero().to_string()]).stderr(std::process::Stdio::piped());
    let mut strace = Strace(command.spawn().map_err(|error| format!("strace cannot be run: {error}"))?);
    let start = Instant::now();
    while !is_traced(pid) {
        if let Some(status) = strace.0.try_wait().unwrap() {
            let said = std::io::read_to_string(strace.0.stderr.take().unwrap()).unwrap_or_default();
            return Err(format!("strace ended ({status}): {}", said.trim()));
        }
        assert!(start.elapsed() < PATIENCE, "strace does not attach to {pid:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(strace)
}

/// Trains until something is saved, kills the victim at a call of one of the next saves, and goes on.
fn killed_at(project: &Project, victim: Victim, kind: &str, n: usize) -> Outcome {
    let run_dir = &format!("run-{}-{n}", kind.trim_start_matches('?').split(',').next().unwrap());
    // The log is written too, by the thread that trains: where writes are counted, it has to be silent.
    let is_logged = kind != "write";
    let silent: &[&str] = if is_logged { &[] } else { &["--set", "log.every=1000000"] };
    let keep_one = ["--set", "checkpoint.keep=1"];
    let mut running = start(project, victim.ranks, run_dir, &[&FOR_LONG[..], &keep_one, silent].concat());
    running.until("a checkpoint", || is_saved(project, run_dir));
    let processes = if victim.ranks == 1 { vec![running.pid()] } else { running.ranks() };
    let checkpoints = project.path(run_dir).join("checkpoints");
    stop_between_saves(processes[victim.rank]);
    let before = newest(&checkpoints);
    let mut strace = attach(processes[victim.rank], kind, n).unwrap();
    send(processes[victim.rank], Signal::CONT);
    until_killed_or_saved_twice(processes[victim.rank], &checkpoints);
    if lives(processes[victim.rank]) {
        // The calls of a rank that leaves are none of the save's.
        strace.let_go();
        running.signal(Signal::TERM);
    }
    let (code, stderr) = running.wait();
    until_gone(&processes);
    drop(strace);
    if code == Some(75) {
        return Outcome::Survived;
    }
    let what = format!("{victim:?}, {kind} {n}");
    assert_eq!(code, if victim.ranks == 1 { None } else { Some(137) }, "{what}: {stderr}");
    let left = newest(&checkpoints);
    assert!(left >= before && is_one_of_the_last_two(left, &checkpoints), "{what}: step {left} is left: {stderr}");
    goes_on(project, victim.ranks, run_dir, left, is_logged, &what);
    if left == before { Outcome::WentBack } else { Outcome::WentOn }
}

/// Starts a run: without a launcher where it has one rank.
fn start(project: &Project, ranks: usize, run_dir: &str, more: &[&str]) -> Running {
    if ranks > 1 {
        return launch(project, ranks, run_dir, more);
    }
    let mut command = project.program();
    command.args(train(run_dir, &SHARDS)).args(more);
    project.start(run_dir, command)
}

/// Stops a process at a moment at which it writes no checkpoint.
fn stop_between_saves(pid: Pid) {
    let start = Instant::now();
    loop {
        send(pid, Signal::STOP);
        while !is_stopped(pid) {
            assert!(start.elapsed() < PATIENCE, "{pid:?} does not stop");
            std::thread::sleep(Duration::from_micros(200));
        }
        if !threads(pid).iter().any(|name| name == "checkpoint") {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{pid:?} saves and saves");
        send(pid, Signal::CONT);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Steps of the directories of checkpoints, whole or not.
fn begun(checkpoints: &Path) -> BTreeSet<u64> {
    let names = std::fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.map(|name| name["step-".len()..].split('.').next().unwrap().parse().unwrap()).collect()
}

/// The newest checkpoint that is committed, and it verifies.
fn newest(checkpoints: &Path) -> u64 {
    let (step, path) = list(checkpoints).unwrap().pop().unwrap();
    verify(&path).unwrap();
    step
}

/// Whether it is the save that was begun last or the one before that: not more than one interval is lost.
fn is_one_of_the_last_two(step: u64, checkpoints: &Path) -> bool {
    begun(checkpoints).into_iter().rev().take(2).any(|begun| begun == step)
}

/// Two checkpoints later, all calls of a save have been made.
fn until_killed_or_saved_twice(pid: Pid, checkpoints: &Path) {
    let (start, mut saved) = (Instant::now(), BTreeSet::new());
    while lives(pid) && saved.len() < 3 {
        assert!(start.elapsed() < PATIENCE, "{pid:?} neither dies nor saves");
        saved.extend(list(checkpoints).unwrap().last().map(|(step, _)| *step));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Resumes from step `from`, and comes to the same bits and the same log as a run that was not killed.
fn goes_on(project: &Project, ranks: usize, run_dir: &str, from: u64, is_logged: bool, what: &str) {
    let end = from + 10;
    let (code, stderr) = start(project, ranks, run_dir, &["--set", &format!("train.steps={end}")]).wait();
    assert_eq!(code, Some(0), "{what}: {stderr}");
    assert!(stderr.contains(&format!("resuming from {run_dir}/checkpoints/step-{from:08}")), "{what}: {stderr}");
    assert!(!stderr.contains("skipping"), "{what}: {stderr}");
    let straight = uninterrupted(project, end);
    assert!(project.state(run_dir, end) == project.state(&straight, end), "{what}: other bits");
    let mut expected = project.measured(&straight);
    expected.retain(|line| is_logged || line["step"].as_u64().unwrap() > from);
    assert_eq!(project.measured(run_dir), expected, "{what}");
    let left = std::fs::read_dir(project.path(run_dir).join("checkpoints")).unwrap();
    let mut names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.all(|name| !name.contains(".tmp-")), "{what}: a part of a save is left");
}
