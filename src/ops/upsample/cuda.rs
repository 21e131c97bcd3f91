//! `kernels/upsample.cu`

use super::{Upsample, UpsampleGradient};
use crate::device::cuda::{Argument, Launch, Precision};
use crate::tape::Shape;

/// Most threads of a block.
const THREADS: usize = 256;

/// y: each pixel of x four times.
pub fn launch(op: &Upsample, precision: Precision) -> Launch {
    each_pixel("upsample", &op.shape, precision, &[])
}

/// dx: the sum of the four, or added to dx.
pub fn launch_gradient(op: &UpsampleGradient, precision: Precision, adds: bool) -> Launch {
    each_pixel("upsample_gradient", &op.shape, precision, &[Argument::flag(adds)])
}

/// A thread for each 16 bytes of a pixel's channels of the small picture, or for each channel where 16 bytes do not divide them; blocks for
/// each row.
fn each_pixel(name: &str, shape: &Shape, precision: Precision, more: &[Argument]) -> Launch {
    let [images, height, width, channels] = shape.nhwc();
    let pack = 16 / precision.bytes();
    let row = width * channels / if channels.is_multiple_of(pack) { pack } else { 1 };
    let threads = row.next_multiple_of(32).min(THREADS);
    let sizes = [Argument::u32(width), Argument::u32(channels)];
    let arguments = [&[Argument::Input(0), Argument::Output(0)][..], &sizes, more].concat();
    Launch::new(name, precision, [images * height, row.div_ceil(threads), 1], threads, arguments)
}
