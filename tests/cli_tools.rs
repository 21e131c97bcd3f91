//! `plan`, `bench` and `doctor` as a user runs them.

use ddpm_dist::device::cuda::Image;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No data set stands there: none of these commands opens one.
const PAPER: &str = "[data]\npath = \"nowhere\"\nsize = 32\n";
const PAPER_256: &str = "\
[data]
path = \"nowhere\"
size = 256
[model]
channels = [128, 128, 256, 256, 512, 512]
attention_levels = [4]
dropout = 0.0
[train]
batch = 64
";
const TINY: &str = "\
[data]
path = \"nowhere\"
size = [8, 12]
[model]
image_channels = 1
channels = [8, 16]
blocks = 1
attention_levels = [1]
groups = 4
dropout = 0.1
[train]
batch = 3
";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).to_str().unwrap().to_string()
    }
}

fn ddpm_dist(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ddpm-dist"));
    command.args(arguments).env_remove("DDPM_DIST_SIMD").env_remove("NVCC");
    command
}

fn output(arguments: &[&str]) -> Output {
    ddpm_dist(arguments).output().unwrap()
}

#[track_caller]
fn stdout_of(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout_of(output(arguments))).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn plan_knows_the_papers_models() {
    let folder = Folder::new();
    let file = folder.write("cifar10.toml", PAPER);
    let text = stdout_of(output(&["plan", &file]));
    assert!(text.contains("35,746,307") && text.contains("12.44 GFLOP per image"), "{text}");
    let plan = json_of(&["plan", &file, "--json"]);
    assert_eq!(plan["parameters"], 35_746_307);
    assert_eq!(plan["batch"], 128);
    assert_eq!((number(&plan["forward_flops_per_image"]) / 1e7).round(), 1244.0);

    let file = folder.write("256.toml", PAPER_256);
    let plan = json_of(&["plan", &file, "--json"]);
    assert_eq!(plan["parameters"], 113_673_219);
    assert_eq!((number(&plan["forward_flops_per_image"]) / 1e9).round(), 497.0);
}

#[test]
fn plan_adds_up() {
    let folder = Folder::new();
    let file = folder.write("cifar10.toml", PAPER);
    let plan = json_of(&["plan", &file, "--json", "--set", "train.batch=2"]);
    let sum = |list: &str, key: &str| plan[list].as_array().unwrap().iter().map(|row| number(&row[key])).sum::<f64>();
    assert_eq!(sum("memory", "bytes"), number(&plan["memory_total"]));
    assert_eq!(sum("ops", "count"), number(&plan["instructions"]));
    assert_eq!(sum("ops", "flops"), number(&plan["arithmetic"]));
    assert_eq!(number(&plan["forward_flops"]), 2.0 * number(&plan["forward_flops_per_image"]));
    assert_eq!(number(&plan["step_flops"]), 3.0 * number(&plan["forward_flops"]));

    let bytes = |name: &str| {
        let part = plan["memory"].as_array().unwrap().iter().find(|part| part["name"] == name);
        number(&part.unwrap_or_else(|| panic!("no {name}"))["bytes"])
    };
    // Gaps between tensors are below 256 bytes, and there are some hundred tensors.
    let weights = bytes("weights");
    assert!((0.0..256.0 * 400.0).contains(&(weights - 4.0 * 35_746_307.0)), "{weights}");
    assert_eq!(bytes("gradients"), weights);
    assert_eq!(bytes("moments"), 2.0 * weights);
    assert_eq!(bytes("ema"), weights);
    // Twice the images: twice the activations; the flat buffers stay.
    let twice = json_of(&["plan", &file, "--json", "--set", "train.batch=4"]);
    let arena = twice["memory"].as_array().unwrap().iter().find(|part| part["name"] == "arena").unwrap();
    let ratio = number(&arena["bytes"]) / bytes("arena");
    assert!((1.5..2.1).contains(&ratio), "{ratio}");
}

#[test]
fn plan_lists_every_instruction() {
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let instructions = number(&json_of(&["plan", &file, "--json"])["instructions"]) as usize;
    let text = stdout_of(output(&["plan", &file, "--listing"]));
    let listing = text.split_once("\nProgram").unwrap().1;
    let lines: Vec<&str> = listing.lines().skip(1).collect();
    assert_eq!(lines.len(), instructions);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line.split_whitespace().next(), Some(i.to_string().as_str()), "{line}");
    }
    assert!(lines[0].contains("q_sample") && lines[instructions - 1].contains("adam_ema"), "{listing}");
    let json = json_of(&["plan", &file, "--listing", "--json"]);
    let in_json: Vec<&str> = json["listing"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert_eq!(in_json, lines);
}

#[test]
fn plan_says_what_is_missing() {
    let folder = Folder::new();
    let file = folder.write("sizeless.toml", "[data]\npath = \"nowhere\"\n");
    let refused = output(&["plan", &file]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--set data.size"));
    stdout_of(output(&["plan", &file, "--set", "data.size=32"]));
    let odd = output(&["plan", &file, "--set", "data.size=30"]);
    assert_eq!(odd.status.code(), Some(2));
}

#[test]
fn values_out_of_range_are_shown_where_they_stand() {
    let folder = Folder::new();
    let file = folder.write("bad.toml", &TINY.replace("groups = 4", "groups = 5"));
    let line = TINY.lines().position(|l| l.starts_with("channels")).unwrap() + 1;
    for command in ["plan", "bench"] {
        let refused = |arguments: &[&str], words: &[&str]| {
            let refused = output(&[&[command, &file], arguments].concat());
            let stderr = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status.code(), Some(2), "{stderr}");
            assert!(words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
        };
        refused(&[], &[&format!("bad.toml:{line}:"), "`model.channels`", "multiples of model.groups = 5"]);
        refused(&["--set", "model.groups=3"], &["`model.channels`", "model.groups = 3"]);
        refused(&["--set", "model.groups=4", "--set", "model.blocks=65"], &["--set model.blocks=65", "`model.blocks`"]);
    }
}

#[test]
fn sizes_that_cannot_be_counted_are_refused_and_not_wrapped() {
    let folder = Folder::new();
    let file = folder.write("huge.toml", PAPER);
    let with = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        output(&[&["plan", &file, "--json"], &sets[..]].concat())
    };
    let channels = "model.channels=[65536,65536]";
    for (sets, key) in [
        (&[channels, "data.size=8192", "train.batch=1048576"][..], channels),
        (&[channels, "train.batch=1048576"], "train.batch=1048576"),
        (&["data.size=8192", "train.batch=1048576"], "data.size=8192"),
        (&["data.size=512", "train.batch=1", "sample.batch=4096", channels], "sample.batch=4096"),
    ] {
        let refused = with(sets);
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{sets:?}: {stderr}");
        assert!(stderr.contains("2^60"), "{sets:?}: {stderr}");
        assert!(stderr.contains(key) || key == "data.size=8192", "{sets:?}: {stderr}");
    }
    // What is only absurd is counted: an image costs the same alone and among many.
    let plan = |batch: &str| -> Value { serde_json::from_str(&stdout_of(with(&[channels, batch]))).unwrap() };
    let (one, many) = (plan("train.batch=1"), plan("train.batch=64"));
    assert_eq!(one["forward_flops_per_image"], many["forward_flops_per_image"]);
    // The 3x3 convolutions between 65536 channels at 32² and 16² are most of it: (2 + 3) and (2 + 3 + 4) of 18·C²·pixels, at least.
    let convolution = |side: f64| 18.0 * 65536f64.powi(2) * side * side;
    assert!(number(&one["forward_flops_per_image"]) > 5.0 * convolution(32.0) + 9.0 * convolution(16.0));
    assert_eq!(number(&many["forward_flops"]), 64.0 * number(&many["forward_flops_per_image"]));
    let bytes = |plan: &Value| number(&plan["memory_total"]);
    assert!(bytes(&many) > bytes(&one) && bytes(&one) > 16.0 * number(&one["parameters"]));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let folder = Folder::new();
    let file = folder.write("cifar10.toml", PAPER);
    let mut command = ddpm_dist(&["plan", &file, "--listing"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bench_measures() {
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let plan = json_of(&["plan", &file, "--json"]);
    let report = json_of(&["bench", &file, "--steps", "2", "--warmup", "1", "--threads", "1", "--per-op", "--json"]);
    for (key, expected) in [("tool", "ddpm-dist"), ("model", "tiny"), ("device", "cpu"), ("dtype", "f32")] {
        assert_eq!(report[key], expected, "{key}");
    }
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    for (key, expected) in [("batch", 3), ("threads", 1), ("steps", 2)] {
        assert_eq!(report[key], expected, "{key}");
    }
    let step = &report["step_ms"];
    let [median, p10, p90] = ["median", "p10", "p90"].map(|key| number(&step[key]));
    assert!(0.0 < p10 && p10 <= median && median <= p90, "{step}");
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
    assert!(near(number(&report["images_per_second"]), 3e3 / median), "{report}");
    assert!(near(number(&report["gflops"]), number(&plan["step_flops"]) / median / 1e6), "{report}");
    #[cfg(target_os = "linux")]
    assert!(number(&report["peak_memory_bytes"]) > 1e6, "{report}");

    let rows = report["per_op"].as_array().unwrap();
    let planned = plan["ops"].as_array().unwrap();
    assert_eq!(rows.len(), planned.len());
    for row in planned {
        let same = |r: &&Value| r["op"] == row["op"] && r["phase"] == row["phase"];
        assert_eq!(rows.iter().find(same).expect("every op is measured")["count"], row["count"]);
    }
    let times: Vec<f64> = rows.iter().map(|row| number(&row["ms"])).collect();
    assert!(times.is_sorted_by(|a, b| a >= b), "{times:?}");
    assert!(times[0] > 0.0);
    // With two steps a median is the mean, so that the parts add up to less than the whole.
    let share: f64 = rows.iter().map(|row| number(&row["share"])).sum();
    assert!(share > 0.0 && share <= 1.0 + 1e-9, "{share}");
}

#[test]
fn bench_writes_a_file_beside_its_table() {
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let out = folder.path("results/tiny.json");
    let arguments = ["bench", &file, "--steps", "1", "--warmup", "0", "--json", out.to_str().unwrap()];
    let table = stdout_of(output(&arguments));
    assert!(table.contains("ms median") && table.contains("GFLOP/s"), "{table}");
    let report: Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    assert_eq!(report["steps"], 1);
    assert!(report.get("per_op").is_none());
}

#[test]
fn bench_compares_with_what_was_measured_before() {
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let one_step = ["bench", &file, "--steps", "1", "--warmup", "1", "--json"];
    let before = json_of(&one_step);
    assert_eq!(before["what"], "training");
    let theirs = |changes: &[(&str, Value)]| {
        // As the peer writes it, with less in it.
        let mut peer = serde_json::json!({"tool": "pytorch", "version": "2.15.0"});
        for key in ["what", "model", "batch", "device", "dtype"] {
            peer[key] = before[key].clone();
        }
        let rate = number(&before["images_per_second"]);
        peer["images_per_second"] = (rate / 4.0).into();
        peer["gflops"] = (number(&before["gflops"]) / 4.0).into();
        changes.iter().for_each(|(key, value)| peer[key] = value.clone());
        folder.write("peer.json", &peer.to_string())
    };
    let peer = theirs(&[]);
    let report = json_of(&[&one_step[..], &["--compare", &peer]].concat());
    let ratio = 4.0 * number(&report["images_per_second"]) / number(&before["images_per_second"]);
    assert!((number(&report["compared"]["ratio"]) / ratio - 1.0).abs() < 1e-9, "{report}");
    let table = stdout_of(output(&["bench", &file, "--steps", "1", "--compare", &peer]));
    assert!(table.contains("images per second of pytorch 2.15.0"), "{table}");

    let refused = |changes: &[(&str, Value)], words: &[&str]| {
        let peer = theirs(changes);
        let output = output(&[&one_step[..], &["--compare", &peer]].concat());
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    };
    refused(&[("batch", 4.into())], &["peer.json", "batch", "4 there, 3 here"]);
    refused(&[("device", "cuda".into())], &["device", "cuda there, cpu here"]);
    refused(&[("dtype", "bf16".into())], &["precision", "bf16 there, f32 here"]);
    refused(&[("what", "sampling".into())], &["sampling there, training here"]);
    refused(&[("gflops", 1e9.into())], &["network", "GFLOP an image"]);
    refused(&[("tool", 3.into())], &["peer.json", "expected a string", "train_step.py"]);
    let missing = output(&[&one_step[..], &["--compare", "nowhere.json"]].concat());
    assert_eq!(missing.status.code(), Some(2));
}

#[test]
fn bench_measures_reverse_steps() {
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let plan = json_of(&["plan", &file, "--json"]);
    let report = json_of(&["bench", &file, "--sampling", "--set", "sample.batch=5", "--steps", "3", "--json"]);
    assert_eq!((&report["what"], &report["batch"], &report["steps"]), (&"sampling".into(), &5.into(), &3.into()));
    // The network forward, once for each image.
    let flops = number(&report["gflops"]) * number(&report["step_ms"]["median"]) * 1e6;
    assert!((flops / (5.0 * number(&plan["forward_flops_per_image"])) - 1.0).abs() < 1e-9, "{report}");
    let output = output(&["bench", &file, "--sampling", "--per-op"]);
    assert_eq!(output.status.code(), Some(2));
}

/// Whether the process has its own answer to SIGINT by now.
#[cfg(target_os = "linux")]
fn catches_sigint(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 << 1 != 0)
}

#[cfg(target_os = "linux")]
#[test]
fn bench_stops_at_a_signal() {
    use rustix::process::{Pid, Signal, kill_process};
    let folder = Folder::new();
    let file = folder.write("tiny.toml", TINY);
    let mut command = ddpm_dist(&["bench", &file, "--steps", "100000000", "--warmup", "0", "--json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while !catches_sigint(child.id()) {
        assert!(start.elapsed() < Duration::from_secs(60), "the program does not catch SIGINT");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Somewhere among its steps: on a slow machine before the first, which ends alike.
    std::thread::sleep(Duration::from_millis(500));
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("stopped"), "{stderr}");
    // What was measured by then is still told.
    if stderr.contains("stopped after") {
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(number(&report["steps"]) >= 1.0);
    }
}

fn doctor(set: &[(&str, &Path)]) -> String {
    stdout_of(ddpm_dist(&["doctor"]).envs(set.iter().copied()).output().unwrap())
}

/// The report's line on `subject`, with its advice.
#[track_caller]
fn finding(report: &str, subject: &str) -> (bool, String) {
    let mut lines = report.lines().skip_while(|line| !line.get(9..).is_some_and(|rest| rest.starts_with(subject)));
    let line = lines.next().unwrap_or_else(|| panic!("no {subject}: {report}"));
    let is_ok = line.starts_with("ok ");
    assert!(is_ok || line.starts_with("warning "), "{line}");
    let advice = lines.next().filter(|line| line.trim_start().starts_with('→'));
    assert_eq!(advice.is_some(), !is_ok, "a warning, and nothing else, comes with advice: {report}");
    (is_ok, format!("{line}\n{}", advice.unwrap_or_default()))
}

#[test]
fn doctor_looks_at_everything() {
    let report = doctor(&[]);
    for subject in ["cores", "threads", "SIMD", "memory", "device", "CUDA driver", "cuBLASLt", "cuDNN", "NVRTC", "NCCL"]
    {
        finding(&report, subject);
    }
    let kernels = finding(&report, "CUDA kernels").1;
    match Image::embedded() {
        Some(image) => assert!(kernels.contains(image.compiler) && kernels.contains("sm_90a"), "{kernels}"),
        None => assert!(kernels.contains("no nvcc"), "{kernels}"),
    }
    let device = finding(&report, "device").1;
    assert!(device.contains("CPU cores") || device.contains("cuDNN"), "{device}");
    let folder = Folder::new();
    let output = ddpm_dist(&["doctor"]).current_dir(folder.path("")).output().unwrap();
    let report = stdout_of(output);
    assert!(finding(&report, "current directory").1.contains("writable"), "{report}");
}

#[test]
fn a_misspelt_level_of_vector_instructions_is_refused() {
    let plan =
        |level: &str| ddpm_dist(&["plan", "configs/quickstart.toml"]).env("DDPM_DIST_SIMD", level).output().unwrap();
    let refused = plan("avx1024");
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("DDPM_DIST_SIMD=avx1024") && stderr.contains("portable, avx2 or avx512"), "{stderr}");
    for level in ["", "portable", "avx2", "avx512"] {
        assert!(plan(level).status.success(), "{level}");
    }
}

#[test]
fn doctor_says_what_the_environment_changes() {
    let folder = Folder::new();
    let (is_ok, text) = finding(&doctor(&[("DDPM_DIST_SIMD", Path::new("portable"))]), "SIMD");
    assert!(!is_ok && text.contains("unset DDPM_DIST_SIMD"), "{text}");
    let (is_ok, text) = finding(&doctor(&[("DDPM_DIST_SIMD", Path::new("fastest"))]), "SIMD");
    assert!(!is_ok && text.contains("refuses"), "{text}");

    let caches = folder.path("caches");
    let (is_ok, text) = finding(&doctor(&[("XDG_CACHE_HOME", &caches)]), "data cache");
    assert_eq!(is_ok, !text.contains('→'));
    assert!(text.contains("caches/ddpm-dist: will be made"), "{text}");
    folder.write("file", "");
    let (is_ok, text) = finding(&doctor(&[("XDG_CACHE_HOME", &folder.path("file"))]), "data cache");
    assert!(!is_ok && text.contains("cannot be written"), "{text}");

    let too_many = stdout_of(output(&["doctor", "--threads", "1024"]));
    let (is_ok, text) = finding(&too_many, "threads");
    assert!(text.contains("1024") && !is_ok, "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn doctor_finds_libraries_without_loading_them() {
    let folder = Folder::new();
    let path = folder.path("libcudnn.so.9");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ddpm-dist"), &path).unwrap();
    let (is_ok, text) = finding(&doctor(&[("LD_LIBRARY_PATH", &folder.path(""))]), "cuDNN");
    assert!(is_ok && text.contains(path.to_str().unwrap()), "{text}");
    // What the loader would choke on is warned of, not met.
    let broken = Folder::new();
    broken.write("libcuda.so.1", "");
    let (is_ok, text) = finding(&doctor(&[("LD_LIBRARY_PATH", &broken.path(""))]), "CUDA driver");
    assert!(!is_ok && text.contains("empty"), "{text}");
}
