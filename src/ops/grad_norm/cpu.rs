use crate::device::cpu::Launch;
use crate::multiversion;

/// Most partial sums. Each is an f64 whose halves stand in two floats of the workspace.
pub(super) const CHUNKS: usize = 1024;
/// Fewest gradients of a partial sum.
const SHORTEST: usize = 1 << 12;

pub(super) fn grad_norm(launch: &Launch<'_>) {
    let gradients = launch.input::<f32>(0);
    let chunk = gradients.len().div_ceil(CHUNKS).next_multiple_of(LANES).max(SHORTEST);
    let partials = &mut launch.scratch()[..2 * gradients.len().div_ceil(chunk)];
    launch.pool().for_chunks(partials, 2, |i, partial, _| {
        let start = i * chunk;
        let end = gradients.len().min(start + chunk);
        partial.copy_from_slice(&halves(sum_of_squares(&gradients[start..end])));
    });
    let sum: f64 = partials.as_chunks::<2>().0.iter().map(|p| whole(*p)).sum();
    // Of finite numbers the sum is finite, for it is far from f64's limit; of others it never is.
    let finite = sum.is_finite();
    let norm = sum.sqrt() as f32;
    let output = launch.output::<f32>(0);
    output[0] = if finite { norm.min(f32::MAX) } else { norm };
    output[1] = if finite { 1.0 } else { 0.0 };
}

fn halves(x: f64) -> [f32; 2] {
    let bits = x.to_bits();
    [f32::from_bits((bits >> 32) as u32), f32::from_bits(bits as u32)]
}

fn whole(halves: [f32; 2]) -> f64 {
    f64::from_bits(u64::from(halves[0].to_bits()) << 32 | u64::from(halves[1].to_bits()))
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
