//! Ranks that divide the optimiser's state among them (`optim.sharded`): the same bits as those that have all of it, with 1/n of the memory.

mod common;

use common::Project;
use common::processes::send;
use common::ranks::{FOR_LONG, is_saved, launch, launcher, same_as_uninterrupted};
use rustix::process::Signal;
use std::process::Command;

const DIVIDED: [&str; 2] = ["--set", "optim.sharded=true"];
const WHOLE: [&str; 2] = ["--set", "optim.sharded=false"];
/// A trajectory with clipped gradients and grids of the averaged weights.
const STEPS: u64 = 24;
const RUN: [&str; 8] =
    ["--set", "optim.clip=0.2", "--set", "sample.every=8", "--set", "sample.count=5", "--set", "checkpoint.every=4"];

/// Trains so many steps on `ranks` ranks; gives what they said.
fn trained(project: &Project, ranks: usize, run_dir: &str, steps: u64, sharded: [&str; 2]) -> String {
    let steps = format!("train.steps={steps}");
    let more = [&RUN[..], &["--set", &steps], &sharded].concat();
    let (code, stderr) = project.start(run_dir, launcher(project, ranks, run_dir, &more)).wait();
    assert_eq!(code, Some(0), "{ranks} ranks: {stderr}");
    stderr
}

/// All that a run leaves behind is what another leaves: state, log and grids.
#[track_caller]
fn is_as(project: &Project, run_dir: &str, expected: &str) {
    assert!(project.state(run_dir, STEPS) == project.state(expected, STEPS), "{run_dir}: other bits");
    assert_eq!(project.measured(run_dir), project.measured(expected), "{run_dir}");
    for step in [8, 16, STEPS] {
        let [found, expected] =
            [run_dir, expected].map(|run| project.read(format!("{run}/samples/step-{step:08}.png")));
        assert!(found == expected, "{run_dir}: other images at step {step}");
    }
}

#[test]
fn who_keeps_the_state_changes_no_bit() {
    let project = Project::new();
    trained(&project, 1, "whole", STEPS, WHOLE);
    for ranks in [1, 2, 4] {
        let run_dir = format!("divided-{ranks}");
        trained(&project, ranks, &run_dir, STEPS, DIVIDED);
        is_as(&project, &run_dir, "whole");
    }
    // Another number of ranks, and the other way of keeping it, each time.
    for (ranks, steps, sharded) in
        [(4, 5, DIVIDED), (2, 10, WHOLE), (1, 13, DIVIDED), (2, 18, DIVIDED), (4, STEPS, WHOLE)]
    {
        let said = trained(&project, ranks, "changed", steps, sharded);
        assert_eq!(said.contains("resuming from"), steps != 5, "{said}");
        assert!(!said.contains("last bits differ"), "{said}");
    }
    // Runs that end earlier draw a last grid each, others than those of one that goes on.
    assert!(project.state("changed", STEPS) == project.state("whole", STEPS), "other bits");
    assert_eq!(project.measured("changed"), project.measured("whole"));
}

#[test]
fn a_rank_that_is_killed_costs_a_restart_and_no_bit() {
    let project = Project::new();
    let mut running = launch(&project, 4, "run", &[&FOR_LONG[..], &DIVIDED, &["--max-restarts", "1"]].concat());
    running.until("a checkpoint", || is_saved(&project, "run"));
    send(running.ranks()[2], Signal::KILL);
    running.until_said("resuming from");
    same_as_uninterrupted(&project, running, "run");
}

/// A checkpoint of theirs is one like any other.
#[test]
fn tools_read_what_they_save() {
    let project = Project::new();
    trained(&project, 4, "divided", 8, DIVIDED);
    trained(&project, 1, "whole", 8, WHOLE);
    let checkpoint = "divided/checkpoints/step-00000008";
    project.done(&["checkpoint", "verify", checkpoint]);
    project.done(&["checkpoint", "reshard", checkpoint, "--shards", "3", "--out", "copy"]);
    assert!(project.state("divided", 8) == project.state("whole", 8));
    for run in ["divided", "whole"] {
        project.done(&["sample", run, "--count", "3", "--seed", "5", "--threads", "1", "--out", &format!("{run}.npy")]);
    }
    assert!(project.read("divided.npy") == project.read("whole.npy"));
    // Weights to begin with, of which each rank takes its slices of the average.
    for (run, ranks, sharded) in [("from-1", 1, WHOLE), ("from-4", 4, DIVIDED)] {
        let more = [&RUN[..], &["--set", "train.steps=4", "--init", "whole"], &sharded].concat();
        let (code, stderr) = project.start(run, launcher(&project, ranks, run, &more)).wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    assert!(project.state("from-4", 4) == project.state("from-1", 4));
}

#[test]
fn ranks_that_do_not_agree_are_refused() {
    let project = Project::new();
    let store = common::ranks::store();
    let sharded = ["optim.sharded=true", "optim.sharded=false"];
    let ranks = common::ranks::start(&project, &store, 2, |rank, command: &mut Command| {
        command.args(common::ranks::train("run", &["--set", sharded[rank]]))
    });
    for (rank, running) in ranks.into_iter().enumerate() {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(2), "{stderr}");
        assert!(rank > 0 || stderr.contains("`optim.sharded` = true, rank 1 false"), "{stderr}");
    }
}
