//! `kernels/accumulate.cu`

use super::Accumulate;
use crate::device::cuda::{Argument, Launch, Precision};

/// One launch for each sum that is added: g ← p_i + g, of `len` elements.
pub fn launches(op: &Accumulate, len: usize) -> Vec<Launch> {
    let add = |number| {
        let buffers = [Argument::Input(number), Argument::Output(0)];
        Launch { kernel: "accumulate".into(), ..Launch::elementwise("", Precision::F32, len, &buffers, &[]) }
    };
    (0..op.sums).map(add).collect()
}
