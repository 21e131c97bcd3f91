use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;

/// e^x to about 1 ulp on [−87, 88], clamped outside; plain arithmetic, so that loops over it become vector code.
///
/// e^x = 2^n·e^r with n = round(x/ln 2) and |r| ≤ ln 2/2, where a polynomial of degree 6 (Taylor coefficients adjusted by minimax on
/// that interval) is accurate to f32.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512: exact products with n
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // n stands in the low bits of `shifted`; moved to the exponent it is 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    e * scale
}

/// σ(x) = 1/(1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

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
