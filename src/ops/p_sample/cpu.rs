use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::CHUNK;
use crate::rng::{Kind, Stream};
use crate::tape::Shape;

/// Elements whose noise is drawn, then used, at a time.
pub(super) const BLOCK: usize = 2048;

pub(super) fn p_sample(shape: &Shape, launch: &Launch<'_>) {
    let (out, table) = (launch.input::<f32>(0), launch.input::<f32>(1));
    let (timesteps, clock) = (launch.input::<u32>(2), launch.input::<u32>(3));
    let step = timesteps[clock[0] as usize];
    let row = &table[9 * clock[0] as usize..][..9];
    let seed = u64::from(clock[3]) << 32 | u64::from(clock[2]);
    let sigma = row[7];
    let elements = shape.dims()[1..].iter().product::<usize>();
    let x = launch.output::<f32>(0);
    launch.pool().for_chunks(x, elements, |image, x, scratch| {
        let sample = clock[1].wrapping_add(image as u32);
        let noise = Stream { seed, kind: Kind::SampleNoise, layer: 0, sample, step };
        let out = &out[image * elements..][..elements];
        for (block, (x, out)) in x.chunks_mut(BLOCK).zip(out.chunks(BLOCK)).enumerate() {
            mean(x, out, row);
            if sigma != 0.0 {
                let z = &mut scratch[..x.len()];
                noise.fill_normal((block * BLOCK) as u64, z);
                add_scaled(x, z, sigma);
            }
        }
    });
    launch.pool().for_chunks(launch.output::<f32>(1), CHUNK, |i, input, _| {
        input.copy_from_slice(&x[i * CHUNK..][..input.len()]);
    });
}

pub(super) fn next_step(launch: &Launch<'_>) {
    let (timesteps, clock) = (launch.input::<u32>(0), launch.output::<u32>(0));
    clock[0] += 1;
    launch.output::<u32>(1).fill(timesteps[(clock[0] as usize).min(timesteps.len() - 1)]);
}

multiversion! {
    fn mean(x: &mut [f32], out: &[f32], row: &[f32]) {
        let [x0_from_xt, x0_from_out, eps_from_xt, eps_from_out] = [row[0], row[1], row[2], row[3]];
        let [c_x0, c_xt, c_eps] = [row[4], row[5], row[6]];
        let limit = if row[8] > 0.0 { row[8] } else { f32::INFINITY };
        for (x, &out) in x.iter_mut().zip(out) {
            let x_t = *x;
            // `clamp` keeps NaN, so a diverged network is not hidden.
            let x_0 = (x0_from_xt * x_t + x0_from_out * out).clamp(-limit, limit);
            let epsilon = eps_from_xt * x_t + eps_from_out * out;
            *x = c_x0 * x_0 + c_xt * x_t + c_eps * epsilon;
        }
    }
}

multiversion! {
    fn add_scaled(x: &mut [f32], z: &[f32], sigma: f32) {
        for (x, z) in x.iter_mut().zip(z) {
            *x += sigma * z;
        }
    }
}
