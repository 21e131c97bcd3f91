//! `kernels/copy.cu`, `kernels/cast.cu`

use super::Copy;
use crate::device::cuda::{Argument, Launch, Precision};

/// Threads of a block of a cast, which have eight elements each.
const THREADS: usize = 256;

/// y = x, or y += x.
pub fn launch(op: &Copy, precision: Precision, adds: bool) -> Launch {
    let buffers = [Argument::Input(0), Argument::Output(0)];
    Launch::elementwise("copy", precision, op.shape.len(), &buffers, &[Argument::flag(adds)])
}

/// y = x of `len` elements, from the other precision to `to`.
pub fn cast(len: usize, to: Precision) -> Launch {
    let arguments = vec![Argument::Input(0), Argument::Output(0), Argument::u64(len as u64)];
    Launch::new("cast_to", to, [len.div_ceil(8 * THREADS), 1, 1], THREADS, arguments)
}
