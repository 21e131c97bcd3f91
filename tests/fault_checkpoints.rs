//! What can happen to the state of a run of many ranks: damaged files, a disk that refuses, a bit that flips in memory, another number of
//! ranks, a second run in the same directory. All of it is done to the program itself.

mod common;

use common::Project;
use common::ranks::{FOR_LONG, SHARDS, alone, is_saved, launch, launcher, uninterrupted};
use ddpm_dist::checkpoint::{Want, load};
use rustix::process::{Pid, Signal};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[test]
fn a_damaged_shard_is_named_and_the_checkpoint_before_it_taken() {
    let (_alone, project) = (alone(), Project::new());
    let straight = uninterrupted(&project, 20);
    let (code, stderr) = launch(&project, 2, "run", &["--set", "train.steps=15"]).wait();
    assert_eq!(code, Some(0), "{stderr}");
    let shard = "shard-00001-of-00002.safetensors";
    let [.., before, 15] = project.checkpoints("run")[..] else { panic!("two checkpoints") };
    let before = project.checkpoint("run", before).file_name().unwrap().to_str().unwrap().to_string();
    type Damage = fn(&Path);
    let flip: Damage = |path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(path, bytes).unwrap();
    };
    let cut: Damage = |path| File::options().write(true).open(path).unwrap().set_len(1000).unwrap();
    let delete: Damage = |path| std::fs::remove_file(path).unwrap();
    for (name, damage) in [("flip", flip), ("cut", cut), ("delete", delete)] {
        project.copy("run", name);
        damage(&project.checkpoint(name, 15).join(shard));
        let (code, stderr) = launch(&project, 2, name, &["--set", "train.steps=20"]).wait();
        assert_eq!(code, Some(0), "{stderr}");
        let says =
            |line: &str| line.contains("warning: skipping") && line.contains("step-00000015") && line.contains(shard);
        assert!(stderr.lines().any(says), "{name}: {stderr}");
        assert!(stderr.contains(&format!("resuming from {name}/checkpoints/{before}")), "{stderr}");
        assert!(project.state(name, 20) == project.state(&straight, 20), "{name}");
    }
}

#[test]
fn a_disk_that_refuses_the_checkpoints_of_many_ranks_for_a_while() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &["--set", "checkpoint.keep=3"]].concat());
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    // Even the system's administrator cannot make a directory in a file.
    project.write("away", b"no directory");
    project.exchange("run/checkpoints", "away");
    launcher.until_said("is NOT saved");
    let lines = project.log_lines("run");
    launcher.until("more steps", || project.log_lines("run") > lines + 20);
    project.exchange("run/checkpoints", "away");
    let last = *project.checkpoints("run").last().unwrap();
    launcher.until("a checkpoint after it", || project.checkpoints("run").last().is_some_and(|&step| step > last));
    launcher.signal(Signal::TERM);
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let end = *project.checkpoints("run").last().unwrap();
    assert_eq!(project.hashes("run", end).len(), 2, "one shard of each rank");
}

/// A checkpoint of four ranks goes on at one, two and eight.
#[test]
fn a_checkpoint_goes_on_at_any_number_of_ranks() {
    let (_alone, project) = (alone(), Project::new());
    let eight = ["--set", "train.batch=8", "--set", "train.shards=8"];
    project.trained("straight", &[&eight[..], &["--set", "train.steps=20"]].concat());
    let train = |ranks: usize, run_dir: &str, steps: &str| {
        let (code, stderr) = launch(&project, ranks, run_dir, &[&eight[..], &["--set", steps]].concat()).wait();
        assert_eq!(code, Some(0), "{stderr}");
    };
    train(4, "run", "train.steps=10");
    for ranks in [1, 2, 8] {
        let run_dir = format!("on-{ranks}");
        project.copy("run", &run_dir);
        train(ranks, &run_dir, "train.steps=20");
        assert!(project.state(&run_dir, 20) == project.state("straight", 20), "{ranks} ranks");
        assert_eq!(project.measured(&run_dir), project.measured("straight"), "{ranks} ranks");
    }
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let (_alone, project) = (alone(), Project::new());
    let mut first = launch(&project, 2, "run", &FOR_LONG);
    project.until_steps(&mut first, "run", 5);
    let owner = first.ranks()[0].as_raw_nonzero().to_string();
    let (code, stderr) = project.start("second", launcher(&project, 2, "run", &[])).wait();
    assert_eq!(code, Some(4), "{stderr}");
    assert!(stderr.contains("is in use by") && stderr.contains(&owner), "{stderr}");
    first.signal(Signal::TERM);
    assert_eq!(first.wait().0, Some(75));
}

/// Weights that a learning rate of almost nothing leaves as they were drawn can be found in the memory of a rank, and a bit of them flipped.
#[test]
fn a_flipped_bit_is_noticed_and_its_rank_named() {
    let (_alone, project) = (alone(), Project::new());
    let still = ["--set", "optim.lr=1e-37"];
    project.trained("drawn", &[&SHARDS[..], &still, &["--set", "train.steps=1"]].concat());
    let drawn = load(&project.checkpoint("drawn", 1), None, Want::Params).unwrap().params;
    let words: Vec<u32> = drawn[..64].iter().map(|x| x.to_bits()).collect();
    // Of four the minority, when it is time to compare; of two both, when it is time to save.
    let by_interval = ["--set", "cluster.compare_every=50", "--set", "checkpoint.every=0"];
    let by_saving = ["--set", "cluster.compare_every=0", "--set", "checkpoint.every=100"];
    for (size, every, names) in [(4, by_interval, "rank 2 holds"), (2, by_saving, "ranks 0, 1 hold")] {
        let run_dir = format!("run-{size}");
        let mut launcher = launch(&project, size, &run_dir, &[&FOR_LONG[..], &still, &every].concat());
        match size {
            4 => project.until_steps(&mut launcher, &run_dir, 12),
            _ => launcher.until("a checkpoint", || is_saved(&project, &run_dir)),
        }
        assert!(flip_everywhere(launcher.ranks()[size / 2], &words) > 0, "the weights were found");
        let at = project.log_lines(&run_dir);
        let (code, stderr) = launcher.wait();
        assert_eq!(code, Some(9), "{stderr}");
        assert!(stderr.contains(names), "{stderr}");
        let end = project.log_lines(&run_dir);
        assert!(end < at + 110, "noticed {} steps later", end - at);
        for step in project.checkpoints(&run_dir) {
            let saved = load(&project.checkpoint(&run_dir, step), None, Want::Params).unwrap();
            assert!(saved.params[..64] == drawn[..64], "the checkpoint of step {step} holds the flipped bit");
        }
    }
}

/// Flips the lowest bit of the first word of every place in the memory of a process that holds `words`; gives how many there are.
fn flip_everywhere(pid: Pid, words: &[u32]) -> usize {
    let pid = pid.as_raw_nonzero();
    let pattern: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
    let mut flips = 0;
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(access)) = (fields.next(), fields.next()) else { continue };
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        // A reservation of address space, as for what ranks share, is larger than any memory.
        if !access.starts_with("rw") || end - start > 1 << 30 {
            continue;
        }
        let mut bytes = vec![0; (end - start) as usize];
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        for (offset, found) in bytes.chunks_exact(4).enumerate().map(|(i, word)| (4 * i, word)) {
            if found == &pattern[..4] && bytes[offset..].starts_with(&pattern) {
                memory.write_all_at(&[found[0] ^ 1], start + offset as u64).unwrap();
                flips += 1;
            }
        }
    }
    flips
}
