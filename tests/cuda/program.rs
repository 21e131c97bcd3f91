//! The program itself on the machine made of software: a run on a GPU as a user has it, and what it says where something is wrong.

use crate::machine::{WITH_KERNELS, library_path, not_tested};
use ddpm_dist::device::cuda::Image;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// A grey network of two levels on the images that come with the source.
const CONFIG: &str = "\
[data]
path = \"data/fashion-mnist-10k/t10k-images-idx3-ubyte.gz\"
size = 28
[model]
image_channels = 1
channels = [8, 16]
blocks = 1
attention_levels = [1]
groups = 4
[train]
steps = 6
batch = 4
[checkpoint]
every = 3
[sample]
count = 2
every = 0
steps = 3
batch = 2
";

pub struct Work {
    folder: tempfile::TempDir,
}

impl Work {
    /// None where the program has no kernels.
    pub fn new(test: &str) -> Option<Work> {
        if Image::embedded().is_none() {
            not_tested(&format!("{test}: built without nvcc"));
            return None;
        }
        if std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
            not_tested(&format!("{test}: there is no data set beside this program"));
            return None;
        }
        let work = Work { folder: tempfile::tempdir().unwrap() };
        std::fs::write(work.path("config.toml"), CONFIG).unwrap();
        Some(work)
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_string()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ddpm-dist"));
        command
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("LD_LIBRARY_PATH", library_path(&WITH_KERNELS));
        command.env("XDG_CACHE_HOME", self.folder.path()).env("RUST_BACKTRACE", "0");
        command
    }

    pub fn train(&self, run: &str, more: &[&str]) -> Command {
        let (config, run) = (self.path("config.toml"), self.path(run));
        self.command(&[&["train", &config, "--run-dir", &run][..], more].concat())
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
pub fn ok(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    said(&output)
}

/// Ends with that code and says all of these words.
#[track_caller]
pub fn fails(mut command: Command, code: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn last_checkpoint(run: &str) -> Vec<u8> {
    std::fs::read(Path::new(run).join("checkpoints/step-00000006/shard-00000-of-00001.safetensors")).unwrap()
}

#[test]
fn a_run_trains_goes_on_and_samples() {
    let Some(work) = Work::new("program::a_run_trains_goes_on_and_samples") else { return };
    let device = ["--device", "cuda"];
    ok(work.train("whole", &device));
    // Stopped after three steps, and gone on with.
    ok(work.train("parts", &["--device", "cuda", "--set", "train.steps=3"]));
    ok(work.train("parts", &device));
    assert!(last_checkpoint(&work.path("whole")) == last_checkpoint(&work.path("parts")), "the same bits");
    let samples = work.path("samples.png");
    ok(work.command(&["sample", &work.path("whole"), "--count", "3", "--out", &samples, "--device", "cuda"]));
    assert!(std::fs::metadata(samples).unwrap().len() > 0);
    // A GPU that is there is what is taken.
    let said = ok(work.command(&["doctor"]));
    assert!(said.contains("a machine made of software, cuDNN 9"), "{said}");
    let (config, bf16) = (work.path("config.toml"), "train.precision=\"bf16\"");
    let said = ok(work.command(&["bench", &config, "--set", bf16, "--steps", "2", "--warmup", "1", "--per-op"]));
    assert!(
        said.contains("on a machine made of software, bf16")
            && said.contains("GPU memory")
            && said.contains("group_norm"),
        "{said}"
    );
    let said = ok(work.command(&["plan", &config, "--set", bf16, "--device", "cuda"]));
    assert!(said.contains("on a GPU in bf16") && said.contains("workspace"), "{said}");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn bench_measures_a_gpu() {
    let Some(work) = Work::new("program::bench_measures_a_gpu") else { return };
    let config = work.path("config.toml");
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
    let json = |arguments: &[&str]| -> Value {
        let output = work.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for precision in ["f32", "bf16"] {
        let set = format!("train.precision=\"{precision}\"");
        let cuda = [&config, "--device", "cuda", "--set", &set, "--set", "data.size=8"];
        let bench = [&["bench"][..], &cuda, &["--steps", "2", "--warmup", "1"]].concat();
        let plan = json(&[&["plan"][..], &cuda, &["--json"]].concat());
        let report = json(&[&bench[..], &["--per-op", "--json"]].concat());
        for (key, expected) in [("device", "cuda"), ("gpu", "a machine made of software"), ("dtype", precision)] {
            assert_eq!(report[key], expected, "{key}");
        }
        // Products that large are made by cuBLASLt alone, and a step has much else to do.
        let [rate, peak] = ["gflops", "peak_gflops"].map(|key| number(&report[key]));
        assert!(0.0 < rate && rate < peak, "{report}");
        let median = number(&report["step_ms"]["median"]);
        assert!(near(rate, number(&plan["step_flops"]) / median / 1e6), "{report}");
        assert!(near(number(&report["images_per_second"]), 4e3 / median), "{report}");
        // Weights, gradients, both moments and their average at least.
        let state = 5.0 * 4.0 * number(&plan["parameters"]);
        assert!(number(&report["gpu_memory_bytes"]) > state && number(&report["peak_memory_bytes"]) > 1e6, "{report}");

        let (rows, planned) = (report["per_op"].as_array().unwrap(), plan["ops"].as_array().unwrap());
        assert_eq!(rows.len(), planned.len());
        for row in planned {
            let same = |r: &&Value| r["op"] == row["op"] && r["phase"] == row["phase"];
            assert_eq!(rows.iter().find(same).expect("every op is measured")["count"], row["count"]);
        }
        // A median of two is the mean, so that the parts add up to the step but for what is around its programs and may be held up. This
        // machine's clock is the host's, in floats of milliseconds.
        let share: f64 = rows.iter().map(|row| number(&row["share"])).sum();
        assert!(share > 0.0 && share <= 1.0 + 1e-5, "{share} of the step: {report}");

        let table = ok(work.command(&bench));
        for words in ["GFLOP/s (3 × forward), ", " of large matrix products here", "GPU memory"] {
            assert!(table.contains(words), "{words} is not in: {table}");
        }
    }
}

#[test]
fn bench_compares_what_a_gpu_does_and_measures_reverse_steps() {
    let Some(work) = Work::new("program::bench_compares_what_a_gpu_does_and_measures_reverse_steps") else { return };
    let config = work.path("config.toml");
    let bench = ["bench", &config, "--steps", "2", "--warmup", "1"];
    let read = |path: &str| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let plan: Value =
        serde_json::from_str(&ok(work.command(&["plan", &config, "--json", "--device", "cuda"]))).unwrap();
    for (what, more, batch) in [("training", &[][..], 4), ("sampling", &["--sampling", "--set", "sample.batch=3"], 3)] {
        let [before, after] = ["before", "after"].map(|when| work.path(&format!("{what}-{when}.json")));
        ok(work.command(&[&bench[..], more, &["--device", "cuda", "--json", &before]].concat()));
        let table =
            ok(work
                .command(&[&bench[..], more, &["--device", "cuda", "--json", &after, "--compare", &before]].concat()));
        assert!(table.contains(" images per second of ddpm-dist "), "{table}");
        let [before, after] = [&before, &after].map(|path| read(path));
        for report in [&before, &after] {
            assert_eq!((&report["what"], &report["batch"]), (&what.into(), &batch.into()));
            assert!(number(&report["peak_gflops"]) > 0.0 && number(&report["gpu_memory_bytes"]) > 0.0, "{report}");
        }
        let ratio = number(&after["images_per_second"]) / number(&before["images_per_second"]);
        assert!((number(&after["compared"]["ratio"]) / ratio - 1.0).abs() < 1e-9, "{after}");
        if what == "sampling" {
            // The network forward, once for each image.
            let flops = number(&after["gflops"]) * number(&after["step_ms"]["median"]) * 1e6;
            assert!((flops / (3.0 * number(&plan["forward_flops_per_image"])) - 1.0).abs() < 1e-9, "{after}");
        }
    }
    let compared =
        |more: &[&str]| work.command(&[&bench[..], &["--compare", &work.path("training-before.json")], more].concat());
    let mut other = compared(&["--device", "cuda"]);
    other.env("CUDA_SIM_NAME", "another card");
    fails(other, 2, &["another GPU", "a machine made of software there, another card here"]);
    fails(compared(&["--device", "cpu"]), 2, &["another device", "cuda there, cpu here"]);
    fails(compared(&["--device", "cuda", "--sampling"]), 2, &["training there, sampling here"]);
}

#[test]
fn what_keeps_a_gpu_from_working_is_told() {
    let Some(work) = Work::new("program::what_keeps_a_gpu_from_working_is_told") else { return };
    let cuda = ["--device", "cuda"];
    let with = |name: &str, value: &str, more: &[&str]| {
        let mut command = work.train("refused", more);
        command.env(name, value);
        command
    };
    fails(with("LD_LIBRARY_PATH", "", &cuda), 7, &["there is no CUDA driver here", "install NVIDIA's driver"]);
    let [driver, dnn, blas] = WITH_KERNELS;
    for (libraries, missing) in [([driver, dnn], "there is no cuBLASLt"), ([driver, blas], "there is no cuDNN")] {
        let path = library_path(&libraries).into_string().unwrap();
        fails(with("LD_LIBRARY_PATH", &path, &cuda), 7, &[missing, "pip install"]);
    }
    // Another library by the name of cuBLASLt.
    let cudnn = std::path::PathBuf::from(library_path(&[dnn]));
    std::os::unix::fs::symlink(cudnn.join("libcudnn.so"), work.path("libcublasLt.so")).unwrap();
    let path = format!("{}:{}", work.path(""), library_path(&[driver, dnn]).into_string().unwrap());
    fails(with("LD_LIBRARY_PATH", &path, &cuda), 7, &["this is cuBLASLt without `cublasLtGetVersion`", "pip install"]);
    fails(with("CUDA_SIM_CARD", "7.5 65536", &cuda), 7, &["has compute capability 7.5"]);
    fails(with("CUDA_SIM_CUBLASLT_FAIL", "create", &cuda), 7, &["cuBLASLt cannot start"]);
    fails(
        with("CUDA_SIM_CUBLASLT_FAIL", "heuristic", &cuda),
        7,
        &["cuBLASLt cannot find an algorithm for the product of"],
    );
    fails(with("CUDA_SIM_CUBLASLT_FAIL", "multiply", &cuda), 7, &["cuBLASLt cannot multiply matrices"]);
    fails(with("CUDA_SIM_CUDNN_FAIL", "create", &cuda), 7, &["cuDNN"]);
    fails(
        with("LD_LIBRARY_PATH", "", &["--device", "cpu", "--set", "train.precision=\"bf16\""]),
        2,
        &["CPU cores compute in f32 only"],
    );
    fails(work.train("refused", &["--device", "tpu"]), 2, &["auto, cpu, cuda"]);
    // What is not asked for, and is not there, is done without; where no GPU is, nothing is wrong.
    fails(with("CUDA_SIM_GPUS", "0", &cuda), 7, &["there is no GPU 0 here: this machine has 0"]);
    let said = ok(with("CUDA_SIM_GPUS", "0", &["--set", "train.steps=1"]));
    assert!(!said.contains("computing on CPU cores"), "{said}");
    let said = ok(with("CUDA_SIM_CUBLASLT_FAIL", "create", &["--set", "train.steps=1"]));
    assert!(said.contains("computing on CPU cores: cuBLASLt cannot start"), "{said}");
}

/// Images that a GPU has no room for are uploaded for each step, and give the same bits.
#[test]
fn a_run_is_the_same_whether_the_gpu_holds_the_images() {
    let Some(work) = Work::new("program::a_run_is_the_same_whether_the_gpu_holds_the_images") else { return };
    let held = ok(work.train("held", &["--device", "cuda", "--verbose"]));
    assert!(held.contains("the GPU holds all images"), "{held}");
    let mut uploaded = work.train("uploaded", &["--device", "cuda", "--verbose"]);
    // The images are 7.8 MB.
    let config = work.path("config.toml");
    let plan: Value =
        serde_json::from_str(&ok(work.command(&["plan", &config, "--json", "--device", "cuda"]))).unwrap();
    let parts = plan["memory"].as_array().unwrap().iter().filter(|part| part["on_host"] == false);
    let needed: u64 = parts.map(|part| part["bytes"].as_u64().unwrap()).sum();
    uploaded.env("CUDA_SIM_MEMORY", (needed + (10 << 20)).to_string());
    let said = ok(uploaded);
    assert!(!said.contains("the GPU holds all images"), "{said}");
    assert!(last_checkpoint(&work.path("held")) == last_checkpoint(&work.path("uploaded")), "the same bits");
}
