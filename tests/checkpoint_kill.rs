//! A process that saves checkpoint after checkpoint is killed (SIGKILL) at arbitrary moments, again and again.

use ddpm_dist::checkpoint::{
    Buffers, CheckpointConfig, Layout, Meta, RunDir, Saver, Snapshot, Start, Want, load_newest, rundir,
};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const DIR: &str = "DDPM_DIST_TEST_KILL_DIR";

fn layout() -> Arc<Layout> {
    Arc::new(Layout::packed([("a.weight", vec![300, 3, 3, 70]), ("b", vec![1001])]).unwrap())
}

/// The value of element `i` of group `group` after `step` steps.
fn value(step: u64, group: usize, i: usize) -> f32 {
    (step * 7 + group as u64) as f32 + i as f32 / 1024.0
}

/// The run that is killed: goes on from the newest checkpoint and says which steps were reported as saved.
#[test]
#[ignore = "is started by the test below"]
fn run_until_killed() {
    let Some(root) = std::env::var_os(DIR) else { return };
    let run = RunDir::open(Path::new(&root), Start::Resume).expect("the lock of the killed process is free");
    let layout = layout();
    let newest = load_newest(&run.checkpoints(), Some(&layout), Want::All).unwrap();
    let mut step = newest.map_or(0, |n| n.snapshot.meta.step);
    let mut saver = Saver::new(&run.checkpoints(), &CheckpointConfig { keep: 2, ..Default::default() }).unwrap();
    loop {
        step += 1;
        let mut buffers = saver.buffers(&layout);
        let Buffers { params, adam_m, adam_v, ema, .. } = &mut buffers;
        for (group, buffer) in [params, adam_m, adam_v, ema].into_iter().enumerate() {
            buffer.iter_mut().enumerate().for_each(|(i, v)| *v = value(step, group, i));
        }
        let meta = Meta { step, world_size: 1, ..Meta::default() };
        saver.save(Snapshot::new(meta, layout.clone(), buffers)).unwrap();
        saver.wait().unwrap().result.unwrap();
        println!("saved {step}");
    }
}

#[test]
fn a_killed_run_leaves_its_last_reported_checkpoint_or_a_newer_one() {
    let tmp = tempfile::tempdir().unwrap();
    let layout = layout();
    let mut delay = 0x9e37_79b9u32;
    let mut last = 0;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "run_until_killed"])
            .env(DIR, tmp.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut saved = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| line.rsplit_once("saved ")?.1.parse::<u64>().ok());
        let first = saved.next().unwrap_or_else(|| panic!("round {round}: the run did not save after step {last}"));
        assert!(first > last, "round {round}: step {first} after {last}");
        delay ^= delay << 13;
        delay ^= delay >> 17;
        delay ^= delay << 5;
        std::thread::sleep(Duration::from_micros(u64::from(delay % 60_000)));
        child.kill().unwrap();
        last = saved.last().unwrap_or(first);
        child.wait().unwrap();

        let newest = load_newest(&rundir::checkpoints_of(tmp.path()), Some(&layout), Want::All).unwrap().unwrap();
        assert!(newest.skipped.is_empty(), "round {round}: {}", newest.skipped[0]);
        let found = newest.snapshot;
        let step = found.meta.step;
        assert!(step == last || step == last + 1, "round {round}: found {step}, reported {last}");
        for (group, buffer) in [&found.params, &found.adam_m, &found.adam_v, &found.ema].into_iter().enumerate() {
            for t in layout.tensors() {
                assert!(t.range().all(|i| buffer[i] == value(step, group, i)), "round {round}: {}", t.name);
            }
        }
        last = step;
    }
    let run = RunDir::open(tmp.path(), Start::Resume).unwrap();
    Saver::new(&run.checkpoints(), &CheckpointConfig::default()).unwrap();
    let left = std::fs::read_dir(run.checkpoints()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.contains(".tmp-")));
}
