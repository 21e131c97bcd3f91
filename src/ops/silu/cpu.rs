use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;
use crate::simd::sigmoid;

pub(super) fn silu(launch: &Launch<'_>) {
    let x = launch.input::<f32>(0);
    launch.pool().for_chunks(launch.output::<f32>(0), CHUNK, |i, y, _| {
        forward(y, &x[i * CHUNK..][..y.len()]);
    });
}

pub(super) fn silu_gradient(launch: &Launch<'_>) {
    let (x, dy) = (launch.input::<f32>(0), launch.input::<f32>(1));
    let adds = launch.updates(0);
    launch.pool().for_chunks(launch.output::<f32>(0), CHUNK, |i, dx, _| {
        backward(dx, &x[i * CHUNK..][..dx.len()], &dy[i * CHUNK..][..dx.len()], adds);
    });
}

multiversion! {
    fn forward(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid(x);
        }
    }
}

multiversion! {
    fn backward(dx: &mut [f32], x: &[f32], dy: &[f32], adds: bool) {
        for ((dx, &x), dy) in dx.iter_mut().zip(x).zip(dy) {
            let s = sigmoid(x);
            let gradient = dy * (s * (1.0 + x * (1.0 - s)));
            *dx = if adds { *dx + gradient } else { gradient };
        }
    }
}
