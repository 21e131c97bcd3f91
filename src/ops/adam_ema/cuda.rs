//! `kernels/adam_ema.cu`

use crate::device::cuda::{Argument, Launch};

/// Threads of a block, which have eight parameters each.
const THREADS: usize = 256;

/// Of flat buffers of `len` elements; with a bf16 copy of the weights as output 4 if `has_copy`.
///
/// # Panics
/// If 8 does not divide `len`: flat buffers end on a multiple of 256 bytes.
pub fn launch(len: usize, decoupled: bool, has_copy: bool) -> Launch {
    assert!(len.is_multiple_of(8), "{len} elements");
    let copy = if has_copy { Argument::Output(4) } else { Argument::Null };
    let buffers = [0, 1, 2].map(Argument::Input).into_iter().chain([0, 1, 2, 3].map(Argument::Output));
    let arguments = buffers.chain([copy, Argument::u64(len as u64), Argument::u32(decoupled.into())]).collect();
    Launch {
        kernel: "adam_ema".into(),
        grid: [len.div_ceil(8 * THREADS), 1, 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments,
    }
}
