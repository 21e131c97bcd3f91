//! `kernels/bias.cu` and `kernels/bias_gradient.cu`; products are cuBLASLt's.

use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block: 32 along the channels, 8 along the rows.
const THREADS: usize = 256;
/// Rows of a piece, unless there are too many pieces: so many that partial sums are little beside them.
const ROWS: usize = 256;
/// Most pieces: some blocks for each multiprocessor of a large GPU.
const PIECES: usize = 512;

/// Partial sums of each channel, f32, that the workspace holds for `rows` rows.
pub fn pieces(rows: usize) -> usize {
    rows.div_ceil(ROWS).clamp(1, PIECES)
}

/// y `[rows, channels]` += b `[channels]` (+ a residual of y's shape), in place: Input 0 is b, Input 1 the residual, Output 0 is y.
pub fn bias([rows, channels]: [usize; 2], precision: Precision, has_residual: bool) -> Launch {
    let residual = if has_residual { Argument::Input(1) } else { Argument::Null };
    let buffers = [Argument::Input(0), residual, Argument::Output(0)];
    Launch::elementwise("bias", precision, rows * channels, &buffers, &[Argument::u32(channels)])
}

/// db (+)= the sum over the rows of dy `[rows, channels]`: partial sums, then their total.
pub fn bias_gradient([rows, channels]: [usize; 2], precision: Precision, adds: bool) -> [Launch; 2] {
    let pack = 16 / precision.bytes();
    let wide = 32 * if channels.is_multiple_of(pack) { pack } else { 1 };
    let pieces = pieces(rows);
    let first = vec![Argument::Input(0), Argument::Scratch, Argument::u32(rows), Argument::u32(channels)];
    let sizes = [Argument::u32(pieces), Argument::u32(channels), Argument::flag(adds)];
    let arguments = [Argument::Scratch, Argument::Output(0)].into_iter().chain(sizes).collect();
    let total = Launch {
        kernel: "bias_gradient_total".into(),
        grid: [channels.div_ceil(THREADS / 32), 1, 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments,
    };
    let grid = [pieces, channels.div_ceil(wide), 1];
    [Launch::new("bias_gradient", precision, grid, THREADS, first), total]
}
