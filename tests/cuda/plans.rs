//! How a GPU computes convolutions is chosen once and kept: on disk, by all ranks, and in the checkpoint. The machine's cuDNN writes a line for
//! each search and each plan, and is slow where it is told to be (tests/cuda-sim/cudnn.cpp).

use crate::build::Build;
use crate::common::{Project, Running, ranks};
use crate::machine::{library_path, not_tested};
use ddpm_dist::checkpoint::inspect;
use ddpm_dist::device::cuda::{Choice, Image, PlanTable};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const LIBRARIES: [Build; 4] = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];

/// A variable of the environment, and its value.
type Setting<'a> = (&'a str, &'a str);

/// Two engines are right in f32, and a machine that is slow with one takes the other.
const BOTH: Setting<'static> = ("CUDA_SIM_CUDNN_ENGINES", "6,8");
const TAKES_6: Setting<'static> = ("CUDA_SIM_CUDNN_SLOW", "8");
const TAKES_8: Setting<'static> = ("CUDA_SIM_CUDNN_SLOW", "6");
/// So have products two algorithms that are right.
const TAKES_0: Setting<'static> = ("CUDA_SIM_CUBLASLT_SLOW", "1");
const TAKES_1: Setting<'static> = ("CUDA_SIM_CUBLASLT_SLOW", "0");

/// Nothing is kept on disk.
const OFF: Setting<'static> = ("DDPM_DIST_CUDA_PLANS", "off");

/// None where the program has no kernels, or the GPU is a real one.
fn project() -> Option<Project> {
    if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        not_tested("kept plans need nvcc, and the machine made of software");
        return None;
    }
    Some(Project::new())
}

/// A run, what it said, and what its cuDNN did.
struct Ran {
    output: Output,
    said: String,
    log: Vec<String>,
}

impl Ran {
    /// Whether a rank searched, both or neither.
    #[track_caller]
    fn has_searched(&self, rank: usize) -> bool {
        let has = |what: &str| self.log.contains(&format!("{rank} {what}"));
        let both = [has("searches"), has("searches products")];
        assert_eq!(both[0], both[1], "{:?}", self.log);
        both[0]
    }

    /// The engines of a rank's plans, those that were only timed among them.
    fn engines(&self, rank: usize) -> BTreeSet<&str> {
        let begin = format!("{rank} plans engine ");
        self.log.iter().filter_map(|line| line.strip_prefix(&begin)).collect()
    }
}

fn begun(project: &Project, ranks: usize, run_dir: &str, settings: &[Setting<'_>]) -> (Command, PathBuf) {
    let mut command = project.program();
    let log = project.path(format!("log-{}", fs::read_dir(project.path("")).unwrap().count()));
    fs::write(&log, "").unwrap();
    let ranks = ranks.to_string();
    command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", &ranks);
    command.env("CUDA_SIM_LOG", &log).envs([BOTH]).envs(settings.iter().copied());
    command.args(["--ranks", &ranks, "train", "config.toml", "--device", "cuda", "--run-dir", run_dir]);
    command.args(["--set", "checkpoint.every=2", "--set", "sample.count=2"]);
    (command, log)
}

/// Trains some steps.
fn train(project: &Project, ranks: usize, run_dir: &str, steps: u64, settings: &[Setting<'_>]) -> Ran {
    let (mut command, log) = begun(project, ranks, run_dir, settings);
    let output = command.args(["--set", &format!("train.steps={steps}")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{said}");
    let log = fs::read_to_string(log).unwrap().lines().map(String::from).collect();
    Ran { output, said, log }
}

#[track_caller]
fn must_be_well(ran: Ran) -> Ran {
    assert!(ran.output.status.success(), "{:?}: {}", ran.output.status, ran.said);
    ran
}

/// The plans that a checkpoint pins.
fn pinned(project: &Project, run_dir: &str, step: u64) -> PlanTable {
    let manifest = inspect(&project.path(format!("{run_dir}/checkpoints/step-{step:08}"))).unwrap();
    serde_json::from_value(manifest.meta.extra["plans"].clone()).unwrap()
}

fn engines_of(table: &PlanTable) -> BTreeSet<i64> {
    let engine = |choice: &Choice| match choice {
        Choice::Convolution(choice) => Some(choice.engine.engine),
        Choice::Product(_) => None,
    };
    table.choices().iter().filter_map(|timed| engine(&timed.choice)).collect()
}

/// Numbers of the products' algorithms, which stand in their sixth word (tests/cuda-sim/cublaslt.cpp).
fn algorithms_of(table: &PlanTable) -> BTreeSet<u64> {
    let algorithm = |choice: &Choice| match choice {
        Choice::Convolution(_) => None,
        Choice::Product(choice) => Some(choice.algorithm[5]),
    };
    table.choices().iter().filter_map(|timed| algorithm(&timed.choice)).collect()
}

/// The one file of plans.
fn cache_file(project: &Project) -> PathBuf {
    let files = fs::read_dir(project.path("cache/ddpm-dist/plans")).unwrap();
    let files: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn a_second_process_computes_as_the_first_found() {
    let Some(project) = project() else { return };
    let first = must_be_well(train(&project, 1, "first", 2, &[TAKES_6, TAKES_1]));
    assert_eq!(algorithms_of(&pinned(&project, "first", 2)), BTreeSet::from([1]));
    assert!(first.has_searched(0) && first.said.contains("timing how cuDNN and cuBLASLt compute"), "{}", first.said);
    let name = cache_file(&project).file_name().unwrap().to_str().unwrap().to_string();
    assert!(name.starts_with("a-machine-made-of-software-8.0-cudnn-9.10.2"), "{name}");
    let text = fs::read_to_string(cache_file(&project)).unwrap();
    let second = must_be_well(train(&project, 1, "second", 2, &[TAKES_8, TAKES_0]));
    assert!(!second.has_searched(0) && !second.said.contains("timing how"), "{}", second.said);
    assert_eq!(second.engines(0), BTreeSet::from(["6"]));
    assert_eq!(pinned(&project, "first", 2), pinned(&project, "second", 2));
    assert_eq!(fs::read_to_string(cache_file(&project)).unwrap(), text);
    // Where nothing is kept, each process searches.
    let alone = must_be_well(train(&project, 1, "alone", 2, &[TAKES_8, TAKES_0, OFF]));
    assert!(alone.has_searched(0), "{}", alone.said);
    assert_eq!(engines_of(&pinned(&project, "alone", 2)), BTreeSet::from([8]));
    assert_eq!(algorithms_of(&pinned(&project, "alone", 2)), BTreeSet::from([0]));
    assert_eq!(fs::read_to_string(cache_file(&project)).unwrap(), text);
}

#[test]
fn a_cache_that_is_of_no_use_is_told_once_and_never_stops_a_run() {
    let Some(project) = project() else { return };
    must_be_well(train(&project, 1, "first", 1, &[]));
    let (file, whole) = (cache_file(&project), fs::read(cache_file(&project)).unwrap());
    fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    let damaged = must_be_well(train(&project, 1, "damaged", 1, &[]));
    assert!(damaged.has_searched(0), "{}", damaged.said);
    assert_eq!(damaged.said.matches("is damaged").count(), 1, "{}", damaged.said);
    assert_eq!(fs::read(file.with_extension("jsonl.set-aside")).unwrap(), whole[..whole.len() - 20]);
    let after = must_be_well(train(&project, 1, "after", 1, &[]));
    assert!(!after.has_searched(0) && !after.said.contains("is damaged"), "{}", after.said);

    let below_a_file = project.write("a-file", "").join("below");
    let unwritable = [("DDPM_DIST_CUDA_PLANS", below_a_file.to_str().unwrap())];
    let unwritable = must_be_well(train(&project, 1, "unwritable", 1, &unwritable));
    assert_eq!(unwritable.said.matches("cannot be kept in").count(), 1, "{}", unwritable.said);
    let unknown = train(&project, 1, "unknown", 1, &[("DDPM_DIST_CUDA_PLANS", "yes")]);
    assert_eq!(unknown.output.status.code(), Some(7), "{}", unknown.said);
    assert!(unknown.said.contains("DDPM_DIST_CUDA_PLANS=yes is unknown"), "{}", unknown.said);
}

#[test]
fn a_plan_that_does_not_hold_any_more_is_searched_again() {
    let Some(project) = project() else { return };
    must_be_well(train(&project, 1, "first", 1, &[TAKES_6]));
    let file = cache_file(&project);
    let text = fs::read_to_string(&file).unwrap();
    // An engine that there is not, and one that computes something else.
    let spoilt =
        text.replacen("{\"engine\":6,", "{\"engine\":100,", 1).replacen("{\"engine\":6,", "{\"engine\":11,", 1);
    let of_11 = spoilt.replace("\"knobs\":[{\"kind\":2,\"value\":1}]", "\"knobs\":[]");
    // And an algorithm that leaves out a term: the sixth word of the first product's.
    let at = of_11.find("\"algorithm\":[").unwrap() + "\"algorithm\":[".len();
    let words: Vec<&str> = of_11[at..].split_once(']').unwrap().0.split(',').collect();
    let others = [&words[..5], &["2"], &words[6..]].concat().join(",");
    let of_11 = of_11.replacen(&words.join(","), &others, 1);
    fs::write(&file, &of_11).unwrap();
    let again = must_be_well(train(&project, 1, "again", 1, &[TAKES_6]));
    assert!(again.said.contains("3 of the plans that were chosen before cannot be used"), "{}", again.said);
    assert!(again.has_searched(0), "{}", again.said);
    assert!(!algorithms_of(&pinned(&project, "again", 1)).contains(&2));
    assert_eq!(engines_of(&pinned(&project, "again", 1)), BTreeSet::from([6]));
    let mended = must_be_well(train(&project, 1, "mended", 1, &[TAKES_8]));
    assert!(!mended.has_searched(0) && !mended.said.contains("cannot be used"), "{}", mended.said);
}

#[test]
fn all_ranks_compute_as_rank_0_has_found() {
    let Some(project) = project() else { return };
    let (other, products) = (("CUDA_SIM_CUDNN_SLOW_OF_1", "6"), ("CUDA_SIM_CUBLASLT_SLOW_OF_1", "0"));
    let ran = must_be_well(train(&project, 2, "run", 2, &[OFF, TAKES_6, other, TAKES_0, products]));
    assert!(ran.has_searched(0) && !ran.has_searched(1), "{:?}", ran.log);
    assert_eq!(ran.engines(1), BTreeSet::from(["6"]));
    let has = |line: &str| ran.log.iter().any(|known| known == line);
    assert!(has("1 has algorithm 0 again") && !has("1 has algorithm 1 again"), "{:?}", ran.log);
    assert_eq!(engines_of(&pinned(&project, "run", 2)), BTreeSet::from([6]));
    assert!(!ran.said.contains("differs in its last bits"), "{}", ran.said);
    // Plans of one version are of no use to another.
    let version = ("CUDA_SIM_CUDNN_VERSION_OF_1", "91100");
    let mixed = must_be_well(train(&project, 2, "mixed", 2, &[OFF, TAKES_6, other, version]));
    assert!(mixed.has_searched(0) && mixed.has_searched(1), "{:?}", mixed.log);
    let notice =
        "rank 1 has a machine made of software (8.0) with cuDNN 9.11.0 and cuBLASLt 13.0.1: what these compute differs";
    assert_eq!(mixed.said.matches(notice).count(), 1, "{}", mixed.said);
    assert_eq!(engines_of(&pinned(&project, "mixed", 2)), BTreeSet::from([6]));
}

#[test]
fn a_rank_that_finds_no_plans_ends_all_with_its_own_words() {
    let Some(project) = project() else { return };
    must_be_well(train(&project, 1, "trained", 1, &[]));
    let of_1 = [("CUDA_SIM_CUDNN_FAIL_OF_1", "execute"), ("CUDA_SIM_CUDNN_VERSION_OF_1", "91100")];
    // What rank 0 finds is of no use to a rank with another cuDNN, which looks for its own.
    for (failing, settings) in [(0, &[("CUDA_SIM_CUDNN_FAIL_OF_0", "execute")][..]), (1, &of_1)] {
        for arguments in [
            &["train", "config.toml", "--device", "cuda", "--run-dir", "run"][..],
            &["bench", "config.toml", "--device", "cuda", "--steps", "1"],
            &["sample", "trained", "--device", "cuda", "--count", "2", "--out", "out.png"],
        ] {
            let log = project.write("log", "");
            let store = ranks::store();
            let ranks = ranks::start(&project, &store, 2, |_, command| {
                command.env("LD_LIBRARY_PATH", library_path(&LIBRARIES)).env("CUDA_SIM_GPUS", "2");
                command.env("CUDA_SIM_LOG", &log).envs([BOTH, OFF]).envs(settings.iter().copied()).args(arguments)
            });
            let ended: Vec<_> = ranks.into_iter().map(Running::wait).collect();
            let whose = if failing == 0 { "" } else { "rank 1: " };
            for (rank, (code, said)) in ended.iter().enumerate() {
                assert_eq!(*code, Some(7), "rank {rank} of {arguments:?}: {said}");
                // Rank 0 speaks for those who were only told of it.
                let speaks = rank == 0 || rank == failing;
                assert_eq!(said.matches("ddpm-dist: ").count(), usize::from(speaks), "rank {rank}: {said}");
            }
            let said = &ended[0].1;
            assert!(said.contains(&format!("ddpm-dist: {whose}cuDNN 9.1")), "{arguments:?}: {said}");
            assert!(said.contains("has nothing for the") && said.contains("CUDNN_STATUS_EXECUTION_FAILED"), "{said}");
            let searches = String::from_utf8(project.read("log")).unwrap().lines().any(|line| line == "1 searches");
            assert_eq!(searches, failing == 1, "{arguments:?}");
        }
    }
}

#[test]
fn a_search_may_take_longer_than_ranks_wait_for_each_other() {
    let Some(project) = project() else { return };
    let (mut command, _) = begun(&project, 2, "run", &[("CUDA_SIM_CUDNN_WAIT_OF_0", "12000")]);
    let output = command.args(["--set", "train.steps=1", "--set", "cluster.timeout=8"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_search_that_is_killed_keeps_what_it_has_found() {
    let Some(project) = project() else { return };
    let searches = |ran: &Ran| ran.log.iter().filter(|line| *line == "0 searches").count();
    let lines = |text: &str| text.lines().map(String::from).collect::<BTreeSet<_>>();
    let all = searches(&must_be_well(train(&project, 1, "straight", 1, &[OFF])));
    let middle = (all / 2).to_string();
    let killed = train(&project, 1, "run", 1, &[("CUDA_SIM_CUDNN_KILLED", &middle)]);
    assert!(!killed.output.status.success() && killed.said.contains("signal 9"), "{}", killed.said);
    let kept = lines(&fs::read_to_string(cache_file(&project)).unwrap());
    let again = must_be_well(train(&project, 1, "run", 1, &[]));
    // The first line says what they are for.
    assert!(kept.len() > 1 && searches(&again) < all - all / 4, "{} of {all}", searches(&again));
    let complete = lines(&fs::read_to_string(cache_file(&project)).unwrap());
    assert!(complete.is_superset(&kept), "{kept:?}, then {complete:?}");
    assert_eq!(complete.len(), 1 + pinned(&project, "run", 1).choices().len());
}

#[test]
fn ranks_that_wait_for_a_search_notice_that_it_has_died() {
    let Some(project) = project() else { return };
    // Built before the clock runs.
    library_path(&LIBRARIES);
    let since = Instant::now();
    let ran = train(&project, 2, "run", 1, &[("CUDA_SIM_CUDNN_KILLED_OF_0", "1")]);
    assert!(!ran.output.status.success() && ran.said.contains("rank 0"), "{}", ran.said);
    // Ranks wait for each other five minutes.
    assert!(since.elapsed() < Duration::from_secs(120), "{:?}", since.elapsed());
}

#[test]
fn a_checkpoint_pins_how_convolutions_are_computed() {
    let Some(project) = project() else { return };
    must_be_well(train(&project, 1, "run", 2, &[OFF, TAKES_6]));
    let manifest = inspect(&project.path("run/checkpoints/step-00000002")).unwrap();
    assert_eq!((&*manifest.meta.libraries["cudnn"], &*manifest.meta.libraries["cublaslt"]), ("9.10.2", "13.0.1"));
    assert_eq!(manifest.meta.device_kind, "cuda (a machine made of software)");
    let resumed = must_be_well(train(&project, 1, "run", 4, &[OFF, TAKES_8]));
    assert!(!resumed.has_searched(0), "{:?}", resumed.log);
    assert_eq!(pinned(&project, "run", 4), pinned(&project, "run", 2));
    assert!(!resumed.said.contains("last bits"), "{}", resumed.said);
    // Before what this machine has on disk.
    must_be_well(train(&project, 1, "elsewhere", 2, &[TAKES_8]));
    let resumed = must_be_well(train(&project, 1, "run", 6, &[TAKES_8]));
    assert_eq!(resumed.engines(0), BTreeSet::from(["6"]));
    // On another card, or with another cuDNN, they are searched, which is said.
    for (steps, setting, says) in [
        (
            8,
            ("CUDA_SIM_CUDNN_VERSION", "91100"),
            "going on with cuDNN 9.11.0 and cuBLASLt 13.0.1: same images and noise",
        ),
        (
            10,
            ("CUDA_SIM_CUBLASLT_VERSION", "130100"),
            "going on with cuDNN 9.10.2 and cuBLASLt 13.1.0: same images and noise",
        ),
        (12, ("CUDA_SIM_NAME", "NVIDIA X1"), "going on with cuda (NVIDIA X1): same images and noise"),
    ] {
        let other = must_be_well(train(&project, 1, "run", steps, &[OFF, TAKES_8, setting]));
        assert!(other.has_searched(0), "{:?}", other.log);
        assert_eq!(other.said.matches(says).count(), 1, "{}", other.said);
        assert_eq!(engines_of(&pinned(&project, "run", steps)), BTreeSet::from([8]));
    }
}

#[test]
fn a_run_that_passes_over_a_damaged_checkpoint_takes_the_plans_of_the_one_before() {
    let Some(project) = project() else { return };
    must_be_well(train(&project, 1, "run", 2, &[OFF, TAKES_6]));
    must_be_well(train(&project, 1, "other", 4, &[OFF, TAKES_8]));
    let newest = project.checkpoint("run", 4);
    fs::rename(project.checkpoint("other", 4), &newest).unwrap();
    let mut files = fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().path());
    let shard = files.find(|path| path.extension().is_some_and(|e| e == "safetensors")).unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    assert_eq!(engines_of(&pinned(&project, "run", 4)), BTreeSet::from([8]), "its manifest is whole");
    let resumed = must_be_well(train(&project, 1, "run", 6, &[OFF, TAKES_8]));
    assert!(resumed.said.contains("skipping") && resumed.said.contains("step-00000002"), "{}", resumed.said);
    assert!(!resumed.has_searched(0), "{:?}", resumed.log);
    assert_eq!(resumed.engines(0), BTreeSet::from(["6"]));
    assert_eq!(pinned(&project, "run", 6), pinned(&project, "run", 2));
}
