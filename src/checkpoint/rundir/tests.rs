//! Run directories: made, resumed, overwritten, refused.

use super::*;

fn touch(root: &Path, files: &[&str]) {
    for file in files {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"x").unwrap();
    }
}

const RUN: [&str; 6] = [
    "config.toml",
    "log.jsonl",
    "tb/events.out.tfevents.1.host",
    "samples/step-00000010.png",
    "checkpoints/step-00000010/manifest.json",
    "checkpoints/step-00000010/shard-00000-of-00001.safetensors",
];

#[test]
fn a_new_directory_is_made_and_can_be_resumed() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("runs/first");
    RunDir::check(&root, Start::Resume).unwrap();
    assert!(!root.exists(), "a check makes nothing");
    let run = RunDir::open(&root, Start::Resume).unwrap();
    run.settle(None).unwrap();
    run.write_config("a = 1\n").unwrap();
    run.write_config("a = 2\n").unwrap();
    assert_eq!(fs::read_to_string(run.config()).unwrap(), "a = 2\n");
    assert!(run.checkpoints().is_dir() && run.samples().is_dir() && run.tensorboard().is_dir());
    assert_eq!(run.sample(12000, "png"), root.join("samples/step-00012000.png"));
    drop(run);
    assert!(is_run_dir(&root));
    RunDir::open(&root, Start::Resume).unwrap();
}

#[test]
fn fresh_refuses_a_run_and_overwrite_removes_only_what_a_run_made() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    drop(RunDir::open(root, Start::Fresh { overwrite: false }).unwrap());
    drop(RunDir::open(root, Start::Fresh { overwrite: false }).unwrap()); // nothing was trained yet
    touch(root, &RUN);
    let mine = ["notes.txt", "samples/favourite.png", "checkpoints/step-00000020/notes", "checkpoints/old/x", "tb/x"];
    touch(root, &mine);
    let e = RunDir::open(root, Start::Fresh { overwrite: false }).unwrap_err();
    assert!(matches!(&e, RunDirError::HoldsRun { .. }) && e.to_string().contains("--overwrite"), "{e}");
    assert!(RUN.iter().all(|f| root.join(f).exists()));
    let run = RunDir::open(root, Start::Fresh { overwrite: true }).unwrap();
    assert!(RUN.iter().all(|f| root.join(f).exists()), "nothing is removed before the new run can start");
    let left = run.settle(None).unwrap();
    assert!(RUN.iter().all(|f| !root.join(f).exists()));
    assert!(mine.iter().all(|f| root.join(f).exists()));
    assert!(left.contains(&root.join("notes.txt")));
}

#[cfg(unix)]
#[test]
fn overwrite_removes_links_and_not_what_they_lead_to() {
    use std::os::unix::fs::symlink;
    let tmp = tempfile::tempdir().unwrap();
    let elsewhere = tmp.path().join("elsewhere");
    let kept = ["step-00000010/manifest.json", "step-00000010.png", "events.out.tfevents.1.host"];
    for dir in [CHECKPOINTS, SAMPLES, TENSORBOARD, "checkpoints/step-00000010"] {
        let root = tmp.path().join(dir.replace('/', "-"));
        touch(&elsewhere, &kept);
        drop(RunDir::open(&root, Start::Resume).unwrap());
        touch(&root, &RUN);
        let path = root.join(dir);
        fs::remove_dir_all(&path).unwrap();
        symlink(&elsewhere, &path).unwrap();
        let left = RunDir::open(&root, Start::Fresh { overwrite: true }).unwrap().settle(None).unwrap();
        assert!(kept.iter().all(|f| elsewhere.join(f).exists()), "{dir}");
        assert!(RUN.iter().all(|f| !root.join(f).exists()), "{dir}");
        assert!(!fs::symlink_metadata(&path).is_ok_and(|m| m.is_symlink()), "{dir}");
        assert!(left.iter().all(|p| p.is_dir()), "{left:?}");
    }
    // Also one that leads nowhere.
    let root = tmp.path().join("broken");
    RunDir::open(&root, Start::Resume).unwrap().settle(None).unwrap();
    fs::remove_dir(root.join(SAMPLES)).unwrap();
    symlink("nowhere", root.join(SAMPLES)).unwrap();
    RunDir::open(&root, Start::Fresh { overwrite: true }).unwrap().settle(None).unwrap();
    assert!(root.join(SAMPLES).is_dir());
}

#[test]
fn a_directory_that_is_no_run_is_never_taken() {
    let tmp = tempfile::tempdir().unwrap();
    touch(tmp.path(), &["config.toml"]);
    for start in [Start::Resume, Start::Fresh { overwrite: false }, Start::Fresh { overwrite: true }] {
        let e = RunDir::open(tmp.path(), start).unwrap_err();
        assert!(matches!(&e, RunDirError::NotARun { found, .. } if found == "config.toml"), "{e}");
    }
    assert_eq!(names(tmp.path()).unwrap(), ["config.toml"]);
}

#[test]
fn a_second_run_is_told_who_owns_the_directory() {
    let tmp = tempfile::tempdir().unwrap();
    let first = RunDir::open(tmp.path(), Start::Resume).unwrap();
    for start in [Start::Resume, Start::Fresh { overwrite: true }] {
        match RunDir::open(tmp.path(), start).unwrap_err() {
            RunDirError::Locked { owner, .. } => assert_eq!(owner.pid, Some(std::process::id())),
            e => panic!("{e}"),
        }
    }
    drop(first);
    RunDir::open(tmp.path(), Start::Resume).unwrap();
}
