//! `--interface`: on which network several machines listen. Here two "machines" are one, and networks are addresses of its loopback.

mod common;

use common::{Project, Running};
use std::collections::BTreeSet;
use std::fs::{read_dir, read_link, read_to_string};
use std::net::TcpListener;

const HERE: &str = "127.0.0.2";

/// A port of that network that is free.
fn free_port() -> u16 {
    TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap().port()
}

/// A process and those that it started.
fn family(pid: u32) -> Vec<u32> {
    let tasks = read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|c| c.split(' ').filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    [pid].into_iter().chain(children.into_iter().flat_map(family)).collect()
}

/// Addresses, as the system writes them, at which processes listen for TCP.
fn listening(processes: &[u32]) -> BTreeSet<String> {
    let sockets: BTreeSet<String> = processes
        .iter()
        .flat_map(|pid| read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten())
        .filter_map(|file| Some(read_link(file.path()).ok()?.to_string_lossy().strip_prefix("socket:[")?.to_string()))
        .map(|rest| rest.trim_end_matches(']').to_string())
        .collect();
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| read_to_string(table).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    lines
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
            let is_ours = *state == "0A" && sockets.contains(*inode);
            is_ours.then(|| local.split(':').next().unwrap_or_default().to_string())
        })
        .collect()
}

/// Two nodes of one rank each that train for long; gives where all four processes listen.
fn of_two_nodes(more: &[&str]) -> BTreeSet<String> {
    let project = Project::new();
    let rdzv = format!("{HERE}:{}", free_port());
    let start = |node: &str| {
        let mut command = project.program();
        command.args(["train", "config.toml", "--run-dir", "run", "--threads", "1", "--set", "train.steps=10000000"]);
        command.args(["--ranks", "1", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]).args(more);
        project.start(&format!("node-{node}"), command)
    };
    let mut nodes = [start("0"), start("1")];
    nodes[0].until("a step", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 1);
    let processes: Vec<u32> = nodes.iter().flat_map(|node| family(node.child.id())).collect();
    assert_eq!(processes.len(), 4, "two launchers, two ranks");
    let found = listening(&processes);
    nodes[0].signal(rustix::process::Signal::TERM);
    for (code, stderr) in nodes.map(Running::wait) {
        assert_eq!(code, Some(75), "{stderr}");
    }
    found
}

#[test]
fn launchers_and_ranks_listen_on_the_network_that_was_chosen() {
    let only: BTreeSet<String> = [format!("{:08X}", u32::from_le_bytes([127, 0, 0, 2]))].into();
    assert_eq!(of_two_nodes(&["--interface", HERE]), only);
    let unasked = of_two_nodes(&[]);
    assert!(unasked.iter().any(|address| address.bytes().all(|digit| digit == b'0')), "all networks: {unasked:?}");
}

/// As under `srun` or `mpirun`: rank 0 serves the store.
#[test]
fn ranks_without_a_launcher_of_ours_listen_there_too() {
    let (project, port) = (Project::new(), free_port().to_string());
    let start = |rank: &str| {
        let mut command = project.program();
        command.args(["train", "config.toml", "--run-dir", "run", "--threads", "1", "--set", "train.steps=10000000"]);
        command.args(["--interface", HERE]).env("RANK", rank).env("WORLD_SIZE", "2");
        command.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1").env("MASTER_ADDR", HERE).env("MASTER_PORT", &port);
        project.start(&format!("rank-{rank}"), command)
    };
    let mut ranks = [start("0"), start("1")];
    ranks[0].until("a step", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 1);
    let found = listening(&[ranks[0].child.id(), ranks[1].child.id()]);
    assert_eq!(found, [format!("{:08X}", u32::from_le_bytes([127, 0, 0, 2]))].into());
    assert!(ranks[0].stderr().contains(&format!("open on {HERE}")), "{}", ranks[0].stderr());
    ranks[1].signal(rustix::process::Signal::TERM);
    for (code, stderr) in ranks.map(Running::wait) {
        assert_eq!(code, Some(75), "{stderr}");
    }
}

#[test]
fn what_is_not_there_is_refused_with_what_is() {
    let project = Project::new();
    let nodes = ["--ranks", "1", "--nnodes", "2", "--node-rank", "0", "--rdzv", "127.0.0.1:29999", "--interface"];
    for name in ["eth77", "192.0.2.1"] {
        project.train_refused(&[&nodes[..], &[name]].concat(), 2, &["--interface", name, "lo (127.0.0.1)"]);
    }
}

#[test]
fn a_meeting_place_on_another_network_is_refused() {
    let project = Project::new();
    let nodes = ["--ranks", "1", "--nnodes", "2", "--node-rank", "0", "--rdzv", "192.0.2.1:29999", "--interface", "lo"];
    project.train_refused(&nodes, 2, &["192.0.2.1", "127.0.0.1", "--rdzv"]);
    let mut command = project.program();
    command
        .args(["train", "config.toml", "--run-dir", "run", "--interface", "lo"])
        .env("RANK", "0")
        .env("WORLD_SIZE", "2");
    command
        .env("LOCAL_RANK", "0")
        .env("LOCAL_WORLD_SIZE", "1")
        .env("MASTER_ADDR", "192.0.2.1")
        .env("MASTER_PORT", "29999");
    let (code, stderr) = project.start("rank", command).wait();
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("192.0.2.1") && stderr.contains("set MASTER_ADDR to 127.0.0.1"), "{stderr}");
}
