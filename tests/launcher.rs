//! `ddpm-dist --ranks N`: the program as its own launcher.

mod common;

use common::processes::{catches, children, lives, until_gone};
use common::ranks::{FOR_LONG, train};
use common::{Project, Running};
use ddpm_dist::rendezvous::store::Client;
use rustix::process::{Pid, Signal};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// A command that works for longer than anyone waits, on any number of ranks.
const WORKS: [&str; 4] = ["bench", "config.toml", "--steps", "100000000"];

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_signal_to_a_command_without_state_reaches_all_ranks_and_is_no_failure() {
    for (signal, expected) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let project = Project::new();
        let mut command = project.program();
        command.args(["--ranks", "2", "--threads", "1", "--max-restarts", "3"]).args(WORKS);
        let mut launcher = project.start("run", command);
        let pid = launcher.pid();
        let ready = || children(pid).into_iter().filter(|rank| catches(*rank, signal)).count() == 2;
        launcher.until("two ranks that catch signals", ready);
        let ranks = launcher.ranks();
        launcher.signal(signal);
        let (code, stderr) = launcher.wait();
        assert_eq!(code, Some(expected), "{stderr}");
        assert!(!stderr.contains("starting again"), "{stderr}");
        assert!(!ranks.into_iter().any(lives));
    }
}

#[test]
fn one_rank_trains_and_a_signal_saves_its_state() {
    let project = Project::new();
    let mut command = project.program();
    command.args(["train", "config.toml", "--run-dir", "run", "--set", "train.steps=10000000", "--ranks", "1"]);
    let mut running = project.start("run", command);
    project.until_steps(&mut running, "run", 10);
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

/// Starts the launcher of one of `nodes` machines, which trains with one rank.
fn start_node(project: &Project, nodes: usize, node: usize, port: u16) -> Running {
    let mut command = project.program();
    let [count, number] = [nodes, node].map(|n| n.to_string());
    command.args(["--ranks", "1", "--nnodes", &count, "--node-rank", &number, "--rdzv", &format!("127.0.0.1:{port}")]);
    command.args(train("run", &FOR_LONG)).args(["--set", "train.batch=12"]);
    // A launcher that is killed leaves its private folder behind.
    command.env("TMPDIR", project.path(""));
    project.start(&format!("node-{node}"), command)
}

/// Waits until a node has come to the meeting place of node 0.
fn until_joined(lead: &mut Running, port: u16, node: usize) {
    let mut store = Client::connect("127.0.0.1", port, "launcher/", PATIENCE).unwrap();
    lead.until(&format!("node {node}"), || store.has(&format!("node/{node}")).unwrap());
}

#[test]
fn two_machines_and_one_that_dies() {
    let (project, port) = (Project::new(), free_port());
    let [mut lead, other] = [0, 1].map(|node| start_node(&project, 2, node, port));
    project.until_steps(&mut lead, "run", 3);
    let [rank]: [Pid; 1] = children(other.pid()).try_into().unwrap();
    other.signal(Signal::KILL);
    let needed = until_gone(&[rank]);
    assert!(needed < Duration::from_secs(2), "its rank outlives it by {needed:?}");
    let (code, stderr) = lead.wait();
    assert_eq!(code, Some(6), "{stderr}");
    assert!(stderr.contains("node 1 (") && stderr.contains("is gone"), "{stderr}");
}

#[test]
fn machines_that_wait_for_another_leave_when_node_0_is_told() {
    let (project, port) = (Project::new(), free_port());
    let [mut lead, other] = [0, 1].map(|node| start_node(&project, 3, node, port));
    until_joined(&mut lead, port, 1);
    lead.signal(Signal::TERM);
    for node in [lead, other] {
        let (code, stderr) = node.wait();
        assert_eq!(code, Some(143), "{stderr}");
        assert!(stderr.contains("stopped by signal 15"), "{stderr}");
    }
    assert!(!project.path("run").exists());
}

/// Machine 1 has come and stands still, so that its rank is waited for.
#[test]
fn ranks_of_several_machines_leave_when_one_launcher_is_told_before_all_have_come() {
    let (project, port) = (Project::new(), free_port());
    let [mut lead, still] = [0, 1].map(|node| start_node(&project, 3, node, port));
    until_joined(&mut lead, port, 1);
    still.signal(Signal::STOP);
    let other = start_node(&project, 3, 2, port);
    let pids = [lead.pid(), other.pid()];
    let ready = || pids.map(children).iter().all(|ranks| ranks.len() == 1 && catches(ranks[0], Signal::TERM));
    lead.until("two ranks that catch signals", ready);
    let ranks: Vec<Pid> = pids.into_iter().flat_map(children).collect();
    lead.signal(Signal::TERM);
    let needed = until_gone(&ranks);
    assert!(needed < Duration::from_secs(5), "they leave after {needed:?}");
    still.signal(Signal::KILL);
    for node in [lead, other] {
        let (code, stderr) = node.wait();
        assert_eq!(code, Some(75), "{stderr}");
        assert!(stderr.contains("stopped before all ranks had come"), "{stderr}");
    }
    assert!(!project.path("run").exists());
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
        (&["--gpus", "2"][..], 7, &["there is no CUDA driver here"][..]),
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
