//! `kernels/timestep_embedding.cu`

use super::TimestepEmbedding;
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block.
const THREADS: usize = 128;

/// Inputs: t, and the op's [frequencies](TimestepEmbedding::frequencies) f64.
pub fn launch(op: &TimestepEmbedding, precision: Precision) -> Launch {
    let arguments = vec![
        Argument::Input(0),
        Argument::Input(1),
        Argument::Output(0),
        Argument::u32(op.dim),
        Argument::flag(op.cosines_first),
    ];
    // One more than frequencies where the dim is odd.
    let blocks = op.dim.div_ceil(2).div_ceil(THREADS);
    Launch::new("timestep_embedding", precision, [blocks, op.images, 1], THREADS, arguments)
}
