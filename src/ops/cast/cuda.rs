//! `kernels/cast.cu`

use crate::device::cuda::{Launch, Precision};

/// Of flat buffers of `len` elements.
pub(super) fn launch(len: usize) -> Launch {
    Launch::cast(len, Precision::Bf16)
}
