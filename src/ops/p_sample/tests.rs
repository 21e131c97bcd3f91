use super::{State, StepInputs, p_sample, row};
use crate::diffusion::{
    DiffusionConfig, Objective, SamplerConfig, SamplerKind, SamplerTable, Schedule, Variance, p_sample_step,
};
use crate::ops::testing::{Planned, random};
use crate::rng::{Kind, Stream};
use crate::tape::{Shape, Spec, Tape};

const SEED: u64 = 0x0123_4567_89AB_CDEF;
const EPS: f64 = f32::EPSILON as f64;

fn run(shape: &Shape, threads: usize, x: &[f32], out: &[f32], row: [f32; 9], clock: [u32; 2], seed: u64) -> Vec<f32> {
    let mut tape = Tape::new();
    let state = State {
        x: tape.io("x", Spec::f32(shape.clone())),
        input: tape.io("input", Spec::computed(shape.clone())),
        t: tape.io("t", Spec::u32([shape.dims()[0]])),
        clock: tape.io("clock", Spec::u32([4])),
    };
    let inputs = StepInputs {
        out: tape.io("out", Spec::f32(shape.clone())),
        table: tape.io("table", Spec::f32([3, 9])),
        timesteps: tape.io("timesteps", Spec::u32([3])),
    };
    p_sample(&mut tape, state, inputs);
    let mut planned = Planned::new(&tape, threads);
    planned.set("x", x);
    planned.set("out", out);
    planned.set("table", [[f32::NAN; 9], row, [f32::NAN; 9]].as_flattened());
    planned.set("timesteps", &[9, clock[0], 41]);
    planned.set("clock", &[1, clock[1], seed as u32, (seed >> 32) as u32]);
    planned.run();
    let next = planned.get::<f32>("x");
    assert_eq!(planned.get::<f32>("input").len(), next.len());
    assert!(planned.get::<f32>("input").iter().zip(&next).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert_eq!(planned.get::<u32>("clock")[..2], [2, clock[1]]);
    assert!(planned.get::<u32>("t").iter().all(|&t| t == 41));
    next
}

/// The step in f64 and the sum of its terms' sizes, which bounds the rounding errors.
fn exact(x: f32, out: f32, z: f32, row: [f32; 9]) -> (f64, f64) {
    let [x, out, z] = [x, out, z].map(f64::from);
    let [a, b, c, d, c_x0, c_xt, c_eps, sigma, clip] = row.map(f64::from);
    let limit = if clip == 0.0 { f64::INFINITY } else { clip };
    let x_0 = (a * x + b * out).clamp(-limit, limit);
    let value = c_x0 * x_0 + c_xt * x + c_eps * (c * x + d * out) + sigma * z;
    let size = c_x0.abs() * ((a * x).abs() + (b * out).abs())
        + (c_xt * x).abs()
        + c_eps.abs() * ((c * x).abs() + (d * out).abs())
        + (sigma * z).abs();
    (value, size)
}

fn noise(seed: u64, step: u32, image: u32, len: usize) -> Vec<f32> {
    let mut z = vec![0.0; len];
    Stream { seed, kind: Kind::SampleNoise, layer: 0, sample: image, step }.fill_normal(0, &mut z);
    z
}

#[test]
fn matches_f64_with_and_without_clipping_and_noise() {
    for shape in
        [Shape::from([3, 5, 7, 3]), Shape::from([2, 33, 65, 3]), Shape::from([4, 1, 1, 1]), Shape::from([1, 64, 64, 1])]
    {
        let elements = shape.dims()[1..].iter().product::<usize>();
        let (x, out) = (random(1, shape.len()), random(2, shape.len()));
        for (sigma, clip) in [(0.0, 0.0), (0.0, 1.0), (0.3, 0.0), (0.3, 0.7)] {
            let row = [1.3, -0.8, 0.4, 0.9, 0.35, 0.6, -0.2, sigma, clip];
            let y = run(&shape, 2, &x, &out, row, [250, 11], SEED);
            for i in 0..shape.len() {
                let z = noise(SEED, 250, 11 + (i / elements) as u32, elements)[i % elements];
                let (exact, size) = exact(x[i], out[i], z, row);
                // At most seven roundings on the way of any term.
                let error = (f64::from(y[i]) - exact).abs();
                assert!(error <= 3.5 * EPS * size, "{shape} σ={sigma} clip={clip} [{i}]: {} instead of {exact}", y[i]);
            }
        }
    }
}

#[test]
fn without_noise_the_noise_stream_is_not_read() {
    // The workspace holds NaN or the noise of another step; σ = 0 must be σ = 0 and not 0·z.
    let shape = Shape::from([2, 3, 3, 2]);
    let (x, out) = (random(1, 36), random(2, 36));
    let row = [1.3, -0.8, 0.4, 0.9, 0.35, 0.6, -0.2, 0.0, 1.0];
    let first = run(&shape, 1, &x, &out, row, [0, 0], 1);
    assert!(first.iter().all(|y| y.is_finite()));
    assert_eq!(first, run(&shape, 1, &x, &out, row, [7, 7], 2));
}

/// Eq. 11 follows from eq. 7 and eq. 15: without clipping both rows give the same mean.
#[test]
fn mean_by_x_0_is_the_mean_by_epsilon() {
    let shape = Shape::from([2, 3, 5, 3]);
    let (x, out) = (random(1, 90), random(2, 90));
    let (beta, before) = (0.01f64, 0.4f64);
    let alpha_bar = before * (1.0 - beta);
    let (c_x0, c_xt) =
        (before.sqrt() * beta / (1.0 - alpha_bar), (1.0 - beta).sqrt() * (1.0 - before) / (1.0 - alpha_bar));
    let (from_xt, from_out) = (1.0 / alpha_bar.sqrt(), -(1.0 / alpha_bar - 1.0).sqrt());
    let row = [from_xt, from_out, 0.0, 1.0, c_x0, c_xt, 0.0, 0.0, 0.0].map(|c| c as f32);
    let y = run(&shape, 1, &x, &out, row, [0, 0], 0);
    for i in 0..90 {
        let [x, out] = [x[i], out[i]].map(f64::from);
        let mean = (x - beta / (1.0 - alpha_bar).sqrt() * out) / (1.0 - beta).sqrt();
        let size = c_x0 * (from_xt * x.abs() - from_out * out.abs()) + c_xt * x.abs();
        assert!((f64::from(y[i]) - mean).abs() <= 3.5 * EPS * size, "[{i}] {} instead of {mean}", y[i]);
    }
}

#[test]
fn runs_every_step_of_every_sampler() {
    let shape = Shape::from([2, 3, 5, 3]);
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        for (sampler, eta, clip) in
            [(SamplerKind::Ddpm, 0.0, 1.0), (SamplerKind::Ddim, 0.0, 0.0), (SamplerKind::Ddim, 0.5, 1.0)]
        {
            let schedule = Schedule::new(&DiffusionConfig { objective, clip, ..Default::default() }).unwrap();
            let config = SamplerConfig { sampler, steps: 10, eta, ..Default::default() };
            let table = SamplerTable::new(&schedule, &config).unwrap();
            let mut x = random(1, 90);
            for step in &table.steps {
                let t = step.timestep;
                let out = random(u64::from(10 + t), 90);
                let next = run(&shape, 2, &x, &out, row(step, table.clip), [t, 0], SEED);
                let z = [0, 1].map(|image| noise(SEED, t, image, 45)).concat();
                let [x64, out64, z64] = [&x, &out, &z].map(|v| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
                let expected = p_sample_step(step, table.clip, &x64, &out64, &z64);
                for i in 0..90 {
                    let (_, size) = exact(x[i], out[i], z[i], row(step, table.clip));
                    // As in the test against f64, and two roundings of coefficients.
                    let error = (f64::from(next[i]) - expected[i]).abs();
                    assert!(
                        error <= 4.5 * EPS * size,
                        "{objective:?} {sampler:?} t = {t} [{i}]: {} {error:e}",
                        next[i]
                    );
                }
                x = next;
            }
        }
    }
}

/// Over all T steps, a step of Algorithm 2 is p_θ(x_{t−1} | x_t) as the formulas of `diffusion` have it: mean + σ_t z, without z at t = 0.
#[test]
fn a_step_of_algorithm_2_is_p() {
    let shape = Shape::from([2, 3, 5, 3]);
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        for variance in [Variance::FixedLarge, Variance::FixedSmall] {
            let schedule = Schedule::new(&DiffusionConfig { objective, variance, ..Default::default() }).unwrap();
            let table = SamplerTable::new(&schedule, &SamplerConfig::default()).unwrap();
            for t in [0, 1, 250, 999] {
                let row = row(&table.steps[999 - t], table.clip);
                let (x, out) = (random(t as u64, 90), random(7, 90));
                let found = run(&shape, 2, &x, &out, row, [t as u32, 3], SEED);
                let z = [3, 4].map(|image| noise(SEED, t as u32, image, 45)).concat();
                for i in 0..90 {
                    let (mean, variance) = schedule.p_mean_variance(x[i].into(), t, out[i].into());
                    let sigma = if t > 0 { variance.sqrt() } else { 0.0 };
                    let (_, size) = exact(x[i], out[i], z[i], row);
                    // As below: seven roundings, and two of coefficients. The tables differ by ε_64/(1 − ᾱ_0).
                    let error = (f64::from(found[i]) - (mean + sigma * f64::from(z[i]))).abs();
                    assert!(error <= 4.5 * EPS * size + 4e-12, "{objective:?} t = {t} [{i}]: {} {error:e}", found[i]);
                }
            }
        }
    }
}

#[test]
fn noise_belongs_to_seed_image_and_step() {
    let (whole, part) = (Shape::from([6, 5, 7, 3]), Shape::from([2, 5, 7, 3]));
    let (x, out) = (random(1, whole.len()), random(2, whole.len()));
    let row = [1.3, -0.8, 0.0, 1.0, 0.35, 0.6, 0.0, 0.5, 1.0];
    let all = run(&whole, 1, &x, &out, row, [40, 8], SEED);
    let range = 2 * 105..4 * 105;
    assert_eq!(run(&part, 1, &x[range.clone()], &out[range.clone()], row, [40, 10], SEED), all[range]);
    for threads in [2, 3] {
        assert_eq!(run(&whole, threads, &x, &out, row, [40, 8], SEED), all, "{threads} threads");
    }
    for (clock, seed) in [([41, 8], SEED), ([40, 14], SEED), ([40, 8], SEED + 1), ([40, 8], SEED + (1 << 32))] {
        let other = run(&whole, 1, &x, &out, row, clock, seed);
        assert!(other.iter().zip(&all).filter(|(a, b)| a == b).count() < 8, "{clock:?} {seed:#x}: the same noise");
    }
}

#[test]
fn clipping_does_not_hide_nan() {
    let row = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let y = run(&Shape::from([1, 1, 2, 2]), 1, &[f32::NAN, 5.0, -5.0, 0.5], &[0.0; 4], row, [0, 0], 0);
    assert!(y[0].is_nan());
    assert_eq!(y[1..], [1.0, -1.0, 0.5]);
}
