//! What training takes of a GPU's memory is what `plan` says, and what does not fit is refused before it begins.

use crate::build::Build;
use crate::machine::{library_path, not_tested};
use crate::program::{Work, fails, ok};
use cudarc::driver::result;
use ddpm_dist::device::cuda::{self, Gpu};
use serde_json::Value;
use std::process::Command;

/// Bytes that libraries take whatever the config.
const WORKSPACE: u64 = cuda::WORKSPACE as u64;
/// What `bench` has in place of a data set, where there is room for it: 1024 images.
const IMAGES: u64 = 1024 * 28 * 28;

/// Those that `plan` says a GPU needs beside the workspace, of a run without grids unless `more` has some.
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

/// Grids of many more images than a batch has.
const GRIDS: [&str; 6] = ["--set", "sample.count=32", "--set", "sample.batch=32", "--set", "sample.every=3"];

/// On a card that has 2 % more than was planned; with 2 % less it is refused. A plan that is looked for once it runs takes memory, too.
#[test]
fn a_run_with_grids_takes_as_much_memory_as_was_planned() {
    let Some(work) = Work::new("memory::a_run_with_grids_takes_as_much_memory_as_was_planned") else { return };
    for precision in ["f32", "bf16"] {
        let set = format!("train.precision=\"{precision}\"");
        let more = [&GRIDS[..], &["--set", &set]].concat();
        let needed = planned(&work, &more);
        assert!(needed > 2 * planned(&work, &["--set", &set]), "the grids weigh most: {needed}");
        let on_card = |run: &str, bytes: u64| {
            let mut train = work.train(run, &[&["--device", "cuda"], &more[..]].concat());
            train.env("CUDA_SIM_MEMORY", (WORKSPACE + bytes).to_string());
            train
        };
        ok(on_card(precision, needed + needed / 50));
        assert!(std::path::Path::new(&work.path(precision)).join("samples/step-00000006.png").exists());
        fails(on_card("small", needed - needed / 50), 7, &["set `train.batch` to"]);
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

/// Says to a process of the test below whether it keeps memory.
const KEEPS: &str = "DDPM_DIST_CUDA_KEEPS";

/// A library may hold the context for as long as the process: what is not freed would be lost until then.
#[test]
fn a_gpu_frees_what_it_has_allocated() {
    const TEST: &str = "memory::a_gpu_frees_what_it_has_allocated";
    if let Ok(keeps) = std::env::var(KEEPS) {
        let gpu = Gpu::without_kernels(0).unwrap();
        let [first, _second] = [(); 2].map(|()| gpu.allocate(1000).unwrap());
        gpu.free(first).unwrap();
        if keeps == "yes" {
            // SAFETY: the size is not zero.
            unsafe { result::malloc_sync(1000) }.unwrap();
        }
        return;
    }
    if std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        return not_tested("what is left when a context goes: a real driver does not say");
    }
    for (keeps, is_left) in [("no", false), ("yes", true)] {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", TEST, "--nocapture"]).env(KEEPS, keeps);
        let output = again.env("LD_LIBRARY_PATH", library_path(&[Build::BareDriver])).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        assert_eq!(said.contains("1 allocations were left when the context went"), is_left, "{said}");
    }
}
