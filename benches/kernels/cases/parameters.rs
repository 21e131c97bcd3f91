//! Kernels that pass over all parameters, or over the weights of a layer.

use super::{BOTH, Case, Content, floats, named};
use ddpm_dist::device::cuda::{Argument, Launch, Precision, nccl};
use ddpm_dist::ops::accumulate::{self, Accumulate};
use ddpm_dist::ops::{adam_ema, conv2d, grad_norm};

/// Parameters of the CIFAR-10 model and of the 256² model.
const PARAMETERS: [usize; 2] = [35_746_816, 113_673_216];
/// Filters, channels and pixels of the largest convolution of each.
const LARGEST: [[usize; 3]; 2] = [[256, 512, 9], [512, 1024, 9]];
/// First and last layer of both as rows and columns, and what they have with channels padded.
const PADDED: [[[usize; 2]; 2]; 2] = [[[128 * 9, 3], [128 * 9, 8]], [[3, 9 * 128], [8, 9 * 128]]];
/// Numbers of GPUs.
const RANKS: [usize; 2] = [8, 64];

pub fn cases() -> Vec<Case> {
    let all = PARAMETERS.into_iter().flat_map(of_all);
    let layouts = LARGEST.into_iter().map(transposed);
    let padding = PADDED.into_iter().flat_map(|sizes| BOTH.into_iter().flat_map(move |p| padded(sizes, p)));
    all.chain(layouts).chain(padding).chain(RANKS.map(tree_sum)).chain([beacon()]).collect()
}

/// The beginning of a wait, told to memory of the GPU's own: what a launch of it takes at least.
fn beacon() -> Case {
    let words = |count: usize| Content::Exactly(vec![0; count * size_of::<u64>()]);
    let arguments = vec![Argument::Output(0), Argument::Output(1), Argument::u64(0), Argument::u32(1)];
    let launch = Launch { kernel: "beacon".into(), grid: [1; 3], block: [1; 3], shared: 0, arguments };
    Case { bytes: 48, ..Case::new("1".into(), [launch], vec![], vec![words(4), words(5)]) }
}

/// Parts of a bucket of 25 MiB that the ranks add up, each the slice of one.
fn tree_sum(ranks: usize) -> Case {
    let len = (25 << 20) / size_of::<f32>() / ranks;
    let parts = vec![Content::F32(ranks * len)];
    // Each part is read; each sum of up to eight is written, and read where there are more.
    let sums = if ranks > 8 { 2 * ranks.div_ceil(8) } else { 0 } + 1;
    Case {
        bytes: 4 * len * (ranks + sums),
        ..Case::new(format!("{ranks} of {}", named([len])), nccl::tree_sum(ranks, len, len), vec![], parts)
    }
}

fn of_all(len: usize) -> [Case; 4] {
    let scalars = [2e-4, 0.1, 0.001, 1e-8, 0.0, 0.9, 0.999, 1.0, 1e-4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let ([weights, m, ema], v) = ([(); 3].map(|()| Content::F32(len)), Content::Squares(len));
    let sum = Accumulate { sums: 1, elements: len };
    let floats_of = |count: usize| vec![Content::F32(count)];
    // Of two floats each.
    let sums = len.div_ceil(grad_norm::BLOCK);
    // What is updated is read, too.
    [
        Case {
            bytes: 38 * len,
            ..Case::new(
                named([len]),
                [adam_ema::cuda::launch(len, false, true)],
                vec![Content::F32(len), floats(&[1.0, 1.0]), floats(&scalars)],
                vec![weights, m, v, ema, Content::Bf16(len)],
            )
        },
        Case {
            bytes: 12 * len,
            ..Case::new(named([len]), accumulate::cuda::launches(&sum, len), floats_of(len), floats_of(len))
        },
        Case::new(named([len]), [grad_norm::cuda::square_sums(len)], floats_of(len), floats_of(2 * sums)),
        Case::new(named([sums]), [grad_norm::cuda::grad_norm(sums)], floats_of(2 * sums), floats_of(2)),
    ]
}

fn transposed(sizes: [usize; 3]) -> Case {
    let [from, to] = [(); 2].map(|()| vec![Content::F32(sizes.iter().product())]);
    Case::new(named(sizes), [conv2d::cuda::transposed(sizes)], from, to)
}

/// The compute copy of a layer, and its gradient's way back.
fn padded([size, with]: [[usize; 2]; 2], precision: Precision) -> [Case; 2] {
    let flat = || vec![Content::F32(size[0] * size[1])];
    let wide = || vec![Content::of(precision, with[0] * with[1])];
    let text = || format!("{} in {}", named(size), named(with));
    [
        Case::new(text(), [conv2d::cuda::padded(size, with, precision)], flat(), wide()),
        Case::new(text(), [conv2d::cuda::unpadded(size, with[1], precision, false)], wide(), flat()),
    ]
}
