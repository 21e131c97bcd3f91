//! Many processes, one trajectory: whatever the number of ranks, the same bits; and what keeps ranks from training together is named.

mod common;

use common::{Project, Running};
use ddpm_dist::checkpoint::{GROUPS, Snapshot, Want, load};
use ddpm_dist::rendezvous::store::Server;
use std::process::Command;

/// The environment in which a launcher starts a rank; this test serves the store, as a launcher does.
fn rank_of<'a>(command: &'a mut Command, store: &Server, rank: usize, size: usize) -> &'a mut Command {
    let number = |n: usize| n.to_string();
    command
        .env("DDPM_DIST_RUN_ID", "test")
        .env("RANK", number(rank))
        .env("WORLD_SIZE", number(size))
        .env("LOCAL_RANK", number(rank))
        .env("LOCAL_WORLD_SIZE", number(size))
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", store.address().port().to_string())
}

fn store() -> Server {
    Server::listen(([127, 0, 0, 1], 0).into()).unwrap()
}

/// Starts `size` ranks, rank r with `arguments(r)`.
fn start(project: &Project, store: &Server, size: usize, arguments: impl Fn(usize) -> Vec<String>) -> Vec<Running> {
    let start = |rank| {
        let mut command = project.program();
        command.args(arguments(rank));
        rank_of(&mut command, store, rank, size);
        project.start(&format!("rank-{rank}"), command)
    };
    (0..size).map(start).collect()
}

/// Arguments of a training run.
fn train(run_dir: &str, more: &[&str]) -> Vec<String> {
    let first = ["train", "config.toml", "--run-dir", run_dir, "--threads", "1"];
    first.iter().chain(more).map(|s| s.to_string()).collect()
}

/// Trains on `size` ranks and expects all of them to end well; gives what each said.
fn trained(project: &Project, size: usize, run_dir: &str, more: &[&str]) -> Vec<String> {
    let store = store();
    let ranks = start(project, &store, size, |_| train(run_dir, more));
    ranks
        .into_iter()
        .enumerate()
        .map(|(rank, running)| {
            let (code, stderr) = running.wait();
            assert_eq!(code, Some(0), "rank {rank} of {size}: {stderr}");
            stderr
        })
        .collect()
}

/// Weights, moments and averages of a checkpoint, as bits.
fn state(project: &Project, run_dir: &str, step: u64) -> Vec<Vec<u32>> {
    let snapshot: Snapshot = load(&project.checkpoint(run_dir, step), None, Want::All).unwrap();
    GROUPS.map(|group| snapshot.group(group).iter().map(|x| x.to_bits()).collect()).to_vec()
}

const SHARDS: [&str; 10] = [
    "--set",
    "train.shards=8",
    "--set",
    "train.batch=8",
    "--set",
    "train.steps=52",
    "--set",
    "checkpoint.every=26",
    "--set",
    "optim.clip=0.2",
];

/// Dropout, flips, clipping, warm-up and averages are on; 52 steps; with 1, 2, 4 and 8 ranks, and with 4 and then 2.
#[test]
fn one_trajectory_at_any_number_of_ranks() {
    let project = Project::new();
    trained(&project, 1, "one", &SHARDS);
    let (expected, measured) = (state(&project, "one", 52), project.measured("one"));
    assert_eq!(measured.len(), 52);
    assert!(measured.iter().any(|line| line["grad_norm"].as_f64().unwrap() > 0.2), "no gradient was clipped");
    for size in [2, 4, 8] {
        let run_dir = format!("on-{size}");
        let said = trained(&project, size, &run_dir, &SHARDS);
        assert!(said[0].contains(&format!("on {size} ranks")), "{}", said[0]);
        assert!(said[1..].iter().all(String::is_empty), "rank 0 speaks for all: {said:?}");
        assert!(state(&project, &run_dir, 52) == expected, "{size} ranks");
        assert_eq!(project.measured(&run_dir), measured, "{size} ranks");
    }
    trained(&project, 4, "changed", &[&SHARDS[..], &["--set", "train.steps=26"]].concat());
    let said = trained(&project, 2, "changed", &SHARDS);
    assert!(said[0].contains("resuming") && !said[0].contains("last bits differ"), "{}", said[0]);
    assert!(state(&project, "changed", 52) == expected);
    assert_eq!(project.measured("changed"), measured);
}

/// As many shards as ranks: a change of ranks is said.
#[test]
fn another_number_of_ranks_is_said_where_it_changes_bits() {
    let project = Project::new();
    trained(&project, 2, "run", &["--set", "train.steps=5"]);
    let said = trained(&project, 4, "run", &["--set", "train.steps=10"]);
    assert!(said[0].contains("warning: saved by 2 ranks, going on with 4 ranks"), "{}", said[0]);
    assert!(said[0].contains("last bits differ"), "{}", said[0]);
}

#[test]
fn images_are_the_same_at_any_number_of_ranks() {
    let project = Project::new();
    trained(&project, 2, "run", &["--set", "train.steps=5", "--set", "sample.count=7"]);
    assert!(project.path("run/samples/step-00000005.png").is_file());
    let sample = |out: &str| {
        ["sample", "run", "--count", "7", "--seed", "3", "--threads", "1", "--out", out].map(str::to_string).to_vec()
    };
    for out in ["npy", "gif"] {
        let alone = format!("alone.{out}");
        project.done(&sample(&alone).iter().map(String::as_str).collect::<Vec<_>>());
        for size in [2, 3] {
            let (store, together) = (store(), format!("on-{size}.{out}"));
            for running in start(&project, &store, size, |_| sample(&together)) {
                let (code, stderr) = running.wait();
                assert_eq!(code, Some(0), "{stderr}");
            }
            assert!(project.read(&together) == project.read(&alone), "{out}, {size} ranks");
        }
    }
}

#[test]
fn ranks_measure_together() {
    let (project, store) = (Project::new(), store());
    let bench = ["bench", "config.toml", "--steps", "2", "--warmup", "1", "--json", "result.json", "--threads", "1"];
    for running in start(&project, &store, 2, |_| bench.map(str::to_string).to_vec()) {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    let result: serde_json::Value = serde_json::from_slice(&project.read("result.json")).unwrap();
    assert_eq!((result["ranks"].as_u64(), result["batch"].as_u64()), (Some(2), Some(4)));
}

/// Starts two ranks that cannot train together; gives how each ended.
fn refused(more: [&[&str]; 2]) -> [(Option<i32>, String); 2] {
    let (project, store) = (Project::new(), store());
    let ranks = start(&project, &store, 2, |rank| train("run", more[rank]));
    let ended: Vec<_> = ranks.into_iter().map(Running::wait).collect();
    assert!(!project.path("run/log.jsonl").exists(), "nothing was trained");
    ended.try_into().unwrap()
}

/// All ranks are refused by exit code 2, and rank 0 says why, with these words.
fn said_once(ranks: impl IntoIterator<Item = (Option<i32>, String)>, words: &[&str]) {
    for (rank, (code, stderr)) in ranks.into_iter().enumerate() {
        assert_eq!(code, Some(2), "{stderr}");
        assert_eq!(stderr.contains("ddpm-dist: "), rank == 0, "rank {rank}: {stderr}");
        assert!(rank > 0 || words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
    }
}

#[test]
fn ranks_with_different_configs_are_refused() {
    for (set, key) in [("optim.lr=1e-3", "optim.lr"), ("train.steps=30", "train.steps")] {
        said_once(refused([&[], &["--set", set]]), &["do not belong together", key]);
    }
}

#[test]
fn a_world_that_does_not_divide_the_batch_is_refused() {
    for (set, key) in [("train.batch=5", "train.batch"), ("train.shards=1", "train.shards")] {
        for (code, stderr) in refused([&["--set", set], &["--set", set]]) {
            assert_eq!(code, Some(2), "{stderr}");
            assert!(stderr.contains(key) && stderr.contains("2 ranks"), "{stderr}");
        }
    }
}

#[test]
fn two_processes_with_one_number_are_refused() {
    let (project, store) = (Project::new(), store());
    let start = |name: &str| {
        let mut command = project.program();
        command.args(train("run", &["--rdzv-timeout", "5"]));
        rank_of(&mut command, &store, 1, 2);
        project.start(name, command)
    };
    let (first, second) = (start("first"), start("second"));
    let ended = [first.wait(), second.wait()];
    assert!(ended.iter().all(|(code, _)| *code == Some(8)), "{ended:?}");
    assert!(ended.iter().any(|(_, stderr)| stderr.contains("two processes say they are rank 1")), "{ended:?}");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let (project, store) = (Project::new(), store());
    let mut command = project.program();
    command.args(train("run", &["--rdzv-timeout", "1"]));
    rank_of(&mut command, &store, 0, 2);
    let (code, stderr) = project.start("alone", command).wait();
    assert_eq!(code, Some(8), "{stderr}");
    assert!(stderr.contains("ranks [1] of 2 have not come within 1 s"), "{stderr}");
}

#[test]
fn a_store_that_nobody_serves_is_named() {
    let project = Project::new();
    let store = store();
    let port = store.address().port();
    let mut command = project.program();
    command.args(train("run", &["--rdzv-timeout", "1"]));
    rank_of(&mut command, &store, 0, 2);
    drop(store);
    let (code, stderr) = project.start("alone", command).wait();
    assert_eq!(code, Some(8), "{stderr}");
    assert!(stderr.contains(&format!("127.0.0.1:{port} cannot be reached within 1 s")), "{stderr}");
}

/// Rank 0 serves the store where no launcher does.
#[test]
fn a_port_in_use_is_named() {
    let (project, store) = (Project::new(), store());
    let mut command = project.program();
    command.args(train("run", &[]));
    rank_of(&mut command, &store, 0, 2).env_remove("DDPM_DIST_RUN_ID");
    let (code, stderr) = project.start("alone", command).wait();
    assert_eq!(code, Some(8), "{stderr}");
    let port = store.address().port();
    assert!(stderr.contains(&format!("port {port}")) && stderr.contains("MASTER_PORT"), "{stderr}");
}

#[test]
fn a_rank_beyond_the_world_is_refused() {
    let (project, store) = (Project::new(), store());
    let mut command = project.program();
    command.args(train("run", &[]));
    rank_of(&mut command, &store, 2, 2);
    let (code, stderr) = project.start("alone", command).wait();
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("the rank is 2, expected less than 2"), "{stderr}");
}

/// Another build of the program: its commit is another.
#[test]
fn ranks_of_different_builds_are_refused() {
    let (project, store) = (Project::new(), store());
    let mut program = std::fs::read(env!("CARGO_BIN_EXE_ddpm-dist")).unwrap();
    let name = format!("ddpm-dist {} (", env!("CARGO_PKG_VERSION")).into_bytes();
    let places: Vec<usize> =
        program.windows(name.len()).enumerate().filter(|(_, w)| *w == name).map(|(i, _)| i).collect();
    assert!(!places.is_empty(), "the program says which build it is");
    for place in places {
        let commit = &mut program[place + name.len()];
        *commit = if *commit == b'0' { b'1' } else { b'0' };
    }
    let other = project.write("other", program);
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let programs = [env!("CARGO_BIN_EXE_ddpm-dist"), other.to_str().unwrap()];
    let ranks: Vec<Running> = (0..2)
        .map(|rank| {
            let mut command = project.program_by(programs[rank]);
            command.args(train("run", &[]));
            rank_of(&mut command, &store, rank, 2);
            project.start(&format!("rank-{rank}"), command)
        })
        .collect();
    said_once(ranks.into_iter().map(Running::wait), &["rank 0 runs ddpm-dist", "start one and the same program"]);
}

/// The best instructions of two machines differ, and with them the last bits.
#[test]
fn ranks_with_different_instructions_are_refused() {
    let (project, store) = (Project::new(), store());
    let ranks: Vec<Running> = (0..2)
        .map(|rank| {
            let mut command = project.program();
            command.args(train("run", &[]));
            rank_of(&mut command, &store, rank, 2).env("DDPM_DIST_SIMD", ["portable", "avx2"][rank]);
            project.start(&format!("rank-{rank}"), command)
        })
        .collect();
    said_once(ranks.into_iter().map(Running::wait), &["portable", "avx2", "DDPM_DIST_SIMD"]);
}

#[test]
fn ranks_that_see_other_directories_are_refused() {
    let (project, store) = (Project::new(), store());
    let ranks = start(&project, &store, 2, |rank| train(["run", "elsewhere"][rank], &[]));
    for (rank, running) in ranks.into_iter().enumerate() {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some([6, 4][rank]), "{stderr}");
        assert!(stderr.contains("rank 1") && stderr.contains("elsewhere") && stderr.contains("--run-dir"), "{stderr}");
    }
}

#[test]
fn ranks_that_see_other_images_are_refused() {
    let project = Project::new();
    std::fs::create_dir(project.path("others")).unwrap();
    for i in 0..12 {
        project.picture(&format!("others/{i:02}.png"), [8, 8], i + 1);
    }
    let store = store();
    let data = ["data.path=\"pictures\"", "data.path=\"others\""];
    let ranks = start(&project, &store, 2, |rank| train("run", &["--set", data[rank]]));
    said_once(ranks.into_iter().map(Running::wait), &["rank 1 sees other images than rank 0"]);
}

/// Before all ranks have come there is nothing to save; the ranks that are there leave together.
#[test]
fn ranks_that_wait_for_others_leave_when_one_is_told() {
    let (project, store) = (Project::new(), store());
    let mut ranks: Vec<Running> = [0, 2]
        .into_iter()
        .map(|rank| {
            let mut command = project.program();
            command.args(train("run", &[]));
            rank_of(&mut command, &store, rank, 3);
            project.start(&format!("rank-{rank}"), command)
        })
        .collect();
    // Both have said where they listen; nobody is rank 1.
    ranks[0].until("two ranks to wait", || store.len() >= 4);
    ranks[1].signal(rustix::process::Signal::USR1);
    for running in ranks {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(75), "{stderr}");
        assert!(stderr.contains("stopped before all ranks had come"), "{stderr}");
    }
}

#[test]
fn ranks_that_would_make_other_images_are_refused() {
    let (project, store) = (Project::new(), store());
    project.trained("run", &["--set", "train.steps=5"]);
    let sample =
        |rank: usize| ["sample", "run", "--seed", ["3", "4"][rank], "--out", "x.png"].map(str::to_string).to_vec();
    let ranks = start(&project, &store, 2, sample);
    said_once(ranks.into_iter().map(Running::wait), &["of step 5, 16 images of seed 3", "seed 4"]);
    assert!(!project.path("x.png").exists());
}
