//! Runs of many ranks: under our launcher, or each rank started by hand.

use super::{Project, Running};
use ddpm_dist::rendezvous::store::Server;
use rustix::process::Signal;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test of a file at a time: each is several busy processes.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shards that 1, 2 and 4 ranks divide, so that all of these runs have one trajectory; checkpoints every five steps.
pub const SHARDS: [&str; 2] = ["--set", "train.shards=4"];

/// More steps than anyone waits for.
pub const FOR_LONG: [&str; 2] = ["--set", "train.steps=10000000"];

/// The launcher with `ranks` ranks that train in `run_dir`.
pub fn launcher(project: &Project, ranks: usize, run_dir: &str, more: &[&str]) -> Command {
    let mut command = project.program();
    command.args(["--ranks", &ranks.to_string()]).args(train(run_dir, &SHARDS)).args(more);
    command
}

/// Starts it.
pub fn launch(project: &Project, ranks: usize, run_dir: &str, more: &[&str]) -> Running {
    project.start(run_dir, launcher(project, ranks, run_dir, more))
}

/// The same training by one process that nothing happens to; gives its run directory.
pub fn uninterrupted(project: &Project, steps: u64) -> String {
    let run_dir = format!("straight-{steps}");
    if !project.path(&run_dir).exists() {
        project.trained(&run_dir, &[&SHARDS[..], &["--set", &format!("train.steps={steps}")]].concat());
    }
    run_dir
}

/// Lets a run of [`launch`] that was started [`FOR_LONG`] do some more steps, tells it to leave, and compares all of it, weights and log, with
/// a run that nothing happened to. Gives its last step and what it said.
pub fn same_as_uninterrupted(project: &Project, mut launcher: Running, run_dir: &str) -> (u64, String) {
    let lines = project.log_lines(run_dir);
    launcher.until("more steps", || project.log_lines(run_dir) > lines + 10);
    launcher.signal(Signal::TERM);
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let step = *project.checkpoints(run_dir).last().unwrap();
    let straight = uninterrupted(project, step);
    assert!(project.state(run_dir, step) == project.state(&straight, step), "other bits at step {step}");
    assert_eq!(project.measured(run_dir), project.measured(&straight));
    (step, stderr)
}

/// Whether a run has a checkpoint.
pub fn is_saved(project: &Project, run_dir: &str) -> bool {
    project.path(run_dir).is_dir() && !project.checkpoints(run_dir).is_empty()
}

/// A store as a launcher serves it, on a free port.
pub fn store() -> Server {
    Server::listen(([127, 0, 0, 1], 0).into()).unwrap()
}

/// The environment of a rank that no launcher of ours has started, all of them on this machine: rank 0 serves the store at `host:port`.
pub fn rank_of<'a>(command: &'a mut Command, [rank, size]: [usize; 2], host: &str, port: u16) -> &'a mut Command {
    let [rank, size] = [rank, size].map(|n| n.to_string());
    command.env("RANK", &rank).env("WORLD_SIZE", &size).env("LOCAL_RANK", &rank).env("LOCAL_WORLD_SIZE", &size);
    command.env("MASTER_ADDR", host).env("MASTER_PORT", port.to_string())
}

/// As [`rank_of`], with the mark of a launcher, which serves the store.
pub fn rank_of_launcher<'a>(command: &'a mut Command, place: [usize; 2], store: &Server) -> &'a mut Command {
    rank_of(command, place, "127.0.0.1", store.address().port()).env("DDPM_DIST_RUN_ID", "test")
}

/// Starts these ranks of `size` by hand, each with the arguments that `prepare(rank, command)` adds; this test serves their store, as a launcher does.
pub fn start_some(
    project: &Project,
    store: &Server,
    ranks: &[usize],
    size: usize,
    prepare: impl Fn(usize, &mut Command) -> &mut Command,
) -> Vec<Running> {
    let start = |(i, &rank): (usize, &usize)| {
        let mut command = project.program();
        prepare(rank, &mut command);
        rank_of_launcher(&mut command, [rank, size], store);
        project.start(&format!("process-{i}"), command)
    };
    ranks.iter().enumerate().map(start).collect()
}

/// Starts all ranks of `size`.
pub fn start(
    project: &Project,
    store: &Server,
    size: usize,
    prepare: impl Fn(usize, &mut Command) -> &mut Command,
) -> Vec<Running> {
    start_some(project, store, &(0..size).collect::<Vec<_>>(), size, prepare)
}

/// Arguments of a rank that trains.
pub fn train<'a>(run_dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "config.toml", "--run-dir", run_dir, "--threads", "1"], more].concat()
}
