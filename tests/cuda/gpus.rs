//! `--gpus 4` on the machine made of software: the program starts a rank for each GPU, which train as one GPU does, whatever happens to one of
//! them.

use crate::build::Build;
use crate::common::processes::{lives, send, until_gone};
use crate::common::ranks::{alone, is_saved};
use crate::common::{Project, Running};
use crate::machine::{library_path, not_tested};
use ddpm_dist::device::cuda::Image;
use rustix::process::Signal;
use std::process::Command;

const LIBRARIES: [Build; 4] = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];

/// Steps of a run.
const STEPS: u64 = 12;

/// Nothing where there are no kernels, or no such machine.
fn project(test: &str) -> Option<Project> {
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        not_tested(&format!("{test}: it needs nvcc, and the machine made of software"));
        return None;
    }
    Some(Project::new())
}

/// Training with checkpoints every third step.
fn command(project: &Project, gpus: &[&str], run_dir: &str, more: &[&str]) -> Command {
    let mut command = project.program();
    command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "4").env("RUST_BACKTRACE", "0");
    command.args(gpus).args(["train", "config.toml", "--run-dir", run_dir]);
    command.args(["--set", &format!("train.steps={STEPS}"), "--set", "checkpoint.every=3"]).args(more);
    command
}

fn start(project: &Project, gpus: &[&str], run_dir: &str, more: &[&str]) -> Running {
    project.start(run_dir, command(project, gpus, run_dir, more))
}

const ONE: [&str; 2] = ["--device", "cuda"];
const FOUR: [&str; 2] = ["--gpus", "4"];
/// Gradients are added along one tree over four parts of the batch, on any number of ranks.
const FIXED: [&str; 2] = ["--set", "train.shards=4"];

/// Trains on one GPU, with the same parts of a batch.
fn straight(project: &Project) {
    let (code, stderr) = start(project, &ONE, "straight", &FIXED).wait();
    assert_eq!(code, Some(0), "{stderr}");
}

fn is_as_straight(project: &Project, run_dir: &str) {
    assert!(project.state(run_dir, STEPS) == project.state("straight", STEPS), "other bits");
    assert_eq!(project.measured(run_dir), project.measured("straight"));
}

#[test]
fn four_gpus_train_as_one() {
    let Some(project) = project("gpus::four_gpus_train_as_one") else { return };
    let _alone = alone();
    straight(&project);
    let (code, stderr) = start(&project, &FOUR, "fixed", &FIXED).wait();
    assert_eq!(code, Some(0), "{stderr}");
    is_as_straight(&project, "fixed");

    let (code, stderr) = start(&project, &FOUR, "auto", &[]).wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stderr.matches("has left its communicator").count(), 4, "{stderr}");
    let [found, expected] = ["auto", "straight"].map(|run_dir| project.measured(run_dir));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        for value in ["loss", "grad_norm"] {
            let [found, expected] = [found, expected].map(|line| line[value].as_f64().unwrap());
            // Sums of some thousand terms in another order, which Adam makes larger step by step.
            assert!((found - expected).abs() <= 1e-3 * expected.abs(), "{value}: {found}, on one GPU {expected}");
        }
    }
}

#[test]
fn a_rank_that_is_killed_costs_its_gpus_a_restart_and_no_bit() {
    let Some(project) = project("gpus::a_rank_that_is_killed_costs_its_gpus_a_restart_and_no_bit") else { return };
    let _alone = alone();
    straight(&project);
    let mut launcher = start(&project, &[&FOUR[..], &["--max-restarts", "1"]].concat(), "run", &FIXED);
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    send(launcher.ranks()[2], Signal::KILL);
    launcher.until_said("resuming from");
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("rank 2 ") && stderr.contains("signal 9"), "the cause: {stderr}");
    is_as_straight(&project, "run");
}

/// The card of one of them, whose rank says so; the others name it.
#[test]
fn a_gpu_that_fails_is_named_and_the_rest_goes_on_from_the_checkpoint() {
    let Some(project) = project("gpus::a_gpu_that_fails_is_named_and_the_rest_goes_on_from_the_checkpoint") else {
        return;
    };
    let _alone = alone();
    straight(&project);
    let mut broken = command(&project, &[&FOUR[..], &["--max-restarts", "1"]].concat(), "run", &FIXED);
    // The first step is no graph yet.
    broken.env("CUDA_SIM_FAULT", "ecc@6 of 1").env("CUDA_SIM_FAULT_ONCE", project.path("broken"));
    let (code, stderr) = project.start("run", broken).wait();
    assert_eq!(code, Some(0), "{stderr}");
    let cause = stderr.lines().find(|line| line.contains("rank 1 (node 0")).unwrap_or_else(|| panic!("{stderr}"));
    for words in ["exit code 7 (device or memory)", "uncorrectable ECC error", "take the card out"] {
        assert!(cause.contains(words), "{words} is not in: {cause}");
    }
    is_as_straight(&project, "run");
}

#[test]
fn a_rank_that_stands_still_is_named() {
    let Some(project) = project("gpus::a_rank_that_stands_still_is_named") else { return };
    let _alone = alone();
    let more = ["--set", "cluster.timeout=10", "--set", "train.steps=10000000"];
    let mut launcher = start(&project, &FOUR, "run", &more);
    project.until_steps(&mut launcher, "run", 2);
    let ranks = launcher.ranks();
    send(ranks[1], Signal::STOP);
    until_gone(&[ranks[0], ranks[2], ranks[3]]);
    let (code, stderr) = launcher.wait();
    assert!(!lives(ranks[1]), "the launcher puts it down");
    assert_ne!(code, Some(0), "{stderr}");
    assert!(stderr.contains("rank 1 has shown no sign of life"), "{stderr}");
}

#[test]
fn more_gpus_than_there_are_is_said_once() {
    let Some(project) = project("gpus::more_gpus_than_there_are_is_said_once") else { return };
    let (code, stderr) = start(&project, &["--gpus", "5"], "run", &[]).wait();
    assert_eq!((code, stderr.matches("ddpm-dist: ").count()), (Some(7), 1), "{stderr}");
    assert!(stderr.contains("--gpus 5") && stderr.contains('4'), "{stderr}");
    assert!(!project.path("run").exists());
}
