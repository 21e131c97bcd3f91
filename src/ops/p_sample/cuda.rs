//! `kernels/p_sample.cu`

use super::PSample;
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block, which have four pixels each.
const THREADS: usize = 128;

/// One reverse step of a captured loop. Inputs: the network's output with `padded` channels; the table [S, 9] of all steps; their timesteps
/// u32 [S]; the counter u32 [1]; the seed u32 [2]. Outputs: x f32 [N, …, C], updated, and the network's next input, with `padded` channels.
/// `first` is the index of the first image.
pub fn launch(op: &PSample, precision: Precision, padded: usize, first: u32) -> Launch {
    let [images, height, width, channels] = op.shape.nhwc();
    let buffers = [0, 1, 2, 3, 4].map(Argument::Input).into_iter().chain([0, 1].map(Argument::Output));
    let numbers = [first as usize, height * width, channels, padded].map(Argument::u32);
    let blocks = (height * width).div_ceil(4 * THREADS);
    Launch::new("p_sample", precision, [blocks, images, 1], THREADS, buffers.chain(numbers).collect())
}

/// Counts on to the next step; the counter is output 0.
pub fn advance() -> Launch {
    let arguments = vec![Argument::Output(0)];
    Launch { kernel: "p_sample_advance".into(), grid: [1; 3], block: [1; 3], shared: 0, arguments }
}
