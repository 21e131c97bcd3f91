//! Reverse steps, DDPM and DDIM, as a captured loop runs them.

use crate::cpu::on_cpu;
use crate::elementwise::BOTH;
use crate::machine::{Buffer, run_launch};
use crate::values::{activations, bytes_of, bytes_of_f32, bytes_of_u32, f32_of, normals, padded, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, SamplerTable, Schedule};
use ddpm_dist::ops::p_sample::{NextStep, PSample, cuda, row};

/// A loop of ten steps: a row of the table and the timestep of each.
struct Loop {
    rows: Vec<[f32; 9]>,
    timesteps: Vec<u32>,
}

impl Loop {
    fn new(sampler: SamplerKind, eta: f64, is_clipped: bool) -> Loop {
        let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
        let choice = SamplerConfig { sampler, eta, steps: 10, ..SamplerConfig::default() };
        let table = SamplerTable::new(&schedule, &choice).unwrap();
        let clip = if is_clipped { table.clip } else { f64::INFINITY };
        let rows = table.steps.iter().map(|step| row(step, clip)).collect();
        Loop { rows, timesteps: table.steps.iter().map(|step| step.timestep).collect() }
    }

    /// One step of images of that shape on the CPU and by the kernel, whose activations have `with` channels; `out` as both have it. Gives the
    /// CPU's x.
    fn check(
        &self,
        step: usize,
        shape: [usize; 4],
        with: usize,
        precision: Precision,
        [on_device, on_host]: [Vec<u8>; 2],
    ) -> Vec<f32> {
        let [images, height, width, channels] = shape;
        let pixels = images * height * width;
        let op = PSample { shape: shape.into(), steps: self.rows.len(), padded: channels };
        let x = bytes_of_f32(&normals(77, pixels * channels));
        let clock = bytes_of_u32(&[step as u32, 1000, 0x9ABC_DEF0, 0x1234_5678]);
        let [table, times] = [bytes_of_f32(self.rows.as_flattened()), bytes_of_u32(&self.timesteps)];
        let inputs = [on_host, table.clone(), times.clone(), clock.clone()];
        let expected = on_cpu(op.clone(), &inputs, std::slice::from_ref(&x)).remove(0);

        let inputs = [padded(&on_device, channels, with, precision), table, times, clock];
        let outputs = [Buffer::Updated(x), Buffer::Output(pixels * with * precision.bytes())];
        let launch = cuda::launch(&PSample { padded: with, ..op }, precision);
        let found = run_launch(&launch, &inputs.map(Buffer::Input), &outputs);
        let is_same = |found: f32, expected: f32| {
            // What is no number has bits of its own on each side.
            found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
        };
        let expected = f32_of(&expected, Precision::F32);
        for (i, (found, expected)) in f32_of(&found[0], Precision::F32).into_iter().zip(&expected).enumerate() {
            assert!(is_same(found, *expected), "step {step}, element {i}: {found}, expected {expected}");
        }
        for (i, found) in f32_of(&found[1], precision).into_iter().enumerate() {
            let expected = match i % with {
                c if c < channels => rounded(expected[i / with * channels + c], precision),
                _ => 0.0,
            };
            assert!(is_same(found, expected), "the next input, element {i}: {found}, expected {expected}");
        }
        expected
    }
}

#[test]
fn reverse_steps_are_those_of_the_cpu() {
    for (sampler, eta, is_clipped) in [
        (SamplerKind::Ddpm, 0.0, true),
        (SamplerKind::Ddpm, 0.0, false),
        (SamplerKind::Ddim, 0.0, true),
        (SamplerKind::Ddim, 0.7, true),
    ] {
        let steps = Loop::new(sampler, eta, is_clipped);
        for (shape, with) in [([2, 8, 8, 3], 8), ([3, 7, 5, 1], 8), ([1, 33, 40, 2], 2)] {
            for precision in BOTH {
                for step in [0, 5, steps.rows.len() - 1] {
                    let out = activations(step as u64, shape.iter().product(), precision);
                    steps.check(step, shape, with, precision, out);
                }
            }
        }
    }
}

#[test]
fn each_image_gets_the_next_timestep() {
    let timesteps: Vec<u32> = (0..50).map(|i| 999 - 20 * i).collect();
    let op = NextStep { images: 300, steps: timesteps.len() };
    let inputs = [Buffer::Input(bytes_of_u32(&timesteps))];
    for (before, t) in [(0, timesteps[1]), (41, timesteps[42]), (49, timesteps[49])] {
        let outputs = [Buffer::Updated(bytes_of_u32(&[before, 7, 8, 9])), Buffer::Output(4 * op.images)];
        let found = run_launch(&cuda::advance(&op), &inputs, &outputs);
        assert_eq!(found, [bytes_of_u32(&[before + 1, 7, 8, 9]), bytes_of_u32(&[t; 300])]);
    }
}

#[test]
fn a_network_that_has_diverged_is_not_hidden() {
    for (sampler, is_clipped) in [(SamplerKind::Ddpm, true), (SamplerKind::Ddpm, false), (SamplerKind::Ddim, true)] {
        let steps = Loop::new(sampler, 0.0, is_clipped);
        for precision in BOTH {
            let mut out: Vec<f32> = normals(3, 4 * 4 * 3).into_iter().map(|x| rounded(x, precision)).collect();
            out[5] = f32::NAN;
            out[16] = f32::INFINITY;
            out[47] = f32::NEG_INFINITY;
            let both = [bytes_of(&out, precision), bytes_of_f32(&out)];
            let x = steps.check(5, [1, 4, 4, 3], 8, precision, both);
            // Clipping x_0 does not bring back an infinity: it is in the noise, too.
            let lost: Vec<usize> = (0..48).filter(|&i| !x[i].is_finite()).collect();
            assert_eq!(lost, [5, 16, 47], "{sampler:?}: {x:?}");
        }
    }
}
