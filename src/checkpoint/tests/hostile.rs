//! Damaged and hostile files are refused by name, never with a panic.

use super::*;
use proptest::prelude::*;
use std::fs;
use std::sync::OnceLock;

const SHARD: &str = "shard-00000-of-00001.safetensors";

/// Steps 1 and 2, of which `damage` then changes the second.
fn after(damage: impl FnOnce(&Path)) -> (tempfile::TempDir, Newest) {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 1));
    damage(&save(tmp.path(), &snapshot(&layout(), 2)));
    let newest = load_newest(tmp.path(), Some(&layout()), Want::All).unwrap().unwrap();
    (tmp, newest)
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_file_is_named_and_the_checkpoint_before_is_taken() {
    type Damage = (&'static str, &'static str, fn(&Path));
    let damages: [Damage; 9] = [
        (SHARD, "is missing", |p| fs::remove_file(p).unwrap()),
        (SHARD, "truncated", |p| edit(p, |b| b.truncate(b.len() - 1))),
        (SHARD, "truncated", |p| edit(p, Vec::clear)),
        (SHARD, "truncated", |p| edit(p, |b| b.push(0))),
        (SHARD, "SHA-256", |p| edit(p, |b| *b.last_mut().unwrap() ^= 1)),
        (SHARD, "header", |p| edit(p, |b| b[7] = 0xff)),
        ("manifest.json", "is missing", |p| fs::remove_file(p).unwrap()),
        ("manifest.json", "truncated", |p| edit(p, |b| b.truncate(100))),
        ("manifest.json", "damaged or edited", |p| edit(p, |b| b[60] ^= 4)),
    ];
    for (file, says, damage) in damages {
        let (_tmp, newest) = after(|dir| damage(&dir.join(file)));
        assert_eq!(newest.snapshot.meta.step, 1);
        assert_same(&newest.snapshot, &snapshot(&layout(), 1));
        let [skipped] = &newest.skipped[..] else { panic!("{:?}", newest.skipped) };
        let message = skipped.to_string();
        assert!(message.contains(says) && message.contains(file) && message.contains("step-00000002"), "{message}");
    }
}

#[test]
fn one_damaged_shard_of_several_is_named_and_the_checkpoint_before_is_taken() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 4] = [
        ("is missing", |p| fs::remove_file(p).unwrap()),
        ("truncated", |p| edit(p, |b| b.truncate(b.len() / 2))),
        ("SHA-256", |p| edit(p, |b| *b.last_mut().unwrap() ^= 0x10)),
        // Whole and sound, and the shard of another step.
        ("SHA-256", |p| {
            let other = p.parent().unwrap().with_file_name("step-00000001").join(p.file_name().unwrap());
            fs::copy(other, p).map(drop).unwrap();
        }),
    ];
    for index in 0..3 {
        for (says, damage) in damages {
            let tmp = tempfile::tempdir().unwrap();
            let [_, path] = [1, 2].map(|step| save_sharded(tmp.path(), &snapshot(&layout(), step), 3));
            let file = ShardFile::file_name(index, 3);
            damage(&path.join(&file));
            let newest = load_newest(tmp.path(), Some(&layout()), Want::All).unwrap().unwrap();
            assert_same(&newest.snapshot, &snapshot(&layout(), 1));
            let [skipped] = &newest.skipped[..] else { panic!("{:?}", newest.skipped) };
            let message = skipped.to_string();
            assert!(message.contains(says) && message.contains(&file), "{message}");
        }
    }
}

#[test]
fn a_shard_that_is_a_directory_or_a_renamed_checkpoint_is_refused() {
    let (_tmp, newest) = after(|dir| {
        fs::remove_file(dir.join(SHARD)).unwrap();
        fs::create_dir(dir.join(SHARD)).unwrap();
    });
    assert!(newest.skipped[0].to_string().contains("is missing"));
    let (_tmp, newest) = after(|dir| fs::rename(dir, dir.with_file_name("step-00000009")).unwrap());
    assert!(
        newest.skipped[0].to_string().contains("it is of step 2 in a directory of step 9"),
        "{}",
        newest.skipped[0]
    );
}

#[test]
fn a_file_that_cannot_be_read_now_is_not_damage() {
    // A loop of links stands for every refusal that has nothing to do with the content; permissions do not stop an administrator.
    for file in [SHARD, "manifest.json"] {
        for steps in [1, 2] {
            let tmp = tempfile::tempdir().unwrap();
            let saved: Vec<_> = (1..=steps).map(|step| save(tmp.path(), &snapshot(&layout(), step))).collect();
            let newest = saved[saved.len() - 1].clone();
            fs::remove_file(newest.join(file)).unwrap();
            std::os::unix::fs::symlink(file, newest.join(file)).unwrap();
            let error = load_newest(tmp.path(), Some(&layout()), Want::All).unwrap_err();
            assert!(matches!(&error, CheckpointError::Unreadable { path, .. } if *path == newest), "{error}");
            let message = error.to_string();
            assert!(message.contains(file) && message.contains("move it away"), "{message}");
            assert!(!message.contains("--overwrite"), "{message}");
        }
    }
}

#[test]
fn when_nothing_verifies_that_is_an_error_and_an_empty_directory_is_none() {
    let tmp = tempfile::tempdir().unwrap();
    assert!(load_newest(&tmp.path().join("absent"), None, Want::All).unwrap().is_none());
    assert!(load_newest(tmp.path(), None, Want::All).unwrap().is_none());
    for step in [1, 2] {
        fs::remove_file(save(tmp.path(), &snapshot(&layout(), step)).join(SHARD)).unwrap();
    }
    let message = load_newest(tmp.path(), None, Want::All).unwrap_err().to_string();
    assert!(message.contains("step-00000001") && message.contains("step-00000002"), "{message}");
}

#[test]
fn a_shard_whose_header_moves_tensors_is_refused_even_with_a_right_hash() {
    let tmp = tempfile::tempdir().unwrap();
    let path = save(tmp.path(), &snapshot(&layout(), 2));
    let original = fs::read(path.join(SHARD)).unwrap();
    for (from, to, says) in [
        ("params.t\"", "params.u\"", "params.u"),
        ("params.t\"", "adam_m.t\"", ""),
        ("[16,16]", "[16,15]", "garbled header"),
        ("[16,16]", "[32,8] ", "expected F32 [16, 16]"),
        ("\"F32\"", "\"I32\"", "expected F32"),
    ] {
        let mut bytes = original.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes.splice(at..at + from.len(), to.bytes());
        fs::write(path.join(SHARD), &bytes).unwrap();
        let mut manifest = inspect(&path).unwrap();
        manifest.files[0].sha256 = crate::checkpoint::stream::hex(&<sha2::Sha256 as sha2::Digest>::digest(&bytes));
        fs::write(path.join("manifest.json"), manifest.encode().unwrap()).unwrap();
        let message = load(&path, None, Want::All).unwrap_err().to_string();
        assert!(message.contains(SHARD) && message.contains(says), "{to}: {message}");
    }
}

/// The files of an undamaged checkpoint, shard and manifest.
fn sound() -> &'static (Vec<u8>, Vec<u8>) {
    static FILES: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    FILES.get_or_init(|| {
        let tmp = tempfile::tempdir().unwrap();
        let path = save(tmp.path(), &snapshot(&layout(), 2));
        (fs::read(path.join(SHARD)).unwrap(), fs::read(path.join("manifest.json")).unwrap())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn arbitrary_damage_to_a_shard_never_panics_and_never_loads(at in any::<prop::sample::Index>(), put in prop::collection::vec(any::<u8>(), 1..40)) {
        let (shard, manifest) = sound();
        let at = at.index(shard.len());
        let end = (at + put.len()).min(shard.len());
        let same = shard[at..end] == put[..end - at];
        let mut damaged = shard.clone();
        damaged[at..end].copy_from_slice(&put[..end - at]);
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path();
        fs::write(path.join(SHARD), damaged).unwrap();
        fs::write(path.join("manifest.json"), manifest).unwrap();
        prop_assert_eq!(load(path, None, Want::All).is_ok(), same);
    }

    #[test]
    fn arbitrary_manifests_never_panic(text in "[\\[\\]{}\",:a-z0-9_ .-]{0,300}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Manifest::decode(Path::new("m"), text.as_bytes()).is_err());
        prop_assert!(Manifest::decode(Path::new("m"), &bytes).is_err());
    }

    #[test]
    fn arbitrary_ranges_never_panic(rows in prop::collection::vec((any::<u64>(), any::<u64>(), prop::collection::vec(any::<u64>(), 0..4)), 0..6)) {
        let specs = rows.into_iter().enumerate().map(|(i, (offset, len, shape))| TensorSpec {
            name: format!("t{}", i % 4),
            shape: shape.into_iter().map(|d| d as usize).collect(),
            offset: offset as usize,
            len: len as usize,
        });
        let _ = Layout::new(specs.collect());
    }
}
