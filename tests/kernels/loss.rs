//! The loss, its gradient, and what happens past f32.

use crate::cpu::on_cpu;
use crate::sim::{Buffer, run_with};
use crate::values::{activations, bytes_of_f32, bytes_of_u32, f32_of, padded, pixels, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, Objective, Schedule};
use ddpm_dist::ops::loss::{MseLoss, cuda};
use ddpm_dist::ops::q_sample::TrainingBatch;

/// Gradient and losses of a kernel and of the CPU, for an output of the network that is given.
fn check(batch: &TrainingBatch, channels: usize, objective: Objective, precision: Precision, out: [Vec<u8>; 2]) {
    let TrainingBatch { images, height, width, .. } = *batch;
    let schedule = Schedule::new(&DiffusionConfig { objective, ..DiffusionConfig::default() }).unwrap();
    let table = bytes_of_f32(schedule.target_table().as_flattened());
    let op = MseLoss { batch: batch.clone(), global_batch: 2 * images };
    let (pictures, clock) = (pixels(3, batch.shape().len()), bytes_of_u32(&[5, 40, 0, 0]));
    let t = bytes_of_u32(&[0, 999, 500, 17][..images]);
    let [on_device, on_host] = out;
    let inputs = [on_host, pictures, t, table, clock];
    let expected = on_cpu(op.clone(), &inputs, &[]);

    let [_, pictures, t, table, clock] = inputs;
    let inputs =
        [padded(&on_device, batch.channels, channels, precision), pictures, t, table, clock].map(Buffer::Input);
    let bytes = images * height * width * channels * precision.bytes();
    let [first, second] = cuda::launches(&op, precision, channels, false);
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
    TrainingBatch { images, height, width, channels, timesteps: 1000, flip: true, seed: 0xFEED_5EED_0001 }
}

#[test]
fn losses_and_gradients_are_those_of_the_cpu() {
    for (shape, padded) in [([2, 32, 32, 3], 8), ([4, 28, 28, 1], 8), ([3, 5, 3, 2], 2), ([1, 1, 1, 5], 8)] {
        let batch = batch(shape);
        for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
            for precision in [Precision::F32, Precision::Bf16] {
                check(&batch, padded, objective, precision, activations(8, batch.shape().len(), precision));
            }
        }
    }
}

#[test]
fn an_image_whose_loss_is_past_f32_has_a_gradient_of_nan() {
    let batch = batch([2, 4, 4, 3]);
    let mut out = vec![0.5; batch.shape().len()];
    out[7] = 3e38;
    check(&batch, 8, Objective::Epsilon, Precision::F32, [bytes_of_f32(&out), bytes_of_f32(&out)]);
}
