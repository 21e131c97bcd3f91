use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;

pub(super) fn copy(launch: &Launch<'_>) {
    let x = launch.input::<f32>(0);
    let y = launch.output::<f32>(0);
    let adds = launch.updates(0);
    launch.pool().for_chunks(y, CHUNK, |i, y, _| {
        let x = &x[i * CHUNK..][..y.len()];
        if adds { accumulate(y, x) } else { y.copy_from_slice(x) }
    });
}

multiversion! {
    fn accumulate(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}
