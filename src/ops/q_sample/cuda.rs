//! `kernels/q_sample.cu`

use super::TrainingBatch;
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block.
const THREADS: usize = 128;
/// Pixels of a thread.
const PIXELS: usize = 4;

/// With `padded` channels in x_t, and images taken from a data set by index if input 3 is there: u32 [N].
pub fn launch(batch: &TrainingBatch, precision: Precision, padded: usize, is_indexed: bool) -> Launch {
    let &TrainingBatch { images, height, width, channels, timesteps, flip, seed } = batch;
    let indices = if is_indexed { Argument::Input(3) } else { Argument::Null };
    let arguments = vec![
        Argument::Input(0),
        indices,
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
