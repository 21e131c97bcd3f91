//! The loss, its gradient, and what happens past f32.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch, run_with};
use crate::values::{activations, bytes_of_f32, bytes_of_u32, f32_of, normals, padded, pixels, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, Objective, Schedule};
use ddpm_dist::ops::loss::{MseLoss, cuda};
use ddpm_dist::ops::q_sample::TrainingBatch;
use ddpm_dist::train::Metrics;

/// Gradient and losses of a kernel and of the CPU, for an output of the network that is given.
fn check(
    batch: &TrainingBatch,
    channels: usize,
    objective: Objective,
    precision: Precision,
    is_indexed: bool,
    out: [Vec<u8>; 2],
) {
    let TrainingBatch { images, height, width, .. } = *batch;
    let schedule = Schedule::new(&DiffusionConfig { objective, ..DiffusionConfig::default() }).unwrap();
    let table = bytes_of_f32(schedule.target_table().as_flattened());
    let op = MseLoss { padded: batch.channels, batch: batch.clone(), global_batch: 2 * images };
    let (pictures, clock) = (pixels(3, batch.shape().len()), bytes_of_u32(&[5, 40, 0, 0]));
    let t = bytes_of_u32(&[0, 999, 500, 17][..images]);
    let [on_device, on_host] = out;
    let inputs = [on_host, pictures, t, table, clock];
    let expected = on_cpu(op.clone(), &inputs, &[]);

    let [_, pictures, t, table, clock] = inputs;
    // Where images are taken from a data set they stand in it the other way round.
    let indices: Vec<u32> = (0..images as u32).rev().collect();
    let image = batch.elements();
    let data_set = indices.iter().flat_map(|&i| &pictures[i as usize * image..][..image]).copied().collect();
    let pictures = if is_indexed { data_set } else { pictures };
    let out = padded(&on_device, batch.channels, channels, precision);
    let inputs = [out, pictures, t, table, clock, bytes_of_u32(&indices)].map(Buffer::Input);
    let bytes = images * height * width * channels * precision.bytes();
    let batch_on_device = TrainingBatch { held: is_indexed.then_some(images), ..batch.clone() };
    let [first, second] = cuda::launches(&MseLoss { batch: batch_on_device, ..op }, precision, channels);
    let workspace = Buffer::Output(8 * images * cuda::partials(batch));
    let [gradient, partials] = &run_with(&first, &inputs, &[Buffer::Output(bytes)], &workspace)[..] else {
        panic!("two outputs")
    };
    let outputs = [Buffer::Updated(gradient.clone()), Buffer::Output(4 * images)];
    let found = run_with(&second, &inputs, &outputs, &Buffer::Input(partials.clone()));

    let (losses, exact) = (f32_of(&found[1], Precision::F32), f32_of(&expected[1], Precision::F32));
    let cpu = f32_of(&expected[0], Precision::F32);
    for (i, x) in f32_of(&found[0], precision).into_iter().enumerate() {
        let expected = match i % channels {
            c if c < batch.channels => rounded(cpu[i / channels * batch.channels + c], precision),
            _ => 0.0,
        };
        let is_lost = exact[i / (height * width * channels)].is_infinite();
        assert!(
            if is_lost { x.is_nan() } else { x.to_bits() == expected.to_bits() },
            "element {i}: {x}, expected {expected}"
        );
    }
    for (found, exact) in losses.iter().zip(exact) {
        // Sums of f64 in another order, rounded to f32.
        assert!(found.to_bits().abs_diff(exact.to_bits()) <= 1, "{found}, expected {exact}");
    }
}

fn batch([images, height, width, channels]: [usize; 4]) -> TrainingBatch {
    TrainingBatch { images, height, width, channels, timesteps: 1000, flip: true, seed: 0xFEED_5EED_0001, held: None }
}

#[test]
fn losses_and_gradients_are_those_of_the_cpu() {
    for (shape, padded) in [([2, 32, 32, 3], 8), ([4, 28, 28, 1], 8), ([3, 5, 3, 2], 2), ([1, 1, 1, 5], 8)] {
        let batch = batch(shape);
        for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
            for precision in [Precision::F32, Precision::Bf16] {
                // Both ways, by turns.
                let is_indexed = (precision == Precision::Bf16) != (objective == Objective::V);
                check(&batch, padded, objective, precision, is_indexed, activations(8, batch.shape().len(), precision));
            }
        }
    }
}

#[test]
fn an_image_whose_loss_is_past_f32_has_a_gradient_of_nan() {
    let batch = batch([2, 4, 4, 3]);
    let mut out = vec![0.5; batch.shape().len()];
    out[7] = 3e38;
    check(&batch, 8, Objective::Epsilon, Precision::F32, false, [bytes_of_f32(&out), bytes_of_f32(&out)]);
}

#[test]
fn losses_by_quartile_are_those_of_the_host() {
    for (images, timesteps) in [(1, 1000), (7, 1000), (300, 1000), (128, 4), (129, 3)] {
        let losses: Vec<f32> = normals(9, images).into_iter().map(f32::abs).collect();
        let t: Vec<u32> = (0..images as u32).map(|i| i.wrapping_mul(2_654_435_761) % timesteps).collect();
        let inputs = [bytes_of_f32(&losses), bytes_of_u32(&t)].map(Buffer::Input);
        let launch = cuda::quartiles(images, timesteps as usize);
        let found = run_launch(&launch, &inputs, &[Buffer::Output(4 * 16)]).remove(0);
        let found: Vec<f64> = found.as_chunks().0.iter().map(|bytes| f64::from_ne_bytes(*bytes)).collect();
        let pairs = losses.into_iter().zip(t);
        let expected = Metrics::new(pairs, timesteps as usize, [0.0, 1.0]).quartiles;
        for (quarter, mean) in found.chunks_exact(2).zip(expected) {
            assert_eq!((quarter[1] > 0.0).then(|| quarter[0] / quarter[1]), mean);
        }
    }
}
