//! `kernels/accumulate.cu`

use super::Accumulate;
use crate::device::cuda::{Argument, Launch, Precision};

/// One launch for each sum that is added: g ← p_i + g.
pub fn launches(op: &Accumulate) -> Vec<Launch> {
    let add = |number| {
        let buffers = [Argument::Input(number), Argument::Output(0)];
        Launch { kernel: "accumulate".into(), ..Launch::elementwise("", Precision::F32, op.elements, &buffers, &[]) }
    };
    (0..op.sums).map(add).collect()
}
