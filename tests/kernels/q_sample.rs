//! `q_sample` draws the bits that the CPU draws.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_launch};
use crate::values::{bytes_of_f32, bytes_of_u32, f32_of, pixels, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, Schedule};
use ddpm_dist::ops::q_sample::{QSample, TrainingBatch, cuda};

#[test]
fn q_sample_draws_what_the_cpu_draws() {
    let table = bytes_of_f32(Schedule::new(&DiffusionConfig::default()).unwrap().q_sample_table().as_flattened());
    // Colour padded to 8 channels, grey, two and five channels; a last thread with fewer pixels; more than one block.
    for (images, height, width, channels, padded) in
        [(3, 32, 32, 3, 8), (2, 28, 28, 1, 8), (1, 3, 7, 3, 3), (4, 5, 3, 2, 4), (2, 1, 1, 5, 5), (1, 9, 31, 3, 16)]
    {
        let batch = TrainingBatch {
            images,
            height,
            width,
            channels,
            timesteps: 1000,
            flip: true,
            seed: 0xDEAD_BEEF_0123,
            held: None,
        };
        // A data set of which the batch takes some, in an order of its own.
        let area = height * width;
        let image = area * channels;
        let data_set = pixels(7, 11 * image);
        let indices: Vec<u32> = (0..images as u32).map(|j| 10 - 3 * j).collect();
        let taken =
            indices.iter().flat_map(|&i| &data_set[i as usize * image..][..image]).copied().collect::<Vec<u8>>();
        let clock = bytes_of_u32(&[17, u32::MAX - 1, 0, 0]);
        let expected = on_cpu(
            QSample { padded: batch.channels, batch: batch.clone() },
            &[taken.clone(), table.clone(), clock.clone()],
            &[],
        );
        for precision in [Precision::F32, Precision::Bf16] {
            for is_indexed in [false, true] {
                let held = is_indexed.then_some(11);
                let launch = cuda::launch(&TrainingBatch { held, ..batch.clone() }, precision, padded);
                let source = if is_indexed { &data_set } else { &taken };
                let inputs =
                    [source, &table, &clock, &bytes_of_u32(&indices)].map(|bytes| Buffer::Input(bytes.clone()));
                let outputs = [images * area * padded * precision.bytes(), 4 * images].map(Buffer::Output);
                let found = run_launch(&launch, &inputs, &outputs);
                assert_eq!(found[1], expected[1], "t");
                let cpu = f32_of(&expected[0], Precision::F32);
                let with_padding = |i: usize| match i % padded {
                    c if c < channels => rounded(cpu[i / padded * channels + c], precision),
                    _ => 0.0,
                };
                let x_t = f32_of(&found[0], precision);
                for (i, x) in x_t.iter().enumerate() {
                    assert_eq!(x.to_bits(), with_padding(i).to_bits(), "{launch:?}: element {i}");
                }
            }
        }
    }
}
