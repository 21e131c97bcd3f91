use super::BLOCK;
use crate::device::cpu::Launch;
use crate::multiversion;

/// Blocks that a thread sums at a time.
const BLOCKS: usize = 8;

pub(super) fn square_sums(launch: &Launch<'_>) {
    let gradients = launch.input::<f32>(0);
    launch.pool().for_chunks(launch.output::<f64>(0), BLOCKS, |i, sums, _| {
        let blocks = gradients[i * BLOCKS * BLOCK..].chunks(BLOCK);
        sums.iter_mut().zip(blocks).for_each(|(sum, block)| *sum = sum_of_squares(block));
    });
}

pub(super) fn grad_norm(launch: &Launch<'_>) {
    let sum: f64 = launch.input::<f64>(0).iter().sum();
    // Of finite numbers the sum is finite, for it is far from f64's limit; of others it never is.
    let finite = sum.is_finite();
    let norm = sum.sqrt() as f32;
    let output = launch.output::<f32>(0);
    output[0] = if finite { norm.min(f32::MAX) } else { norm };
    output[1] = if finite { 1.0 } else { 0.0 };
}

const LANES: usize = 32;

multiversion! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut sums = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                sums[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}
