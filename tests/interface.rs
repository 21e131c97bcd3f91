//! `--interface`: on which network several machines listen. Here two "machines" are one, and networks are addresses of its loopback.

mod common;

use common::processes::children;
use common::ranks::{FOR_LONG, rank_of, train};
use common::{Project, Running};
use rustix::process::{Pid, Signal};
use std::collections::BTreeSet;
use std::fs::{read_dir, read_link, read_to_string};
use std::net::TcpListener;
use std::process::Command;

const HERE: &str = "127.0.0.2";

/// A port of that network that is free.
fn free_port() -> u16 {
    TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap().port()
}

/// Addresses, as the system writes them, at which processes listen for TCP.
fn listening(processes: &[Pid]) -> BTreeSet<String> {
    let sockets: BTreeSet<String> = processes
        .iter()
        .flat_map(|pid| read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten().flatten())
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
        command.args(train("run", &FOR_LONG));
        command.args(["--ranks", "1", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]).args(more);
        project.start(&format!("node-{node}"), command)
    };
    let mut nodes = [start("0"), start("1")];
    project.until_steps(&mut nodes[0], "run", 1);
    let launchers = nodes.each_ref().map(Running::pid);
    let processes: Vec<Pid> = launchers.into_iter().chain(launchers.into_iter().flat_map(children)).collect();
    assert_eq!(processes.len(), 4, "two launchers, two ranks");
    let found = listening(&processes);
    nodes[0].signal(Signal::TERM);
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

/// Makes a rank the only one of its machine.
fn on_its_own_machine(command: &mut Command) {
    command.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1");
}

/// As under `srun` or `mpirun`: rank 0 serves the store.
#[test]
fn ranks_without_a_launcher_of_ours_listen_there_too() {
    let (project, port) = (Project::new(), free_port());
    let start = |rank: usize| {
        let mut command = project.program();
        command.args(train("run", &FOR_LONG));
        command.args(["--interface", HERE]);
        on_its_own_machine(rank_of(&mut command, [rank, 2], HERE, port));
        project.start(&format!("rank-{rank}"), command)
    };
    let mut ranks = [start(0), start(1)];
    project.until_steps(&mut ranks[0], "run", 1);
    let found = listening(&ranks.each_ref().map(Running::pid));
    assert_eq!(found, [format!("{:08X}", u32::from_le_bytes([127, 0, 0, 2]))].into());
    assert!(ranks[0].stderr().contains(&format!("open on {HERE}")), "{}", ranks[0].stderr());
    ranks[1].signal(Signal::TERM);
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
    command.args(train("run", &["--interface", "lo"]));
    on_its_own_machine(rank_of(&mut command, [0, 2], "192.0.2.1", 29999));
    let (code, stderr) = project.start("rank", command).wait();
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("192.0.2.1") && stderr.contains("set MASTER_ADDR to 127.0.0.1"), "{stderr}");
}
