//! `checkpoint verify`, `inspect` and `reshard` as a user runs them.

mod common;

use common::Project;
use serde_json::Value;

const STEP_5: &str = "run/checkpoints/step-00000005";
const STEP_10: &str = "run/checkpoints/step-00000010";

fn trained() -> Project {
    let project = Project::new();
    project.trained("run", &["--set", "train.steps=10"]);
    project
}

fn turn_a_bit(project: &Project, file: &str) {
    let mut bytes = project.read(file);
    *bytes.last_mut().unwrap() ^= 1;
    project.write(file, bytes);
}

#[test]
fn verify_reads_every_checkpoint_and_says_which_is_damaged() {
    let project = trained();
    for (path, steps) in [("run", &[5, 10][..]), ("run/checkpoints", &[5, 10]), (STEP_5, &[5]), (STEP_10, &[10])] {
        let ended = project.done(&["checkpoint", "verify", path]);
        let lines: Vec<&str> = ended.stdout.lines().collect();
        assert_eq!(lines.len(), steps.len(), "{}", ended.stdout);
        for (line, step) in lines.iter().zip(steps) {
            assert!(line.contains(&format!("ok, step {step}, 1 shard, ")), "{line}");
        }
    }
    let shard = format!("{STEP_5}/shard-00000-of-00001.safetensors");
    turn_a_bit(&project, &shard);
    let ended = project.run(&["checkpoint", "verify", "run"]);
    ended.refused(4, &["1 of 2 checkpoints cannot be resumed from"]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(lines[0].contains("FAILED") && lines[0].contains(&shard) && lines[0].contains("SHA-256"), "{}", lines[0]);
    assert!(lines[1].contains("ok, step 10"), "{}", lines[1]);
    let ended = project.run(&["checkpoint", "verify", "run", "--json"]);
    ended.refused(4, &["1 of 2"]);
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&found[0]["ok"], &found[1]["ok"], &found[1]["step"]), (&false.into(), &true.into(), &10.into()));
    // One that has lost its manifest is still a checkpoint by its name, and one under another's name is none.
    std::fs::remove_file(project.path(STEP_5).join("manifest.json")).unwrap();
    std::fs::rename(project.path(STEP_10), project.path("run/checkpoints/step-00000011")).unwrap();
    let ended = project.run(&["checkpoint", "verify", "run"]);
    ended.refused(4, &["2 of 2"]);
    assert!(ended.stdout.contains("manifest.json is missing") && ended.stdout.contains("its name says 11"));
    project.run(&["checkpoint", "verify", STEP_5]).refused(4, &["1 of 1 checkpoint"]);
    project.run(&["checkpoint", "verify", "pictures"]).refused(4, &["pictures", "neither a checkpoint"]);
    project.run(&["checkpoint", "verify", "nowhere"]).refused(4, &["nowhere", "neither a checkpoint"]);
    std::fs::remove_dir_all(project.path("run/checkpoints")).unwrap();
    project.run(&["checkpoint", "verify", "run"]).refused(4, &["run has no checkpoint yet"]);
}

#[test]
fn inspect_shows_what_the_manifest_says() {
    let project = trained();
    let ended = project.done(&["checkpoint", "inspect", "run"]);
    for words in [STEP_10, "10 (40 images)", "seed", "11", "1 rank", "model.channels", "[8, 16]", "params", "adam_v"] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains("conv_in.weight"));
    let ended = project.done(&["checkpoint", "inspect", STEP_5, "--tensors"]);
    assert!(ended.stdout.contains("5 (20 images)") && ended.stdout.contains("conv_in.weight"), "{}", ended.stdout);
    let ended = project.done(&["checkpoint", "inspect", "run", "--json"]);
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&found["run"]["step"], &found["run"]["seed"]), (&10.into(), &11.into()));
    let elements: u64 = found["tensors"].as_array().unwrap().iter().map(|t| t["elements"].as_u64().unwrap()).sum();
    assert_eq!((Some(elements), found["files"].as_array().unwrap().len()), (found["parameters"].as_u64(), 1));
    // A truncated shard is seen without reading it.
    project.write(&format!("{STEP_10}/shard-00000-of-00001.safetensors"), b"short");
    project.run(&["checkpoint", "inspect", "run"]).refused(4, &["shard-00000-of-00001", "has 5 bytes"]);
}

#[test]
fn reshard_makes_a_checkpoint_that_a_run_goes_on_from() {
    let project = trained();
    let ended = project.done(&["checkpoint", "reshard", "run", "--shards", "3"]);
    let copy = format!("{STEP_10}-reshard-3");
    assert!(ended.stderr.contains(&copy) && ended.stderr.contains("3 shards"), "{}", ended.stderr);
    assert_eq!(std::fs::read_dir(project.path(&copy)).unwrap().count(), 4);
    let verified = project.done(&["checkpoint", "verify", &copy]);
    assert!(verified.stdout.contains("ok, step 10, 3 shards"), "{}", verified.stdout);
    assert_eq!(project.checkpoints("run"), [5, 10], "a run does not take the copy for one of its own");
    for (source, out) in [("run", "a.npy"), (&*copy, "b.npy")] {
        project.done(&["sample", source, "--count", "2", "--out", out]);
    }
    assert_eq!(project.read("a.npy"), project.read("b.npy"));
    // Back into one file it is the file it was.
    project.done(&["checkpoint", "reshard", &copy, "--shards", "1", "--out", "back"]);
    let file = "shard-00000-of-00001.safetensors";
    assert_eq!(project.read(format!("back/{file}")), project.read(format!("{STEP_10}/{file}")));
    // In the place of the original, it is gone on from to the same end.
    std::fs::create_dir_all(project.path("other/checkpoints")).unwrap();
    std::fs::rename(project.path(&copy), project.path("other/checkpoints/step-00000010")).unwrap();
    for run in ["run", "other"] {
        project.trained(run, &[]);
    }
    assert_eq!(project.hashes("other", 20), project.hashes("run", 20));
}

#[test]
fn reshard_writes_over_nothing_and_trusts_nothing() {
    let project = trained();
    let before = project.content("run");
    let reshard = |more: &[&str]| project.run(&[&["checkpoint", "reshard"], more].concat());
    reshard(&["run", "--shards", "0"]).refused_by_parser(&["--shards"]);
    reshard(&["run"]).refused_by_parser(&["--shards"]);
    for out in [STEP_10, "run", "pictures", "config.toml"] {
        reshard(&["run", "--shards", "2", "--out", out]).refused(4, &[out, "exists"]);
    }
    reshard(&["run", "--shards", "2", "--out", "config.toml/x"]).refused(4, &["config.toml"]);
    reshard(&["nowhere", "--shards", "2"]).refused(4, &["nowhere"]);
    assert_eq!(project.content("run"), before);
    turn_a_bit(&project, &format!("{STEP_10}/shard-00000-of-00001.safetensors"));
    reshard(&["run", "--shards", "2"]).refused(4, &["step-00000010", "SHA-256"]);
    assert_eq!(std::fs::read_dir(project.path("run/checkpoints")).unwrap().count(), 2, "nothing is left of it");
    project.done(&["checkpoint", "reshard", STEP_5, "--shards", "2", "--out", "of-5"]);
}
