//! `grad_norm` in two stages against the sum of squares in f64.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_with};
use crate::values::{bytes_of_f32, f32_of, normals};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::grad_norm::{GradNorm, cuda};

fn norm(gradients: &[f32]) -> [f32; 2] {
    let [partial, total] = cuda::launches(gradients.len());
    let input = [Buffer::Input(bytes_of_f32(gradients))];
    let partials = run_with(&partial, &input, &[], &Buffer::Output(8 * cuda::partials(gradients.len()))).remove(0);
    let found = run_with(&total, &input, &[Buffer::Output(8)], &Buffer::Input(partials)).remove(0);
    f32_of(&found, Precision::F32).try_into().unwrap()
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
        let cpu = on_cpu(GradNorm { parameters: len }, &[bytes_of_f32(&gradients)], &[]);
        let cpu = f32_of(&cpu[0], Precision::F32);
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
