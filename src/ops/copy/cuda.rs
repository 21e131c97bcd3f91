//! `kernels/copy.cu`

use super::Copy;
use crate::device::cuda::{Argument, Launch, Precision};

/// y = x, or y += x.
pub fn launch(op: &Copy, precision: Precision, adds: bool) -> Launch {
    let buffers = [Argument::Input(0), Argument::Output(0)];
    Launch::elementwise("copy", precision, op.shape.len(), &buffers, &[Argument::flag(adds)])
}
