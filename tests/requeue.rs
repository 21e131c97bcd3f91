//! `train --requeue`: which jobs of Slurm go into the queue again when their run has to leave. Slurm is a script here that notes what it is
//! asked; `.ci/launchers` does the same with the real one.

mod common;

use common::{Project, Running};
use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt;

/// A folder with a `scontrol` that notes what it is asked and then does `body`.
fn scontrol(project: &Project, body: &str) {
    std::fs::create_dir_all(project.path("bin")).unwrap();
    let script = project
        .write("bin/scontrol", format!("#!/bin/sh\necho \"$@\" >> '{}'\n{body}\n", project.path("asked").display()));
    std::fs::set_permissions(script, PermissionsExt::from_mode(0o755)).unwrap();
}

/// What it was asked.
fn asked(project: &Project) -> String {
    std::fs::read_to_string(project.path("asked")).unwrap_or_default()
}

/// A run for longer than anyone waits, as part of job 7, that has done a few steps.
fn started(project: &Project, more: &[&str]) -> Running {
    let mut command = project.program();
    command.args(["train", "config.toml", "--run-dir", "run", "--threads", "1", "--set", "train.steps=10000000"]);
    command.args(more).env("PATH", project.path("bin")).env("SLURM_JOB_ID", "7");
    let mut running = project.start("run", command);
    running.until("three steps", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 3);
    running
}

/// Ends a run by a signal; gives what it said and what Slurm was asked.
fn told(project: &Project, signal: Signal, more: &[&str]) -> (String, String) {
    let running = started(project, more);
    running.signal(signal);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    assert!(stderr.contains("state saved"), "{stderr}");
    (stderr, asked(project))
}

#[test]
fn the_signal_and_slurms_record_decide() {
    const SHOW: &str = "show job 7\n";
    for (signal, record, expected) in [
        (Signal::USR1, "PreemptTime=None", "requeue 7\n"),
        (Signal::USR2, "PreemptTime=None", "requeue 7\n"),
        (Signal::TERM, "PreemptTime=None", SHOW),
        (Signal::TERM, "PreemptTime=2026-11-22T11:40:31", "show job 7\nrequeue 7\n"),
        (Signal::INT, "PreemptTime=2026-11-22T11:40:31", ""),
    ] {
        let project = Project::new();
        scontrol(&project, &format!("echo 'JobId=7 {record} SuspendTime=None'"));
        let (stderr, asked) = told(&project, signal, &["--requeue"]);
        assert_eq!(asked, expected, "{signal:?}, {record}: {stderr}");
        assert_eq!(stderr.contains("job 7 is in the queue again"), expected.contains("requeue"), "{stderr}");
    }
}

#[test]
fn without_the_option_slurm_is_not_asked() {
    let project = Project::new();
    scontrol(&project, "");
    assert_eq!(told(&project, Signal::USR1, &[]).1, "");
}

#[test]
fn only_one_rank_asks() {
    let project = Project::new();
    scontrol(&project, "");
    let (stderr, asked) = told(&project, Signal::USR1, &["--requeue", "--ranks", "2"]);
    assert_eq!(asked, "requeue 7\n", "{stderr}");
}

#[test]
fn a_job_that_cannot_be_requeued_is_an_alarm() {
    for (body, words) in
        [(Some("echo 'Invalid user id' >&2; exit 1"), "Invalid user id"), (None, "cannot run `scontrol requeue 7`")]
    {
        let project = Project::new();
        std::fs::create_dir(project.path("bin")).unwrap();
        body.iter().for_each(|body| scontrol(&project, body));
        let (stderr, _) = told(&project, Signal::USR1, &["--requeue"]);
        assert!(stderr.contains("job 7 is NOT in the queue again") && stderr.contains(words), "{stderr}");
        assert!(stderr.contains("submit it once more"), "{stderr}");
    }
}

#[test]
fn a_run_that_ends_by_itself_asks_nothing() {
    let project = Project::new();
    scontrol(&project, "");
    let mut command = project.program();
    command.args(["train", "config.toml", "--run-dir", "run", "--threads", "1", "--requeue"]);
    command.env("PATH", project.path("bin")).env("SLURM_JOB_ID", "7");
    let (code, stderr) = project.start("run", command).wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(asked(&project), "");
}

/// `--max-time` is over before the work is: nobody has sent a signal.
#[test]
fn a_run_out_of_its_own_time_comes_back() {
    let project = Project::new();
    scontrol(&project, "");
    let (code, stderr) = started(&project, &["--requeue", "--max-time", "0:06"]).wait();
    assert_eq!(code, Some(75), "{stderr}");
    assert_eq!(asked(&project), "requeue 7\n", "{stderr}");
}
