use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;

pub(super) fn add(launch: &Launch<'_>) {
    let (a, b) = (launch.input::<f32>(0), launch.input::<f32>(1));
    launch.pool().for_chunks(launch.output::<f32>(0), CHUNK, |i, y, _| {
        sum(y, &a[i * CHUNK..][..y.len()], &b[i * CHUNK..][..y.len()]);
    });
}

multiversion! {
    fn sum(y: &mut [f32], a: &[f32], b: &[f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }
}
