//! `ddpm-dist train` from start to end: what a run leaves behind, and that a run that was stopped is the run that never stopped.

mod common;

use common::{Project, npy};
use ddpm_dist::checkpoint::{CheckpointConfig, Group, Saver, Want, load, verify};
use rustix::process::Signal;

/// The run in `a` and the run in `b` are the same up to step `step`: weights, moments, average, and everything that was measured.
fn assert_same_run(project: &Project, a: &str, b: &str, step: u64) {
    assert_eq!(project.hashes(a, step), project.hashes(b, step), "checkpoints of step {step}");
    let (measured_a, measured_b) = (project.measured(a), project.measured(b));
    assert_eq!(measured_a.len() as u64, step, "one line for each step");
    assert!(measured_a.iter().zip(1u64..).all(|(line, number)| line["step"] == number));
    assert_eq!(measured_a, measured_b);
}

fn steps(count: u64) -> String {
    format!("train.steps={count}")
}

#[test]
fn a_run_leaves_config_log_curves_samples_and_checkpoints() {
    let project = Project::new();
    let ended = project.trained("run", &["--set", "sample.count=3", "--set", "sample.every=10"]);
    assert!(ended.stderr.contains("done: 20 steps"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("step-00000020.png") && ended.stderr.contains("ddpm-dist sample"),
        "{}",
        ended.stderr
    );
    for step in [10, 20] {
        let picture = image::open(project.path(format!("run/samples/step-{step:08}.png"))).unwrap();
        assert!(picture.width() >= 8 && picture.height() >= 8);
    }
    let log = project.log("run");
    assert_eq!(log.len(), 20);
    for (line, step) in log.iter().zip(1u64..) {
        assert_eq!((line["step"].as_u64(), line["images"].as_u64()), (Some(step), Some(4 * step)));
        let lr = 2e-3 * (step as f64 / 4.0).min(1.0);
        assert!((line["lr"].as_f64().unwrap() - lr).abs() < 1e-12, "{line}");
        assert!(line["loss"].as_f64().unwrap() > 0.0 && line["grad_norm"].as_f64().unwrap() > 0.0, "{line}");
        assert_eq!(line["loss_by_quartile_of_t"].as_array().unwrap().len(), 4);
    }
    let events = std::fs::read_dir(project.path("run/tb")).unwrap().count();
    assert_eq!(events, 1, "one TensorBoard file per start");
    let config = String::from_utf8(project.read("run/config.toml")).unwrap();
    assert!(config.contains("beta_end") && config.contains("eps"), "the resolved config has every key:\n{config}");
    let manifest = verify(&project.checkpoint("run", 20)).unwrap();
    assert_eq!((manifest.meta.step, manifest.meta.images, manifest.meta.seed), (20, 80, 11));
    assert_eq!(manifest.meta.config_toml.as_deref(), Some(&config[..]));

    // The stored config is a config: it describes the same run, from any directory.
    project.write("again.toml", config);
    project.done(&["train", "again.toml", "--run-dir", "again", "--set", "sample.count=0"]);
    assert_eq!(project.hashes("run", 20), project.hashes("again", 20));
}

#[test]
fn an_array_trains_like_the_pictures_it_is_made_of() {
    let project = Project::new();
    let mut pixels = Vec::new();
    for i in 0..12 {
        pixels.extend(image::open(project.path(format!("pictures/{i:02}.png"))).unwrap().to_rgb8().into_raw());
    }
    project.write("images.npy", npy(&[12, 8, 8, 3], &pixels));
    project.trained("pictures-run", &[]);
    project.trained("array-run", &["--set", "data.path=\"images.npy\""]);
    assert_same_run(&project, "pictures-run", "array-run", 20);
}

#[test]
fn a_run_in_two_parts_is_the_run_in_one() {
    let project = Project::new();
    project.trained("one", &[]);
    project.trained("two", &["--set", &steps(10)]);
    assert_eq!(project.log("two").len(), 10);
    // Length, intervals and place of the data may change, and so may the number of threads.
    std::fs::rename(project.path("pictures"), project.path("moved")).unwrap();
    let more = ["--set", "data.path=\"moved\"", "--set", "checkpoint.every=7", "--set", "checkpoint.keep=3"];
    let ended = project.done(&[&["train", "config.toml", "--run-dir", "two", "--threads", "1"], &more[..]].concat());
    assert!(ended.stderr.contains("resuming from") && ended.stderr.contains("step-00000010"), "{}", ended.stderr);
    assert_same_run(&project, "one", "two", 20);
}

#[test]
fn a_finished_run_that_is_started_again_stays_as_it_is() {
    let project = Project::new();
    project.trained("run", &[]);
    let before = project.content("run/checkpoints");
    project.trained("run", &[]);
    assert_eq!(project.content("run/checkpoints"), before);
    assert_eq!(project.log("run").len(), 20);
}

#[test]
fn a_signal_saves_and_leaves() {
    for signal in [Signal::TERM, Signal::INT] {
        let project = Project::new();
        // No checkpoint but that of the signal.
        let mut running = project.train_on("run", &["--set", "checkpoint.every=0"]);
        running.until("ten steps", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 10);
        running.signal(signal);
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(75), "{stderr}");
        let saved = project.checkpoints("run");
        assert_eq!(saved.len(), 1, "{stderr}");
        assert!(stderr.contains(&format!("stopped at step {}", saved[0])), "{stderr}");
        let end = saved[0] + 10;
        project.trained("run", &["--set", &steps(end)]);
        project.trained("straight", &["--set", &steps(end)]);
        assert_same_run(&project, "straight", "run", end);
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_data_cache() {
    let project = Project::new();
    project.trained("first", &["--set", &steps(1)]);
    let in_cache = |extension: &str| {
        let entries = std::fs::read_dir(project.path("cache/ddpm-dist")).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|e| e == extension)).collect::<Vec<_>>()
    };
    std::fs::remove_file(&in_cache("pixels")[0]).unwrap();
    // This test is the process that builds the cache and does not get on with it.
    let lock = std::fs::File::options().write(true).open(&in_cache("lock")[0]).unwrap();
    lock.lock().unwrap();
    let mut running = project.train_on("run", &[]);
    let stderr = project.path("run.stderr");
    running.until("the wait", || std::fs::read_to_string(&stderr).unwrap().contains("waiting for it"));
    running.signal(Signal::TERM);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    assert!(stderr.contains("stopped before the first step"), "{stderr}");
    assert!(!project.path("run").exists() && in_cache("pixels").is_empty());
    drop(lock);
    project.trained("run", &["--set", &steps(1)]);
}

#[test]
fn the_first_step_is_shown_however_rarely_steps_are_logged() {
    let project = Project::new();
    let ended = project.trained("run", &["--set", "log.every=1000000"]);
    let line =
        ended.stderr.lines().find(|line| line.starts_with("step 1/20 ")).unwrap_or_else(|| panic!("{}", ended.stderr));
    assert!(line.contains("loss ") && line.contains(" img/s") && line.ends_with(" left"), "{line}");
    assert_eq!(project.log("run").len(), 1, "the last step");
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let project = Project::new();
    let mut end = 10;
    for round in 1..=2 {
        let mut running = project.train_on("run", &[]);
        running.until("a checkpoint", || project.checkpoints("run").last().is_some_and(|&step| step > end));
        running.child.kill().unwrap();
        let (code, stderr) = running.wait();
        assert_eq!(code, None, "{stderr}");
        end = *project.checkpoints("run").last().unwrap();
        assert!(project.log_lines("run") > 0, "round {round}");
    }
    end += 10;
    project.trained("run", &["--set", &steps(end)]);
    project.trained("straight", &["--set", &steps(end)]);
    assert_same_run(&project, "straight", "run", end);
    let left: Vec<_> =
        std::fs::read_dir(project.path("run/checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().contains("tmp")), "{left:?}");
}

#[test]
fn what_would_change_the_trajectory_is_refused_by_name() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(5)]);
    let before = project.content("run");
    for (set, key) in [
        ("optim.lr=1e-3", "optim.lr"),
        ("train.batch=3", "train.batch"),
        ("train.seed=12", "train.seed"),
        ("data.flip=false", "data.flip"),
        ("ema.decay=0.99", "ema.decay"),
        ("diffusion.objective=\"v\"", "diffusion.objective"),
        ("model.dropout=0.0", "model.dropout"),
    ] {
        project.train("run", &["--set", set]).refused(4, &[key, "step-00000005", "--run-dir"]);
    }
    assert_eq!(project.content("run"), before);
}

#[test]
fn another_model_is_refused_by_name() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(5)]);
    let before = project.content("run");
    project.train("run", &["--set", "model.channels=[8, 24]"]).refused(4, &["step-00000005", "model.channels"]);
    let scaled = ["--set", "model.timestep=\"scale_shift\""];
    project.train("run", &scaled).refused(4, &["step-00000005", "model.timestep", "\"add\"", "\"scale_shift\""]);
    assert_eq!(project.content("run"), before);
}

#[test]
fn other_images_are_refused() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(5)]);
    let before = project.content("run");
    project.picture("pictures/03.png", [8, 8], 99);
    project.train("run", &[]).refused(4, &["step-00000005", "other images", "pictures"]);
    assert_eq!(project.content("run"), before);
}

#[test]
fn fresh_spares_a_run_unless_told_to_overwrite_it() {
    let project = Project::new();
    project.trained("run", &["--fresh", "--set", &steps(10)]);
    let before = project.content("run");
    project.train("run", &["--fresh"]).refused(4, &["run", "--overwrite"]);
    assert_eq!(project.content("run"), before);
    project.train("run", &["--overwrite"]).refused_by_parser(&["--fresh"]);
    project.trained("run", &["--fresh", "--overwrite", "--set", &steps(5), "--set", "optim.lr=1e-3"]);
    assert_eq!(project.checkpoints("run"), [5]);
    assert_eq!(project.log("run").len(), 5);
    assert_eq!(std::fs::read_dir(project.path("run/tb")).unwrap().count(), 1);

    // A folder of something else is nobody's run.
    project.train("pictures", &["--fresh", "--overwrite"]).refused(4, &["pictures", "not a run directory"]);
    assert_eq!(std::fs::read_dir(project.path("pictures")).unwrap().count(), 12);
}

#[test]
fn an_earlier_run_goes_only_when_the_next_one_can_start() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(5)]);
    let before = project.content("run");
    let script = r#"ulimit -v 4000000; exec "$0" "$@""#;
    let arguments =
        ["train", "config.toml", "--run-dir", "run", "--fresh", "--overwrite", "--set", "train.batch=1048576"];
    let mut limited = project.program_by("sh");
    let output = limited.args(["-c", script, env!("CARGO_BIN_EXE_ddpm-dist")]).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert!(stderr.contains("train.batch"), "{stderr}");
    assert_eq!(project.content("run"), before);
}

#[test]
fn a_picture_that_breaks_in_the_middle_of_a_run_costs_no_step() {
    let project = Project::new();
    let good = project.read("pictures/07.png");
    let mut broken = good.clone();
    let middle = broken.len() / 2;
    broken[middle] ^= 0xff;
    // The headers are read at the start, the pixels when their turn comes.
    let more = ["--set", "data.cache_limit=0", "--set", "checkpoint.every=1000", "--set", &steps(6)];
    project.trained("straight", &more);
    project.write("pictures/07.png", broken);
    let ended = project.train("run", &more);
    ended.refused(3, &["07.png"]);
    let saved = project.checkpoints("run");
    assert!(saved.len() == 1 && (1..6).contains(&saved[0]), "{saved:?}: {}", ended.stderr);
    ended.warned(&[&format!("step {} is saved", saved[0])]);
    assert_eq!(project.log("run").len() as u64, saved[0]);
}

#[test]
fn what_a_resumed_run_does_not_do_is_said() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(5)]);
    let ended = project.trained("run", &["--set", &steps(10), "--init", "run"]);
    ended.warned(&["begin with", "not used"]);
    let arguments = ["train", "config.toml", "--run-dir", "run", "--set", "train.steps=15"];
    let output = project.program().args(arguments).env("DDPM_DIST_SIMD", "portable").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    if ddpm_dist::simd::level() == ddpm_dist::simd::Level::Portable {
        return common::not_tested("another level of instructions: this machine has none above portable");
    }
    assert!(stderr.contains("going on with cpu (portable)") && stderr.contains("last bits"), "{stderr}");
}

#[test]
fn a_second_process_is_told_who_owns_the_run() {
    let project = Project::new();
    let mut running = project.train_on("run", &[]);
    running.until("a checkpoint", || !project.checkpoints("run").is_empty());
    let owner = format!("process {}", running.child.id());
    for more in [&[][..], &["--fresh", "--overwrite"]] {
        project.train("run", more).refused(4, &["in use", &owner, "--run-dir"]);
    }
    running.signal(Signal::TERM);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let step = *project.checkpoints("run").last().unwrap();
    project.trained("run", &["--set", &steps(step + 1)]);
}

#[test]
fn a_run_that_diverges_stops_and_keeps_its_last_checkpoint() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(10)]);
    // The state after step 10 with weights that are finite and overflow.
    let mut snapshot = load(&project.checkpoint("run", 10), None, Want::All).unwrap();
    let layout = snapshot.layout.clone();
    let range = layout.get("conv_out.weight").unwrap().range();
    snapshot.params[range].fill(1e38);
    let mut saver = Saver::new(&project.path("run/checkpoints"), &CheckpointConfig::default()).unwrap();
    saver.save(snapshot).unwrap();
    saver.wait().unwrap().result.unwrap();
    let before = project.hashes("run", 10);
    project.train("run", &[]).refused(5, &["step 11", "not finite", "checkpoint of step 10 is intact", "optim.lr"]);
    assert_eq!(project.hashes("run", 10), before);
    assert_eq!(project.checkpoints("run").last(), Some(&10));
    assert_eq!(project.log("run").len(), 10);
}

#[test]
fn training_begins_with_given_weights() {
    let project = Project::new();
    project.trained("run", &[]);
    project.done(&["export", "run", "exported"]);
    let ema = load(&project.checkpoint("run", 20), None, Want::Ema).unwrap();
    for source in ["run", "exported", "run/checkpoints/step-00000020"] {
        // A step so small that no weight moves: what is saved is what it began with.
        let tiny = ["--fresh", "--overwrite", "--init", source, "--set", &steps(1), "--set", "optim.lr=1e-30"];
        project.trained("next", &tiny);
        let begun = load(&project.checkpoint("next", 1), None, Want::All).unwrap();
        for tensor in ema.layout.tensors() {
            let (found, expected) = (begun.tensor(Group::Params, &tensor.name), ema.tensor(Group::Ema, &tensor.name));
            assert_eq!(found, expected, "--init {source}: {}", tensor.name);
        }
    }
    let other = ["--init", "run", "--set", "model.channels=[8, 24]"];
    project.train("other", &other).refused(2, &["--init run", "channels"]);
    assert!(!project.path("other").exists());
}

#[test]
fn weights_that_overflow_stop_the_first_step() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(1)]);
    project.done(&["export", "run", "exported"]);
    let file = "exported/unet/diffusion_pytorch_model.safetensors";
    let mut bytes = project.read(file);
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let begin = entries["conv_out.bias"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + begin..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    project.write(file, bytes);
    let ended = project.train("next", &["--init", "exported"]);
    ended.refused(5, &["step 1", "not finite", "No checkpoint was saved"]);
    assert_eq!(project.checkpoints("next"), [0u64; 0]);
}

#[test]
fn a_checkpoint_says_what_made_it() {
    let project = Project::new();
    project.trained("run", &["--set", &steps(1)]);
    let meta = ddpm_dist::checkpoint::verify(&project.checkpoint("run", 1)).unwrap().meta;
    let begin = format!("ddpm-dist {} (", env!("CARGO_PKG_VERSION"));
    let commit = meta.build.strip_prefix(&begin).and_then(|rest| rest.strip_suffix(')'));
    let commit = commit.unwrap_or_else(|| panic!("{}", meta.build));
    let git = |arguments: &[&str]| {
        let output =
            std::process::Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_string())
    };
    // A source without git, or inside another repository, does not know.
    let root = git(&["rev-parse", "--show-toplevel"]).and_then(|root| std::path::Path::new(&root).canonicalize().ok());
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(head) if root == std::path::Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().ok() => {
            assert!([head.clone(), head.clone() + "-changed"].contains(&commit.to_string()), "{commit}, at {head}");
        }
        _ => assert_eq!(commit, "unknown"),
    }
    assert!(meta.libraries["rustc"].starts_with("rustc 1."), "{:?}", meta.libraries);
    assert_eq!(meta.libraries["simd"], ddpm_dist::simd::level().name());
}
