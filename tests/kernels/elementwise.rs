//! Kernels that have a thread for 16 bytes: what they compute in f32 and round once is the CPU's result, rounded.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch};
use crate::values::{activations, bytes_of_f32, f32_of, normals, rounded};
use ddpm_dist::collective::sum_along_tree;
use ddpm_dist::device::cuda::nccl::tree_sum;
use ddpm_dist::device::cuda::{Launch, Precision};
use ddpm_dist::ops::accumulate::{self, Accumulate};
use ddpm_dist::ops::add::{self, Add};
use ddpm_dist::ops::copy::{self, Copy};
use ddpm_dist::ops::silu::{self, Silu, SiluGradient};
use ddpm_dist::ops::upsample::{self, Upsample, UpsampleGradient};
use ddpm_dist::tape::Op;

pub const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];
/// One element, fewer than a pack, whole packs, and one more; more than a block.
const LENGTHS: [usize; 6] = [1, 3, 8, 64, 1025, 5000];

/// Runs an op with one output, or its kernel, on the same activations, `lengths` of inputs; `adds` has the output updated.
/// Gives both results as f32.
fn both(
    op: impl Op,
    launch: Launch,
    precision: Precision,
    lengths: &[usize],
    output: usize,
    adds: bool,
) -> [Vec<f32>; 2] {
    let drawn: Vec<[Vec<u8>; 2]> =
        lengths.iter().enumerate().map(|(i, len)| activations(i as u64, *len, precision)).collect();
    let before = activations(99, output, precision);
    let inputs: Vec<Buffer> = drawn.iter().map(|[device, _]| Buffer::Input(device.clone())).collect();
    let out = if adds { Buffer::Updated(before[0].clone()) } else { Buffer::Output(output * precision.bytes()) };
    let found = run_launch(&launch, &inputs, &[out]);
    let inputs: Vec<Vec<u8>> = drawn.into_iter().map(|[_, cpu]| cpu).collect();
    let [_, before] = before;
    let expected = on_cpu(op, &inputs, if adds { std::slice::from_ref(&before) } else { &[] });
    [f32_of(&found[0], precision), f32_of(&expected[0], Precision::F32)]
}

/// The CPU's bits, rounded to the precision.
#[track_caller]
fn same([found, expected]: [Vec<f32>; 2], precision: Precision) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            rounded(*expected, precision).to_bits(),
            "element {i}: {found}, expected {expected}"
        );
    }
}

#[test]
fn sums_are_those_of_the_cpu() {
    for precision in BOTH {
        for len in LENGTHS {
            let op = Add { shape: [len].into() };
            same(both(op.clone(), add::cuda::launch(&op, precision), precision, &[len, len], len, false), precision);
        }
    }
    for (len, precision, adds) in
        LENGTHS.iter().flat_map(|&len| BOTH.map(|p| [(len, p, false), (len, p, true)]).concat())
    {
        let op = Copy { shape: [len].into() };
        let launch = copy::cuda::launch(&op, precision, adds);
        same(both(op, launch, precision, &[len], len, adds), precision);
    }
    for len in LENGTHS {
        let op = Accumulate { sums: 1, elements: len };
        let [launch] = &accumulate::cuda::launches(&op, len)[..] else { panic!("one sum is one launch") };
        same(both(op.clone(), launch.clone(), Precision::F32, &[len], len, true), Precision::F32);
    }
    assert_eq!(accumulate::cuda::launches(&Accumulate { sums: 3, elements: 64 }, 64).len(), 3);
}

/// Numbers of ranks: of one launch, of two and of three; whole trees, and others.
#[test]
fn parts_of_ranks_are_added_along_the_tree_of_the_cpu() {
    for (count, len, stride) in [
        (2, 1025, 1040),
        (3, 64, 64),
        (4, 5000, 5008),
        (7, 3, 4),
        (8, 1025, 1028),
        (9, 64, 80),
        (23, 8, 16),
        (130, 5, 8),
    ] {
        // Sums whose bits depend on the order.
        let values: Vec<f32> =
            (0..count).flat_map(|p| normals(p as u64, stride).into_iter().map(move |x| x * p as f32)).collect();
        let mut parts: Vec<Vec<f32>> = values.chunks(stride).map(|part| part[..len].to_vec()).collect();
        sum_along_tree(&mut parts);
        let mut found = bytes_of_f32(&values);
        for launch in tree_sum(count, stride, len) {
            found = run_launch(&launch, &[], &[Buffer::Updated(found)]).remove(0);
        }
        let found = &f32_of(&found, Precision::F32)[..len];
        assert!(
            found.iter().zip(&parts[0]).all(|(found, sum)| found.to_bits() == sum.to_bits()),
            "{count} parts of {len}"
        );
    }
}

#[test]
fn pictures_grow_and_gradients_shrink_as_on_the_cpu() {
    // Levels of the CIFAR-10 model scaled down; channels that no pack divides; one pixel.
    for shape in [[2, 4, 4, 32], [1, 8, 8, 16], [3, 2, 5, 8], [2, 3, 3, 6], [1, 1, 1, 3], [1, 16, 16, 64]] {
        let (len, four) = (shape.iter().product(), 4 * shape.iter().product::<usize>());
        for precision in BOTH {
            let op = Upsample { shape: shape.into() };
            same(both(op.clone(), upsample::cuda::launch(&op, precision), precision, &[len], four, false), precision);
            for adds in [false, true] {
                let op = UpsampleGradient { shape: shape.into() };
                let launch = upsample::cuda::launch_gradient(&op, precision, adds);
                same(both(op, launch, precision, &[four], len, adds), precision);
            }
        }
    }
}

/// Exponentials may be two units off in CUDA and one on the CPU (src/simd/math.rs); a sum, a quotient and a product are rounded on each
/// side: 2 + 1 + 6/2 epsilon, and some room. To bf16, which has 8 bits, the kernel rounds once more, by half a unit: 2^-8.
#[track_caller]
fn close([found, expected]: [Vec<f32>; 2], precision: Precision) {
    let last = match precision {
        Precision::F32 => 0.0,
        Precision::Bf16 => 1.0 / 256.0,
    };
    let epsilon = last + 8.0 * f32::EPSILON;
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // The gradient passes through zero, where the terms of its sum are about 1.
        let tolerance = epsilon * expected.abs() + 8.0 * f32::EPSILON;
        assert!((found - expected).abs() <= tolerance, "element {i}: {found}, expected {expected}");
    }
}

#[test]
fn silu_is_that_of_the_cpu() {
    for precision in BOTH {
        for len in LENGTHS {
            let op = Silu { shape: [len].into() };
            close(both(op.clone(), silu::cuda::launch(&op, precision), precision, &[len], len, false), precision);
            for adds in [false, true] {
                let op = SiluGradient { shape: [len].into() };
                let launch = silu::cuda::launch_gradient(&op, precision, adds);
                close(both(op, launch, precision, &[len, len], len, adds), precision);
            }
        }
    }
}
