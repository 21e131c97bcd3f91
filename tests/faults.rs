//! What can happen to the ranks of a run: one dies, hangs, is slow, is told to leave. Each is done to the program itself: real processes, real
//! signals. What a test waits for it sees (steps in the log, a file, an end); times are measured, and bounded generously, for machines
//! that others use too.

mod common;

use common::processes::{catches, lives, ranks_of, send, until_gone, variable};
use common::ranks::{FOR_LONG, alone, is_saved, launch, same_as_uninterrupted};
use common::{Project, Running};
use ddpm_dist::checkpoint::{Snapshot, Want, load};
use ddpm_dist::collective::Record;
use ddpm_dist::rendezvous::store::Client;
use rustix::process::{Pid, Signal};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// More pictures than one thread decodes while a test runs: it does some hundred a second.
const PICTURES: usize = 1500;

#[test]
fn a_rank_that_is_killed_is_named_and_the_world_goes_on_to_the_same_bits() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 4, "run", &[&FOR_LONG[..], &["--max-restarts", "1"]].concat());
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    let ranks = launcher.ranks();
    assert_eq!(ranks.len(), 4);
    send(ranks[2], Signal::KILL);
    let peers = until_gone(&ranks);
    assert!(peers < Duration::from_secs(5), "peers need {peers:?} to leave");
    launcher.until_said("resuming from");
    let (_, stderr) = same_as_uninterrupted(&project, launcher, "run");
    assert!(stderr.contains("rank 2 ") && stderr.contains("signal 9"), "the cause: {stderr}");
}

#[test]
fn a_rank_that_is_killed_ends_a_run_without_restarts() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 2, "run", &FOR_LONG);
    launcher.until("a checkpoint", || is_saved(&project, "run"));
    send(launcher.ranks()[1], Signal::KILL);
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
    project.until_steps(&mut launcher, "run", 12);
    let ranks = launcher.ranks();
    let mut store = store_of(ranks[1]);
    launcher.until("rank 1 to say what it does", || says_what_it_does(&mut store, 1));
    send(ranks[1], Signal::STOP);
    let waited = until_gone(&[ranks[0], ranks[2]]);
    assert!(waited >= Duration::from_millis(2500) && waited < Duration::from_secs(6), "noticed after {waited:?}");
    let (code, stderr) = launcher.wait();
    assert!(!lives(ranks[1]), "the launcher puts it down");
    assert_ne!(code, Some(0), "{stderr}");
    assert!(stderr.contains("[1] did not answer within 3 s"), "{stderr}");
    assert!(
        stderr.contains("rank 1 has shown no sign of life") && stderr.contains("last seen: step "),
        "what it was doing: {stderr}"
    );
}

/// The store in which a rank meets the others, by its environment.
fn store_of(rank: Pid) -> Client {
    let port = variable(rank, "MASTER_PORT").unwrap().parse().unwrap();
    let run = variable(rank, "DDPM_DIST_RUN_ID").unwrap();
    Client::connect("127.0.0.1", port, &format!("ddpm-dist/{run}/0/"), PATIENCE).unwrap()
}

/// Whether a rank has told the others at which step it is.
fn says_what_it_does(store: &mut Client, rank: usize) -> bool {
    let key = format!("watch/{rank}");
    store.has(&key).unwrap() && serde_json::from_slice::<Record>(&store.get(&key, PATIENCE).unwrap()).unwrap().step > 0
}

#[test]
fn no_rank_outlives_its_launcher() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 4, "run", &FOR_LONG);
    project.until_steps(&mut launcher, "run", 5);
    let ranks = launcher.ranks();
    assert_eq!(ranks.len(), 4);
    launcher.signal(Signal::KILL);
    let needed = until_gone(&ranks);
    assert!(needed < Duration::from_secs(2), "ranks outlive their launcher by {needed:?}");
    assert_eq!(launcher.wait().0, None);
}

#[test]
fn one_rank_is_told_and_all_save_the_same_step() {
    let (_alone, project) = (alone(), Project::new());
    for (number, signal) in [(0, Signal::TERM), (1, Signal::USR1), (3, Signal::USR2), (2, Signal::INT)] {
        let run_dir = format!("run-{number}");
        let mut launcher = launch(&project, 4, &run_dir, &FOR_LONG);
        project.until_steps(&mut launcher, &run_dir, 8);
        send(launcher.ranks()[number], signal);
        let (code, stderr) = launcher.wait();
        assert_eq!(code, Some(75), "{signal:?}: {stderr}");
        let step = *project.checkpoints(&run_dir).last().unwrap();
        assert!(stderr.contains(&format!("stopped at step {step} ")), "{stderr}");
        assert_eq!(project.log_lines(&run_dir) as u64, step, "what is saved is the last step");
        project.hashes(&run_dir, step);
        same_as_uninterrupted(&project, launch(&project, 2, &run_dir, &FOR_LONG), &run_dir);
    }
}

#[test]
fn a_launcher_that_is_told_tells_its_ranks() {
    let (_alone, project) = (alone(), Project::new());
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let run_dir = format!("run-{}", signal.as_raw());
        let mut launcher = launch(&project, 2, &run_dir, &FOR_LONG);
        project.until_steps(&mut launcher, &run_dir, 8);
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
    project.until_steps(&mut launcher, "run", 2);
    send(launcher.ranks()[1], Signal::TERM);
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let last = *project.checkpoints("run").last().unwrap();
    assert!(stderr.contains(&format!("stopped at step {last} ")), "{stderr}");
    assert!(!project.path("run/samples/step-00000002.png").exists(), "sampling went on to its end");
    assert_eq!(project.log_lines("run") as u64, last);
}

/// Before the first step: rank 0 has begun to decode thousands of pictures, by one thread, and rank 1 waits for it.
fn launch_decoding(project: &Project, more: &[&str]) -> (Running, [Pid; 2]) {
    project.picture("pictures/large.png", [1500, 1500], 3);
    for i in 0..PICTURES {
        std::fs::hard_link(project.path("pictures/large.png"), project.path(format!("pictures/link-{i}.png"))).unwrap();
    }
    let slowly = ["--set", "data.decode_threads=1"];
    let mut launcher = launch(project, 2, "run", &[&FOR_LONG[..], &slowly, more].concat());
    launcher.until("a cache that is being written", || !cached(project, ".pixels.tmp-").is_empty());
    let ranks = launcher.ranks().try_into().unwrap();
    (launcher, ranks)
}

/// Files of the cache whose names hold this.
fn cached(project: &Project, part: &str) -> Vec<String> {
    let files = std::fs::read_dir(project.path("cache/ddpm-dist")).into_iter().flatten().flatten();
    files.map(|file| file.file_name().into_string().unwrap()).filter(|name| name.contains(part)).collect()
}

/// Expects that neither the decoding was waited for nor anything trained.
fn left_off(project: &Project, stderr: &str) {
    let whole: Vec<String> = cached(project, ".pixels").into_iter().filter(|name| name.ends_with(".pixels")).collect();
    assert!(whole.is_empty(), "decoding went on to its end ({whole:?}): {stderr}");
    assert!(!project.path("run/log.jsonl").exists(), "nothing was trained: {stderr}");
}

#[test]
fn a_rank_that_is_told_while_another_decodes() {
    let (_alone, project) = (alone(), Project::new());
    let (mut launcher, [_, told]) = launch_decoding(&project, &[]);
    launcher.until("rank 1 to catch signals", || catches(told, Signal::USR1));
    send(told, Signal::USR1);
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(75), "{stderr}");
    left_off(&project, &stderr);
}

#[test]
fn a_rank_that_is_killed_while_another_decodes() {
    let (_alone, project) = (alone(), Project::new());
    let (launcher, ranks) = launch_decoding(&project, &[]);
    send(ranks[1], Signal::KILL);
    let noticed = until_gone(&ranks);
    assert!(noticed < Duration::from_secs(5), "noticed after {noticed:?}");
    let (code, stderr) = launcher.wait();
    assert_eq!(code, Some(137), "{stderr}");
    assert!(stderr.contains("rank 1 was lost"), "rank 0 says so: {stderr}");
    left_off(&project, &stderr);
}

#[test]
fn a_rank_that_stands_still_while_another_decodes() {
    let (_alone, project) = (alone(), Project::new());
    let (launcher, ranks) = launch_decoding(&project, &["--set", "cluster.timeout=2"]);
    send(ranks[1], Signal::STOP);
    let noticed = until_gone(&ranks[..1]);
    assert!(noticed >= Duration::from_millis(1500) && noticed < Duration::from_secs(8), "noticed after {noticed:?}");
    let (code, stderr) = launcher.wait();
    assert!(!lives(ranks[1]), "the launcher puts it down");
    assert_ne!(code, Some(0), "{stderr}");
    assert!(stderr.contains("[1] did not answer within 2 s"), "{stderr}");
    left_off(&project, &stderr);
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

/// Kills a rank, chosen by a fixed sequence of numbers, whenever a few more steps are done, twenty times.
#[test]
fn twenty_kills_at_random_lose_nothing() {
    let (_alone, project) = (alone(), Project::new());
    let mut launcher = launch(&project, 4, "run", &[&FOR_LONG[..], &["--max-restarts", "20"]].concat());
    let mut state_of_chance = 7u64;
    let mut draw = |below: u64| {
        state_of_chance =
            state_of_chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state_of_chance >> 33) % below
    };
    let pid = launcher.pid();
    let mut killed: Vec<Pid> = Vec::new();
    for _ in 0..20 {
        // Somewhere before, in or after a save; the log may be behind the checkpoint that a restart began with.
        let goal = project.log_lines("run") + 1 + draw(9) as usize;
        launcher.until("a few more steps", || are_new(pid, 4, &killed) && project.log_lines("run") >= goal);
        killed = launcher.ranks();
        send(killed[draw(4) as usize], Signal::KILL);
    }
    launcher.until("the last start", || are_new(pid, 4, &killed));
    same_as_uninterrupted(&project, launcher, "run");
}

/// Whether a launcher runs so many ranks, none of them one of these.
fn are_new(launcher: Pid, size: usize, old: &[Pid]) -> bool {
    let ranks = ranks_of(launcher);
    ranks.len() == size && ranks.iter().all(|(_, pid)| !old.contains(pid))
}

/// Half of the time a rank does not run, as if it shared its core: its own time doubles, and it is named; nobody is before that.
#[test]
fn a_slow_rank_is_named() {
    let (_alone, project) = (alone(), Project::new());
    let large = ["--set", "train.batch=16", "--set", "model.channels=[16, 32]"];
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &large].concat());
    project.until_steps(&mut launcher, "run", 20);
    let victim = launcher.ranks()[1];
    let begin = project.log_lines("run");
    while !launcher.stderr().contains("rank 1 is slow") {
        assert!(project.log_lines("run") < begin + 200, "not named: {}", launcher.stderr());
        for (signal, pause) in [(Signal::STOP, 6), (Signal::CONT, 3)] {
            send(victim, signal);
            std::thread::sleep(Duration::from_millis(pause));
        }
    }
    let named = project.log_lines("run") - begin;
    assert!(named <= 25, "named after {named} steps");
    launcher.signal(Signal::TERM);
    assert_eq!(launcher.wait().0, Some(75));
}

/// A rank that is killed at the same place twice: the world goes on without that place, with the same bits.
#[test]
fn a_place_that_keeps_failing_is_given_up() {
    let (_alone, project) = (alone(), Project::new());
    let more = ["--max-restarts", "3", "--min-ranks", "1"];
    let mut launcher = launch(&project, 2, "run", &[&FOR_LONG[..], &more].concat());
    let pid = launcher.pid();
    let mut killed = Vec::new();
    for restarts in 0..2 {
        let said = launcher.words();
        launcher.until("two ranks at work, and something saved", || {
            said().matches("resuming from").count() == restarts && are_new(pid, 2, &killed) && is_saved(&project, "run")
        });
        killed.extend(launcher.ranks());
        send(killed[killed.len() - 1], Signal::KILL);
    }
    launcher.until("one rank", || are_new(pid, 1, &killed));
    let (step, stderr) = same_as_uninterrupted(&project, launcher, "run");
    let saved: Snapshot = load(&project.checkpoint("run", step), None, Want::Ema).unwrap();
    assert_eq!(saved.meta.world_size, 1, "{stderr}");
}
