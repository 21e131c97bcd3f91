//! What goes wrong with a GPU while the program trains: each fault ends the run with one message and the exit code of a device, leaves the last
//! checkpoint whole, and the same command goes on to the bits of a run to which nothing happened. Sampling and benches end in the same words.

use crate::common::{Ended, Project};
use crate::machine::{WITH_KERNELS, library_path, not_tested};
use ddpm_dist::checkpoint::{CheckpointConfig, Saver, Want, load};
use ddpm_dist::device::cuda::Image;

/// A small run: checkpoints after steps 2, 4 and 6, pictures after step 3 and at the end.
const SMALL: [&str; 12] = [
    "--set",
    "train.steps=6",
    "--set",
    "train.batch=2",
    "--set",
    "checkpoint.every=2",
    "--set",
    "sample.every=3",
    "--set",
    "sample.count=2",
    "--set",
    "sample.batch=2",
];
const STEPS: u64 = 6;

/// The code for a device that does not work.
const DEVICE: i32 = 7;

/// A project on a machine made of software; none where there is no such machine.
struct Machine {
    project: Project,
}

impl Machine {
    fn new(test: &str) -> Option<Machine> {
        if Image::embedded().is_none() || std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
            not_tested(&format!("{test}: it needs nvcc, and the machine made of software"));
            return None;
        }
        Some(Machine { project: Project::new() })
    }

    /// Trains with a fault, if one is given.
    fn train(&self, run_dir: &str, fault: Option<&str>, more: &[&str]) -> Ended {
        let settings: Vec<(&str, &str)> = fault.iter().map(|fault| ("CUDA_SIM_FAULT", *fault)).collect();
        self.train_with(run_dir, &settings, more)
    }

    fn train_with(&self, run_dir: &str, settings: &[(&str, &str)], more: &[&str]) -> Ended {
        self.run(&[&["train", "config.toml", "--run-dir", run_dir][..], &SMALL, more].concat(), settings)
    }

    fn run(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Ended {
        let mut command = self.project.program();
        command.args(arguments).args(["--device", "cuda"]);
        command.env("LD_LIBRARY_PATH", library_path(&WITH_KERNELS)).env("RUST_BACKTRACE", "0");
        // Each run looks for its plans, which takes kernels and memory.
        command.env("DDPM_DIST_CUDA_PLANS", "off");
        command.envs(settings.iter().copied());
        let output = command.output().unwrap();
        Ended {
            code: output.status.code().unwrap_or_else(|| panic!("{settings:?}: killed: {output:?}")),
            stderr: String::from_utf8(output.stderr).unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
        }
    }

    /// A run to which nothing happens.
    fn straight(&self) -> Vec<String> {
        if !self.project.path("straight").exists() {
            let ended = self.train("straight", None, &[]);
            assert_eq!(ended.code, 0, "{}", ended.stderr);
        }
        self.project.hashes("straight", STEPS)
    }

    /// Goes on with a run that a fault has ended; every checkpoint that it left is whole, and the end is that of a run to which nothing happened.
    fn goes_on(&self, run_dir: &str, fault: &str) {
        if self.project.path(run_dir).join("checkpoints").is_dir() {
            for step in self.project.checkpoints(run_dir) {
                self.project.hashes(run_dir, step);
            }
        }
        let ended = self.train(run_dir, None, &[]);
        assert_eq!(ended.code, 0, "after {fault}: {}", ended.stderr);
        assert_eq!(self.project.hashes(run_dir, STEPS), self.straight(), "after {fault}: other bits");
    }
}

/// In a step, while images are sampled, and before the first step.
#[test]
fn a_card_that_fails_costs_no_more_than_what_was_not_saved() {
    let Some(machine) = Machine::new("faults::a_card_that_fails_costs_no_more_than_what_was_not_saved") else { return };
    let damaged = ["uncorrectable ECC error", "CUDA_ERROR_ECC_UNCORRECTABLE", "take the card out"];
    let lost = ["CUDA_ERROR_UNKNOWN", "Xid", "restarted"];
    let mistaken = ["an illegal memory access", "CUDA_ERROR_ILLEGAL_ADDRESS", "report it"];
    // While plans are looked for, in the first step, which is no graph yet, in the second and third, in the middle of a grid, in the fifth.
    let all = ["k1", "k100", "1", "2", "4", "7"];
    for (what, places, words) in
        [("ecc", &all[..], damaged), ("bus", &all[2..5], lost), ("address", &all[1..3], mistaken)]
    {
        for at in places {
            let (fault, run_dir) = (format!("{what}@{at}"), format!("{what}-{at}"));
            let ended = machine.train(&run_dir, Some(&fault), &[]);
            ended.refused(DEVICE, &words);
            assert!(!ended.stderr.contains("warning: "), "{fault}: one message: {}", ended.stderr);
            let kept = match machine.project.checkpoints(&run_dir).last() {
                Some(step) => format!("The checkpoint of step {step} is intact: the same command goes on from it"),
                None => "No checkpoint was saved before: the same command begins again".to_string(),
            };
            let is_begun = ended.stderr.contains("after step ");
            assert!(is_begun || *at == "k1", "{fault}: {}", ended.stderr);
            assert_eq!(ended.stderr.contains(&kept), is_begun, "{fault}: {kept}: {}", ended.stderr);
            machine.goes_on(&run_dir, &fault);
        }
    }
}

/// Nothing else is refused: the state is still there, and saved.
#[test]
fn a_launch_that_is_refused_ends_a_run_with_its_state_saved() {
    let Some(machine) = Machine::new("faults::a_launch_that_is_refused_ends_a_run_with_its_state_saved") else {
        return;
    };
    for at in [1, 3, 6] {
        let (fault, run_dir) = (format!("launch@{at}"), format!("launch-{at}"));
        let ended = machine.train(&run_dir, Some(&fault), &[]);
        ended.refused(DEVICE, &["CUDA cannot launch a graph", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"]);
        let step = *machine.project.checkpoints(&run_dir).last().unwrap();
        assert!(ended.stderr.contains(&format!("warning: step {step} is saved")), "{fault}: {}", ended.stderr);
        machine.goes_on(&run_dir, &fault);
    }
}

/// Kernels that are launched one by one, as they are where no graphs are wanted: the first, others of all steps, and of pictures.
#[test]
fn a_kernel_that_is_refused_ends_a_run_with_its_state_saved() {
    let Some(machine) = Machine::new("faults::a_kernel_that_is_refused_ends_a_run_with_its_state_saved") else {
        return;
    };
    let mut saved = Vec::new();
    for number in (1..).step_by(240) {
        let (fault, run_dir) = (format!("launch@k{number}"), format!("kernel-{number}"));
        let settings = [("CUDA_SIM_FAULT", &*fault), ("DDPM_DIST_CUDA_GRAPH", "off")];
        let ended = machine.train_with(&run_dir, &settings, &[]);
        if ended.code == 0 {
            // There are not as many.
            break;
        }
        ended.refused(DEVICE, &["CUDA cannot launch ", " with grid (", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"]);
        match machine.project.checkpoints(&run_dir).last() {
            // In the pictures of the end.
            Some(&STEPS) => {}
            Some(step) => {
                assert!(ended.stderr.contains(&format!("warning: step {step} is saved")), "{fault}: {}", ended.stderr);
                saved.push(*step);
            }
            None => assert_eq!(number, 1, "{fault}: {}", ended.stderr),
        }
        machine.goes_on(&run_dir, &fault);
    }
    assert!(saved.len() > 3 && saved.is_sorted(), "runs ended after steps {saved:?}");
}

/// In kernels of a first step, and in graphs, which steps that are timed op by op are not.
#[test]
fn a_card_that_fails_ends_sampling_and_benches_too() {
    let Some(machine) = Machine::new("faults::a_card_that_fails_ends_sampling_and_benches_too") else { return };
    machine.straight();
    let sample = ["sample", "straight", "--count", "4", "--batch", "2", "--steps", "4", "--out", "images.npy"];
    let bench = ["bench", "config.toml", "--steps", "3", "--warmup", "1"];
    let [per_op, reverse] = ["--per-op", "--sampling"].map(|what| [&bench[..], &[what]].concat());
    for (arguments, places) in [
        (&sample[..], &["k1", "k20", "1", "3"][..]),
        (&bench, &["k1", "k100", "1", "3"]),
        (&per_op, &["k1", "k100"]),
        (&reverse, &["k20", "1", "3"]),
    ] {
        for at in places {
            let fault = format!("ecc@{at}");
            let ended = machine.run(arguments, &[("CUDA_SIM_FAULT", &fault)]);
            ended.refused(DEVICE, &["uncorrectable ECC error", "CUDA_ERROR_ECC_UNCORRECTABLE", "take the card out"]);
            assert!(!ended.stderr.contains("warning: ") && ended.stdout.is_empty(), "{fault}: {ended:?}");
            assert!(!machine.project.path("images.npy").exists(), "{fault}: images");
        }
    }
}

/// Some of them: of libraries, of the program's buffers, of what ops read, of pictures.
#[test]
fn any_allocation_may_be_one_too_many() {
    let Some(machine) = Machine::new("faults::any_allocation_may_be_one_too_many") else { return };
    let mut refused = 0;
    for number in std::iter::successors(Some(1), |number| Some(number + number / 3 + 1)) {
        let (fault, run_dir) = (format!("memory@{number}"), format!("memory-{number}"));
        let ended = machine.train(&run_dir, Some(&fault), &[]);
        if ended.code == 0 {
            // There are not as many.
            break;
        }
        refused = number;
        ended.refused(DEVICE, &["memory", "batch"]);
        machine.goes_on(&run_dir, &fault);
    }
    assert!(refused > 10, "only {refused} allocations");
}

/// Pictures with another number of images than a step has, too: what a run needs it has before its first graph, or it is refused.
#[test]
fn a_run_that_has_begun_takes_no_more_memory() {
    let Some(machine) = Machine::new("faults::a_run_that_has_begun_takes_no_more_memory") else { return };
    let ended = machine.train("run", Some("late@1"), &["--set", "sample.batch=3"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(machine.project.hashes("run", STEPS), machine.straight());
}

/// Weights that are finite and overflow.
#[test]
fn a_loss_that_is_no_number_ends_a_run_as_on_the_cpu() {
    let Some(machine) = Machine::new("faults::a_loss_that_is_no_number_ends_a_run_as_on_the_cpu") else { return };
    let ended = machine.train("run", None, &["--set", "train.steps=4"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let mut snapshot = load(&machine.project.checkpoint("run", 4), None, Want::All).unwrap();
    let range = snapshot.layout.get("conv_out.weight").unwrap().range();
    snapshot.params[range].fill(1e38);
    let mut saver = Saver::new(&machine.project.path("run/checkpoints"), &CheckpointConfig::default()).unwrap();
    saver.save(snapshot).unwrap();
    saver.wait().unwrap().result.unwrap();
    let before = machine.project.hashes("run", 4);
    let ended = machine.train("run", None, &[]);
    ended.refused(5, &["step 5", "not finite", "checkpoint of step 4 is intact", "optim.lr"]);
    assert_eq!(machine.project.hashes("run", 4), before);
    assert_eq!(machine.project.checkpoints("run").last(), Some(&4));
}

/// What this program is not written for is told, and what it cannot do with is refused.
#[test]
fn versions_that_are_not_tested_are_told() {
    let Some(machine) = Machine::new("faults::versions_that_are_not_tested_are_told") else { return };
    let one = ["--set", "train.steps=1"];
    for (name, value, said) in [
        ("CUDA_SIM_DRIVER", "14020", "a driver for CUDA 14.2: this program is written for 13.0 to"),
        ("CUDA_SIM_CUDNN_VERSION", "99900", "cuDNN 9.99.0: this program is written for 9.10 to"),
        ("CUDA_SIM_CUBLASLT_VERSION", "140000", "cuBLASLt 14.0.0: this program is written for 13.0 to"),
    ] {
        let ended = machine.train_with(name, &[(name, value)], &one);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        ended.warned(&[said, "use one of those"]);
    }
    let ended = machine.train_with("old", &[("CUDA_SIM_DRIVER", "12080")], &one);
    ended.refused(DEVICE, &["the driver is for CUDA 12.8", "13.0 or later", "update it"]);
    let ended = machine.train_with("well", &[], &one);
    assert!(ended.code == 0 && !ended.stderr.contains("warning"), "{}", ended.stderr);
}
