//! `square_sums` and `grad_norm` against the sum of squares in f64.

use crate::cpu::{on_cpu, on_cpu_from};
use crate::machine::{Buffer, run_launch};
use crate::values::{bytes_of_f32, f32_of, normals};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::grad_norm::{BLOCK, GradNorm, SquareSums, cuda};
use std::sync::Arc;

fn norm(gradients: &[f32]) -> [f32; 2] {
    let sums = square_sums(gradients);
    let found = run_launch(&cuda::grad_norm(sums.len() / 8), &[Buffer::Input(sums)], &[Buffer::Output(8)]).remove(0);
    f32_of(&found, Precision::F32).try_into().unwrap()
}

/// f64, byte for byte.
fn square_sums(gradients: &[f32]) -> Vec<u8> {
    let sums = Buffer::Output(8 * gradients.len().div_ceil(BLOCK));
    run_launch(&cuda::square_sums(gradients.len()), &[Buffer::Input(bytes_of_f32(gradients))], &[sums]).remove(0)
}

/// Whoever sums which blocks.
#[test]
fn the_sum_of_a_block_depends_on_nothing_outside_it() {
    let gradients = normals(3, 5 * BLOCK + 100);
    let (first, rest) = gradients.split_at(2 * BLOCK);
    assert_eq!([square_sums(first), square_sums(rest)].concat(), square_sums(&gradients));
    // Nor on what is filled up with zeros.
    let filled = [rest, &vec![0.0; BLOCK - 100]].concat();
    assert_eq!(square_sums(&filled), square_sums(rest));
}

#[test]
fn the_norm_is_that_of_f64_and_of_the_cpu() {
    for (seed, len) in [4, 1020, 1024, 5000, 70_000, 300_000].into_iter().enumerate() {
        let gradients = normals(seed as u64, len);
        let exact = gradients.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let [found, finite] = norm(&gradients);
        // The order of a sum in f64 moves it by 1e-13 of itself, which may move its rounding to f32 by one step.
        assert!((f64::from(found) / exact - 1.0).abs() <= f64::from(f32::EPSILON), "{len}: {found}, expected {exact}");
        assert_eq!(finite, 1.0);
        let sums = vec![0xFF; 8 * len.div_ceil(BLOCK)];
        let sums = on_cpu_from(Arc::new(SquareSums { parameters: len }), &[bytes_of_f32(&gradients)], &[sums], 0);
        let cpu = f32_of(&on_cpu(GradNorm, &sums, &[])[0], Precision::F32);
        assert!(found.to_bits().abs_diff(cpu[0].to_bits()) <= 1 && cpu[1] == 1.0, "{len}: {found}, on the CPU {cpu:?}");
    }
}

#[test]
fn numbers_at_the_ends_of_f32_have_a_norm_and_others_have_none() {
    let mut gradients = vec![0.0; 3000];
    assert_eq!(norm(&gradients), [0.0, 1.0]);
    gradients[7] = 1e-40;
    assert_eq!(norm(&gradients), [1e-40, 1.0]);
    gradients[2999] = f32::MAX;
    gradients[1] = -f32::MAX;
    assert_eq!(norm(&gradients), [f32::MAX, 1.0]);
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        gradients[1500] = bad;
        assert_eq!(norm(&gradients)[1], 0.0, "{bad}");
    }
}
