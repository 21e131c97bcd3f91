//! What can happen to a run of many ranks, each done to the program itself: real processes, real signals, real memory. Nothing waits on a
//! clock; what is measured is bounded generously, for machines that others use too.

mod common;

use common::{Project, Running};
use ddpm_dist::checkpoint::{GROUPS, Snapshot, Want, load};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One test at a time: each is several busy processes.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shards that 1, 2 and 4 ranks divide, so that all of these runs have one trajectory; checkpoints every five steps.
const SHARDS: [&str; 2] = ["--set", "train.shards=4"];

/// Starts the launcher with `ranks` ranks that train in `run_dir`.
fn launch(project: &Project, ranks: usize, run_dir: &str, more: &[&str]) -> Running {
    let mut command = project.program();
    command.args(["--ranks", &ranks.to_string(), "train", "config.toml", "--run-dir", run_dir, "--threads", "1"]);
    command.args(SHARDS).args(more);
    project.start(run_dir, command)
}

const FOR_LONG: [&str; 2] = ["--set", "train.steps=10000000"];

/// The ranks that a launcher runs at present, with their numbers.
fn ranks_of(launcher: &Running) -> Vec<(usize, Pid)> {
    ranks_of_pid(launcher.child.id())
}

fn ranks_of_pid(launcher: u32) -> Vec<(usize, Pid)> {
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap_or_default();
    let mut ranks = Vec::new();
    for pid in children.split_whitespace() {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let rank = environment.split(|b| *b == 0).find_map(|v| v.strip_prefix(b"RANK=").map(<[u8]>::to_vec));
        if let Some(rank) = rank {
            let rank = String::from_utf8(rank).unwrap().parse().unwrap();
            ranks.push((rank, Pid::from_raw(pid.parse().unwrap()).unwrap()));
        }
    }
    ranks.sort_by_key(|(rank, _)| *rank);
    ranks
}

fn rank(launcher: &Running, number: usize) -> Pid {
    let ranks = ranks_of(launcher);
    ranks.iter().find(|(rank, _)| *rank == number).unwrap_or_else(|| panic!("rank {number} of {ranks:?}")).1
}

/// Whether a process is there and not merely unburied.
fn lives(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Waits until none of these processes lives; gives how long that took.
fn until_gone(pids: &[Pid]) -> Duration {
    let start = Instant::now();
    while pids.iter().any(|pid| lives(*pid)) {
        assert!(start.elapsed() < Duration::from_secs(60), "{pids:?} live on");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

fn until_steps(project: &Project, launcher: &mut Running, run_dir: &str, steps: usize) {
    let log = project.path(run_dir).join("log.jsonl");
    launcher.until(&format!("{steps} steps"), || log.exists() && project.log_lines(run_dir) >= steps);
}

fn is_saved(project: &Project, run_dir: &str) -> bool {
    project.path(run_dir).is_dir() && !project.checkpoints(run_dir).is_empty()
}

/// Weights, moments and averages of a checkpoint, as bits.
fn state(project: &Project, run_dir: &str, step: u64) -> Vec<Vec<u32>> {
    let snapshot: Snapshot = load(&project.checkpoint(run_dir, step), None, Want::All).unwrap();
    GROUPS.map(|group| snapshot.group(group).iter().map(|x| x.to_bits()).collect()).to_vec()
}

fn uninterrupted(project: &Project, steps: &str) {
    project.trained("straight", &[&SHARDS[..], &["--set", steps]].concat());
}

#[test]
fn a_rank_that_is_killed_is_named_and_the_world_goes_on_to_the_same_bits() {
    let (_alone, project) = (alone(), Project::new());
    uninterrupted(&project, "train.steps=300");
    let mut launcher = launch(&project, 4, "run", &["--max-restarts", "1", "--set", "train.steps=300"]);
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    let ranks = ranks_of(&launcher);
    assert_eq!(ranks.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
    kill_process(ranks[2].1, Signal::KILL).unwrap();
    let peers = until_gone(&ranks.iter().map(|(_, pid)| *pid).collect::<Vec<_>>());
    assert!(peers < Duration::from_secs(5), "peers need {peers:?} to leave");
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("rank 2 ") && stderr.contains("signal 9"), "the cause: {stderr}");
    assert!(stderr.contains("resuming from"), "{stderr}");
    assert!(state(&project, "run", 300) == state(&project, "straight", 300));
    assert_eq!(project.measured("run"), project.measured("straight"));
}

#[test]
fn a_rank_that_is_killed_ends_a_run_without_restarts() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 2, "run", &FOR_LONG);
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    kill_process(rank(&launcher, 1), Signal::KILL).unwrap();
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(137), "{stderr}");
    assert!(stderr.contains("rank 1 ") && stderr.contains("signal 9"), "{stderr}");
    project.hashes("run", *project.checkpoints("run").last().unwrap());
}

#[test]
fn a_rank_that_stands_still_is_named_after_the_timeout() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(
        &project,
        3,
        "run",
        &[&FOR_LONG[..], &["--set", "cluster.timeout=3", "--set", "train.batch=12", "--set", "train.shards=\"auto\""]]
            .concat(),
    );
    // Longer than it takes a rank to say what it does.
    let since = Instant::now();
    launcher.until("two seconds of training", || since.elapsed() > Duration::from_secs(2));
    until_steps(&project, &mut launcher, "run", 12);
    let ranks = ranks_of(&launcher);
    kill_process(ranks[1].1, Signal::STOP).unwrap();
    let waited = until_gone(&[ranks[0].1, ranks[2].1]);
    assert!(waited >= Duration::from_millis(2500) && waited < Duration::from_secs(6), "noticed after {waited:?}");
    let (code, stderr) = launcher.wait();
    assert!(!lives(ranks[1].1), "the launcher puts it down");
    assert_ne!(code, Some(0), "{stderr}");
    assert!(stderr.contains("[1] did not answer within 3 s"), "{stderr}");
    assert!(
        stderr.contains("rank 1 has shown no sign of life") && stderr.contains("last seen: step "),
        "what it was doing: {stderr}"
    );
}

#[test]
fn no_rank_outlives_its_launcher() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 4, "run", &FOR_LONG);
    until_steps(&project, &mut launcher, "run", 5);
    let ranks: Vec<Pid> = ranks_of(&launcher).into_iter().map(|(_, pid)| pid).collect();
    assert_eq!(ranks.len(), 4);
    launcher.signal(Signal::KILL);
    let needed = until_gone(&ranks);
    assert!(needed < Duration::from_secs(2), "ranks outlive their launcher by {needed:?}");
    assert_eq!(launcher.wait().0, None);
}

#[test]
fn one_rank_is_told_and_all_save_the_same_step() {
    let (_alone, project) = (alone(), Project::new());
    uninterrupted(&project, "train.steps=300");
    for (number, signal) in [(0, Signal::TERM), (1, Signal::USR1), (3, Signal::USR2), (2, Signal::INT)] {
        let run_dir = format!("run-{number}");
        let mut launcher = launch(&project, 4, &run_dir, &["--set", "train.steps=300"]);
        until_steps(&project, &mut launcher, &run_dir, 8);
        kill_process(rank(&launcher, number), signal).unwrap();
        let (code, stderr) = launcher.wait();
        assert_eq!(code, Some(75), "{signal:?}: {stderr}");
        let step = *project.checkpoints(&run_dir).last().unwrap();
        assert!(stderr.contains(&format!("stopped at step {step} ")), "{stderr}");
        assert_eq!(project.log_lines(&run_dir) as u64, step, "what is saved is the last step");
        project.hashes(&run_dir, step);
        let (code, stderr) = launch(&project, 2, &run_dir, &["--set", "train.steps=300"]).wait();
        assert_eq!(code, Some(0), "{stderr}");
        assert!(state(&project, &run_dir, 300) == state(&project, "straight", 300), "stopped at {step} by {signal:?}");
    }
}

#[test]
fn a_launcher_that_is_told_tells_its_ranks() {
    let (_alone, project) = (alone(), Project::new());
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let run_dir = format!("run-{}", signal.as_raw());
        let mut launcher = launch(&project, 2, &run_dir, &FOR_LONG);
        until_steps(&project, &mut launcher, &run_dir, 8);
        launcher.signal(signal);
        let (code, stderr) = launcher.wait();
        assert_eq!(code, Some(75), "{signal:?}: {stderr}");
        let step = *project.checkpoints(&run_dir).last().unwrap();
        assert!(stderr.contains(&format!("stopped at step {step} ")), "{stderr}");
    }
}

/// While images are sampled: a thousand reverse steps for each of 256 images after every second step of training.
#[test]
fn a_rank_that_is_told_while_images_are_sampled() {
    let (_alone, project) = (alone(), Project::new());
    let sampling = [
        "--set",
        "diffusion.timesteps=1000",
        "--set",
        "sample.steps=1000",
        "--set",
        "sample.count=256",
        "--set",
        "sample.every=2",
    ];
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &sampling].concat());
    until_steps(&project, &mut launcher, "run", 2);
    kill_process(rank(&launcher, 1), Signal::TERM).unwrap();
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let last = *project.checkpoints("run").last().unwrap();
    assert!(stderr.contains(&format!("stopped at step {last} ")), "{stderr}");
    assert!(!project.path("run/samples/step-00000002.png").exists(), "sampling went on to its end");
    assert_eq!(project.log_lines("run") as u64, last);
}

/// Before the first step: rank 0 decodes thousands of pictures, rank 1 waits for it and is told.
#[test]
fn a_rank_that_is_told_while_data_is_opened() {
    let (_alone, project) = (alone(), Project::new());
    project.picture("pictures/large.png", [1500, 1500], 3);
    for i in 0..400 {
        std::fs::hard_link(project.path("pictures/large.png"), project.path(format!("pictures/link-{i}.png"))).unwrap();
    }
    let mut launcher = launch(&project, 2, "run", &FOR_LONG);
    let pid = launcher.child.id();
    launcher.until("two ranks", || ranks_of_pid(pid).len() == 2);
    let told = rank(&launcher, 1);
    launcher.until("rank 1 to catch signals", || catches(told, Signal::USR1));
    kill_process(told, Signal::USR1).unwrap();
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    assert!(!project.path("run/log.jsonl").exists(), "nothing was trained: {stderr}");
}

fn catches(pid: Pid, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0").trim();
    u64::from_str_radix(mask, 16).unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}

#[test]
fn the_wall_clock_limit_saves_and_leaves_before_it() {
    let (_alone, project) = (alone(), Project::new());
    let start = Instant::now();
    let (code, stderr) = launch(&project, 2, "run", &[&FOR_LONG[..], &["--max-time", "0:15"]].concat()).wait();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!(code, Some(75), "{stderr}");
    let step = *project.checkpoints("run").last().unwrap();
    assert!(step > 0 && stderr.contains(&format!("stopped at step {step} ")), "{stderr}");
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let (_alone, project) = (alone(), Project::new());
    let mut first = launch(&project, 2, "run", &FOR_LONG);
    until_steps(&project, &mut first, "run", 5);
    let owner = rank(&first, 0).as_raw_nonzero().to_string();
    let mut command = project.program();
    command.args(["--ranks", "2", "train", "config.toml", "--run-dir", "run", "--threads", "1"]).args(SHARDS);
    let (code, stderr) = project.start("second", command).wait();
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
            4 => until_steps(&project, &mut launcher, &run_dir, 12),
            _ => launcher.until("a checkpoint", || is_saved(&project, &run_dir)),
        }
        assert!(flip_everywhere(rank(&launcher, size / 2), &words) > 0, "the weights were found");
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

/// Kills a rank, chosen by a fixed sequence of numbers, whenever a few more steps are done, twenty times.
#[test]
fn twenty_kills_at_random_lose_nothing() {
    let (_alone, project) = (alone(), Project::new());
    uninterrupted(&project, "train.steps=400");
    let mut launcher = launch(&project, 4, "run", &["--max-restarts", "20", "--set", "train.steps=400"]);
    let mut state_of_chance = 7u64;
    let mut draw = |below: u64| {
        state_of_chance =
            state_of_chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state_of_chance >> 33) % below
    };
    let pid = launcher.child.id();
    let mut killed: Vec<Pid> = Vec::new();
    for _ in 0..20 {
        // Somewhere before, in or after a save; the log may be behind the checkpoint that a restart began with.
        let log = project.path("run/log.jsonl");
        let steps = if log.exists() { project.log_lines("run") } else { 0 };
        let goal = (steps + 1 + draw(9) as usize).min(380);
        launcher.until("a few more steps", || {
            let ranks = ranks_of_pid(pid);
            let all_new = ranks.len() == 4 && ranks.iter().all(|(_, pid)| !killed.contains(pid));
            all_new && project.path("run/log.jsonl").exists() && project.log_lines("run") >= goal
        });
        let victim = draw(4) as usize;
        killed = ranks_of(&launcher).into_iter().map(|(_, pid)| pid).collect();
        kill_process(rank(&launcher, victim), Signal::KILL).unwrap();
    }
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(state(&project, "run", 400) == state(&project, "straight", 400));
    assert_eq!(project.measured("run"), project.measured("straight"));
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
        copy(&project.path("run"), &project.path(&run_dir));
        train(ranks, &run_dir, "train.steps=20");
        assert!(state(&project, &run_dir, 20) == state(&project, "straight", 20), "{ranks} ranks");
        assert_eq!(project.measured(&run_dir), project.measured("straight"), "{ranks} ranks");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { std::fs::copy(&path, &target).map(drop).unwrap() }
    }
}

/// Half of the time a rank does not run, as if it shared its core: its own time doubles, and it is named; nobody is before that.
#[test]
fn a_slow_rank_is_named() {
    let (_alone, project) = (alone(), Project::new());
    let large = ["--set", "train.batch=16", "--set", "model.channels=[16, 32]"];
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &large].concat());
    until_steps(&project, &mut launcher, "run", 20);
    let victim = rank(&launcher, 1);
    let begin = project.log_lines("run");
    while !launcher.stderr().contains("rank 1 is slow") {
        assert!(project.log_lines("run") < begin + 200, "not named: {}", launcher.stderr());
        for (signal, pause) in [(Signal::STOP, 6), (Signal::CONT, 3)] {
            kill_process(victim, signal).unwrap();
            std::thread::sleep(Duration::from_millis(pause));
        }
    }
    let named = project.log_lines("run") - begin;
    assert!(named <= 25, "named after {named} steps");
    launcher.signal(Signal::TERM);
    assert_eq!(launcher.wait().0, Some(75));
}

#[test]
fn a_disk_that_refuses_the_checkpoints_of_many_ranks_for_a_while() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &["--set", "checkpoint.keep=3"]].concat());
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    // Even the system's administrator cannot make a directory in a file.
    project.write("away", b"no directory");
    project.exchange("run/checkpoints", "away");
    let stderr = project.path("run.stderr");
    let said = || std::fs::read_to_string(&stderr).unwrap();
    launcher.until("an alarm", || said().contains("is NOT saved"));
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

#[test]
fn a_damaged_shard_is_named_and_the_checkpoint_before_it_taken() {
    let (_alone, project) = (alone(), Project::new());
    uninterrupted(&project, "train.steps=20");
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
        copy(&project.path("run"), &project.path(name));
        damage(&project.checkpoint(name, 15).join(shard));
        let (code, stderr) = launch(&project, 2, name, &["--set", "train.steps=20"]).wait();
        assert_eq!(code, Some(0), "{stderr}");
        let says =
            |line: &str| line.contains("warning: skipping") && line.contains("step-00000015") && line.contains(shard);
        assert!(stderr.lines().any(says), "{name}: {stderr}");
        assert!(stderr.contains(&format!("resuming from {name}/checkpoints/{before}")), "{stderr}");
        assert!(state(&project, name, 20) == state(&project, "straight", 20), "{name}");
    }
}

/// A rank that is killed at the same place twice: the world goes on without that place, with the same bits.
#[test]
fn a_place_that_keeps_failing_is_given_up() {
    let (_alone, project) = (alone(), Project::new());
    uninterrupted(&project, "train.steps=300");
    let more = ["--max-restarts", "3", "--min-ranks", "1", "--set", "train.steps=300"];
    let mut launcher = launch(&project, 2, "run", &more);
    let pid = launcher.child.id();
    let stderr = project.path("run.stderr");
    let mut killed = Vec::new();
    for restarts in 0..2 {
        launcher.until("two ranks at work, and something saved", || {
            let said = std::fs::read_to_string(&stderr).unwrap();
            let ranks = ranks_of_pid(pid);
            said.matches("resuming from").count() == restarts
                && ranks.len() == 2
                && ranks.iter().all(|(_, pid)| !killed.contains(pid))
                && is_saved(&project, "run")
        });
        killed.extend(ranks_of(&launcher).into_iter().map(|(_, pid)| pid));
        kill_process(rank(&launcher, 1), Signal::KILL).unwrap();
    }
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(state(&project, "run", 300) == state(&project, "straight", 300));
    let saved: Snapshot = load(&project.checkpoint("run", 300), None, Want::Ema).unwrap();
    assert_eq!(saved.meta.world_size, 1, "{stderr}");
}
