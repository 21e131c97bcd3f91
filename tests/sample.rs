//! `ddpm-dist sample` and `export`: an image depends on weights, seed and its own number, whatever the source and the form it is written in.

mod common;

use common::Project;
use ddpm_dist::checkpoint::{Group, Want, diffusers, load};
use ddpm_dist::report::{read_npy, to_u8, write_npy};
use std::path::Path;
use std::sync::OnceLock;

const IMAGE: usize = 8 * 8 * 3;

/// A trained run that all tests read.
fn project() -> &'static Project {
    static PROJECT: OnceLock<Project> = OnceLock::new();
    PROJECT.get_or_init(|| {
        let project = Project::new();
        project.trained("run", &["--set", "optim.lr=1e-2"]);
        project
    })
}

fn sample(source: &str, out: &str, more: &[&str]) {
    project().done(&[&["sample", source, "--out", out, "--steps", "4"], more].concat());
}

/// Bits of images [count, 8, 8, 3], and that they are images.
fn npy(name: &str, count: usize) -> Vec<u32> {
    let (values, shape) = read_npy(&project().path(name)).unwrap();
    assert_eq!(shape, [count, 8, 8, 3], "{name}");
    assert!(values.iter().all(|x| (-1.0..=1.0).contains(x)), "{name} has values outside [-1, 1]");
    values.iter().map(|x| x.to_bits()).collect()
}

fn sampled(name: &str, source: &str, count: usize, more: &[&str]) -> Vec<u32> {
    let out = format!("{name}.npy");
    sample(source, &out, &[&["--count", &count.to_string()], more].concat());
    npy(&out, count)
}

#[test]
fn an_image_is_the_same_whatever_the_count_and_threads() {
    for (name, sampler) in [("ddpm", &["--sampler", "ddpm"][..]), ("ddim", &["--sampler", "ddim", "--eta", "0.5"])] {
        // More than two batches of the command.
        let all = sampled(&format!("{name}-35"), "run", 35, &[sampler, &["--seed", "3", "--threads", "2"]].concat());
        for (count, threads) in [(1, "1"), (2, "3"), (7, "2"), (16, "1"), (17, "2")] {
            let arguments = [sampler, &["--seed", "3", "--threads", threads]].concat();
            let some = sampled(&format!("{name}-{count}"), "run", count, &arguments);
            assert!(some == all[..count * IMAGE], "{name}: {count} images on {threads} threads");
        }
        assert!((1..35).all(|i| all[..IMAGE] != all[i * IMAGE..][..IMAGE]), "{name}: image 0 comes again");
        let other = sampled(&format!("{name}-other"), "run", 1, &[sampler, &["--seed", "4"]].concat());
        assert_ne!(other, all[..IMAGE]);
    }
}

#[test]
fn the_batch_is_the_runs_and_can_be_chosen() {
    let one = sampled("b-one", "run", 5, &["--batch", "1"]);
    assert_eq!(sampled("b-four", "run", 5, &["--batch", "4"]), sampled("b-own", "run", 5, &[]), "sample.batch is 4");
    for batch in ["4", "5", "64"] {
        assert!(sampled(&format!("b-{batch}"), "run", 5, &["--batch", batch]) == one, "batch {batch}");
    }
    for batch in ["0", "4097"] {
        project().run(&["sample", "run", "--out", "x.png", "--batch", batch]).refused_by_parser(&["--batch"]);
    }
}

#[test]
fn sampler_steps_and_eta_are_obeyed() {
    let first = |name: &str, more: &[&str]| sampled(name, "run", 1, more);
    let ddim = first("k-ddim", &["--sampler", "ddim"]);
    // The run's own sampler is DDIM with η = 0.
    assert_eq!(first("k-default", &[]), ddim);
    assert_eq!(first("k-eta0", &["--sampler", "ddim", "--eta", "0"]), ddim);
    assert_ne!(first("k-eta1", &["--sampler", "ddim", "--eta", "1"]), ddim);
    assert_ne!(first("k-ddpm", &["--sampler", "ddpm"]), ddim);
    let project = project();
    project.done(&["sample", "run", "--count", "1", "--out", "k-own.npy"]);
    assert_eq!(npy("k-own.npy", 1), ddim, "the run's own number of steps is four");
    project.done(&["sample", "run", "--count", "1", "--steps", "100", "--out", "k-all.npy"]);
    assert_ne!(npy("k-all.npy", 1), ddim);
}

#[test]
fn every_form_holds_the_same_images() {
    let images: Vec<f32> = sampled("f", "run", 5, &[]).into_iter().map(f32::from_bits).collect();
    let bytes: Vec<u8> = images.iter().map(|&x| to_u8(x)).collect();
    let project = project();
    for out in ["f.png", "f.npz", "f.gif", "f/"] {
        sample("run", out, &["--count", "5"]);
    }

    let mut names: Vec<_> = std::fs::read_dir(project.path("f")).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 5);
    for (path, expected) in names.iter().zip(bytes.chunks_exact(IMAGE)) {
        assert_eq!(image::open(path).unwrap().to_rgb8().into_raw(), expected, "{}", path.display());
    }

    let mut archive = zip::ZipArchive::new(std::fs::File::open(project.path("f.npz")).unwrap()).unwrap();
    let mut array = Vec::new();
    std::io::Read::read_to_end(&mut archive.by_name("arr_0.npy").unwrap(), &mut array).unwrap();
    assert!(array.ends_with(&bytes), "the archive's array is the u8 images");
    assert!(String::from_utf8_lossy(&array[..128]).contains("(5, 8, 8, 3)"));

    // Every image stands somewhere in the grid, all enlarged by the same whole number.
    let grid = image::open(project.path("f.png")).unwrap().to_rgb8();
    let places = |scale: u32| -> Option<Vec<(u32, u32)>> {
        let is_at = |x: u32, y: u32, pixels: &[u8]| {
            (0..64).all(|i| grid.get_pixel(x + i % 8 * scale, y + i / 8 * scale).0 == pixels[3 * i as usize..][..3])
        };
        let (right, bottom) = (grid.width().checked_sub(8 * scale)?, grid.height().checked_sub(8 * scale)?);
        let place = |pixels: &[u8]| {
            (0..=bottom).flat_map(|y| (0..=right).map(move |x| (y, x))).find(|&(y, x)| is_at(x, y, pixels))
        };
        bytes.chunks_exact(IMAGE).map(place).collect()
    };
    let found = (1..=32).find_map(places).expect("the images are in the grid");
    assert!(found.is_sorted(), "in rows from the top left: {found:?}");

    let decoder = image::codecs::gif::GifDecoder::new(std::io::BufReader::new(
        std::fs::File::open(project.path("f.gif")).unwrap(),
    ));
    let frames = image::AnimationDecoder::into_frames(decoder.unwrap()).count();
    assert!(frames >= 4, "{frames} frames for four steps");
}

#[test]
fn the_noise_can_be_given() {
    let project = project();
    let noise: Vec<f32> = (0..3 * IMAGE).map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0).collect();
    write_npy(&project.path("noise.npy"), &noise, &[3, 8, 8, 3]).unwrap();
    let given = sampled("n-given", "run", 3, &["--init-noise", "noise.npy"]);
    assert_eq!(
        sampled("n-seed", "run", 3, &["--init-noise", "noise.npy", "--seed", "8"]),
        given,
        "DDIM draws nothing else"
    );
    assert_ne!(sampled("n-drawn", "run", 3, &[]), given);
    let ended = project.run(&["sample", "run", "--count", "2", "--init-noise", "noise.npy", "--out", "n-bad.npy"]);
    ended.refused(2, &["noise.npy", "[3, 8, 8, 3]", "[2, 8, 8, 3]"]);
    assert!(!project.path("n-bad.npy").exists());
}

#[test]
fn a_checkpoint_and_its_export_give_the_same_images() {
    let project = project();
    let last = project.checkpoint("run", 20);
    project.done(&["export", "run", "exported"]);
    for sampler in [&["--sampler", "ddpm"][..], &["--sampler", "ddim"], &["--sampler", "ddim", "--eta", "1"]] {
        let run = sampled("e-run", "run", 3, sampler);
        assert_eq!(sampled("e-checkpoint", last.to_str().unwrap(), 3, sampler), run, "{sampler:?}");
        assert_eq!(sampled("e-exported", "exported", 3, sampler), run, "{sampler:?}");
    }
    for name in ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"] {
        let json: serde_json::Value = serde_json::from_slice(&project.read(Path::new("exported").join(name))).unwrap();
        assert!(json["_class_name"].is_string(), "{name}");
    }
}

#[test]
fn averaged_and_raw_weights_are_what_they_say() {
    let project = project();
    let snapshot = load(&project.checkpoint("run", 20), None, Want::All).unwrap();
    for (weights, group) in [("ema", Group::Ema), ("raw", Group::Params)] {
        let dir = format!("exported-{weights}");
        project.done(&["export", "run", &dir, "--weights", weights]);
        let found = diffusers::import(&project.path(&dir)).unwrap().flat(&snapshot.layout).unwrap();
        for tensor in snapshot.layout.tensors() {
            let expected = snapshot.tensor(group, &tensor.name).unwrap();
            assert_eq!(&found[tensor.range()], expected, "{weights}: {}", tensor.name);
        }
    }
    assert_ne!(sampled("w-ema", "exported-ema", 1, &[]), sampled("w-raw", "exported-raw", 1, &[]));
    assert_eq!(
        sampled("w-run", "run", 1, &[]),
        sampled("w-ema", "exported-ema", 1, &["--sampler", "ddim", "--batch", "4"])
    );
}

#[test]
fn diffusers_own_directories_are_sampled_as_their_schedulers_say() {
    let project = project();
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/diffusers_dir");
    let path = reference.join("f16_ddim");
    let sample = |out: &str, more: &[&str]| {
        project.run(&[&["sample", path.to_str().unwrap(), "--count", "2", "--out", out], more].concat())
    };
    // DDIM over T = 5 with the first timestep at 1: four steps are the most there are.
    assert_eq!(sample("d.npy", &["--steps", "4"]).code, 0);
    let (values, shape) = read_npy(&project.path("d.npy")).unwrap();
    assert_eq!(shape, [2, 4, 6, 1]);
    assert!(values.iter().all(|x| x.is_finite()));
    assert_eq!(sample("d-ddim.npy", &["--steps", "4", "--sampler", "ddim", "--eta", "0"]).code, 0);
    assert_eq!(project.read("d.npy"), project.read("d-ddim.npy"));
    assert_eq!(sample("d-ddpm.npy", &["--steps", "4", "--sampler", "ddpm"]).code, 0);
    assert_ne!(project.read("d.npy"), project.read("d-ddpm.npy"));
    sample("d5.npy", &["--steps", "5"]).refused(2, &["steps_offset"]);
    sample("d6.npy", &["--steps", "6"]).refused(2, &["6", "5"]);
    // Without a scheduler the process is unknown.
    let bare = reference.join("old");
    project.run(&["sample", bare.to_str().unwrap(), "--out", "o.npy"]).refused(4, &["scheduler"]);
}

/// What diffusers itself makes of the same noise (`tests/reference/diffusers_samples.py`).
#[derive(serde::Deserialize)]
struct Case {
    name: String,
    steps: usize,
    /// How far PyTorch in f32 ends from PyTorch in f64.
    f32: f32,
    scheduler: serde_json::Value,
}

#[test]
fn images_are_those_of_diffusers() {
    let project = project();
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    let cases: Vec<Case> =
        serde_json::from_slice(&std::fs::read(reference.join("diffusers_samples.json")).unwrap()).unwrap();
    let expected = std::fs::read(reference.join("diffusers_samples.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let view = expected.tensor(name).unwrap();
        assert_eq!(view.shape(), [2, 8, 8, 3]);
        view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    write_npy(&project.path("x_T.npy"), &floats("noise"), &[2, 8, 8, 3]).unwrap();
    std::fs::create_dir_all(project.path("theirs/unet")).unwrap();
    std::fs::create_dir_all(project.path("theirs/scheduler")).unwrap();
    for file in ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"] {
        let from = reference.join("diffusers_dir/f32").join(file);
        std::fs::copy(from, project.path("theirs").join(file)).unwrap();
    }
    assert!(cases.len() >= 15);
    for case in cases {
        let Case { name, steps, f32: rounding, scheduler } = case;
        project.write("theirs/scheduler/scheduler_config.json", scheduler.to_string());
        // Of a DDPM directory only a single step draws nothing.
        let sampler = if steps == 1 { "ddpm" } else { "ddim" };
        let steps = steps.to_string();
        let fixed = ["sample", "theirs", "--count", "2", "--init-noise", "x_T.npy", "--out", "theirs.npy"];
        project.done(&[&fixed[..], &["--sampler", sampler, "--steps", &steps]].concat());
        let (found, _) = read_npy(&project.path("theirs.npy")).unwrap();
        let worst = found.iter().zip(floats(&name)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Sums in another order round as PyTorch's own f32 does, but elsewhere; eight draws of it are a sample of what that can do.
        assert!(worst <= 8.0 * rounding, "{name}: off by {worst}, {} times f32's rounding", worst / rounding);
    }
}

/// The words of a command that is shown, as a shell reads them (none here has spaces).
fn shown_command(text: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("sample ")).unwrap_or_else(|| panic!("{text}"));
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn an_export_samples_as_its_run_does_by_the_command_it_shows() {
    let project = project();
    let sets = ["--set", "sample.spacing=\"trailing\"", "--set", "sample.eta=0.5", "--set", "sample.steps=10"];
    project.trained("spaced", &[&["--set", "train.steps=5"], &sets[..]].concat());
    let ended = project.done(&["export", "spaced", "spaced-export"]);
    let command = shown_command(&ended.stderr);
    assert_eq!(command[0], env!("CARGO_BIN_EXE_ddpm-dist"), "the program as it was started");
    let words: Vec<&str> = command[1..].iter().map(String::as_str).collect();
    let [words @ .., "--out", "samples.png"] = &words[..] else { panic!("{words:?}") };
    project.done(&[words, &["--count", "3", "--out", "spaced-export.npy"]].concat());
    project.done(&["sample", "spaced", "--count", "3", "--out", "spaced.npy"]);
    assert_eq!(npy("spaced-export.npy", 3), npy("spaced.npy", 3));
    let scheduler: serde_json::Value =
        serde_json::from_slice(&project.read("spaced-export/scheduler/scheduler_config.json")).unwrap();
    assert_eq!(scheduler["timestep_spacing"], "trailing");
    for python in
        ["DDPMPipeline.from_pretrained(\"spaced-export\")", "DDIMScheduler", "num_inference_steps=10, eta=0.5"]
    {
        assert!(ended.stderr.contains(python), "{}", ended.stderr);
    }
    assert!(!ended.stderr.contains("note"), "{}", ended.stderr);
    // Seven steps do not divide a hundred: diffusers' DDIM goes back another way, which is said.
    project.trained("odd", &[&["--set", "train.steps=1"], &sets[..4], &["--set", "sample.steps=7"]].concat());
    let odd = project.done(&["export", "odd", "odd-export"]).stderr;
    assert!(odd.contains("note") && odd.contains("7 steps"), "{odd}");
    // Nothing but the last message with -q, more with -v.
    let quiet = project.done(&["export", "spaced", "quiet-export", "-q"]).stderr;
    assert_eq!(quiet, "quiet-export is written\n");
    let verbose = project.done(&["export", "spaced", "verbose-export", "-v"]).stderr;
    assert!(verbose.contains("weights of spaced/checkpoints/step-00000005"), "{verbose}");
}

/// Numbered pictures of a folder.
fn pictures(name: &str) -> usize {
    std::fs::read_dir(project().path(name)).map_or(0, |entries| {
        entries.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "png")).count()
    })
}

/// Hidden files that a sample under way keeps.
fn leftovers() -> usize {
    let entries = std::fs::read_dir(project().path("")).unwrap();
    entries.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".stop")).count()
}

#[test]
fn a_signal_loses_no_finished_image() {
    use rustix::process::Signal;
    let project = project();
    // A million images do not fit in the memory allowed, and need not.
    let limited = r#"ulimit -v 700000; exec "$0" "$@""#;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", limited, env!("CARGO_BIN_EXE_ddpm-dist"), "sample", "run", "--count", "1000000"]);
    command.args(["--threads", "1", "--out", "stop/"]).current_dir(project.path(""));
    let mut running = project.start("stop-folder", command);
    running.until("three batches", || pictures("stop") >= 12);
    running.signal(Signal::INT);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(130), "{stderr}");
    let words = format!("ddpm-dist: stopped after {} of 1000000 images; those are in stop/", pictures("stop"));
    assert!(stderr.contains(&words), "{words:?} is not in {stderr}");

    // An array has the shape of what came.
    for name in ["stop.npy", "stop.npz", "stop.png", "stop.gif"] {
        let mut command = project.program();
        command.args(["sample", "run", "--count", "4000", "--steps", "100", "--threads", "1", "-v", "--out", name]);
        let mut running = project.start(name, command);
        let plain = project.path(format!("{name}.stderr"));
        running
            .until("the work", || leftovers() > 0 || std::fs::read_to_string(&plain).unwrap().contains("weights of"));
        std::thread::sleep(std::time::Duration::from_millis(700));
        running.signal(Signal::TERM);
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(143), "{name}: {stderr}");
        let after = stderr.split("stopped after ").nth(1).unwrap_or_else(|| panic!("{name}: {stderr}"));
        let count: usize = after.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(project.path(name).exists(), count > 0, "{name}: {stderr}");
        assert_eq!(stderr.contains("nothing is written"), count == 0, "{name}: {stderr}");
        if name == "stop.npy" && count > 0 {
            npy(name, count);
        }
        assert_eq!(leftovers(), 0, "{name}");
    }
}

#[test]
fn what_cannot_be_written_is_known_before_the_work() {
    let project = project();
    let many = |out: &str| project.run(&["sample", "run", "--count", "1000000", "--out", out]);
    many("many.png").refused(2, &["many.png", "4096", "1000000"]);
    many("many.gif").refused(2, &["many.gif", "4096"]);
    many("config.toml/x.npy").refused(2, &["config.toml"]);
    many("config.toml/").refused(2, &["config.toml"]);
    // A source that is not there costs no folder.
    project.run(&["sample", "nowhere", "--out", "new/folder/x.png"]).refused(4, &["nowhere"]);
    assert!(!project.path("new").exists());

    // A disk of 2 MiB, seen by one process tree alone: 4000 images of 192 floats are 3 MB.
    let script = r#"mkdir disk && mount -t tmpfs -o size=2m none disk || exit 99
        "$0" sample run --count 4000 --out disk/x.npy; code=$?; ls -A disk
        "$0" sample run --count 100000 --steps 1 --out disk/set/; echo "code $? $(ls -A disk/set | grep -vc '^[0-9]*.png')"
        exit $code"#;
    let mut command = std::process::Command::new("unshare");
    command.args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_ddpm-dist")]).current_dir(project.path(""));
    let output = command.output().unwrap();
    if output.status.code() == Some(99) || !output.stderr.starts_with(b"ddpm-dist") {
        return common::not_tested("a full disk: a file system cannot be mounted here (it takes root and unshare)");
    }
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("ddpm-dist: not enough space for `disk/x.npy`: it needs 2.93 MiB"), "{stderr}");
    // A folder fills until there is no room, and holds nothing but images.
    assert_eq!(stdout, "code 1 0\n", "{stderr}");
    assert!(stderr.contains("cannot write `disk/set/"), "{stderr}");
}
