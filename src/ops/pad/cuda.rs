//! `kernels/layout.cu`

use super::Pad;
use crate::device::cuda::{Form, Precision, Work};
use crate::ops::conv2d::cuda::{padded, unpadded};

pub(super) fn pad(op: &Pad, form: &Form) -> Work {
    let [from, to] = op.matrices();
    Work::kernels([padded(from, to, form.precision)])
}

pub(super) fn pad_gradient(op: &Pad, form: &Form) -> Work {
    let [from, [_, with_columns]] = op.matrices();
    Work::kernels([unpadded(from, with_columns, Precision::F32, form.updates(0))])
}
