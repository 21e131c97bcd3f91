//! Reverse steps, DDPM and DDIM, as a captured loop runs them.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch};
use crate::values::{activations, bytes_of_f32, bytes_of_u32, f32_of, normals, padded, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, SamplerTable, Schedule};
use ddpm_dist::ops::p_sample::{NextStep, PSample, cuda, row};

#[test]
fn reverse_steps_are_those_of_the_cpu() {
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    let (seed, first) = (0x1234_5678_9ABC_DEF0u64, 1000);
    for (sampler, eta, is_clipped) in [
        (SamplerKind::Ddpm, 0.0, true),
        (SamplerKind::Ddpm, 0.0, false),
        (SamplerKind::Ddim, 0.0, true),
        (SamplerKind::Ddim, 0.7, true),
    ] {
        let choice = SamplerConfig { sampler, eta, steps: 10, ..SamplerConfig::default() };
        let table = SamplerTable::new(&schedule, &choice).unwrap();
        let clip = if is_clipped { table.clip } else { f64::INFINITY };
        let rows: Vec<[f32; 9]> = table.steps.iter().map(|step| row(step, clip)).collect();
        let timesteps: Vec<u32> = table.steps.iter().map(|step| step.timestep).collect();
        for ([images, height, width, channels], with) in [([2, 8, 8, 3], 8), ([3, 7, 5, 1], 8), ([1, 33, 40, 2], 2)] {
            let op = PSample { shape: [images, height, width, channels].into(), steps: rows.len() };
            let pixels = images * height * width;
            for precision in [Precision::F32, Precision::Bf16] {
                for step in [0, 5, rows.len() - 1] {
                    let [on_device, on_host] = activations(step as u64, pixels * channels, precision);
                    let x = bytes_of_f32(&normals(77, pixels * channels));
                    let clock = bytes_of_u32(&[step as u32, first, seed as u32, (seed >> 32) as u32]);
                    let [table, times] = [bytes_of_f32(rows.as_flattened()), bytes_of_u32(&timesteps)];
                    let inputs = [on_host, table.clone(), times.clone(), clock.clone()];
                    let expected = on_cpu(op.clone(), &inputs, std::slice::from_ref(&x)).remove(0);

                    let inputs = [padded(&on_device, channels, with, precision), table, times, clock];
                    let outputs = [Buffer::Updated(x), Buffer::Output(pixels * with * precision.bytes())];
                    let launch = cuda::launch(&op, precision, with);
                    let found = run_launch(&launch, &inputs.map(Buffer::Input), &outputs);
                    assert!(found[0] == expected, "{sampler:?} {eta}, step {step}, {channels} channels");
                    let expected = f32_of(&expected, Precision::F32);
                    for (i, x) in f32_of(&found[1], precision).into_iter().enumerate() {
                        let expected = match i % with {
                            c if c < channels => rounded(expected[i / with * channels + c], precision),
                            _ => 0.0,
                        };
                        assert_eq!(x.to_bits(), expected.to_bits(), "the next input, element {i}");
                    }
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
