use crate::device::cpu::Pool;
use crate::ops::CHUNK;
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// y = x, rounded.
pub(in crate::ops) fn cast(pool: &Pool, x: &[f32], y: &mut [bf16]) {
    pool.for_chunks(y, CHUNK, |i, y, _| y.convert_from_f32_slice(&x[i * CHUNK..][..y.len()]));
}
