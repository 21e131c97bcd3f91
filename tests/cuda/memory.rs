//! What training takes of a GPU's memory is what `plan` says, and what does not fit is refused before it begins.

use crate::program::{Work, fails, ok};
use serde_json::Value;

/// Bytes that libraries take whatever the config.
const WORKSPACE: u64 = 256 << 20;
/// What `bench` has in place of a data set, where there is room for it: 1024 images.
const IMAGES: u64 = 1024 * 28 * 28;

/// Those that `plan` says a GPU needs beside the workspace.
fn planned(work: &Work, more: &[&str]) -> u64 {
    let config = work.path("config.toml");
    let arguments = [&["plan", &config, "--json", "--device", "cuda", "--set", "sample.count=0"], more].concat();
    let plan: Value = serde_json::from_str(&ok(work.command(&arguments))).unwrap();
    let parts = plan["memory"].as_array().unwrap().iter().filter(|part| part["on_host"] == false);
    parts.map(|part| part["bytes"].as_u64().unwrap()).sum::<u64>() - WORKSPACE
}

#[test]
fn a_run_takes_as_much_memory_as_was_planned() {
    let Some(work) = Work::new("memory::a_run_takes_as_much_memory_as_was_planned") else { return };
    for more in [&["--set", "train.batch=2"][..], &["--set", "train.precision=\"bf16\"", "--set", "train.shards=2"]] {
        let config = work.path("config.toml");
        let bench = ["bench", &config, "--json", "--device", "cuda", "--quiet", "--steps", "1", "--warmup", "0"];
        let report: Value = serde_json::from_str(&ok(work.command(&[&bench[..], more].concat()))).unwrap();
        let (taken, planned) =
            (report["gpu_memory_bytes"].as_u64().unwrap() - WORKSPACE - IMAGES, planned(&work, more));
        let ratio = taken as f64 / planned as f64;
        assert!((ratio - 1.0).abs() < 0.05, "{more:?}: {taken} bytes, planned {planned}");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_one_that_does() {
    let Some(work) = Work::new("memory::a_batch_that_does_not_fit_is_refused_with_one_that_does") else { return };
    let [five, six] = ["5", "6"].map(|batch| planned(&work, &["--set", &format!("train.batch={batch}")]));
    let card = (WORKSPACE + five.midpoint(six)).to_string();
    let bench = |batch: &str| {
        let (config, batch) = (work.path("config.toml"), format!("train.batch={batch}"));
        let steps = ["--device", "cuda", "--steps", "1", "--warmup", "0", "--set"];
        let mut command = work.command(&[&["bench", &config][..], &steps, &[&batch]].concat());
        command.env("CUDA_SIM_MEMORY", &card);
        command
    };
    fails(bench("64"), 7, &["a machine made of software", "set `train.batch` to 5 (now 64)", "more GPUs"]);
    fails(bench("6"), 7, &["set `train.batch` to 5 (now 6)"]);
    ok(bench("5"));
    // Nothing is left behind by a run that does not begin.
    let mut train = work.train("run", &["--device", "cuda", "--set", "train.batch=64"]);
    train.env("CUDA_SIM_MEMORY", &card);
    fails(train, 7, &["set `train.batch` to"]);
    assert!(!std::path::Path::new(&work.path("run")).join("checkpoints").exists());
}
