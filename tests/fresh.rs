//! `--fresh` begins anew once: whoever starts the same command again, after a failure or from the queue, goes on with what it has begun.

mod common;

use common::{Project, Running};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

const FRESH: [&str; 2] = ["--fresh", "--overwrite"];

fn launch(project: &Project, more: &[&str]) -> Running {
    let mut command = project.program();
    command.args(["--ranks", "2", "--max-restarts", "1", "train", "config.toml", "--run-dir", "run", "--threads", "1"]);
    command.args(["--set", "train.shards=4"]).args(more);
    project.start("run", command)
}

/// The ranks of a launcher.
fn ranks_of(launcher: &Running) -> Vec<Pid> {
    let pid = launcher.child.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect()
}

#[test]
fn a_restart_goes_on_with_what_the_fresh_start_has_begun() {
    let project = Project::new();
    project.trained("straight", &["--set", "train.steps=200", "--set", "train.shards=4"]);
    project.trained("run", &["--set", "train.steps=400", "--set", "checkpoint.every=100"]);
    let (code, stderr) = launch(&project, &["--fresh"]).wait();
    assert_eq!(code, Some(4), "{stderr}");
    assert!(stderr.contains("already holds a run"), "{stderr}");

    let mut launcher = launch(&project, &[&["--set", "train.steps=200"], &FRESH[..]].concat());
    // The earlier run has no checkpoint of such a step.
    launcher.until("a checkpoint of its own", || {
        let steps = project.path("run/checkpoints").is_dir().then(|| project.checkpoints("run"));
        steps.is_some_and(|steps| steps.iter().any(|step| step % 100 != 0))
    });
    kill_process(ranks_of(&launcher)[1], Signal::KILL).unwrap();
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stderr.matches("resuming from").count(), 1, "{stderr}");
    assert_eq!(project.hashes("run", 200).len(), 2);
    assert_eq!(project.measured("run"), project.measured("straight"), "no step of the earlier run is left");
    // Another launch begins anew again.
    let (code, stderr) = launch(&project, &[&["--set", "train.steps=5"], &FRESH[..]].concat()).wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(!stderr.contains("resuming from"), "{stderr}");
    assert_eq!(project.checkpoints("run"), [5]);
}

/// As Slurm starts a job that it has put into the queue again.
#[test]
fn a_job_that_comes_back_from_the_queue_goes_on() {
    let project = Project::new();
    let life = |number: &str, job: &str, steps: &str| {
        let mut command = project.program();
        command.args(["train", "config.toml", "--run-dir", "run", "--set", steps]).args(FRESH);
        command.env("SLURM_JOB_ID", job).env("SLURM_RESTART_COUNT", number);
        let (code, stderr) = project.start("life", command).wait();
        assert_eq!(code, Some(0), "{stderr}");
        stderr.contains("resuming from")
    };
    assert!(!life("0", "7", "train.steps=5"));
    assert!(life("1", "7", "train.steps=10"));
    assert_eq!(project.checkpoints("run"), [5, 10]);
    // This job's first life has ended before it came to begin anew.
    assert!(!life("1", "8", "train.steps=5"));
    assert!(!life("0", "8", "train.steps=5"));
}

/// The lock of a machine that went down stays until the file system's lease ends.
#[test]
fn the_lock_of_another_machine_is_waited_for() {
    let project = Project::new();
    project.trained("run", &["--set", "train.steps=5"]);
    let lock = std::fs::OpenOptions::new().read(true).write(true).open(project.path("run/run.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    project.write("run/run.lock", r#"{"host":"gone","pid":7,"since":"2026-01-31T12:34:56Z"}"#);
    let arguments = ["train", "config.toml", "--run-dir", "run", "--set", "train.steps=10"];
    let begin = || {
        let mut command = project.program();
        command.args(arguments);
        project.start("waiting", command)
    };
    let waits = || {
        let said = std::fs::read_to_string(project.path("waiting.stderr")).unwrap();
        said.contains("in use by process 7 on gone since 2026-01-31T12:34:56Z") && said.contains("waiting")
    };
    let mut told = begin();
    told.until("it waits", waits);
    told.signal(Signal::TERM);
    let (code, stderr) = told.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let mut waiting = begin();
    waiting.until("it waits", waits);
    drop(lock);
    let (code, stderr) = waiting.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(project.checkpoints("run"), [5, 10]);
}
