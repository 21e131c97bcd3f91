use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;

pub(super) fn accumulate(launch: &Launch<'_>) {
    let sum = launch.output::<f32>(0);
    for number in 0..launch.inputs() {
        let left = launch.input::<f32>(number);
        launch.pool().for_chunks(sum, CHUNK, |i, sum, _| add(sum, &left[i * CHUNK..][..sum.len()]));
    }
}

multiversion! {
    fn add(sum: &mut [f32], left: &[f32]) {
        for (sum, left) in sum.iter_mut().zip(left) {
            *sum += left;
        }
    }
}
