//! What is saved is loaded, whatever the number of shards and the order of the tensors.

use super::*;

#[test]
fn a_snapshot_comes_back_bit_for_bit() {
    let tmp = tempfile::tempdir().unwrap();
    let saved = snapshot(&layout(), 12);
    let path = save(tmp.path(), &saved);
    assert_eq!(path, tmp.path().join("step-00000012"));
    assert_same(&load(&path, None, Want::All).unwrap(), &saved);
    assert_same(&load(&path, Some(&layout()), Want::All).unwrap(), &saved);
    assert_eq!(verify(&path).unwrap().meta, saved.meta);
    let names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["step-00000012"], "nothing temporary is left");
}

#[test]
fn any_number_of_shards_loads() {
    let saved = snapshot(&layout(), 3);
    for count in [1, 2, 3, 4, 8, 40] {
        let tmp = tempfile::tempdir().unwrap();
        let path = save_sharded(tmp.path(), &saved, count);
        assert_eq!(inspect(&path).unwrap().files.len(), count);
        verify(&path).unwrap();
        assert_same(&load(&path, None, Want::All).unwrap(), &saved);
    }
}

#[test]
fn a_shard_is_a_plain_safetensors_file() {
    let tmp = tempfile::tempdir().unwrap();
    let saved = snapshot(&layout(), 3);
    let path = save(tmp.path(), &saved);
    let bytes = std::fs::read(path.join("shard-00000-of-00001.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 4 * 7);
    for (name, view) in file.iter() {
        let (group, tensor) = name.split_once('.').unwrap();
        let group = GROUPS.into_iter().find(|g| g.name() == group).unwrap();
        let expected: Vec<u8> = saved.tensor(group, tensor).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!((view.data(), view.shape()), (&expected[..], &layout().get(tensor).unwrap().shape[..]));
    }
}

#[test]
fn tensors_may_stand_elsewhere_when_they_are_loaded() {
    let saved = snapshot(&layout(), 3);
    let mut order: Vec<_> = layout().tensors().iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    order.reverse();
    let other = Arc::new(Layout::packed(order).unwrap());
    for count in [1, 3] {
        let tmp = tempfile::tempdir().unwrap();
        let loaded = load(&save_sharded(tmp.path(), &saved, count), Some(&other), Want::All).unwrap();
        for group in GROUPS {
            let mut rest = loaded.group(group).to_vec();
            for t in other.tensors() {
                assert_eq!(bits(loaded.tensor(group, &t.name).unwrap()), bits(saved.tensor(group, &t.name).unwrap()));
                rest[t.range()].fill(0.0);
            }
            assert!(rest.iter().all(|v| v.to_bits() == 0), "gaps are zero");
        }
    }
}

#[test]
fn only_what_is_wanted_takes_memory() {
    let tmp = tempfile::tempdir().unwrap();
    let saved = snapshot(&layout(), 3);
    let path = save(tmp.path(), &saved);
    let ema = load(&path, None, Want::Ema).unwrap();
    assert_eq!(bits(&ema.ema), bits(&saved.ema));
    assert!(ema.params.is_empty() && ema.adam_m.is_empty() && ema.adam_v.is_empty());
    assert_eq!(bits(&load(&path, None, Want::Params).unwrap().params), bits(&saved.params));
}

#[test]
fn another_model_is_refused_and_no_older_checkpoint_is_taken() {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 3));
    let other = Layout::packed([("conv_in.weight", vec![5, 3, 3, 1]), ("new", vec![2])]).unwrap();
    let e = load_newest(tmp.path(), Some(&Arc::new(other)), Want::All).unwrap_err();
    let message = e.to_string();
    assert!(matches!(e, CheckpointError::OtherModel { .. }), "{message}");
    for part in ["conv_in.weight is [5, 3, 3, 3], configured is [5, 3, 3, 1]", "it lacks new [2]", "and 3 more"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn saving_a_step_again_replaces_it() {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 3));
    let mut again = snapshot(&layout(), 3);
    again.params[5] = 77.0;
    let path = save(tmp.path(), &again);
    assert_same(&load(&path, None, Want::All).unwrap(), &again);
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1);
}

#[test]
fn buffers_are_recycled_and_a_second_save_has_to_wait() {
    let tmp = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(tmp.path(), &CheckpointConfig::default()).unwrap();
    assert!(saver.poll().is_none() && saver.wait().is_none());
    let layout = layout();
    let buffers = saver.buffers(&layout);
    let address = buffers.params.as_ptr();
    saver.save(Snapshot::new(snapshot(&layout, 1).meta, layout.clone(), buffers)).unwrap();
    assert!(saver.is_busy());
    let refused = saver.save(snapshot(&layout, 2)).unwrap_err();
    assert_eq!((refused.running, refused.snapshot.meta.step), (1, 2));
    let report = loop {
        if let Some(report) = saver.poll() {
            break report;
        }
        std::thread::yield_now();
    };
    assert_eq!(report.step, 1);
    let saved = report.result.unwrap();
    assert_eq!(saved.bytes, std::fs::metadata(saved.path.join("shard-00000-of-00001.safetensors")).unwrap().len());
    assert_eq!(saver.buffers(&layout).params.as_ptr(), address);
    saver.save(*refused.snapshot).unwrap();
    drop(saver); // waits
    assert_eq!(list(tmp.path()).unwrap().iter().map(|(s, _)| *s).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn old_checkpoints_go_and_marked_ones_stay() {
    let tmp = tempfile::tempdir().unwrap();
    let config = CheckpointConfig { every: 10, keep: 2, keep_every: 30 };
    let mut saver = Saver::new(tmp.path(), &config).unwrap();
    for step in (10..=70).step_by(10) {
        saver.save(snapshot(&layout(), step)).unwrap();
        let saved = saver.wait().unwrap().result.unwrap();
        assert!(saved.not_removed.is_empty());
    }
    assert_eq!(list(tmp.path()).unwrap().iter().map(|(s, _)| *s).collect::<Vec<_>>(), [30, 60, 70]);
}

#[test]
fn a_damaged_checkpoint_does_not_count_as_kept_and_a_foreign_file_is_not_removed() {
    let tmp = tempfile::tempdir().unwrap();
    for step in [10, 20, 30] {
        save(tmp.path(), &snapshot(&layout(), step));
    }
    std::fs::write(tmp.path().join("step-00000010/notes.txt"), b"keep").unwrap();
    std::fs::remove_file(tmp.path().join("step-00000030/manifest.json")).unwrap();
    let mut saver = Saver::new(tmp.path(), &CheckpointConfig { keep: 2, ..Default::default() }).unwrap();
    saver.save(snapshot(&layout(), 40)).unwrap();
    let saved = saver.wait().unwrap().result.unwrap();
    // Sound are 10, 20, 40: the two newest of these stay, and 10 has to stay as it is.
    assert!(saved.removed.is_empty());
    assert!(saved.not_removed[0].to_string().contains("notes.txt"), "{}", saved.not_removed[0]);
    assert_same(&load(&tmp.path().join("step-00000010"), None, Want::All).unwrap(), &snapshot(&layout(), 10));
}
