//! `kernels/silu.cu`

use super::{Silu, SiluGradient};
use crate::device::cuda::{Argument, Launch, Precision};

/// y = x·σ(x).
pub fn launch(op: &Silu, precision: Precision) -> Launch {
    Launch::elementwise("silu", precision, op.shape.len(), &[Argument::Input(0), Argument::Output(0)], &[])
}

/// dx = dy·SiLU′(x), or added to dx.
pub fn launch_gradient(op: &SiluGradient, precision: Precision, adds: bool) -> Launch {
    let buffers = [Argument::Input(0), Argument::Input(1), Argument::Output(0)];
    Launch::elementwise("silu_gradient", precision, op.shape.len(), &buffers, &[Argument::flag(adds)])
}
