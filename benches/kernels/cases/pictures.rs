//! Kernels at the two ends of the network, where pictures have 3 channels and activations 8, and of an image's timestep.

use super::{BOTH, Case, Content, floats, named, words};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::diffusion::{DiffusionConfig, SamplerConfig, SamplerTable, Schedule};
use ddpm_dist::ops::loss::{self, MseLoss};
use ddpm_dist::ops::p_sample::{self, NextStep, PSample};
use ddpm_dist::ops::q_sample::{self, TrainingBatch};
use ddpm_dist::ops::timestep_embedding::{self, TimestepEmbedding};

/// Of the models' batches; more of them in the last one, so that 256 MB are moved.
const SHAPES: [[usize; 4]; 3] = [[128, 32, 32, 3], [16, 256, 256, 3], [256, 256, 256, 3]];
/// Channels of their activations.
const PADDED: usize = 8;
const TIMESTEPS: usize = 1000;
/// Pixels of a data set on the device of which a batch takes some images: more than a cache holds.
const DATA_SET: usize = 256 << 20;

pub fn cases() -> Vec<Case> {
    let schedule = Schedule::new(&DiffusionConfig::default()).expect("the default schedule");
    let mut cases = Vec::new();
    for shape in SHAPES {
        for precision in BOTH {
            for is_indexed in [false, true] {
                cases.extend(training(shape, &schedule, precision, is_indexed));
            }
            cases.push(sampling(shape, &schedule, precision));
        }
    }
    for precision in BOTH {
        // The CIFAR-10 model's, the other one's is shorter.
        cases.push(embedding([128, 128], precision));
    }
    let images = 128;
    let losses = vec![Content::Squares(images), timesteps(images)];
    cases.push(Case::new(named([images]), [loss::cuda::quartiles(images, TIMESTEPS)], losses, vec![Content::F32(16)]));
    let next = NextStep { images, steps: TIMESTEPS };
    let outputs = vec![words([0; 4]), Content::Bytes(4 * images)];
    cases.push(Case::new(named([images]), [p_sample::cuda::advance(&next)], vec![timesteps(TIMESTEPS)], outputs));
    cases
}

fn timesteps(images: usize) -> Content {
    words((0..images as u32).map(|i| i * 37 % TIMESTEPS as u32))
}

/// What a training step begins with and ends in.
fn training(shape: [usize; 4], schedule: &Schedule, precision: Precision, is_indexed: bool) -> [Case; 2] {
    let [images, height, width, channels] = shape;
    let (pixels, elements) = (images * height * width, images * height * width * channels);
    let batch =
        TrainingBatch { images, height, width, channels, timesteps: TIMESTEPS, flip: true, seed: 1, held: None };
    let held = is_indexed.then(|| DATA_SET / batch.elements());
    let batch = TrainingBatch { held, ..batch };
    let mse = MseLoss { batch: batch.clone(), global_batch: images, padded: PADDED };
    let table = || floats(schedule.target_table().as_flattened());
    let clock = || words([7, 0, 0, 0]);
    let activations = || Content::of(precision, PADDED * pixels);
    let there_are = held.unwrap_or(images);
    let pictures = || Content::Bytes(there_are * batch.elements());
    let taken = || words((0..images as u32).map(|i| i.wrapping_mul(2_654_435_761) % there_are as u32));
    let indices = || is_indexed.then(taken);
    let text = || named(shape) + if is_indexed { ", by index" } else { "" };
    let moved = |tensors: usize| elements + tensors * activations().bytes();
    [
        Case {
            bytes: moved(1),
            ..Case::new(
                text(),
                [q_sample::cuda::launch(&batch, precision, PADDED)],
                [pictures(), table(), clock()].into_iter().chain(indices()).collect(),
                vec![activations(), Content::Bytes(4 * images)],
            )
        },
        Case {
            scratch: 8 * images * loss::cuda::partials(&batch),
            bytes: moved(2),
            ..Case::new(
                text(),
                loss::cuda::launches(&mse, precision, PADDED),
                [activations(), pictures(), timesteps(images), table(), clock()].into_iter().chain(indices()).collect(),
                vec![activations(), Content::F32(images)],
            )
        },
    ]
}

/// A reverse step, which also reads the x that it writes.
fn sampling(shape: [usize; 4], schedule: &Schedule, precision: Precision) -> Case {
    let [images, height, width, channels] = shape;
    let pixels = images * height * width;
    let sampler = SamplerTable::new(schedule, &SamplerConfig::default()).expect("the default sampler");
    let rows: Vec<[f32; 9]> = sampler.steps.iter().map(|step| p_sample::row(step, sampler.clip)).collect();
    let numbers = words(sampler.steps.iter().map(|step| step.timestep));
    let activations = || Content::of(precision, PADDED * pixels);
    let case = Case::new(
        named(shape),
        [p_sample::cuda::launch(&PSample { shape: shape.into(), steps: rows.len(), padded: PADDED }, precision)],
        vec![activations(), floats(rows.as_flattened()), numbers, words([3, 0, 1, 0])],
        vec![Content::F32(channels * pixels), activations()],
    );
    Case { bytes: 8 * channels * pixels + 2 * activations().bytes(), ..case }
}

fn embedding(shape @ [images, dim]: [usize; 2], precision: Precision) -> Case {
    let op = TimestepEmbedding::new(images, dim, 1.0, false);
    let frequencies = Content::Exactly(op.frequencies().iter().flat_map(|f| f.to_ne_bytes()).collect());
    let outputs = vec![Content::of(precision, images * dim)];
    let launch = timestep_embedding::cuda::launch(&op, precision);
    Case::new(named(shape), [launch], vec![timesteps(images), frequencies], outputs)
}
