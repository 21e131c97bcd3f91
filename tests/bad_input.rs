//! Bad input, case by case: the exit code, one message that names what is wrong, and nothing lost.

mod common;

use common::{Project, npy};
use std::path::Path;
use std::process::Command;

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
    let train = |words: &[&str]| project.train_refused(&[], 2, words);

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
        ("model.timestep=\"multiply\"", &["--set", "`model.timestep`", "add", "scale_shift"]),
        ("model.mid_attention_groups=0", &["--set model.mid_attention_groups=0", "a divisor of 16"]),
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
        project.train_refused(&["--set", set], 2, words);
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
    project.train_refused(&["--set", &set("nowhere")], 3, &["no data set at nowhere", "folder of PNG or JPEG"]);
    project.train_refused(&["--set", &set("data/fashion-of-nobody")], 3, &["dataset-fashion-mnist"]);
    project.train_refused(&["--set", &set("cifar-of-nobody")], 3, &["cifar-10-binary.tar.gz"]);
    std::fs::create_dir(project.path("empty")).unwrap();
    project.train_refused(&["--set", &set("empty")], 3, &["empty", "no images"]);
    project.write("notes.txt", "no images here");
    project.train_refused(&["--set", &set("notes.txt")], 3, &["notes.txt"]);
    project.write("none.npy", npy(&[0, 8, 8, 3], &[]));
    project.train_refused(&["--set", &set("none.npy")], 3, &["none.npy", "no images"]);
    pipe(&project.path("pipe"));
    project.train_refused(&["--set", &set("pipe")], 3, &["pipe", "a named pipe", "expected a regular file"]);
    project.write("void.npy", []);
    project.train_refused(&["--set", &set("void.npy")], 3, &["void.npy"]);
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
            project.train_refused(&arguments, 3, &[name, "expected"]);
        }
        project.write(name, [&whole[..], &[1, 2, 3]].concat());
        project.train_refused(&arguments, 3, &[name, "expected"]);
    }
}

#[test]
fn truncated_pictures() {
    let project = Project::new();
    let whole = project.read("pictures/05.png");
    for keep in [whole.len() / 2, 8, 0] {
        project.write("pictures/05.png", &whole[..keep]);
        project.train_refused(&[], 3, &["05.png"]);
    }
    // Skipping is possible, and said.
    project.trained("skip", &["--set", "data.on_bad_image=\"skip\""]).warned(&["1 images were skipped", "05.png"]);
    assert_eq!(project.checkpoints("skip").last(), Some(&20));
    for i in 0..12 {
        project.write(&format!("pictures/{i:02}.png"), b"not a picture");
    }
    project.train_refused(&["--set", "data.on_bad_image=\"skip\""], 3, &["pictures", "no images"]);
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
        project.train_refused(&["--set", limit], 3, &["05.png", "claims 100000×100000 pixels"]);
        let skip = ["--set", limit, "--set", "data.on_bad_image=\"skip\"", "--fresh", "--overwrite"];
        project.trained("skip", &skip).warned(&["1 images were skipped", "05.png", "claims"]);
    }
}

#[test]
fn sizes_that_do_not_fit_the_model() {
    let project = Project::new();
    project.picture("pictures/small.png", [8, 7], 1);
    project.train_refused(&[], 3, &["small.png", "7", "data.size"]);
    std::fs::remove_file(project.path("pictures/small.png")).unwrap();
    // Two levels halve once, three twice.
    project.train_refused(&["--set", "data.size=7"], 2, &["`data.size`", "7×7", "multiples of 2"]);
    let four = ["--set", "model.channels=[8, 8, 8, 8]", "--set", "data.size=[8, 4]"];
    project.train_refused(&four, 2, &["`data.size`", "8×4", "multiples of 8"]);
    let unscaled = config_of(&project).replacen("size = 8\n", "", 1);
    project.write("config.toml", unscaled);
    project.train_refused(&[], 2, &["`data.size`", "not given"]);

    project.write("tiny.npy", npy(&[4, 1, 1, 3], &[9; 12]));
    project.train_refused(&["--set", "data.path=\"tiny.npy\""], 2, &["`data.size`", "1×1", "multiples of 2"]);
    project.write("odd.npy", npy(&[4, 6, 9, 3], &[9; 4 * 6 * 9 * 3]));
    project.train_refused(&["--set", "data.path=\"odd.npy\""], 2, &["`data.size`", "6×9", "multiples of 2"]);
    let contradiction = ["--set", "data.path=\"odd.npy\"", "--set", "data.size=6"];
    project.train_refused(&contradiction, 3, &["odd.npy", "data.size = 6"]);
    project.write("grey.npy", npy(&[4, 8, 8], &[9; 4 * 8 * 8]));
    project.train_refused(&["--set", "data.path=\"grey.npy\""], 2, &["`model.image_channels`"]);
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
