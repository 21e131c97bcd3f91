//! `kernels/add.cu`

use super::Add;
use crate::device::cuda::{Argument, Launch, Precision};

/// y = a + b.
pub fn launch(op: &Add, precision: Precision) -> Launch {
    let buffers = [Argument::Input(0), Argument::Input(1), Argument::Output(0)];
    Launch::elementwise("add", precision, op.shape.len(), &buffers, &[])
}
