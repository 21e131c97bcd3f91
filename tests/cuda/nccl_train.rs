//! The program itself, with a GPU for each rank, against one GPU.

use crate::build::Build;
use crate::common::Project;
use crate::machine::{library_path, not_tested};
use ddpm_dist::device::cuda::Image;
use std::process::Output;

const LIBRARIES: [Build; 4] = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];

/// Nothing where there are no kernels, or too few GPUs.
fn train(project: &Project, libraries: &[Build], ranks: usize, more: &[&str]) -> Option<Output> {
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        not_tested("training on several GPUs needs nvcc, and the machine made of software");
        return None;
    }
    let (ranks, run_dir) = (ranks.to_string(), format!("on-{ranks}"));
    let mut command = project.program();
    command.env("LD_LIBRARY_PATH", library_path(libraries)).env("CUDA_SIM_GPUS", &ranks);
    command.args(["--ranks", &ranks, "train", "config.toml", "--device", "cuda", "--run-dir", &run_dir]);
    Some(command.args(["--set", "train.steps=4"]).args(more).output().unwrap())
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
