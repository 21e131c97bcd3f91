//! What runs kernels on a GPU, with a driver that is made of software: all other tests of this program once more, as on a GPU.

use crate::build::{Build, build};
use ddpm_dist::device::cuda::{CudaError, Gpu, Image};
use std::io::Write;
use std::process::Command;

fn not_tested(what: &str) {
    // Nothing could be done about it.
    let _ = writeln!(std::io::stderr(), "NOT TESTED: {what}");
}

#[test]
fn kernels_run_through_a_driver() {
    if Image::embedded().is_none() {
        not_tested("kernels through a driver: built without nvcc");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    build(Build::Driver, folder.path());
    // The name that is looked for first: no other driver is to be found before this one.
    std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcuda.so")).unwrap();
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--skip", "faults::", "--skip", "driver::", "--skip", "many_tokens"]);
    let output = again.env("DDPM_DIST_KERNELS", "gpu").env("LD_LIBRARY_PATH", folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("test result: ok"), "{said}");
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
