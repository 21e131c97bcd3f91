//! `--gpus 4` on the machine made of software: the program starts a rank for each GPU, which train as one GPU does, whatever happens to one of
//! them.

use crate::build::Build;
use crate::common::processes::{lives, send, until_gone};
use crate::common::ranks::{self, alone, is_saved, store};
use crate::common::{Project, Running};
use crate::machine::{library_path, not_tested};
use ddpm_dist::device::cuda::Image;
use ddpm_dist::report::read_npy;
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

/// As many as a machine commonly has.
#[test]
fn eight_gpus_train_as_one() {
    let Some(project) = project("gpus::eight_gpus_train_as_one") else { return };
    let _alone = alone();
    let short = ["--set", "train.steps=3", "--set", "train.batch=8", "--set", "train.shards=8"];
    for (run_dir, gpus) in [("one", &ONE), ("eight", &["--gpus", "8"])] {
        let mut command = command(&project, gpus, run_dir, &short);
        command.env("CUDA_SIM_GPUS", "8");
        let (code, stderr) = project.start(run_dir, command).wait();
        assert_eq!(code, Some(0), "{stderr}");
        let left = stderr.matches("has left its communicator").count();
        assert_eq!(left, if run_dir == "one" { 0 } else { 8 }, "{stderr}");
    }
    assert!(project.state("eight", 3) == project.state("one", 3), "other bits");
    assert_eq!(project.measured("eight"), project.measured("one"));
}

/// Each rank makes some of the batches, the last of which is not full.
#[test]
fn two_gpus_sample_the_images_of_one() {
    let Some(project) = project("gpus::two_gpus_sample_the_images_of_one") else { return };
    let _alone = alone();
    for precision in ["f32", "bf16"] {
        let precise = format!("train.precision=\"{precision}\"");
        let (code, stderr) =
            start(&project, &ONE, precision, &["--set", "train.steps=2", "--set", "optim.lr=1e-2", "--set", &precise])
                .wait();
        assert_eq!(code, Some(0), "{stderr}");
        for form in ["npy", "png"] {
            let sampled = |name: &str, gpus: &[&str]| {
                let out = format!("{name}-{precision}.{form}");
                let mut command = project.program();
                command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "2");
                command.args(gpus).args(["sample", precision, "--out", &out, "--count", "5", "--batch", "2"]);
                let (code, stderr) = project
                    .start(name, {
                        command.args(["--sampler", "ddpm", "--steps", "3", "--seed", "3"]);
                        command
                    })
                    .wait();
                assert_eq!(code, Some(0), "{stderr}");
                assert!(!stderr.contains("warning"), "{stderr}");
                project.read(out)
            };
            let one = sampled("one", &ONE);
            assert!(sampled("gpus", &["--gpus", "2"]) == one, "{precision}, {form}: --gpus 2 makes other images");
            let ranks = sampled("ranks", &["--ranks", "2", "--device", "cuda"]);
            assert!(ranks == one, "{precision}, {form}: --ranks 2 makes other images");
        }
        let images = read_npy(&project.path(format!("one-{precision}.npy"))).unwrap().0;
        let image = images.len() / 5;
        assert!((1..5).all(|i| images[..image] != images[i * image..][..image]), "image 0 comes again");
    }
}

const DIVIDED: [&str; 2] = ["--set", "optim.sharded=true"];
const GRIDS: [&str; 4] = ["--set", "sample.every=4", "--set", "sample.count=3"];

/// As graphs, and instruction by instruction; where there is no NCCL, through the host.
#[test]
fn four_gpus_that_divide_the_optimisers_state_train_as_one() {
    let Some(project) = project("gpus::four_gpus_that_divide_the_optimisers_state_train_as_one") else { return };
    let _alone = alone();
    for precision in ["f32", "bf16"] {
        let precise = format!("train.precision=\"{precision}\"");
        let fixed = [&FIXED[..], &GRIDS, &["--set", &precise]].concat();
        let one = format!("one-{precision}");
        let (code, stderr) = start(&project, &ONE, &one, &fixed).wait();
        assert_eq!(code, Some(0), "{stderr}");
        for (how, graph, libraries) in
            [("graph", "on", &LIBRARIES[..]), ("single", "off", &LIBRARIES), ("host", "on", &LIBRARIES[..3])]
        {
            let run_dir = format!("{how}-{precision}");
            let mut command = command(&project, &FOUR, &run_dir, &[&fixed[..], &DIVIDED].concat());
            command.env("DDPM_DIST_CUDA_GRAPH", graph).env("LD_LIBRARY_PATH", library_path(libraries));
            let (code, stderr) = project.start(&run_dir, command).wait();
            assert_eq!(code, Some(0), "{run_dir}: {stderr}");
            assert!(!stderr.contains("could not be made one CUDA graph"), "{stderr}");
            assert!(project.state(&run_dir, STEPS) == project.state(&one, STEPS), "{run_dir}: other bits");
            assert_eq!(project.measured(&run_dir), project.measured(&one), "{run_dir}");
            let grids = [&run_dir, &one].map(|run| project.read(format!("{run}/samples/step-{STEPS:08}.png")));
            assert!(grids[0] == grids[1], "{run_dir}: other images");
        }
    }
}

/// What each takes of its GPU's memory is what `plan` says, to 5 %.
#[test]
fn gpus_that_divide_the_optimisers_state_take_the_memory_that_was_planned() {
    const WORKSPACE: u64 = ddpm_dist::device::cuda::WORKSPACE as u64;
    let Some(project) = project("gpus::gpus_that_divide_the_optimisers_state_take_the_memory_that_was_planned") else {
        return;
    };
    let _alone = alone();
    let json = |name: &str| -> serde_json::Value { serde_json::from_slice(&project.read(name)).unwrap() };
    // Wide enough for the state to weigh more than its filling.
    let wide = ["--set", "model.channels=[32, 64]", "--set", "sample.count=0", "--set", "train.batch=4"];
    let taken = |name: &str, more: &[&str]| {
        let mut command = project.program();
        command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "4").env("RUST_BACKTRACE", "0");
        command.args(FOUR).args(["bench", "config.toml", "--quiet", "--steps", "2", "--warmup", "1", "--json", name]);
        let (code, stderr) = project
            .start(name, {
                command.args(wide).args(more);
                command
            })
            .wait();
        assert_eq!(code, Some(0), "{stderr}");
        // What it has in place of a data set.
        json(name)["gpu_memory_bytes"].as_u64().unwrap() - WORKSPACE - 1024 * 8 * 8 * 3
    };
    let planned = |more: &[&str]| {
        let plan = ["plan", "config.toml", "--ranks", "4", "--device", "cuda", "--json"];
        let plan: serde_json::Value =
            serde_json::from_str(&project.done(&[&plan[..], &wide, more].concat()).stdout).unwrap();
        let parts = plan["memory"].as_array().unwrap().iter().filter(|part| part["on_host"] == false);
        parts.map(|part| part["bytes"].as_u64().unwrap()).sum::<u64>() - WORKSPACE
    };
    let whole = taken("whole.json", &[]);
    for more in [&DIVIDED[..], &[&DIVIDED[..], &["--set", "train.precision=\"bf16\""]].concat()] {
        let (found, expected) = (taken("divided.json", more), planned(more));
        assert!((found as f64 / expected as f64 - 1.0).abs() < 0.05, "{more:?}: {found} bytes, planned {expected}");
        assert!(found < whole, "{more:?}: {found} bytes, of ranks that have all of it {whole}");
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
    broken.env("CUDA_SIM_FAULT", "ecc@4 of 1").env("CUDA_SIM_FAULT_ONCE", project.path("broken"));
    let (code, stderr) = project.start("run", broken).wait();
    assert_eq!(code, Some(0), "{stderr}");
    let cause = stderr.lines().find(|line| line.contains("rank 1 (node 0")).unwrap_or_else(|| panic!("{stderr}"));
    for words in ["exit code 7 (device or memory)", "uncorrectable ECC error", "take the card out"] {
        assert!(cause.contains(words), "{words} is not in: {cause}");
    }
    is_as_straight(&project, "run");
}

/// Ranks that nobody starts again: each ends with a code of its own.
#[test]
fn whoever_misses_a_rank_with_a_broken_gpu_names_it() {
    let Some(project) = project("gpus::whoever_misses_a_rank_with_a_broken_gpu_names_it") else { return };
    let _alone = alone();
    let store = store();
    let ranks = ranks::start(&project, &store, 2, |_, command| {
        command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "2").env("RUST_BACKTRACE", "0");
        command.env("CUDA_SIM_FAULT", "ecc@4 of 1").args(ranks::train("run", &ONE)).args(["--set", "train.steps=100"])
    });
    let [zero, one] = ranks.into_iter().map(Running::wait).collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(one.0, Some(7), "{}", one.1);
    assert!(one.1.contains("uncorrectable ECC error"), "{}", one.1);
    assert_eq!(zero.0, Some(6), "{}", zero.1);
    assert!(zero.1.contains("rank 1 "), "{}", zero.1);
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

/// Under a launcher that knows nothing of GPUs.
#[test]
fn more_ranks_than_gpus_is_said_by_the_rank_that_has_none() {
    let Some(project) = project("gpus::more_ranks_than_gpus_is_said_by_the_rank_that_has_none") else { return };
    let _alone = alone();
    let mut two = command(&project, &["--ranks", "2", "--device", "cuda"], "run", &[]);
    two.env("CUDA_SIM_GPUS", "1");
    let (code, stderr) = project.start("run", two).wait();
    assert_eq!(code, Some(7), "{stderr}");
    for words in ["rank 1 (node 0", "there is no GPU 1 here: this machine has 1", "CUDA_VISIBLE_DEVICES"] {
        assert!(stderr.contains(words), "{words} is not in: {stderr}");
    }
    assert!(!project.path("run/checkpoints").exists());
}
