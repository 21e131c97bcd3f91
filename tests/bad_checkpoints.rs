//! Damaged checkpoints, and sources of weights that cannot be used, case by case: the exit code, one message that names what is wrong, and nothing lost.

mod common;

use common::{Project, npy};
use std::path::Path;
use std::process::Command;

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
        let made = Command::new("mkfifo").arg(project.path(pipe)).status().unwrap();
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
        project.train_refused(
            &["--init", "model", "--set", "model.channels=[4, 8]", "--set", "model.groups=2"],
            4,
            &words,
        );
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
