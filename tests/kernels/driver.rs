//! What runs kernels on a GPU, with a driver that is made of software: all other tests of this program once more, as on a GPU.

use crate::build::{Build, build};
use ddpm_dist::device::cuda::{CudaError, Gpu, Image};
use std::io::Write;
use std::path::Path;
use std::process::Command;

fn not_tested(what: &str) {
    // Nothing could be done about it.
    let _ = writeln!(std::io::stderr(), "NOT TESTED: {what}");
}

/// Some tests of this program, as on a GPU that is `card`: whether they pass, and what is said.
fn on(card: &str, driver: &Path, which: &[&str]) -> (bool, String) {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(which).envs([("DDPM_DIST_KERNELS", "gpu"), ("CUDA_SIM_CARD", card)]);
    let output = again.env("LD_LIBRARY_PATH", driver).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success() && said.contains("test result: ok"), said.into_owned())
}

#[test]
fn a_driver_runs_kernels_on_cards_that_can() {
    if Image::embedded().is_none() {
        not_tested("kernels through a driver: built without nvcc");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    build(Build::Driver, folder.path());
    // The name that is looked for first: no other driver is to be found before this one.
    std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcuda.so")).unwrap();
    let all = ["faults::", "benchmark::", "driver::", "many_tokens"].map(|name| ["--skip", name]);
    let (is_well, said) = on("8.0 166912", folder.path(), all.as_flattened());
    assert!(is_well, "{said}");
    for (card, words) in [
        ("7.5 65536", "has compute capability 7.5, and the kernels are for 8.0 and later (sm_80"),
        ("8.9 101376", "gives a block 101376 bytes of shared memory, and the kernels take up to 166912"),
    ] {
        let (is_well, said) = on(card, folder.path(), &["adam_ema"]);
        assert!(!is_well && said.contains("GPU 0 (a machine made of software)") && said.contains(words), "{said}");
    }
}

#[test]
fn a_machine_without_a_driver_is_told_what_to_do() {
    match Gpu::open(0) {
        Err(error @ CudaError::NoDriver) => assert!(error.to_string().contains("install NVIDIA's driver")),
        Err(CudaError::NoKernels) => not_tested("a machine without a driver: this one has one"),
        Ok(_) => not_tested("a machine without a driver: this one has one"),
        Err(other) => panic!("{other}"),
    }
}
