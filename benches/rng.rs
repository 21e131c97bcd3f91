//! Random numbers per second on one thread: `cargo bench --bench rng`.

use ddpm_dist::rng::{Kind, Stream};
use std::hint::black_box;
use std::time::Instant;

fn main() {
    let stream = |step| Stream { seed: 1, kind: Kind::Noise, layer: 0, sample: 0, step };
    let mut x = vec![0f32; 3072 * 4];
    let mut time = |name: &str, draw: &dyn Fn(&mut [f32], u32)| {
        let once = || {
            let start = Instant::now();
            (0..200).for_each(|step| draw(black_box(&mut x), step));
            200.0 * x.len() as f64 / start.elapsed().as_secs_f64()
        };
        let best = std::iter::repeat_with(once).take(20).fold(0.0, f64::max);
        println!("{name}: {:.2} G/s", best / 1e9);
    };
    time("normals", &|x, step| stream(step).fill_normal(0, x));
    time("normals, unaligned", &|x, step| stream(step).fill_normal(1, x));
    time("normals, images of 784", &|x, step| {
        x.chunks_exact_mut(784).for_each(|x| stream(step).fill_normal(0, x));
    });
    time("keep masks", &|x, step| stream(step).fill_keep(0, 0.9, x));
}
