//! `kernels/cast.cu`

use crate::device::cuda::{Launch, Precision};
use crate::ops::copy::cuda::cast;

/// Of flat buffers of `len` elements.
pub(super) fn launch(len: usize) -> Launch {
    cast(len, Precision::Bf16)
}
