//! The program itself, with a GPU for each rank, against one GPU.

use crate::build::Build;
use crate::common::ranks::{self, alone, store};
use crate::common::{Project, Running};
use crate::machine::{library_path, not_tested};
use ddpm_dist::device::cuda::Image;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const LIBRARIES: [Build; 4] = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];

/// Nothing where there are no kernels, or too few GPUs.
fn command(project: &Project, libraries: &[Build], ranks: usize, run_dir: &str) -> Option<Command> {
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        not_tested("training on several GPUs needs nvcc, and the machine made of software");
        return None;
    }
    let ranks = ranks.to_string();
    let mut command = project.program();
    command.env("LD_LIBRARY_PATH", library_path(libraries)).env("CUDA_SIM_GPUS", &ranks);
    command.args(["--ranks", &ranks, "train", "config.toml", "--device", "cuda", "--run-dir", run_dir]);
    command.args(["--set", "train.steps=4"]);
    Some(command)
}

fn train(project: &Project, libraries: &[Build], ranks: usize, more: &[&str]) -> Option<Output> {
    Some(command(project, libraries, ranks, &format!("on-{ranks}"))?.args(more).output().unwrap())
}

fn words(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn two_gpus_train_as_one() {
    let project = Project::new();
    for ranks in [1, 2] {
        let Some(output) = train(&project, &LIBRARIES, ranks, &[]) else { return };
        let said = words(&output);
        assert!(!said.contains("warning"), "{said}");
        let left = said.matches("has left its communicator").count();
        assert_eq!(left, if ranks == 1 { 0 } else { ranks }, "{said}");
    }
    let [one, two] = ["on-1", "on-2"].map(|run_dir| project.measured(run_dir));
    assert_eq!((one.len(), two.len()), (4, 4));
    for (one, two) in one.iter().zip(&two) {
        for value in ["loss", "grad_norm"] {
            let [one, two] = [one, two].map(|line| line[value].as_f64().unwrap());
            // Sums of some thousand terms in another order.
            assert!((one - two).abs() <= 1e-5 * one.abs(), "{value}: {one} on one GPU, {two} on two");
        }
    }
}

#[test]
fn a_fixed_order_has_one_result_on_any_number_of_gpus() {
    let project = Project::new();
    for ranks in [1, 2] {
        let Some(output) = train(&project, &LIBRARIES, ranks, &["--set", "train.shards=2"]) else { return };
        assert!(!words(&output).contains("warning"), "{output:?}");
    }
    let [one, two] = ["on-1", "on-2"].map(|run_dir| project.measured(run_dir));
    assert_eq!((one.len(), two.len()), (4, 4));
    for (one, two) in one.iter().zip(&two) {
        for value in ["loss", "grad_norm"] {
            assert_eq!(one[value], two[value], "{value}");
        }
    }
}

#[test]
fn where_there_is_no_nccl_gradients_go_through_the_host_which_is_said() {
    let project = Project::new();
    let Some(output) = train(&project, &LIBRARIES[..3], 2, &[]) else { return };
    assert!(words(&output).contains("through the memory of the host"), "{output:?}");
    assert!(words(&output).contains("there is no NCCL 2 here (libnccl.so.2"), "{output:?}");
}

#[test]
fn gradients_in_bf16_train_as_those_in_f32_do() {
    let project = Project::new();
    let bf16 = ["--set", "train.reduce=\"bf16\""];
    let Some(output) = train(&project, &LIBRARIES, 1, &[]) else { return };
    words(&output);
    assert!(!words(&train(&project, &LIBRARIES, 2, &bf16).unwrap()).contains("warning"));
    let [one, two] = ["on-1", "on-2"].map(|run_dir| project.measured(run_dir));
    for (one, two) in one.iter().zip(&two) {
        let [one, two] = [one, two].map(|line| line["grad_norm"].as_f64().unwrap());
        // Each is rounded by 2⁻⁹ at most, and so is each sum.
        assert!(one != two && (one - two).abs() <= one / 128.0, "{one} in f32, {two} in bf16");
    }
}

#[test]
fn gradients_in_bf16_are_refused_where_they_cannot_be_had() {
    let project = Project::new();
    let bf16 = ["--set", "train.reduce=\"bf16\""];
    let refused = |output: Output, why: &str| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains("train.reduce") && said.contains(why), "{said}");
    };
    let run = |more: &[&str]| {
        let mut command = project.program();
        command.args(["--ranks", "2", "train", "config.toml", "--device", "cpu", "--run-dir", "refused"]);
        command.args(bf16).args(more).output().unwrap()
    };
    refused(run(&[]), "between GPUs, by NCCL");
    refused(run(&["--set", "train.shards=2"]), "promises the same bits");
    if let Some(output) = train(&project, &LIBRARIES[..3], 2, &bf16) {
        refused(output, "between GPUs, by NCCL");
    }
}

/// While the GPU computes the step before, whose sums are not to be given up.
#[test]
fn a_capture_that_nccl_refuses_costs_speed_and_no_bit() {
    let project = Project::new();
    let run = |run_dir: &str, settings: &[(&str, &str)]| {
        let mut command = command(&project, &LIBRARIES, 2, run_dir)?;
        Some(words(&command.env("CUDA_SIM_BUSY", "1").envs(settings.iter().copied()).output().unwrap()))
    };
    let Some(said) = run("captured", &[]) else { return };
    assert!(!said.contains("warning"), "{said}");
    let said = run("refused", &[("CUDA_SIM_NCCL_FAIL_OF_1", "capture")]).unwrap();
    assert_eq!(said.matches("warning").count(), 1, "{said}");
    assert!(said.contains("one by one, which is slower") && said.contains("a capture that it cannot follow"), "{said}");
    assert_eq!(project.measured("refused"), project.measured("captured"));
}

/// Programs without sums are captured by each rank for itself, while a step is under way: one that does not keeps in step with the others.
#[test]
fn a_rank_without_graphs_keeps_in_step() {
    let project = Project::new();
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        return not_tested("a rank without graphs needs nvcc, and the machine made of software");
    }
    for (run_dir, graphs_of_1) in [("graphs", "on"), ("some", "off")] {
        let (_alone, store) = (alone(), store());
        let ranks = ranks::start(&project, &store, 2, |rank, command| {
            command
                .env("LD_LIBRARY_PATH", library_path(&LIBRARIES))
                .env("CUDA_SIM_GPUS", "2")
                .env("CUDA_SIM_BUSY", "1");
            command.env("DDPM_DIST_CUDA_GRAPH", if rank == 1 { graphs_of_1 } else { "on" });
            command.args(ranks::train(run_dir, &["--device", "cuda"]));
            command.args(["--set", "train.shards=4", "--set", "train.steps=4"])
        });
        for rank in ranks {
            let (code, said) = rank.wait();
            assert_eq!(code, Some(0), "{said}");
        }
    }
    assert_eq!(project.measured("some"), project.measured("graphs"));
}

/// Sums that never end, which NCCL never gives up: what waits for them when the process ends is not waited for.
#[test]
fn gpus_that_hang_for_good_do_not_keep_their_ranks() {
    let project = Project::new();
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        return not_tested("GPUs that hang need nvcc, and the machine made of software");
    }
    let (_alone, store) = (alone(), store());
    let start = Instant::now();
    let ranks = ranks::start(&project, &store, 2, |_, command| {
        command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "2").env("RUST_BACKTRACE", "0");
        command.env("CUDA_SIM_NCCL_FAIL", "deaf,abort").args(ranks::train("run", &["--device", "cuda"]));
        command.args(["--set", "train.steps=4", "--set", "cluster.timeout=5"])
    });
    let ended: Vec<(Option<i32>, String)> = ranks.into_iter().map(Running::wait).collect();
    let took = start.elapsed();
    // Whoever looks a moment later may find the other gone.
    assert!(ended.iter().any(|(code, _)| *code == Some(7)), "{ended:?}");
    for (code, said) in &ended {
        let words = match code {
            Some(7) => "cannot finish the sum of bucket 0 of step 1 within 5 s: all ranks wait for it",
            Some(6) => "was lost",
            _ => panic!("{ended:?}"),
        };
        assert_eq!(said.matches("ddpm-dist: ").count(), 1, "{said}");
        assert!(said.contains(words), "{said}");
    }
    // Starting takes a while; the deadline, its look at the others, and leaving are 5 s each.
    assert!(took < Duration::from_secs(60), "{took:?}");
}

/// A GPU's clock runs by what it computes, so that this machine's other work does not matter.
#[test]
fn a_gpu_that_takes_twice_as_long_is_named_within_twenty_steps() {
    let project = Project::new();
    let run = |run_dir: &str, ranks: usize, settings: &[(&str, &str)]| {
        let mut command = command(&project, &LIBRARIES, ranks, run_dir)?;
        // Much longer than the host takes to begin it.
        command.env("CUDA_SIM_WORK", "100000").envs(settings.iter().copied());
        Some(words(&command.args(["--set", "train.steps=20"]).output().unwrap()))
    };
    let Some(said) = run("equal", 2, &[]) else { return };
    assert!(!said.contains("is slow"), "{said}");
    for ranks in [2, 4] {
        let said = run(&format!("slow-of-{ranks}"), ranks, &[("CUDA_SIM_WORK_OF_1", "200000")]).unwrap();
        assert_eq!(said.matches("is slow").count(), 1, "{said}");
        assert!(said.contains("rank 1 is slow: its own work takes 2.0 times as long"), "{said}");
    }
}

/// Trains on two GPUs to the end of a small run, with checkpoints every second step, or with a fault of NCCL at one rank or at both.
fn two(project: &Project, run_dir: &str, more: &[&str], fault: Option<(&str, &str)>) -> Option<(Option<i32>, String)> {
    let mut command = command(project, &LIBRARIES, 2, run_dir)?;
    command.env("RUST_BACKTRACE", "0").args(["--set", "train.steps=6", "--set", "checkpoint.every=2"]).args(more);
    command.envs(fault);
    Some(project.start(run_dir, command).wait())
}

const AT_1: &str = "CUDA_SIM_NCCL_FAIL_OF_1";
const AT_ALL: &str = "CUDA_SIM_NCCL_FAIL";

/// Of a sum that all have, along a tree, and of slices.
const WAYS: [(&str, &[&str]); 3] =
    [("all", &[]), ("tree", &["--set", "train.shards=2"]), ("slices", &["--set", "optim.sharded=true"])];

/// Where GPUs meet, where a sum is begun, while it is under way, and in a graph; each in a run that goes on from the checkpoint of step 2.
#[test]
fn an_error_of_nccl_costs_no_more_than_what_was_not_saved() {
    let project = Project::new();
    let _alone = alone();
    const STUCK: [&str; 2] = ["cannot finish the sum of bucket 0 of step", "all ranks wait for it"];
    let refused = [
        ("all", AT_1, "ncclCommInitRankConfig", ["cannot join the other GPUs", "Connection refused"]),
        ("all", AT_1, "join", ["unhandled system error (", "closed by remote peer"]),
        ("all", AT_1, "ncclAllReduce", ["cannot sum up ", "no channel"]),
        ("all", AT_1, "sum", ["remote process exited", "status=12"]),
        ("all", AT_1, "sum-graph", ["remote process exited", "status=12"]),
        ("all", AT_1, "deaf", STUCK),
        ("all", AT_ALL, "deaf-graph,abort", STUCK),
        ("tree", AT_1, "ncclSend", ["cannot send ", "no channel"]),
        ("tree", AT_1, "ncclRecv", ["cannot receive ", "no channel"]),
        ("slices", AT_1, "ncclReduceScatter", ["cannot sum up ", "no channel"]),
        ("slices", AT_1, "ncclAllGather", ["cannot gather ", "no channel"]),
    ];
    for (way, set) in WAYS {
        let Some(straight) = two(&project, &format!("straight-{way}"), set, None) else { return };
        assert_eq!(straight.0, Some(0), "{}", straight.1);
        let expected = project.hashes(&format!("straight-{way}"), 6);
        let begun = format!("begun-{way}");
        let (code, stderr) = two(&project, &begun, &[set, &["--set", "train.steps=2"]].concat(), None).unwrap();
        assert_eq!(code, Some(0), "{stderr}");
        for (_, at, fault, words) in refused.iter().filter(|(of, ..)| *of == way) {
            let run_dir = format!("{fault}-{way}");
            project.copy(&begun, &run_dir);
            let patience = ["--set", "cluster.timeout=5"];
            let more = if fault.contains("deaf") { &[set, &patience].concat() } else { set };
            let (code, stderr) = two(&project, &run_dir, more, Some((at, fault))).unwrap();
            assert_eq!(code, Some(7), "{fault}: {stderr}");
            let cause =
                stderr.lines().find(|line| line.contains(" (node 0")).unwrap_or_else(|| panic!("{fault}: {stderr}"));
            for words in [&["exit code 7 (device or memory)", "NCCL 2.29.2 "][..], &words[..]].concat() {
                assert!(cause.contains(words), "{fault}: {words} is not in: {cause}");
            }
            // Of GPUs that hang though all ranks are there nobody knows whose does.
            if *words != STUCK {
                assert!(cause.contains("rank 1 (node 0"), "{fault}: {cause}");
                assert!(stderr.contains("ddpm-dist: rank 1 was lost"), "{fault}: rank 0 names it: {stderr}");
            }
            let saved = project.checkpoints(&run_dir);
            assert_eq!(saved[0], 2, "{fault}");
            for step in saved {
                let hashes = project.hashes(&run_dir, step);
                assert!(step > 2 || hashes == project.hashes(&begun, 2), "{fault}: another checkpoint of step 2");
            }
            let (code, stderr) = two(&project, &run_dir, set, None).unwrap();
            assert_eq!(code, Some(0), "after {fault}: {stderr}");
            assert_eq!(project.hashes(&run_dir, 6), expected, "after {fault}: other bits");
        }
    }
}

/// What a run can do without costs it no bit and is told, but for how it leaves.
#[test]
fn what_nccl_refuses_and_a_run_can_do_without_costs_no_bit() {
    let project = Project::new();
    let _alone = alone();
    let Some((code, stderr)) = two(&project, "straight", &[], None) else { return };
    assert_eq!(code, Some(0), "{stderr}");
    for (at, fault, warnings, words) in [
        (AT_ALL, "ncclGetUniqueId", 1, "gradients are summed through the memory of the host"),
        (AT_1, "capture", 1, "a capture that it cannot follow"),
        (AT_1, "leave", 0, "has aborted its communicator"),
    ] {
        let (code, stderr) = two(&project, fault, &[], Some((at, fault))).unwrap();
        assert_eq!(code, Some(0), "{fault}: {stderr}");
        assert_eq!(stderr.matches("warning: ").count(), warnings, "{fault}: {stderr}");
        assert!(stderr.contains(words), "{fault}: {stderr}");
        assert_eq!(project.hashes(fault, 6), project.hashes("straight", 6), "{fault}: other bits");
    }
}

#[test]
fn a_version_of_nccl_that_this_program_is_not_written_for_is_told_once() {
    let project = Project::new();
    for (version, said) in
        [("23100", "NCCL 2.31.0: this program is written for 2.27 to 2.30"), ("22605", "NCCL 2.26.5: ")]
    {
        let Some(mut command) = command(&project, &LIBRARIES, 2, version) else { return };
        command.env("CUDA_SIM_NCCL_VERSION", version).args(["--set", "train.steps=1"]);
        let stderr = words(&command.output().unwrap());
        let warnings: Vec<&str> = stderr.lines().filter(|line| line.contains("warning: ")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains(said), "{stderr}");
        assert!(warnings[0].contains("use one of those"), "{stderr}");
        assert_eq!(stderr.matches("has left its communicator").count(), 2, "it is used: {stderr}");
    }
}
