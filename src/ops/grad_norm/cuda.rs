//! `kernels/grad_norm.cu`

use super::BLOCK;
use crate::device::cuda::{Argument, Launch};

/// Threads of a block that sums squares …
const THREADS: usize = 256;
/// … and of the one that adds up the sums.
const ALL_THREADS: usize = 1024;

/// Sums of squares of `len` gradients, block by block.
///
/// # Panics
/// If 4 does not divide `len`: flat buffers end on a multiple of 256 bytes.
pub fn square_sums(len: usize) -> Launch {
    assert!(len.is_multiple_of(4), "{len} elements");
    let arguments = vec![Argument::Input(0), Argument::Output(0), Argument::u64(len as u64)];
    launch("square_sums", len.div_ceil(BLOCK), THREADS, arguments)
}

/// The norm, of so many sums.
pub fn grad_norm(sums: usize) -> Launch {
    let arguments = vec![Argument::Input(0), Argument::Output(0), Argument::u32(sums)];
    launch("grad_norm", 1, ALL_THREADS, arguments)
}

fn launch(kernel: &str, blocks: usize, threads: usize, arguments: Vec<Argument>) -> Launch {
    Launch { kernel: kernel.into(), grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0, arguments }
}
