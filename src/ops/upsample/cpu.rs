use crate::device::cpu::Launch;
use crate::multiversion;
use crate::tape::Shape;

pub(super) fn upsample(shape: &Shape, launch: &Launch<'_>) {
    let [_, _, w, c] = shape.nhwc();
    let x = launch.input::<f32>(0);
    let row = w * c;
    launch.pool().for_chunks(launch.output::<f32>(0), 4 * row, |i, y, _| {
        let x = &x[i * row..][..row];
        let (upper, lower) = y.split_at_mut(2 * row);
        for (y, x) in upper.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
            y[..c].copy_from_slice(x);
            y[c..].copy_from_slice(x);
        }
        lower.copy_from_slice(upper);
    });
}

pub(super) fn upsample_gradient(shape: &Shape, launch: &Launch<'_>) {
    let [_, _, w, c] = shape.nhwc();
    let dy = launch.input::<f32>(0);
    let row = w * c;
    let adds = launch.updates(0);
    launch.pool().for_chunks(launch.output::<f32>(0), row, |i, dx, _| {
        let (upper, lower) = dy[4 * i * row..][..4 * row].split_at(2 * row);
        gather(dx, upper, lower, c, adds);
    });
}

multiversion! {
    /// One row of dx from two rows of dy.
    fn gather(dx: &mut [f32], upper: &[f32], lower: &[f32], channels: usize, adds: bool) {
        let pixels = dx.chunks_exact_mut(channels).zip(upper.chunks_exact(2 * channels)).zip(lower.chunks_exact(2 * channels));
        for ((dx, upper), lower) in pixels {
            let (a, b) = upper.split_at(channels);
            let (c, d) = lower.split_at(channels);
            for ((((dx, a), b), c), d) in dx.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                let sum = (a + b) + (c + d);
                *dx = if adds { *dx + sum } else { sum };
            }
        }
    }
}
