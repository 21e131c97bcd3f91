use super::TimestepEmbedding;
use crate::device::cpu::Launch;

pub(super) fn timestep_embedding(op: &TimestepEmbedding, launch: &Launch<'_>) {
    let t = launch.input::<u32>(0);
    let half = op.frequencies.len();
    let (sines, cosines) = if op.cosines_first { (half, 0) } else { (0, half) };
    launch.pool().for_chunks(launch.output::<f32>(0), op.dim, |n, row, _| {
        for (i, frequency) in op.frequencies.iter().enumerate() {
            let (sin, cos) = (f64::from(t[n]) * frequency).sin_cos();
            row[sines + i] = sin as f32;
            row[cosines + i] = cos as f32;
        }
        row[2 * half..].fill(0.0);
    });
}
