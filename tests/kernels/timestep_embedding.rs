//! Sines and cosines of f64 angles, rounded once.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch};
use crate::values::{bytes_of_u32, f32_of, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::timestep_embedding::{TimestepEmbedding, cuda};

#[test]
fn embeddings_are_those_of_the_cpu() {
    let t = bytes_of_u32(&[0, 1, 17, 500, 999]);
    for (dim, freq_shift, cosines_first) in [(128, 1.0, false), (512, 0.0, true), (7, 1.0, false), (2, 0.0, true)] {
        let op = TimestepEmbedding::new(5, dim, freq_shift, cosines_first);
        let frequencies: Vec<u8> = op.frequencies().iter().flat_map(|f| f.to_ne_bytes()).collect();
        let expected = f32_of(&on_cpu(op.clone(), std::slice::from_ref(&t), &[])[0], Precision::F32);
        for precision in [Precision::F32, Precision::Bf16] {
            let inputs = [Buffer::Input(t.clone()), Buffer::Input(frequencies.clone())];
            let output = [Buffer::Output(5 * dim * precision.bytes())];
            let found = f32_of(&run_launch(&cuda::launch(&op, precision), &inputs, &output)[0], precision);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                // A sine of f64 is good to f64's last bits, far below where f32 rounds.
                let off = found.to_bits().abs_diff(rounded(*expected, precision).to_bits());
                assert!(off <= 1, "dim {dim}, element {i}: {found}, expected {expected}");
            }
        }
    }
}
