//! Checkpoints as a whole: round trips, faults at every file operation, hostile files.

mod faults;
mod hostile;
mod killed;
mod ranks;
mod resharding;
mod roundtrip;

use super::*;
use std::path::Path;
use std::sync::Arc;

/// Seven small tensors of odd sizes, with gaps between them and tensors that shard borders cut.
fn layout() -> Arc<Layout> {
    let tensors = [
        ("conv_in.weight", vec![5, 3, 3, 3]),
        ("conv_in.bias", vec![5]),
        ("mid.to_q.weight", vec![16, 16]),
        ("mid.to_q.bias", vec![16]),
        ("up.conv1.weight", vec![7, 3, 3, 5]),
        ("up.conv1.bias", vec![7]),
        ("t", vec![1]),
    ];
    Arc::new(Layout::packed(tensors).unwrap())
}

/// A snapshot whose values name their group, place and step; gaps are zero. Some values are special, and must keep their bits.
fn snapshot(layout: &Arc<Layout>, step: u64) -> Snapshot {
    let mut buffers = Buffers::zeroed(0..layout.elements());
    let groups = [&mut buffers.params, &mut buffers.adam_m, &mut buffers.adam_v, &mut buffers.ema];
    for (g, buffer) in groups.into_iter().enumerate() {
        for t in layout.tensors() {
            for i in t.range() {
                buffer[i] = step as f32 + g as f32 * 0.25 + i as f32 * 1e-3;
            }
        }
        buffer[0] = f32::from_bits(0x7fc0_1234);
        buffer[1] = -0.0;
        buffer[2] = f32::from_bits(1);
    }
    let meta =
        Meta { step, images: step * 128, seed: u64::MAX, config_hash: "c".into(), world_size: 1, ..Meta::default() };
    Snapshot::new(meta, layout.clone(), buffers)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn assert_same(a: &Snapshot, b: &Snapshot) {
    assert_eq!(a.meta, b.meta);
    for group in GROUPS {
        assert_eq!(bits(a.group(group)), bits(b.group(group)), "{group:?}");
    }
}

/// Saves through a saver and waits.
fn save(dir: &Path, snapshot: &Snapshot) -> std::path::PathBuf {
    let mut saver = Saver::new(dir, &CheckpointConfig { keep: 100, ..Default::default() }).unwrap();
    saver.save(snapshot.clone()).unwrap();
    saver.wait().unwrap().result.unwrap().path
}

/// The share of a rank.
fn share(whole: &Snapshot, rank: usize, size: usize) -> Snapshot {
    let range = whole.layout.shard(rank, size);
    let part = |group| whole.group(group)[range.clone()].to_vec();
    let [params, adam_m, adam_v, ema] = GROUPS.map(part);
    let buffers = Buffers { params, adam_m, adam_v, ema, range };
    Snapshot::new(whole.meta.clone(), whole.layout.clone(), buffers)
}

/// Saves as `count` ranks do.
fn save_sharded(dir: &Path, snapshot: &Snapshot, count: usize) -> std::path::PathBuf {
    let mut reports = ranks::Ranks::new(dir, count).save(snapshot);
    reports.swap_remove(0).result.unwrap().path
}
