//! `kernels/grad_norm.cu`

use crate::device::cuda::{Argument, Launch};

/// Threads of a block.
const THREADS: usize = 256;
/// Most partial sums: a few for each multiprocessor.
const PARTIALS: usize = 1024;
/// Fewest gradients of one.
const SHORTEST: usize = 4 * THREADS;

/// Number of partial sums, f64, of `len` gradients: the workspace.
pub fn partials(len: usize) -> usize {
    len.div_ceil(SHORTEST).clamp(1, PARTIALS)
}

/// Of `len` gradients: partial sums to the workspace, then their total.
///
/// # Panics
/// If 4 does not divide `len`: flat buffers end on a multiple of 256 bytes.
pub fn launches(len: usize) -> [Launch; 2] {
    assert!(len.is_multiple_of(4), "{len} elements");
    let partials = partials(len);
    let launch = |kernel: &str, blocks, arguments| Launch {
        kernel: kernel.into(),
        grid: [blocks, 1, 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments,
    };
    [
        launch("grad_norm_partial", partials, vec![Argument::Input(0), Argument::Scratch, Argument::u64(len as u64)]),
        launch("grad_norm_total", 1, vec![Argument::Scratch, Argument::Output(0), Argument::u32(partials)]),
    ]
}
