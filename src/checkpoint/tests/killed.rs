//! A process for each of two ranks; one of them is killed (SIGKILL) at each of its file operations in turn.

use super::faults::{Fault, Faulty, newest};
use super::ranks::{LONG, SHORT, team};
use super::*;
use crate::checkpoint::io::Disk;
use crate::rendezvous::store::Server;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

/// Directory, port, rank, and the operation at which this rank dies, one a line.
const PART: &str = "DDPM_DIST_TEST_KILLED_RANK";

/// Keeps one checkpoint, so that the removal of the old one is among the operations.
fn config() -> CheckpointConfig {
    CheckpointConfig { keep: 1, ..Default::default() }
}

/// One rank: saves step 1, and dies while it saves step 2, or says what became of that.
#[test]
#[ignore = "is started by the test below"]
fn rank() {
    let Ok(part) = std::env::var(PART) else { return };
    let [dir, port, rank, at] = part.lines().collect::<Vec<_>>()[..] else { panic!("{part:?}") };
    let (dir, port) = (Path::new(dir), port.parse().unwrap());
    let (rank, at): (usize, usize) = (rank.parse().unwrap(), at.parse().unwrap());
    let save = |step, io, patience| {
        let mut saver = Saver::with_io(io, dir, &config(), Some(team(port, rank, 2, patience)));
        saver.save(share(&snapshot(&layout(), step), rank, 2)).unwrap();
        saver.wait().unwrap().result
    };
    save(1, Arc::new(Disk), LONG).unwrap();
    // The one that dies is patient: only the other finds someone missing.
    let patience = if at == usize::MAX { SHORT } else { LONG };
    match save(2, Faulty::new(at, Fault::Sigkill), patience) {
        Ok(_) => println!("report: saved"),
        Err(error) => println!("report: {error}"),
    }
}

/// Kills `victim` at its operation `at`. What the other one reported, or `None` where there is no such operation.
fn kill(dir: &Path, victim: usize, at: usize) -> Option<String> {
    let server = Server::listen(([127, 0, 0, 1], 0).into()).unwrap();
    let start = |rank: usize| -> Child {
        let at = if rank == victim { at } else { usize::MAX };
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "checkpoint::tests::killed::rank"])
            .env(PART, format!("{}\n{}\n{rank}\n{at}", dir.to_str().unwrap(), server.address().port()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ended = [0, 1].map(start).map(|child| child.wait_with_output().unwrap());
    if ended[victim].status.signal().is_none() {
        assert!(ended.iter().all(|ended| ended.status.success()), "{ended:?}");
        return None;
    }
    assert_eq!(ended[victim].status.signal(), Some(9));
    let said = String::from_utf8(ended[1 - victim].stdout.clone()).unwrap();
    let report = said.lines().find_map(|line| Some(line.split_once("report: ")?.1.to_string()));
    assert!(report.is_some(), "rank {} did not outlive the other: {said}", 1 - victim);
    report
}

/// One death; whether there was such an operation.
fn one_death(victim: usize, at: usize) -> bool {
    let tmp = tempfile::tempdir().unwrap();
    let Some(report) = kill(tmp.path(), victim, at) else {
        assert_eq!(newest(tmp.path()).snapshot.meta.step, 2);
        return false;
    };
    let fault = format!("rank {victim} died at its operation {at}, the other says {report:?}");
    let found = newest(tmp.path());
    assert!(found.skipped.is_empty(), "{fault}: {}", found.skipped[0]);
    let step = found.snapshot.meta.step;
    assert_same(&found.snapshot, &snapshot(&layout(), step));
    match victim {
        // Rank 0 makes the directory, its shard and the manifest; the ninth operation is the rename.
        0 => assert_eq!(step, if at <= 8 { 1 } else { 2 }, "{fault}"),
        _ => assert_eq!((step, report.contains("rank 1 took no part")), (1, true), "{fault}"),
    }
    assert!(report != "saved" || step == 2, "{fault}");
    // The next start tidies up and goes on.
    let mut saver = Saver::new(tmp.path(), &config()).unwrap();
    saver.save(snapshot(&layout(), 3)).unwrap();
    saver.wait().unwrap().result.unwrap();
    assert_eq!(newest(tmp.path()).snapshot.meta.step, 3);
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1, "{fault}");
    true
}

#[test]
fn a_rank_killed_at_any_operation_costs_one_interval_at_most() {
    for (victim, operations) in [(0, 15), (1, 4)] {
        // Mostly they wait, so several at a time.
        let deaths = std::sync::Mutex::new(0..=operations);
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    loop {
                        let next = deaths.lock().unwrap().next();
                        let Some(at) = next else { break };
                        assert_eq!(one_death(victim, at), at < operations, "rank {victim}, operation {at}");
                    }
                });
            }
        });
    }
}
