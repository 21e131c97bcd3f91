//! `kernels/p_sample.cu`

use super::{NextStep, PSample};
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block, which have four pixels each.
const THREADS: usize = 128;

/// One reverse step.
pub fn launch(op: &PSample, precision: Precision) -> Launch {
    let [images, height, width, channels] = op.shape.nhwc();
    let buffers = [0, 1, 2, 3].map(Argument::Input).into_iter().chain([0, 1].map(Argument::Output));
    let numbers = [height * width, channels, op.padded].map(Argument::u32);
    let blocks = (height * width).div_ceil(4 * THREADS);
    Launch::new("p_sample", precision, [blocks, images, 1], THREADS, buffers.chain(numbers).collect())
}

/// On to the next step.
pub fn advance(op: &NextStep) -> Launch {
    let buffers = [Argument::Input(0), Argument::Output(0), Argument::Output(1)];
    let arguments = buffers.into_iter().chain([op.steps, op.images].map(Argument::u32)).collect();
    Launch { kernel: "p_sample_advance".into(), grid: [1; 3], block: [THREADS, 1, 1], shared: 0, arguments }
}
