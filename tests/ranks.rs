//! Many processes, one trajectory: whatever the number of ranks, the same bits; and what keeps ranks from training together is named.

mod common;

use common::ranks::{rank_of, rank_of_launcher, start, start_some, store, train};
use common::{Project, Running};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::process::Command;

/// Trains on `size` ranks and expects all of them to end well; gives what each said.
fn trained(project: &Project, size: usize, run_dir: &str, more: &[&str]) -> Vec<String> {
    let store = store();
    let ranks = start(project, &store, size, |_, command| command.args(train(run_dir, more)));
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
    let (expected, measured) = (project.state("one", 52), project.measured("one"));
    assert_eq!(measured.len(), 52);
    assert!(measured.iter().any(|line| line["grad_norm"].as_f64().unwrap() > 0.2), "no gradient was clipped");
    for size in [2, 4, 8] {
        let run_dir = format!("on-{size}");
        let said = trained(&project, size, &run_dir, &SHARDS);
        assert!(said[0].contains(&format!("on {size} ranks")), "{}", said[0]);
        assert!(said[1..].iter().all(String::is_empty), "rank 0 speaks for all: {said:?}");
        assert!(project.state(&run_dir, 52) == expected, "{size} ranks");
        assert_eq!(project.measured(&run_dir), measured, "{size} ranks");
    }
    trained(&project, 4, "changed", &[&SHARDS[..], &["--set", "train.steps=26"]].concat());
    let said = trained(&project, 2, "changed", &SHARDS);
    assert!(said[0].contains("resuming") && !said[0].contains("last bits differ"), "{}", said[0]);
    assert!(project.state("changed", 52) == expected);
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
    let sample = ["sample", "run", "--count", "7", "--seed", "3", "--threads", "1", "--out"];
    for out in ["npy", "gif"] {
        let alone = format!("alone.{out}");
        project.done(&[&sample[..], &[&alone]].concat());
        for size in [2, 3] {
            let (store, together) = (store(), format!("on-{size}.{out}"));
            for running in start(&project, &store, size, |_, command| command.args(sample).arg(&together)) {
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
    for running in start(&project, &store, 2, |_, command| command.args(bench)) {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    let result: serde_json::Value = serde_json::from_slice(&project.read("result.json")).unwrap();
    assert_eq!((result["ranks"].as_u64(), result["batch"].as_u64()), (Some(2), Some(4)));
}

/// A launcher that gives each rank cores of its own has divided them already: they are not divided again.
#[test]
fn ranks_compute_with_as_many_threads_as_they_have_cores() {
    let mask = sched_getaffinity(None).unwrap();
    let cores: Vec<String> = (0..CpuSet::MAX_CPU).filter(|&core| mask.is_set(core)).map(|n| n.to_string()).collect();
    let (all, [first, second]) = (cores.join(","), [&cores[..cores.len() / 2], &cores[cores.len() / 2..]]);
    let half = (cores.len() / 2).max(1) as u64;
    assert_eq!(threads_of_rank_0([&all, &all]), half, "all share the cores {all}");
    if cores.len() < 4 {
        common::not_tested("ranks that are bound to some cores each: they would have one thread in any case");
    }
    if cores.len() > 1 {
        assert_eq!(threads_of_rank_0([&first.join(","), &second.join(",")]), half, "each has its own of {all}");
    }
}

/// Measures with two ranks that `taskset` binds to these cores; gives with how many threads rank 0 computed.
fn threads_of_rank_0(cores: [&str; 2]) -> u64 {
    let (project, store) = (Project::new(), store());
    let bench = ["bench", "config.toml", "--steps", "1", "--warmup", "0", "--json", "result.json"];
    let ranks = start(&project, &store, 2, |rank, command| {
        *command = project.program_by("taskset");
        command.args(["-c", cores[rank], env!("CARGO_BIN_EXE_ddpm-dist")]).args(bench)
    });
    for running in ranks {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    let result: serde_json::Value = serde_json::from_slice(&project.read("result.json")).unwrap();
    result["threads"].as_u64().unwrap()
}

/// Starts two ranks that cannot train together; gives how each ended.
fn refused(more: [&[&str]; 2]) -> [(Option<i32>, String); 2] {
    let (project, store) = (Project::new(), store());
    let ranks = start(&project, &store, 2, |rank, command| command.args(train("run", more[rank])));
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
    let arguments = train("run", &["--rdzv-timeout", "5"]);
    let both = start_some(&project, &store, &[1, 1], 2, |_, command| command.args(&arguments));
    let ended: Vec<_> = both.into_iter().map(Running::wait).collect();
    assert!(ended.iter().all(|(code, _)| *code == Some(8)), "{ended:?}");
    assert!(ended.iter().any(|(_, stderr)| stderr.contains("two processes say they are rank 1")), "{ended:?}");
}

/// One rank of two, and nobody else, is refused with these words.
fn refused_alone(rank: usize, prepare: impl FnOnce(&mut Command) -> &mut Command, code: i32, words: &[&str]) {
    let project = Project::new();
    let mut command = project.program();
    command.args(train("run", &["--rdzv-timeout", "1"]));
    prepare(rank_of(&mut command, [rank, 2], "127.0.0.1", 1));
    let (ended, stderr) = project.start("alone", command).wait();
    assert_eq!(ended, Some(code), "{stderr}");
    assert!(words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let store = store();
    refused_alone(
        0,
        |command| rank_of_launcher(command, [0, 2], &store),
        8,
        &["ranks [1] of 2 have not come within 1 s"],
    );
}

#[test]
fn a_store_that_nobody_serves_is_named() {
    let store = store();
    let port = store.address().port();
    let words = format!("127.0.0.1:{port} cannot be reached within 1 s");
    refused_alone(0, move |command| rank_of_launcher(command, [0, 2], &store), 8, &[&words]);
}

/// Rank 0 serves the store where no launcher does.
#[test]
fn a_port_in_use_is_named() {
    let store = store();
    let port = store.address().port().to_string();
    refused_alone(0, |command| command.env("MASTER_PORT", &port), 8, &[&format!("port {port}"), "MASTER_PORT"]);
}

#[test]
fn a_rank_beyond_the_world_is_refused() {
    refused_alone(2, |command| command, 2, &["the rank is 2, expected less than 2"]);
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
    let ranks = start(&project, &store, 2, |rank, command| {
        *command = project.program_by(programs[rank]);
        command.args(train("run", &[]))
    });
    said_once(ranks.into_iter().map(Running::wait), &["rank 0 runs ddpm-dist", "start one and the same program"]);
}

/// The best instructions of two machines differ, and with them the last bits.
#[test]
fn ranks_with_different_instructions_are_refused() {
    let (project, store) = (Project::new(), store());
    let ranks = start(&project, &store, 2, |rank, command| {
        command.args(train("run", &[])).env("DDPM_DIST_SIMD", ["portable", "avx2"][rank])
    });
    said_once(ranks.into_iter().map(Running::wait), &["portable", "avx2", "DDPM_DIST_SIMD"]);
}

#[test]
fn ranks_that_see_other_directories_are_refused() {
    let (project, store) = (Project::new(), store());
    let ranks = start(&project, &store, 2, |rank, command| command.args(train(["run", "elsewhere"][rank], &[])));
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
    let ranks = start(&project, &store, 2, |rank, command| command.args(train("run", &["--set", data[rank]])));
    said_once(ranks.into_iter().map(Running::wait), &["rank 1 sees other images than rank 0"]);
}

/// Before all ranks have come there is nothing to save; the ranks that are there leave together.
#[test]
fn ranks_that_wait_for_others_leave_when_one_is_told() {
    let (project, store) = (Project::new(), store());
    let mut ranks = start_some(&project, &store, &[0, 2], 3, |_, command| command.args(train("run", &[])));
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
    let ranks = start(&project, &store, 2, |rank, command| {
        command.args(["sample", "run", "--seed", ["3", "4"][rank], "--out", "x.png"])
    });
    said_once(ranks.into_iter().map(Running::wait), &["weights of step 5 (checksum ", "seed 4"]);
    assert!(!project.path("x.png").exists());
}

/// As nodes have that read a file system of their own each.
#[test]
fn ranks_that_would_sample_with_other_weights_are_refused() {
    let (project, store) = (Project::new(), store());
    for (run_dir, seed) in [("one", "train.seed=1"), ("other", "train.seed=2")] {
        project.trained(run_dir, &["--set", "train.steps=5", "--set", seed]);
    }
    let ranks =
        start(&project, &store, 2, |rank, command| command.args(["sample", ["one", "other"][rank], "--out", "x.png"]));
    said_once(ranks.into_iter().map(Running::wait), &["do not belong together", "weights of step 5 (checksum "]);
    assert!(!project.path("x.png").exists());
}

/// Also where it is rank 0 that differs from all others.
#[test]
fn ranks_that_begin_with_other_weights_are_refused() {
    let project = Project::new();
    for (run_dir, seed) in [("one", "train.seed=1"), ("other", "train.seed=2")] {
        project.trained(run_dir, &["--set", "train.steps=5", "--set", seed]);
    }
    for odd in [0, 2] {
        let store = store();
        let init = |rank| if rank == odd { "other" } else { "one" };
        let ranks = start(&project, &store, 3, |rank, command| {
            command.args(train("run", &["--set", "train.batch=6", "--init", init(rank)]))
        });
        let words = [format!("rank {} begins with other weights than rank 0", odd.max(1)), "--init".into()];
        said_once(ranks.into_iter().map(Running::wait), &words.each_ref().map(String::as_str));
        assert!(project.checkpoints("run").is_empty(), "nothing was trained");
    }
}
