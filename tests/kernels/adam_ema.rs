//! `adam_ema` leaves the bits that the CPU leaves.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch};
use crate::values::{bytes_of_f32, f32_of, hyper, normals, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::adam_ema::{AdamEma, cuda};

/// One step on `len` parameters that lie in ranges of `large` numbers.
fn check(len: usize, decoupled: bool, norm: [f32; 2], large: f32, seed: u64) {
    let draw = |place: u64, scale: f32| normals(seed + place, len).iter().map(|x| x * scale).collect::<Vec<f32>>();
    let squares: Vec<f32> = draw(4, 1e-3).iter().map(|x| x * x).collect();
    let inputs = [draw(1, large), norm.to_vec(), hyper(7).to_array().to_vec()].map(|values| bytes_of_f32(&values));
    let state = [draw(2, 0.1), draw(3, 1e-3), squares, draw(5, 0.1)].map(|values| bytes_of_f32(&values));
    let expected = on_cpu(AdamEma { decoupled, has_copy: false, parameters: len }, &inputs, &state);
    let inputs = inputs.map(Buffer::Input);
    for has_copy in [true, false] {
        let before = vec![0x55u8; 2 * len];
        let outputs: Vec<Buffer> = state.iter().chain([&before]).cloned().map(Buffer::Updated).collect();
        let found = run_launch(&cuda::launch(len, decoupled, has_copy), &inputs, &outputs);
        assert!(found[..4] == expected, "{len} {decoupled} {norm:?}: {has_copy}");
        if !has_copy {
            assert_eq!(found.len(), 4);
        } else if norm[1] == 0.0 {
            assert_eq!((&found[4], &found[0]), (&before, &state[0]), "nothing is written");
        } else {
            let weights = f32_of(&expected[0], Precision::F32);
            let copied = f32_of(&found[4], Precision::Bf16);
            assert!(weights.iter().zip(&copied).all(|(w, c)| rounded(*w, Precision::Bf16) == *c));
        }
    }
}

#[test]
fn adam_ema_leaves_what_the_cpu_leaves() {
    // One access, less than half a warp's, a little more than half, a block's, and some more.
    for (seed, len) in [8, 64, 136, 2048, 2056, 4096 + 64].into_iter().enumerate() {
        for decoupled in [false, true] {
            check(len, decoupled, [0.5, 1.0], 0.1, 10 * seed as u64);
        }
    }
    // Clipped; squares past f32; and a gradient that was not finite.
    check(256, false, [40.0, 1.0], 2.0, 100);
    check(256, true, [3e38, 1.0], 1e30, 110);
    check(256, false, [f32::NAN, 0.0], 1.0, 120);
}
