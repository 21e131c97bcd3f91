//! Kernels whose work is to pass over activations.

use super::{BOTH, Case, Content, named};
use ddpm_dist::device::cuda::{Launch, Precision};
use ddpm_dist::ops::add::{self, Add};
use ddpm_dist::ops::copy::{self, Copy};
use ddpm_dist::ops::linear;
use ddpm_dist::ops::silu::{self, Silu, SiluGradient};
use ddpm_dist::ops::upsample::{self, Upsample, UpsampleGradient};

/// Largest activation of the CIFAR-10 model at a batch of 128, and of the 256² model at 16.
const SHAPES: [[usize; 4]; 2] = [[128, 32, 32, 128], [16, 256, 256, 128]];

pub fn cases() -> Vec<Case> {
    SHAPES.into_iter().flat_map(|shape| BOTH.into_iter().flat_map(move |precision| of(shape, precision))).collect()
}

fn of(shape @ [images, height, width, channels]: [usize; 4], precision: Precision) -> Vec<Case> {
    let len: usize = shape.iter().product();
    let case = |launch: Launch, inputs: &[usize], output: usize| {
        let inputs = inputs.iter().map(|&len| Content::of(precision, len)).collect();
        Case::new(named(shape), [launch], inputs, vec![Content::of(precision, output)])
    };
    let small = [images, height / 2, width / 2, channels];
    let (up, down) = (Upsample { shape: small.into() }, UpsampleGradient { shape: small.into() });
    let silu_gradient = SiluGradient { shape: shape.into() };
    let rows = images * height * width;
    let other = if precision == Precision::F32 { Precision::Bf16 } else { Precision::F32 };
    vec![
        case(add::cuda::launch(&Add { shape: shape.into() }, precision), &[len, len], len),
        case(silu::cuda::launch(&Silu { shape: shape.into() }, precision), &[len], len),
        case(silu::cuda::launch_gradient(&silu_gradient, precision, false), &[len, len], len),
        case(upsample::cuda::launch(&up, precision), &[len / 4], len),
        case(upsample::cuda::launch_gradient(&down, precision, false), &[len], len / 4),
        case(copy::cuda::launch(&Copy { shape: shape.into() }, precision, false), &[len], len),
        Case::new(
            named(shape),
            [Launch::cast(len, precision)],
            vec![Content::of(other, len)],
            vec![Content::of(precision, len)],
        ),
        Case {
            scratch: 4 * linear::cuda::pieces(rows) * channels,
            ..Case::new(
                named(shape),
                linear::cuda::bias_gradient([rows, channels], precision, false),
                vec![Content::of(precision, len)],
                vec![Content::F32(channels)],
            )
        },
        Case {
            // y is read too.
            bytes: 3 * Content::of(precision, len).bytes(),
            ..Case::new(
                named(shape),
                [linear::cuda::bias([rows, channels], precision, true)],
                vec![Content::of(precision, channels), Content::of(precision, len)],
                vec![Content::of(precision, len)],
            )
        },
    ]
}
