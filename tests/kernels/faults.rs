//! What the machine made of software is for: it finds each of the faults of tests/cuda-sim/planted.cu.

use crate::machine::Buffer;
use crate::sim::try_launch;
use crate::values::{bytes_of_f32, f32_of};
use ddpm_dist::device::cuda::{Argument, Launch, Precision};

fn planted(name: &str) -> Launch {
    let arguments = vec![Argument::Input(0), Argument::Output(0)];
    Launch { kernel: format!("planted_{name}"), grid: [1; 3], block: [64, 1, 1], shared: 0, arguments }
}

fn numbers() -> [Buffer; 1] {
    let numbers: Vec<f32> = (0..64).map(|i| i as f32 + 0.5).collect();
    [Buffer::Input(bytes_of_f32(&numbers))]
}

const OUTPUT: [Buffer; 1] = [Buffer::Output(256)];

/// What the machine says of a launch that it refuses.
fn refusal(launch: &Launch) -> String {
    match try_launch(launch, &numbers(), &OUTPUT, &Buffer::Output(0)) {
        Err(said) => said,
        Ok(_) => panic!("{launch:?} is not refused"),
    }
}

#[test]
fn a_kernel_without_a_fault_runs() {
    let found = try_launch(&planted("none"), &numbers(), &OUTPUT, &Buffer::Output(0)).unwrap();
    let halves: [f32; 2] = [(0..32).map(|i| i as f32 + 0.5).sum(), (32..64).map(|i| i as f32 + 0.5).sum()];
    for (i, sum) in f32_of(&found[0], Precision::F32).into_iter().enumerate() {
        assert_eq!(sum, halves[1 - i / 32], "thread {i} has the sum of the other half");
    }
}

/// Results that tests accept are then accepted for any of the errors that hardware may make.
#[test]
fn quick_functions_are_as_far_off_as_hardware_may_be() {
    let found = try_launch(&planted("approximate"), &numbers(), &OUTPUT, &Buffer::Output(0)).unwrap();
    let mut directions = [0, 0];
    for (i, found) in f32_of(&found[0], Precision::F32).into_iter().enumerate() {
        let x = i as f32 + 0.5;
        // CUDA C++ Programming Guide, "Intrinsic Functions".
        let (exact, most) = match i % 2 {
            0 => ((-f64::from(x)).exp(), 2 + (1.173 * x) as i32),
            _ => (1.0 / f64::from(x), 2),
        };
        let off = found.to_bits() as i32 - (exact as f32).to_bits() as i32;
        assert_eq!(off.abs(), most, "{x}: {found}, exactly {exact}");
        directions[usize::from(off > 0)] += 1;
    }
    assert!(directions.into_iter().all(|times| times > 16), "down and up: {directions:?}");
}

const UNWRITTEN: &str = "byte 0 of argument 1, an output, is not written, or with what nobody has written";

#[test]
fn each_planted_fault_is_found() {
    for (name, words) in [
        ("write_beyond", "heap-buffer-overflow"),
        ("read_beyond", "heap-buffer-overflow"),
        ("shared_beyond", "index 64 out of bounds"),
        ("no_barrier", UNWRITTEN),
        ("vote_for_barrier", UNWRITTEN),
        ("no_second_barrier", "argument 1 depends on the order in which threads run: a barrier is missing"),
        ("barrier_of_a_part", "is at __syncthreads, while thread (32, 0, 0) has left the kernel"),
        ("shuffle_of_a_part", "is at a shuffle with mask ffffffff, while thread (16, 0, 0) has left the kernel"),
        ("shuffle_from_outside", "a shuffle that reads lane 20, which does not take part"),
        ("unwritten_shared", UNWRITTEN),
        ("unwritten_decides", "argument 1 depends on what uninitialised memory holds"),
        ("unwritten_global", UNWRITTEN),
        ("unwritten_output", "byte 160 of argument 1, an output, is not written"),
        ("misaligned", "misaligned address"),
        ("written_input", "argument 0 is an input, and was written"),
        ("copy_without_wait", UNWRITTEN),
        ("copy_without_commit", UNWRITTEN),
        ("copy_of_others", UNWRITTEN),
        ("copy_too_early", "argument 1 depends on the order in which threads run: a barrier is missing"),
        ("copy_misaligned", "thread (0, 0, 0) gives a misaligned address of shared memory"),
        ("mma_of_a_part", "is at mma with mask ffffffff, while thread (16, 0, 0) has left the kernel"),
        ("ldmatrix_of_global", "gives an address that is not shared memory of its block"),
    ] {
        let error = refusal(&planted(name));
        assert!(error.contains(words), "{name}: {error}");
    }
    let beyond = Launch { shared: 64 * 16, ..planted("dynamic_shared_beyond") };
    let error = refusal(&beyond);
    assert!(error.contains("heap-buffer-overflow"), "{error}");
    let half = Launch { block: [48, 1, 1], ..planted("mma_of_half_a_warp") };
    let error = refusal(&half);
    assert!(
        error.contains("is at mma with mask ffffffff, which names lane 16: the block has no such thread"),
        "{error}"
    );
    let race = Launch { grid: [2, 1, 1], ..planted("race_of_blocks") };
    let error = refusal(&race);
    assert!(error.contains("depends on the order in which threads run"), "{error}");
}

#[test]
fn launches_that_a_driver_refuses_are_refused() {
    let launch = planted("none");
    for (launch, words) in [
        (Launch { block: [65, 1, 1], ..launch.clone() }, "65 threads a block, and its launch bound is 64"),
        (Launch { block: [2048, 1, 1], ..launch.clone() }, "is not possible"),
        (Launch { grid: [1, 65536, 1], ..launch.clone() }, "is not possible"),
        (Launch { grid: [0, 1, 1], ..launch.clone() }, "is not possible"),
        (Launch { shared: 200 << 10, ..launch.clone() }, "204800 bytes of shared memory"),
        (Launch { arguments: vec![Argument::Input(0)], ..launch.clone() }, "1 arguments, and the kernel takes 2"),
        (Launch { arguments: vec![Argument::Input(0), Argument::u32(1)], ..launch.clone() }, "argument 1 has 4 bytes"),
        (Launch { kernel: "nothing".into(), ..launch.clone() }, "no kernel of this name"),
    ] {
        let error = refusal(&launch);
        assert!(error.contains(words), "{words}: {error}");
    }
}
