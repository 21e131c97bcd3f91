//! Bad input, case by case: the exit code, one message that names what is wrong, and nothing lost.

mod common;

use common::{Project, npy};
use std::path::Path;
use std::process::Command;

/// Trains with these arguments and expects a refusal that leaves no run behind.
fn refused(project: &Project, more: &[&str], code: i32, words: &[&str]) {
    project.train("run", more).refused(code, words);
    assert!(!project.path("run").exists(), "{more:?} left a run directory");
}

fn pipe(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

fn config_of(project: &Project) -> String {
    String::from_utf8(project.read("config.toml")).unwrap()
}

#[test]
fn configs() {
    let project = Project::new();
    let good = config_of(&project);
    let train = |words: &[&str]| refused(&project, &[], 2, words);

    std::fs::remove_file(project.path("config.toml")).unwrap();
    train(&["config.toml", "does not exist"]);
    std::fs::create_dir(project.path("config.toml")).unwrap();
    train(&["config.toml", "cannot read", "a folder"]);
    std::fs::remove_dir(project.path("config.toml")).unwrap();
    // A pipe would be waited for without end.
    pipe(&project.path("config.toml"));
    train(&["config.toml", "cannot read", "a named pipe"]);
    std::fs::remove_file(project.path("config.toml")).unwrap();
    project.write("config.toml", [0xff, 0xfe, 0x00]);
    train(&["config.toml"]);

    let line = |text: &str| good.lines().position(|l| l == text).unwrap() + 1;
    for (from, to, words) in [
        ("steps = 20", "steps = = 20", &["not valid TOML"][..]),
        ("steps = 20", "step = 20", &["unknown key `train.step`", "did you mean `train.steps`"]),
        ("steps = 20", "steps = \"many\"", &["`train.steps`", "many"]),
        ("steps = 20", "steps = 0", &["`train.steps` = 0", "1 ≤ steps"]),
        ("batch = 4", "batch = 1.5", &["`train.batch`", "1.5"]),
        ("sampler = \"ddim\"", "sampler = \"ddmi\"", &["`sample.sampler`", "did you mean \"ddim\""]),
        ("channels = [8, 16]", "channels = [8, 18]", &["`model.channels`", "multiples of model.groups = 4"]),
        ("decay = 0.9", "decay = 1.5", &["`ema.decay` = 1.5", "decay < 1"]),
        ("timesteps = 100", "timesteps = 0", &["`diffusion.timesteps` = 0"]),
        ("every = 5", "every = 5\nkeep_every = 7", &["`checkpoint.keep_every` = 7", "checkpoint.every = 5"]),
    ] {
        let place = format!("config.toml:{}", line(from) + to.lines().count() - 1);
        project.write("config.toml", good.replacen(from, to, 1));
        let words: Vec<&str> = words.iter().copied().chain([&place[..]]).collect();
        train(&words);
    }
    project.write("config.toml", good.replacen("[train]", "[training]", 1));
    train(&["unknown", "training", "`train`"]);
    project.write("config.toml", "");
    train(&["`data.path`"]);
}

#[test]
fn overrides() {
    let project = Project::new();
    for (set, words) in [
        ("train.steps=many", &["--set train.steps=many", "`train.steps`"][..]),
        ("train.steps=\"5\"", &["--set", "`train.steps`", "whole number"]),
        ("train.steps=-5", &["--set train.steps=-5", "`train.steps`"]),
        ("optim.lr=true", &["--set optim.lr=true", "`optim.lr`"]),
        ("optim.lr=2", &["--set optim.lr=2", "0 < lr ≤ 1"]),
        ("optim.lr=nan", &["--set optim.lr=nan", "`optim.lr`"]),
        // Values that are in range, and in f32, in which they are used, 0 or 1.
        ("optim.lr=1e-50", &["--set optim.lr=1e-50", "0 < lr ≤ 1 in f32"]),
        ("optim.eps=1e-50", &["--set optim.eps=1e-50", "0 < eps < 1 in f32"]),
        ("optim.clip=1e-60", &["--set optim.clip=1e-60", "clip > 0 in f32"]),
        ("model.norm_eps=1e-50", &["--set model.norm_eps=1e-50", "0 < norm_eps < 1 in f32"]),
        ("model.dropout=0.99999999", &["--set model.dropout=0.99999999", "0 ≤ dropout < 1 in f32"]),
        ("diffusion.clip=1e-60", &["--set diffusion.clip=1e-60", "f32"]),
        ("diffusion.beta_start=1e-17", &["--set diffusion.beta_start=1e-17", "above 2^-54"]),
        ("model.channels=[131072]", &["--set model.channels=[131072]", "1 to 65536 channels"]),
        ("optim.rate=1e-3", &["--set optim.rate=1e-3", "unknown key `optim.rate`"]),
        ("model.channels=8", &["--set model.channels=8", "`model.channels`"]),
        ("model.attention_levels=[5]", &["`model.attention_levels`", "levels 0 to 1"]),
        ("data.size=[8]", &["--set data.size=[8]", "`data.size`"]),
        ("nonsense", &["--set nonsense", "section.key=value"]),
        ("=5", &["--set =5"]),
    ] {
        refused(&project, &["--set", set], 2, words);
    }
    project.run(&["train", "config.toml", "--threads", "0"]).refused_by_parser(&["--threads"]);
    project.run(&["train", "config.toml", "--set"]).refused_by_parser(&["--set"]);
    project.run(&["trian", "config.toml"]).refused_by_parser(&["trian", "train"]);
}

/// More than any address space holds, so that it is refused however generous the system is with memory.
#[test]
fn a_model_that_fits_no_machine() {
    let project = Project::new();
    let large = ["--set", "model.channels=[65536, 65536, 65536]", "--set", "model.blocks=64"];
    project.train("run", &large).refused(7, &["memory", "`ddpm-dist plan`"]);
}

#[test]
fn data_sets_that_are_not_there() {
    let project = Project::new();
    let set = |path: &str| format!("data.path=\"{path}\"");
    refused(&project, &["--set", &set("nowhere")], 3, &["no data set at nowhere", "folder of PNG or JPEG"]);
    refused(&project, &["--set", &set("data/fashion-of-nobody")], 3, &["dataset-fashion-mnist"]);
    refused(&project, &["--set", &set("cifar-of-nobody")], 3, &["cifar-10-binary.tar.gz"]);
    std::fs::create_dir(project.path("empty")).unwrap();
    refused(&project, &["--set", &set("empty")], 3, &["empty", "no images"]);
    project.write("notes.txt", "no images here");
    refused(&project, &["--set", &set("notes.txt")], 3, &["notes.txt"]);
    project.write("none.npy", npy(&[0, 8, 8, 3], &[]));
    refused(&project, &["--set", &set("none.npy")], 3, &["none.npy", "no images"]);
    pipe(&project.path("pipe"));
    refused(&project, &["--set", &set("pipe")], 3, &["pipe", "a named pipe", "expected a regular file"]);
    project.write("void.npy", []);
    refused(&project, &["--set", &set("void.npy")], 3, &["void.npy"]);
}

/// `00 00 08 03`, the dimensions, the pixels.
fn idx(dims: [u32; 3], pixels: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3];
    dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend(pixels);
    bytes
}

#[test]
fn truncated_data_sets() {
    let project = Project::new();
    let set = |path: &str| format!("data.path=\"{path}\"");
    let pixels: Vec<u8> = (0..8 * 32 * 32 * 3).map(|i| (i % 251) as u8).collect();
    let whole_idx = idx([8, 8, 8], &pixels[..512]);
    let whole_npy = npy(&[8, 8, 8, 3], &pixels[..8 * 8 * 8 * 3]);
    let record: Vec<u8> = [7].iter().chain(&pixels[..3072]).copied().collect();
    let whole_cifar = record.repeat(8);
    for (name, whole, lost, more) in [
        ("cut-idx3-ubyte", &whole_idx, 1, &["--set", "model.image_channels=1"][..]),
        ("cut.npy", &whole_npy, 1, &[]),
        ("data_batch_1.bin", &whole_cifar, 100, &[]),
    ] {
        let grey = [&["--set", "data.size=8"][..], more].concat();
        let arguments = if name.ends_with("bin") { vec!["--set", "data.size=32"] } else { grey };
        project.write(name, whole);
        let path = set(name);
        let arguments = [&arguments[..], &["--set", &path]].concat();
        project.trained("whole", &[&arguments[..], &["--fresh", "--overwrite", "--set", "train.steps=1"]].concat());
        for keep in [whole.len() - lost, 3] {
            project.write(name, &whole[..keep]);
            refused(&project, &arguments, 3, &[name, "expected"]);
        }
        project.write(name, [&whole[..], &[1, 2, 3]].concat());
        refused(&project, &arguments, 3, &[name, "expected"]);
    }
}

#[test]
fn truncated_pictures() {
    let project = Project::new();
    let whole = project.read("pictures/05.png");
    for keep in [whole.len() / 2, 8, 0] {
        project.write("pictures/05.png", &whole[..keep]);
        refused(&project, &[], 3, &["05.png"]);
    }
    // Skipping is possible, and said.
    project.trained("skip", &["--set", "data.on_bad_image=\"skip\""]).warned(&["1 images were skipped", "05.png"]);
    assert_eq!(project.checkpoints("skip").last(), Some(&20));
    for i in 0..12 {
        project.write(&format!("pictures/{i:02}.png"), b"not a picture");
    }
    refused(&project, &["--set", "data.on_bad_image=\"skip\""], 3, &["pictures", "no images"]);
}

#[test]
fn a_picture_that_turns_out_to_be_bad_while_training() {
    let project = Project::new();
    // A whole header, so that it is found out when it is decoded.
    let whole = project.read("pictures/05.png");
    project.write("pictures/05.png", &whole[..whole.len() - 25]);
    let on_demand = ["--set", "data.cache_limit=0"];
    project.train("stop", &on_demand).refused(3, &["05.png", "cannot be decoded", "data.on_bad_image = \"skip\""]);
    let skip = [&on_demand[..], &["--set", "data.on_bad_image=\"skip\""]].concat();
    let ended = project.trained("skip", &skip);
    ended.warned(&["05.png", "cannot be decoded", "the next good picture stands in"]);
    ended.warned(&["1 images were bad"]);
    assert!(!ended.stderr.contains("data.on_bad_image"), "no advice to set what is set: {}", ended.stderr);
    assert_eq!(project.checkpoints("skip").last(), Some(&20));
    // What stands in for it is a matter of the pictures, not of when it was needed.
    project.trained("parts", &[&skip[..], &["--set", "train.steps=5"]].concat());
    project.trained("parts", &skip);
    assert_eq!(project.hashes("parts", 20), project.hashes("skip", 20));
}

#[test]
fn a_picture_that_claims_more_than_memory() {
    let project = Project::new();
    let mut bomb = project.read("pictures/05.png");
    bomb[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]); // 100000×100000
    let mut crc = flate2::Crc::new();
    crc.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    project.write("pictures/05.png", bomb);
    for limit in ["data.cache_limit=0", "data.cache_limit=\"1GiB\""] {
        refused(&project, &["--set", limit], 3, &["05.png", "claims 100000×100000 pixels"]);
        let skip = ["--set", limit, "--set", "data.on_bad_image=\"skip\"", "--fresh", "--overwrite"];
        project.trained("skip", &skip).warned(&["1 images were skipped", "05.png", "claims"]);
    }
}

#[test]
fn sizes_that_do_not_fit_the_model() {
    let project = Project::new();
    project.picture("pictures/small.png", [8, 7], 1);
    refused(&project, &[], 3, &["small.png", "7", "data.size"]);
    std::fs::remove_file(project.path("pictures/small.png")).unwrap();
    // Two levels halve once, three twice.
    refused(&project, &["--set", "data.size=7"], 2, &["`data.size`", "7×7", "multiples of 2"]);
    let four = ["--set", "model.channels=[8, 8, 8, 8]", "--set", "data.size=[8, 4]"];
    refused(&project, &four, 2, &["`data.size`", "8×4", "multiples of 8"]);
    let unscaled = config_of(&project).replacen("size = 8\n", "", 1);
    project.write("config.toml", unscaled);
    refused(&project, &[], 2, &["`data.size`", "not given"]);

    project.write("tiny.npy", npy(&[4, 1, 1, 3], &[9; 12]));
    refused(&project, &["--set", "data.path=\"tiny.npy\""], 2, &["`data.size`", "1×1", "multiples of 2"]);
    project.write("odd.npy", npy(&[4, 6, 9, 3], &[9; 4 * 6 * 9 * 3]));
    refused(&project, &["--set", "data.path=\"odd.npy\""], 2, &["`data.size`", "6×9", "multiples of 2"]);
    let contradiction = ["--set", "data.path=\"odd.npy\"", "--set", "data.size=6"];
    refused(&project, &contradiction, 3, &["odd.npy", "data.size = 6"]);
    project.write("grey.npy", npy(&[4, 8, 8], &[9; 4 * 8 * 8]));
    refused(&project, &["--set", "data.path=\"grey.npy\""], 2, &["`model.image_channels`"]);
}

#[test]
fn a_disk_that_refuses_checkpoints_for_a_while() {
    let project = Project::new();
    let mut running = project.train_on("run", &["--set", "checkpoint.keep=3"]);
    running.until("a checkpoint", || !project.checkpoints("run").is_empty());
    // Even the system's administrator cannot make a directory in a file.
    let (dir, away) = (project.path("run/checkpoints"), project.path("run/away"));
    std::fs::rename(&dir, &away).unwrap();
    std::fs::write(&dir, b"no directory").unwrap();
    let alarm = |text: &str| {
        text.lines().any(|l| l.starts_with("warning: step") && l.contains("is NOT saved") && l.contains("checkpoints"))
    };
    let stderr = project.path("run.stderr");
    running.until("an alarm", || alarm(&std::fs::read_to_string(&stderr).unwrap()));
    let lines = project.log_lines("run");
    running.until("more steps", || project.log_lines("run") > lines + 20);
    std::fs::remove_file(&dir).unwrap();
    std::fs::rename(&away, &dir).unwrap();
    let last = *project.checkpoints("run").last().unwrap();
    running.until("a checkpoint after it", || project.checkpoints("run").last().is_some_and(|&step| step > last));
    running.signal(rustix::process::Signal::TERM);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let end = *project.checkpoints("run").last().unwrap();
    project.hashes("run", end);
}

/// Trains to step 5, to step 10 while checkpoints cannot be written, and to step 10 again: `sh -c script` with the program and its
/// arguments behind it is the second of these.
fn cannot_be_saved(project: &Project, limited: &mut Command, words: &[&str]) {
    project.trained("straight", &["--set", "train.steps=10"]);
    project.trained("run", &["--set", "train.steps=5"]);
    let saved = project.hashes("run", 5);
    let arguments =
        ["train", "config.toml", "--run-dir", "run", "--set", "train.steps=10", "--set", "checkpoint.every=1"];
    let output = limited
        .arg(env!("CARGO_BIN_EXE_ddpm-dist"))
        .args(arguments)
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let ended = common::Ended { code: output.status.code().unwrap_or(-1), stderr, stdout: String::new() };
    ended.warned(&["is NOT saved", "training goes on"]);
    ended.refused(4, &["the state at step 10 could not be saved"]);
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?} is not in {}", ended.stderr);
    }
    assert_eq!((project.checkpoints("run"), project.hashes("run", 5)), (vec![5], saved));
    let entries = std::fs::read_dir(project.path("run/checkpoints")).unwrap().count();
    assert_eq!(entries, 1, "a save that failed leaves nothing behind");
    project.trained("run", &["--set", "train.steps=10"]);
    assert_eq!(project.hashes("run", 10), project.hashes("straight", 10));
    assert_eq!(project.measured("run"), project.measured("straight"));
}

#[test]
fn a_file_that_cannot_grow() {
    // Files end at 32 KiB, which is less than a shard and more than a log.
    let script = r#"trap '' XFSZ; ulimit -f 64; exec "$0" "$@""#;
    cannot_be_saved(&Project::new(), Command::new("sh").args(["-c", script]), &["shard-00000"]);
}

#[test]
fn a_log_that_cannot_grow_is_one_alarm() {
    let project = Project::new();
    project.trained("straight", &["--set", "train.steps=60"]);
    let log = std::fs::metadata(project.path("straight/log.jsonl")).unwrap().len();
    let config = std::fs::metadata(project.path("straight/config.toml")).unwrap().len();
    // Files end at 4 KiB, which is more than a config and less than a log (and a checkpoint).
    assert!(config < 4096 && log > 2 * 4096, "{config} and {log} bytes");
    let script = r#"trap '' XFSZ; ulimit -f 8; exec "$0" train config.toml --run-dir run --set train.steps=60"#;
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_ddpm-dist")])
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let is_alarm = |line: &&str| line.starts_with("warning: cannot write") && line.contains("log.jsonl");
    assert_eq!(stderr.lines().filter(is_alarm).count(), 1, "{stderr}");
    assert_eq!(output.status.code(), Some(4), "the last state is not saved: {stderr}");
}

#[test]
fn a_full_disk() {
    // A small file system of its own, seen by one process tree alone. Ten checkpoints (0.7 MiB each) and the room that is asked for one
    // (1.8 MiB) fit, so that it is full only with the filler.
    let mount = "mount -t tmpfs -o size=16m none disk";
    let project = Project::new();
    std::fs::create_dir(project.path("disk")).unwrap();
    let allowed = Command::new("unshare").args(["-m", "sh", "-c", mount]).current_dir(project.path("")).output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        eprintln!("not tested: a file system cannot be mounted here (it takes root and unshare)");
        return;
    }
    let train = r#""$0" train config.toml --run-dir disk/run --set checkpoint.every=1 --set train.steps"#;
    let script = format!(
        r#"{mount} || exit 99
        {train}=5 || exit 1
        free=$(df -k --output=avail disk | tail -n 1)
        head -c $(( (free - 300) * 1024 )) /dev/zero > disk/filler
        {train}=10; code=$?; ls disk/run/checkpoints
        rm disk/filler
        {train}=10 || exit 2
        cp -r disk/run copied
        exit $code"#
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_ddpm-dist")])
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let ended = common::Ended { code: output.status.code().unwrap_or(-1), stderr, stdout };
    ended.warned(&["is NOT saved", "not enough space", "training goes on"]);
    ended.refused(4, &["the state at step 10 could not be saved", "not enough space", "checkpoint.keep"]);
    assert_eq!(ended.stdout.lines().last(), Some("step-00000005"), "{}", ended.stdout);
    project.trained("straight", &["--set", "train.steps=10"]);
    assert_eq!(project.hashes("copied", 10), project.hashes("straight", 10));
}

/// Makes a file shorter or turns one bit of it.
fn damage(path: &Path, truncate: bool) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    if truncate {
        bytes.truncate(middle)
    } else {
        bytes[middle] ^= 1
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_checkpoints() {
    let project = Project::new();
    project.trained("straight", &[]);
    for (file, truncate) in [
        ("shard-00000-of-00001.safetensors", true),
        ("shard-00000-of-00001.safetensors", false),
        ("manifest.json", true),
        ("manifest.json", false),
    ] {
        project.trained("run", &["--fresh", "--overwrite", "--set", "train.steps=5"]);
        project.trained("run", &["--set", "train.steps=10"]);
        damage(&project.checkpoint("run", 10).join(file), truncate);
        // Sampling and training pass it over, aloud, and the run becomes what it would have been.
        let sample = project.done(&["sample", "run", "--count", "1", "--out", "x.npy"]);
        sample.warned(&["step-00000010", file]);
        let ended = project.trained("run", &[]);
        ended.warned(&["skipping", "step-00000010", file]);
        assert!(ended.stderr.contains("resuming from") && ended.stderr.contains("step-00000005"), "{}", ended.stderr);
        assert_eq!(project.hashes("run", 20), project.hashes("straight", 20), "{file}");
        assert_eq!(project.measured("run"), project.measured("straight"), "{file}");
        // Asked for by name it is refused.
        project.trained("run", &["--fresh", "--overwrite", "--set", "train.steps=5"]);
        let path = project.checkpoint("run", 5);
        damage(&path.join(file), truncate);
        let before = project.content("run");
        project.run(&["sample", path.to_str().unwrap(), "--count", "1", "--out", "y.npy"]).refused(4, &[file]);
        // With none left the run stops rather than begin again over what is there.
        project.train("run", &[]).refused(4, &["no checkpoint", "step-00000005", file, "--fresh --overwrite"]);
        project.run(&["sample", "run", "--count", "1", "--out", "y.npy"]).refused(4, &["no checkpoint", file]);
        assert_eq!(project.content("run"), before);
        assert!(!project.path("y.npy").exists());
    }
}

#[test]
fn a_checkpoint_that_cannot_be_read_now_is_no_reason_to_go_back() {
    let project = Project::new();
    project.trained("run", &["--set", "train.steps=10"]);
    // A loop of links: the system refuses, whoever asks, and says nothing about the content.
    let shard = project.checkpoint("run", 10).join("shard-00000-of-00001.safetensors");
    let away = project.path("shard");
    std::fs::rename(&shard, &away).unwrap();
    std::os::unix::fs::symlink(&shard, &shard).unwrap();
    let words = ["step-00000010", "shard-00000", "may be whole", "move it away"];
    let ended = project.train("run", &[]);
    ended.refused(4, &words);
    assert!(!ended.stderr.contains("--overwrite"), "{}", ended.stderr);
    project.run(&["sample", "run", "--out", "x.png"]).refused(4, &words);
    std::fs::remove_file(&shard).unwrap();
    std::fs::rename(&away, &shard).unwrap();
    let ended = project.trained("run", &[]);
    assert!(ended.stderr.contains("resuming from") && ended.stderr.contains("step-00000010"), "{}", ended.stderr);
}

#[test]
fn sources_of_samples() {
    let project = Project::new();
    let sample = |more: &[&str]| project.run(&[&["sample"], more].concat());
    sample(&["nowhere", "--out", "x.png"]).refused(4, &["nowhere", "neither a run directory"]);
    sample(&["pictures", "--out", "x.png"]).refused(4, &["pictures", "neither a run directory"]);
    project.trained("run", &["--set", "train.steps=1"]);
    sample(&["run", "--out", "x.tiff"]).refused(2, &["x.tiff"]);
    sample(&["run", "--out", "config.toml/x.png"]).refused(2, &["config.toml"]);
    sample(&["run", "--steps", "101", "--out", "x.png"]).refused(2, &["101", "100"]);
    sample(&["run", "--steps", "0", "--out", "x.png"]).refused(2, &["steps"]);
    sample(&["run", "--eta", "2", "--out", "x.png"]).refused(2, &["eta"]);
    sample(&["run", "--sampler", "ddpm", "--eta", "0.5", "--out", "x.png"]).refused(2, &["--eta"]);
    sample(&["run", "--init-noise", "none.npy", "--out", "x.png"]).refused(3, &["none.npy"]);
    project.write("u8.npy", npy(&[1, 8, 8, 3], &[0; 192]));
    sample(&["run", "--count", "1", "--init-noise", "u8.npy", "--out", "x.png"]).refused(3, &["u8.npy"]);
    project.write("cut.npy", &npy(&[1, 8, 8, 3], &[0; 192])[..40]);
    sample(&["run", "--count", "1", "--init-noise", "cut.npy", "--out", "x.png"]).refused(3, &["cut.npy"]);
    let mut noise = vec![0.5f32; 2 * 192];
    for (i, value, place) in
        [(192 + 24 + 3 + 2, f32::NAN, "[1, 1, 1, 2] is NaN"), (0, f32::INFINITY, "[0, 0, 0, 0] is inf")]
    {
        noise[i] = value;
        ddpm_dist::report::write_npy(&project.path("odd.npy"), &noise, &[2, 8, 8, 3]).unwrap();
        sample(&["run", "--count", "2", "--init-noise", "odd.npy", "--out", "x.png"]).refused(3, &["odd.npy", place]);
    }
    sample(&["run", "--count", "0", "--out", "x.png"]).refused_by_parser(&["--count"]);
    assert!(!project.path("x.png").exists());
    // Pipes, which nobody fills.
    for pipe in ["pipe", "model_index.json", "run.lock", "manifest.json"] {
        let made = std::process::Command::new("mkfifo").arg(project.path(pipe)).status().unwrap();
        assert!(made.success());
    }
    sample(&["run", "--init-noise", "pipe", "--out", "x.png"]).refused(3, &["pipe", "not a regular file"]);
    sample(&["pipe", "--out", "x.png"]).refused(4, &["pipe", "neither a run directory"]);
    sample(&[".", "--out", "x.png"]).refused(4, &["neither a run directory"]);
    project.train("other", &["--init", "pipe"]).refused(4, &["pipe", "neither a run directory"]);
    let nothing = project.content("run");
    project.run(&["export", "nowhere", "exported"]).refused(4, &["nowhere"]);
    project.run(&["export", "run", "pictures"]).refused(4, &["pictures", "not empty"]);
    assert_eq!(project.content("run"), nothing);
    // A run that never saved.
    std::fs::remove_dir_all(project.path("run/checkpoints")).unwrap();
    sample(&["run", "--out", "x.png"]).refused(4, &["run", "no checkpoint"]);
}

#[test]
fn diffusers_directories() {
    let project = Project::new();
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/diffusers_dir/f32");
    let files = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ];
    let weights = std::fs::read(reference.join(files[3])).unwrap();
    let header_end = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(weights[8..header_end].to_vec()).unwrap();
    // A header with other words, and the same tensors' bytes.
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        bytes.extend(&weights[header_end..]);
        bytes
    };
    let config = std::fs::read_to_string(reference.join(files[2])).unwrap();
    let scheduler = std::fs::read_to_string(reference.join(files[1])).unwrap();
    let replaced = |text: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{from:?} is not in the fixture");
        text.replacen(from, to, 1).into_bytes()
    };
    let mut wrong_shape: serde_json::Value = serde_json::from_str(&header).unwrap();
    wrong_shape["conv_in.weight"]["shape"].as_array_mut().unwrap().swap(0, 1);
    let cases: Vec<(&str, Vec<u8>, Vec<&str>)> = vec![
        (
            files[3],
            with_header(&header.replacen("conv_in.bias", "conv_in.sail", 1)),
            vec!["conv_in.bias is missing", files[3]],
        ),
        (
            files[3],
            with_header(&wrong_shape.to_string()),
            vec!["conv_in.weight has shape [3, 4, 3, 3], expected [4, 3, 3, 3]", files[3]],
        ),
        (files[3], weights[..weights.len() - 4].to_vec(), vec![files[3]]),
        (files[3], vec![], vec![files[3]]),
        (
            files[2],
            replaced(&config, "\"DownBlock2D\"", "\"SkipDownBlock2D\""),
            vec![files[2], "down_block_types", "SkipDownBlock2D"],
        ),
        (files[2], replaced(&config, "\"silu\"", "\"gelu\""), vec![files[2], "act_fn"]),
        (files[2], b"{".to_vec(), vec![files[2], "JSON"]),
        (
            files[1],
            replaced(&scheduler, "DDPMScheduler", "PNDMScheduler"),
            vec![files[1], "_class_name", "PNDMScheduler"],
        ),
    ];
    let write = |file: &str, bytes: &[u8]| {
        let path = project.path("model").join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    for file in files {
        write(file, &std::fs::read(reference.join(file)).unwrap());
    }
    let sample = ["sample", "model", "--count", "1", "--steps", "2", "--out", "x.npy"];
    project.done(&sample);
    std::fs::remove_file(project.path("x.npy")).unwrap();
    for (file, bytes, words) in cases {
        write(file, &bytes);
        project.run(&sample).refused(4, &words);
        refused(&project, &["--init", "model", "--set", "model.channels=[4, 8]", "--set", "model.groups=2"], 4, &words);
        write(file, &std::fs::read(reference.join(file)).unwrap());
    }
    for file in &files[1..] {
        std::fs::remove_file(project.path("model").join(file)).unwrap();
        project.run(&sample).refused(4, &["model"]);
        write(file, &std::fs::read(reference.join(file)).unwrap());
    }
    assert!(!project.path("x.npy").exists());
}

#[test]
fn sizes_of_a_diffusers_directory_are_bounded() {
    let project = Project::new();
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/diffusers_dir/f32");
    for file in ["model_index.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"] {
        std::fs::create_dir_all(project.path("model").join(file).parent().unwrap()).unwrap();
        std::fs::copy(reference.join(file), project.path("model").join(file)).unwrap();
    }
    let config = std::fs::read_to_string(reference.join("unet/config.json")).unwrap();
    for (size, words) in [
        ("1099511627776", &["sample_size", "1099511627776", "1 to 8192"][..]),
        ("[8, 1099511627776]", &["sample_size", "1 to 8192"]),
        ("8194", &["sample_size", "1 to 8192"]),
        ("0", &["sample_size"]),
        ("7", &["sample_size is 7", "multiples of 2"]),
        ("null", &["sample_size"]),
    ] {
        let changed = config.replacen("\"sample_size\": 8", &format!("\"sample_size\": {size}"), 1);
        assert_ne!(changed, config);
        project.write("model/unet/config.json", changed);
        let ended = project.run(&["sample", "model", "--count", "1", "--steps", "1", "--out", "x.npy"]);
        ended.refused(4, words);
        assert!(!ended.stderr.contains("data.size"), "the user has no such key: {}", ended.stderr);
    }
    // As large as may be, attention has more to do than can be counted.
    project.write("model/unet/config.json", config.replacen("\"sample_size\": 8", "\"sample_size\": 8192", 1));
    let sample = |batch: &str| project.run(&["sample", "model", "--batch", batch, "--steps", "1", "--out", "x.npy"]);
    sample("4096").refused(2, &["--batch", "4096", "2^60"]);
    // What can be counted may still be more than there is.
    project.write("model/unet/config.json", config.replacen("\"sample_size\": 8", "\"sample_size\": 1024", 1));
    let script = r#"ulimit -v 2000000; exec "$0" sample model --batch 4096 --steps 1 --out x.npy"#;
    let mut limited = Command::new("sh");
    limited.args(["-c", script, env!("CARGO_BIN_EXE_ddpm-dist")]).current_dir(project.path(""));
    let output = limited.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let ended = common::Ended { code: output.status.code().unwrap_or(-1), stderr, stdout: String::new() };
    ended.refused(7, &["memory", "`sample.batch`", "--batch"]);
    assert!(!ended.stderr.contains("train.batch"), "{}", ended.stderr);
    assert!(!project.path("x.npy").exists());
}

#[test]
fn a_network_alone_can_be_trained_from_and_not_sampled() {
    let project = Project::new();
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/diffusers_dir/old");
    let old = old.to_str().unwrap();
    project.run(&["sample", old, "--out", "x.png"]).refused(4, &["scheduler_config.json", "train --init"]);
    project.run(&["export", old, "exported"]).refused(4, &["scheduler_config.json"]);
    let model = ["--set", "model.channels=[4]", "--set", "model.attention_levels=[0]", "--set", "model.groups=2"];
    // A learning rate that changes nothing shows that the run began with these weights.
    let still = ["--set", "train.steps=1", "--set", "optim.lr=1e-30", "--init", old];
    project.trained("run", &[&model[..], &still].concat());
    let snapshot =
        ddpm_dist::checkpoint::load(&project.checkpoint("run", 1), None, ddpm_dist::checkpoint::Want::All).unwrap();
    let theirs = ddpm_dist::checkpoint::diffusers::import(Path::new(old)).unwrap().flat(&snapshot.layout).unwrap();
    assert_eq!(snapshot.params, theirs);
    project.train("other", &["--init", old]).refused(2, &["--init", "model.attention_levels"]);
}

#[test]
fn exit_codes_do_not_need_a_reader() {
    let project = Project::new();
    let cases: [(&[&str], i32); 4] = [
        (&["train", "none.toml"], 2),
        (&["train", "config.toml", "--set", "data.path=\"none\""], 3),
        (&["sample", "nowhere", "--out", "x.png"], 4),
        (&["plan", "config.toml", "--set", "model.groups=5"], 2),
    ];
    for (arguments, code) in cases {
        // A pipe whose reader is gone, a disk that is full, nothing at all.
        let mut child = project.program().args(arguments).spawn().unwrap();
        drop((child.stderr.take(), child.stdout.take()));
        assert_eq!(child.wait().unwrap().code(), Some(code), "{arguments:?}");
        if let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") {
            let status = project.program().args(arguments).stderr(full).status().unwrap();
            assert_eq!(status.code(), Some(code), "{arguments:?}");
        }
        let script = r#"exec "$0" "$@" 2>&- >&-"#;
        let mut closed = Command::new("sh");
        closed.args(["-c", script, env!("CARGO_BIN_EXE_ddpm-dist")]).args(arguments).current_dir(project.path(""));
        assert_eq!(closed.status().unwrap().code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn weights_of_another_model_cost_no_run() {
    let project = Project::new();
    project.trained("source", &["--set", "train.steps=1", "--set", "model.attention_levels=[0]"]);
    project.trained("run", &["--set", "train.steps=5"]);
    let before = project.content("run");
    project
        .train("run", &["--init", "source", "--fresh", "--overwrite"])
        .refused(2, &["--init source", "model.attention_levels"]);
    assert_eq!(project.content("run"), before);
}
