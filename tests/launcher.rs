//! `ddpm-dist --ranks N`: the program as its own launcher.

mod common;

use common::{Project, Running};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::time::{Duration, Instant};

/// A command that works for longer than anyone waits, on any number of ranks.
const WORKS: [&str; 4] = ["bench", "config.toml", "--steps", "100000000"];

fn until(what: &str, patience: Duration, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < patience, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Processes that a process has started.
fn children(pid: u32) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(String::from).collect::<Vec<_>>())
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect()
}

/// Whether a rank has come so far that it works: it has threads.
fn is_at_work(pid: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    tasks.is_ok_and(|tasks| tasks.count() > 1)
}

/// A launcher with `ranks` ranks at work.
fn launcher(project: &Project, name: &str, ranks: usize, more: &[&str]) -> (Running, Vec<Pid>) {
    let mut command = project.program();
    // A launcher that is killed leaves its private folder behind.
    command.env("TMPDIR", project.path(""));
    command.args(["--ranks", &ranks.to_string(), "--threads", "2"]).args(more).args(WORKS);
    let mut running = project.start(name, command);
    let pid = running.child.id();
    running.until("ranks at work", || {
        let ranks_at_work = children(pid).into_iter().filter(|child| is_at_work(*child)).count();
        ranks_at_work == ranks
    });
    (running, children(pid))
}

fn is_gone(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_err() || stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank_behind() {
    let project = Project::new();
    let (mut running, ranks) = launcher(&project, "run", 2, &[]);
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    until("the end of all ranks", Duration::from_secs(2), || ranks.iter().all(|rank| is_gone(*rank)));
}

#[test]
fn a_rank_that_is_killed_is_the_first_cause_and_takes_all_along() {
    let project = Project::new();
    let (running, ranks) = launcher(&project, "run", 2, &[]);
    kill_process(ranks[1], Signal::KILL).unwrap();
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(137), "{stderr}");
    assert!(stderr.contains("rank 1 (node 0, ") && stderr.contains("SIGKILL"), "{stderr}");
    assert!(ranks.iter().all(|rank| is_gone(*rank)));
}

#[test]
fn a_signal_reaches_all_ranks_and_is_no_failure() {
    for (signal, expected) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let project = Project::new();
        let (running, ranks) = launcher(&project, "run", 2, &["--max-restarts", "3"]);
        running.signal(signal);
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(expected), "{stderr}");
        assert!(!stderr.contains("starting again"), "{stderr}");
        assert!(ranks.iter().all(|rank| is_gone(*rank)));
    }
}

#[test]
fn one_rank_trains_and_a_signal_saves_its_state() {
    let project = Project::new();
    let mut command = project.program();
    command.args(["train", "config.toml", "--run-dir", "run", "--set", "train.steps=10000000", "--ranks", "1"]);
    let mut running = project.start("run", command);
    running.until("ten steps", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 10);
    running.signal(Signal::TERM);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    assert!(stderr.contains("stopped at step"), "{stderr}");
    assert!(!project.checkpoints("run").is_empty());
}

#[test]
fn what_a_rank_says_of_its_failure_is_the_last_word() {
    let project = Project::new();
    // A config that is wrong is refused before any rank starts, once.
    project.run(&["--ranks", "2", "bench", "nothing.toml"]).refused(2, &["nothing.toml"]);
    let ranks = ["--ranks", "2", "--max-restarts", "3", "--log-dir", "logs"];
    let ended = project.run(&[&ranks[..], &["sample", "nothing", "--out", "x.png"]].concat());
    assert_eq!(ended.code, 4, "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap_or_default();
    for words in ["ddpm-dist: rank ", "exit code 4", "nothing", "the same would come again"] {
        assert!(last.contains(words), "{}", ended.stderr);
    }
    let json: serde_json::Value =
        serde_json::from_slice(&project.read("logs/attempt-0/rank-00001/error.json")).unwrap();
    assert!(json["message"]["message"].as_str().unwrap().contains("nothing"), "{json}");
    assert_eq!(json["message"]["extraInfo"]["rank"], "1");
    assert!(!project.path("logs/attempt-1").exists());
    // A launcher inside another, as torchrun, says it on.
    let mut command = project.program();
    command
        .args(["--ranks", "1", "sample", "nothing", "--out", "x.png"])
        .env("TORCHELASTIC_ERROR_FILE", project.path("outer.json"));
    assert_eq!(command.status().unwrap().code(), Some(4));
    let outer = String::from_utf8(project.read("outer.json")).unwrap();
    assert!(outer.contains("rank 0") && outer.contains("nothing"), "{outer}");
}

#[test]
fn only_rank_0_has_results() {
    let project = Project::new();
    let ended = project.done(&["--ranks", "2", "bench", "config.toml", "--steps", "1", "--warmup", "0"]);
    assert_eq!(ended.stdout.matches("images").count(), 1, "{}", ended.stdout);
    assert!(!ended.stdout.contains("[rank"), "{}", ended.stdout);
}

#[test]
fn two_machines_and_one_that_dies() {
    let project = Project::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let meet = format!("127.0.0.1:{port}");
    let node = |node: &str| {
        let mut command = project.program();
        command
            .env("TMPDIR", project.path(""))
            .args(["--ranks", "1", "--nnodes", "2", "--node-rank", node, "--rdzv", &meet, "--threads", "2"])
            .args(WORKS);
        project.start(&format!("node{node}"), command)
    };
    let (mut lead, mut other) = (node("0"), node("1"));
    let pids = [lead.child.id(), other.child.id()];
    let at_work = || pids.iter().all(|pid| children(*pid).iter().any(|child| is_at_work(*child)));
    lead.until("ranks at work on both", at_work);
    let rank = children(pids[1])[0];
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    until("the end of its rank", Duration::from_secs(2), || is_gone(rank));
    let (code, stderr) = lead.wait();
    assert_eq!(code, Some(6), "{stderr}");
    assert!(stderr.contains("node 1 (") && stderr.contains("is gone"), "{stderr}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let project = Project::new();
    for command in [&["doctor"][..], &["export", "run", "out"]] {
        project.run(&[command, &["--ranks", "2"]].concat()).refused(2, &[command[0], "one process", "--ranks"]);
    }
    let train = ["train", "config.toml", "--run-dir", "run"];
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    for (options, code, words) in [
        (&["--gpus", "2"][..], 7, &["no GPU device in this build", "--ranks"][..]),
        (&["--ranks", "2", "--gpus", "2"], 2, &["exclude each other"]),
        (&["--max-restarts", "2"], 2, &["--max-restarts needs --ranks"]),
        (&["--ranks", "2", "--nnodes", "2"], 2, &["--node-rank"]),
        (&["--ranks", "2", "--min-ranks", "3"], 2, &["--min-ranks 3", "2 ranks"]),
        (&["--ranks", "2", "--rdzv", &place], 8, &["is in use", "--rdzv", place.rsplit(':').next().unwrap()]),
    ] {
        project.run(&[&train[..], options].concat()).refused(code, words);
        assert!(!project.path("run").exists(), "{options:?}");
    }
    // Nobody at the meeting place, from node 1.
    drop(taken);
    let absent = ["--ranks", "1", "--nnodes", "2", "--node-rank", "1", "--rdzv", &place, "--rdzv-timeout", "1"];
    project.run(&[&train[..], &absent].concat()).refused(8, &["node 0 cannot be reached", &place, "1 s"]);
}

#[test]
fn a_rank_of_another_launcher_does_not_start_ranks() {
    let project = Project::new();
    let srun = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
        ("SLURM_STEP_NODELIST", "n"),
    ];
    let mut command = project.program();
    command.args(["--ranks", "4", "train", "config.toml"]).envs(srun);
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("rank 1 of 2 that srun started") && stderr.contains("--ranks 4"), "{stderr}");
}

#[test]
fn a_rank_whose_launcher_is_gone_does_not_begin() {
    let project = Project::new();
    let mut command = project.program();
    // Process 1 did not start this one.
    command.args(WORKS).env("DDPM_DIST_RUN_ID", "x").env("DDPM_DIST_LAUNCHER_PID", "1");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{output:?}");
}
