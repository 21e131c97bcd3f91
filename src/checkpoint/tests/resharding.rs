//! Any number of shards becomes any other, with the same bits.

use super::*;
use std::fs;
use std::sync::atomic::AtomicBool;

fn go_on() -> Arc<AtomicBool> {
    Arc::default()
}

fn file_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn any_number_of_shards_becomes_any_other() {
    let tmp = tempfile::tempdir().unwrap();
    let saved = snapshot(&layout(), 3);
    let whole = save(&tmp.path().join("whole"), &saved);
    for from in [1, 2, 3, 8, 40, 100] {
        // More shards than blocks of values: some are empty.
        let source = tmp.path().join(format!("of-{from}"));
        let manifest = reshard(&whole, &source, from, &go_on()).unwrap();
        assert_eq!((manifest.files.len(), &manifest.meta), (from, &saved.meta));
        for to in [1, 2, 5, 8] {
            let target = tmp.path().join(format!("of-{from}-of-{to}"));
            reshard(&source, &target, to, &go_on()).unwrap();
            assert_eq!(verify(&target).unwrap().files.len(), to);
            assert_same(&load(&target, Some(&layout()), Want::All).unwrap(), &saved);
            // It is the same whatever it was made from, down to the file.
            let direct = tmp.path().join("direct");
            reshard(&whole, &direct, to, &go_on()).unwrap();
            for name in file_names(&direct) {
                assert_eq!(fs::read(direct.join(&name)).unwrap(), fs::read(target.join(&name)).unwrap(), "{name}");
            }
            fs::remove_dir_all(direct).unwrap();
        }
    }
    assert!(file_names(tmp.path()).iter().all(|name| !name.contains(".tmp-")));
}

#[test]
fn a_checkpoint_of_ranks_is_what_resharding_makes() {
    let tmp = tempfile::tempdir().unwrap();
    let saved = snapshot(&layout(), 3);
    let of_ranks = save_sharded(&tmp.path().join("ranks"), &saved, 3);
    let made = tmp.path().join("made");
    reshard(&save(&tmp.path().join("whole"), &saved), &made, 3, &go_on()).unwrap();
    for name in file_names(&made) {
        assert_eq!(fs::read(made.join(&name)).unwrap(), fs::read(of_ranks.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn nothing_is_written_over_and_nothing_is_left_of_what_fails() {
    let tmp = tempfile::tempdir().unwrap();
    let source = save_sharded(tmp.path(), &snapshot(&layout(), 3), 2);
    let target = tmp.path().join("step-00000003-reshard-4");
    let refused = |target: &Path| reshard(&source, target, 4, &go_on()).unwrap_err().to_string();
    for target in [&source, tmp.path()] {
        assert!(refused(target).contains("exists"), "{}", refused(target));
    }
    std::os::unix::fs::symlink("nowhere", &target).unwrap();
    assert!(refused(&target).contains("exists"));
    fs::remove_file(&target).unwrap();
    assert!(refused(&tmp.path().join("no/such")).contains("no"));
    let stopped = reshard(&source, &target, 4, &Arc::new(AtomicBool::new(true))).unwrap_err();
    assert!(matches!(stopped, CheckpointError::CalledOff));
    let shard = source.join("shard-00001-of-00002.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    assert!(refused(&target).contains("shard-00001-of-00002.safetensors is corrupt"), "{}", refused(&target));
    assert_eq!(file_names(tmp.path()), ["step-00000003"]);
}

#[test]
fn a_copy_beside_a_checkpoint_is_in_no_runs_way() {
    let tmp = tempfile::tempdir().unwrap();
    let source = save(tmp.path(), &snapshot(&layout(), 3));
    let copy = tmp.path().join("step-00000003-reshard-2");
    reshard(&source, &copy, 2, &go_on()).unwrap();
    let newest = load_newest(tmp.path(), Some(&layout()), Want::All).unwrap().unwrap();
    assert_eq!((newest.path, newest.skipped.len()), (source, 0));
    let mut saver = Saver::new(tmp.path(), &CheckpointConfig { keep: 1, ..Default::default() }).unwrap();
    saver.save(snapshot(&layout(), 4)).unwrap();
    saver.wait().unwrap().result.unwrap();
    assert_eq!(file_names(tmp.path()), ["step-00000003-reshard-2", "step-00000004"]);
    verify(&copy).unwrap();
}

#[test]
fn what_a_killed_process_has_left_of_a_copy_is_removed_by_the_next() {
    let tmp = tempfile::tempdir().unwrap();
    let source = save_sharded(tmp.path(), &snapshot(&layout(), 3), 2);
    let target = tmp.path().join("step-00000003-reshard-4");
    let left = |digit: &str| tmp.path().join(format!("step-00000003-reshard-4.tmp-{}", digit.repeat(32)));
    for digit in ["1", "2"] {
        fs::create_dir(left(digit)).unwrap();
        fs::write(left(digit).join("shard-00000-of-00004.safetensors"), b"half").unwrap();
    }
    // Another process still writes this one.
    let held = fs::File::open(left("2")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    reshard(&source, &target, 4, &go_on()).unwrap();
    assert!(!left("1").exists() && left("2").exists());
}
