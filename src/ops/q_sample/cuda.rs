//! `kernels/q_sample.cu`

use super::TrainingBatch;
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block.
const THREADS: usize = 128;
/// Pixels of a thread.
const PIXELS: usize = 4;

/// With `padded` channels in x_t.
pub fn launch(batch: &TrainingBatch, precision: Precision, padded: usize) -> Launch {
    let &TrainingBatch { images, height, width, channels, timesteps, flip, seed, held } = batch;
    let numbers = held.map_or(Argument::Null, |_| Argument::Input(3));
    let arguments = vec![
        Argument::Input(0),
        numbers,
        Argument::Input(1),
        Argument::Input(2),
        Argument::Output(0),
        Argument::Output(1),
        Argument::u64(seed),
        Argument::struct_of([height, width, channels, padded]),
        Argument::u32(timesteps),
        Argument::u32(flip.into()),
    ];
    let blocks = (height * width).div_ceil(PIXELS * THREADS);
    Launch::new("q_sample", precision, [blocks, images, 1], THREADS, arguments)
}
