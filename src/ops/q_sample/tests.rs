use super::cpu::blend;
use super::{TrainingBatch, q_sample};
use crate::diffusion::{DiffusionConfig, Schedule};
use crate::ops::testing::{Planned, Reference, assert_close, pixels};
use crate::rng::{Kind, Stream};
use crate::tape::{Spec, Tape};

fn batch(images: usize, height: usize, width: usize, channels: usize) -> TrainingBatch {
    TrainingBatch {
        images,
        height,
        width,
        channels,
        timesteps: 1000,
        flip: true,
        seed: 0xDEAD_BEEF_0123_4567,
        held: None,
    }
}

fn schedule() -> Schedule {
    Schedule::new(&DiffusionConfig::default()).unwrap()
}

/// √ᾱ and √(1−ᾱ) of the paper's T = 1000 steps.
fn table() -> Vec<f32> {
    schedule().q_sample_table().as_flattened().to_vec()
}

/// x_t and t.
fn run(batch: &TrainingBatch, threads: usize, pixels: &[u8], table: &[f32], clock: [u32; 2]) -> (Vec<f32>, Vec<u32>) {
    let mut tape = Tape::new();
    let pixels_in = tape.io("pixels", Spec::u8(batch.shape()));
    let table_in = tape.io("table", Spec::f32([batch.timesteps, 2]));
    let clock_in = tape.io("clock", Spec::u32([4]));
    let (x_t, t) = (tape.io("x_t", Spec::f32(batch.shape())), tape.io("t", Spec::u32([batch.images])));
    let op = super::QSample { padded: batch.channels, batch: batch.clone() };
    tape.push_into(std::sync::Arc::new(op), &[pixels_in, table_in, clock_in], &[x_t, t], 0);
    let mut planned = Planned::new(&tape, threads);
    planned.set("pixels", pixels);
    planned.set("table", table);
    planned.set("clock", &[clock[0], clock[1], u32::MAX, u32::MAX]);
    planned.run();
    (planned.get("x_t"), planned.get("t"))
}

/// x_0 with the flip, ε and t of image `index`, each by its definition.
pub fn draws(batch: &TrainingBatch, pixels: &[u8], step: u32, index: u32) -> (Vec<f64>, Vec<f32>, u32) {
    let stream = |kind| Stream { seed: batch.seed, kind, layer: 0, sample: index, step };
    let mirrored = batch.flip && stream(Kind::Flip).bits(0) >= 1 << 31;
    let (width, channels) = (batch.width, batch.channels);
    let x_0 = (0..batch.elements()).map(|e| {
        let (row, column, channel) = (e / (width * channels), e / channels % width, e % channels);
        let column = if mirrored { width - 1 - column } else { column };
        f64::from(pixels[(row * width + column) * channels + channel]) / 127.5 - 1.0
    });
    let mut epsilon = vec![0.0; batch.elements()];
    stream(Kind::Noise).fill_normal(0, &mut epsilon);
    (x_0.collect(), epsilon, stream(Kind::Timestep).below(0, batch.timesteps as u32))
}

#[test]
fn matches_equation_4_with_the_draws_of_each_image() {
    // Odd sizes; grey, colour and other; rows longer than a block; images of several blocks, the last one short.
    for (n, h, w, c) in [(7, 5, 7, 3), (4, 1, 1, 1), (5, 28, 28, 1), (6, 3, 5, 4), (4, 3, 701, 3), (3, 61, 33, 3)] {
        let batch = batch(n, h, w, c);
        let (image, schedule) = (batch.elements(), schedule());
        let pixels = pixels(9, n * image);
        let (x_t, t) = run(&batch, 2, &pixels, &table(), [17, 1000]);
        for j in 0..n {
            let (x_0, epsilon, expected_t) = draws(&batch, &pixels[j * image..][..image], 17, 1000 + j as u32);
            assert_eq!(t[j], expected_t);
            let t = t[j] as usize;
            let exact = x_0.iter().zip(&epsilon).map(|(x_0, epsilon)| schedule.q_sample(*x_0, t, f64::from(*epsilon)));
            // Half an ulp each: x_0 and its coefficient, ε's, the two products, the sum.
            assert_close(&format!("{h}×{w}×{c} image {j}"), &x_t[j * image..][..image], exact, 3.0);
        }
    }
}

#[test]
fn matches_pytorch() {
    let file = Reference::open("q_sample.safetensors");
    let (x_0, noise, t) = (file.f32("x0"), file.f32("noise"), file.f64("t"));
    for schedule in ["linear", "cosine"] {
        let alpha_bar = file.f64(&format!("ddpm_pytorch/{schedule}_T1000/alphas_cumprod"));
        let expected = file.f64(&format!("ddpm_pytorch/{schedule}/q_sample"));
        let image = x_0.len() / t.len();
        for (j, t) in t.iter().enumerate() {
            let alpha_bar = alpha_bar[*t as usize];
            let range = j * image..(j + 1) * image;
            let mut x_t = vec![f32::NAN; image];
            let (a, b) = (alpha_bar.sqrt() as f32, (1.0 - alpha_bar).sqrt() as f32);
            blend(&mut x_t, &x_0[range.clone()], &noise[range.clone()], a, b);
            // The file holds f32: one rounding more.
            assert_close(&format!("{schedule} t={t}"), &x_t, expected[range].iter().copied(), 3.0);
        }
    }
}

#[test]
fn pixels_become_minus_one_to_one_correctly_rounded() {
    let batch = TrainingBatch { flip: false, timesteps: 1, ..batch(1, 1, 256, 1) };
    let all: Vec<u8> = (0..=255).collect();
    let (x_0, _) = run(&batch, 1, &all, &[1.0, 0.0], [0, 0]);
    for (pixel, x) in all.iter().zip(&x_0) {
        assert_eq!(*x, (f64::from(*pixel) / 127.5 - 1.0) as f32, "pixel {pixel}");
    }
    assert_eq!((x_0[0], x_0[255]), (-1.0, 1.0));
}

#[test]
fn timesteps_are_uniform_and_half_of_the_images_flipped() {
    const N: usize = 20_000;
    const T: usize = 10;
    // Images of two pixels, black then white: without noise the first value tells which way round they are.
    let batch = TrainingBatch { timesteps: T, ..batch(N, 1, 2, 1) };
    let images: Vec<u8> = [0, 255].repeat(N);
    let (x_t, t) = run(&batch, 2, &images, &[1.0, 0.0].repeat(T), [3, 0]);
    let flipped = x_t.chunks(2).filter(|x| **x == [1.0, -1.0]).count();
    let straight = x_t.chunks(2).filter(|x| **x == [-1.0, 1.0]).count();
    assert_eq!(flipped + straight, N);
    // Five standard deviations of a binomial.
    assert!((flipped as f64 - N as f64 / 2.0).abs() < 5.0 * (N as f64 / 4.0).sqrt(), "{flipped} of {N} flipped");
    let mut counts = [0.0; T];
    t.iter().for_each(|&t| counts[t as usize] += 1.0);
    let expected = N as f64 / T as f64;
    let chi_squared: f64 = counts.iter().map(|count| (count - expected) * (count - expected) / expected).sum();
    assert!(chi_squared < 33.7, "χ² of 9 degrees of freedom passes 33.7 once in 10,000: {chi_squared} {counts:?}");

    let (x_t, _) = run(&TrainingBatch { flip: false, ..batch }, 2, &images, &[1.0, 0.0].repeat(T), [3, 0]);
    assert!(x_t.chunks(2).all(|x| *x == [-1.0, 1.0]), "flipped without `flip`");
}

#[test]
fn an_image_depends_on_its_place_in_the_global_batch_and_the_step_alone() {
    let (whole, part) = (batch(6, 5, 7, 3), batch(2, 5, 7, 3));
    let image = whole.elements();
    let (pixels, table) = (pixels(1, 6 * image), table());
    let (x_t, t) = run(&whole, 1, &pixels, &table, [5, 100]);
    for shard in 0..3 {
        let range = shard * 2 * image..(shard + 1) * 2 * image;
        let clock = [5, 100 + 2 * shard as u32];
        let (part_x_t, part_t) = run(&part, 1, &pixels[range.clone()], &table, clock);
        assert_eq!(part_x_t, x_t[range]);
        assert_eq!(part_t, t[2 * shard..][..2]);
    }
    for threads in [2, 3] {
        assert_eq!(run(&whole, threads, &pixels, &table, [5, 100]), (x_t.clone(), t.clone()), "{threads} threads");
    }
    let other_seed = TrainingBatch { seed: whole.seed ^ 1 << 40, ..whole.clone() };
    for (what, other) in
        [("step", run(&whole, 1, &pixels, &table, [6, 100])), ("seed", run(&other_seed, 1, &pixels, &table, [5, 100]))]
    {
        assert!(
            x_t.iter().zip(&other.0).filter(|(a, b)| a == b).count() < x_t.len() / 100,
            "another {what}, same noise"
        );
    }
}

#[test]
fn the_builder_gives_temporaries_of_the_right_shape() {
    let batch = batch(2, 3, 4, 3);
    let mut tape = Tape::new();
    let pixels = tape.io("pixels", Spec::u8(batch.shape()));
    let table = tape.io("table", Spec::f32([1000, 2]));
    let clock = tape.io("clock", Spec::u32([4]));
    let (x_t, t) = q_sample(&mut tape, &batch, pixels.into(), table, clock);
    assert_eq!((tape.shape(x_t).dims().to_vec(), tape.shape(t).dims().to_vec()), (vec![2, 3, 4, 3], vec![2]));
}
