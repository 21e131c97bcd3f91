use super::TrainingBatch;
use crate::device::cpu::Launch;
use crate::multiversion;

pub(super) fn q_sample(batch: &TrainingBatch, launch: &Launch<'_>) {
    let (pixels, table, clock) = (launch.input::<u8>(0), launch.input::<f32>(1), launch.input::<u32>(2));
    let numbers = batch.held.map(|_| launch.input::<u32>(3));
    let elements = batch.elements();
    let (x_t, t) = (launch.output::<f32>(0), launch.output::<u32>(1));
    launch.pool().for_chunks2((x_t, elements), (t, 1), |j, x_t, t, scratch| {
        let sample = batch.sample(clock, j);
        t[0] = sample.timestep();
        let row = 2 * t[0] as usize;
        let (sqrt_alpha_bar, sqrt_one_minus) = (table[row], table[row + 1]);
        sample.visit(&pixels[batch.place(j, numbers)], scratch, |range, x_0, epsilon| {
            blend(&mut x_t[range], x_0, epsilon, sqrt_alpha_bar, sqrt_one_minus);
        });
    });
}

multiversion! {
    /// y = a·x + b·z.
    pub(super) fn blend(y: &mut [f32], x: &[f32], z: &[f32], a: f32, b: f32) {
        for ((y, x), z) in y.iter_mut().zip(x).zip(z) {
            *y = a * x + b * z;
        }
    }
}
