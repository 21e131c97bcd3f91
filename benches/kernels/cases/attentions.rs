//! Attentions with one head, and their gradients.

use super::{BOTH, Case, Content, named};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::attention::{self, Attention, AttentionGradient};

/// Images, tokens, channels of the one head. Those of the models, then others that benches/pytorch/attention.py has too; then the smallest
/// that tensor cores take, and one that they do not.
const SHAPES: [[usize; 3]; 6] =
    [[128, 256, 256], [16, 256, 512], [16, 1024, 64], [4, 4096, 128], [128, 256, 32], [16, 1024, 100]];

pub fn cases() -> Vec<Case> {
    SHAPES.into_iter().flat_map(|shape| BOTH.into_iter().flat_map(move |precision| of(shape, precision))).collect()
}

fn of(shape @ [images, tokens, channels]: [usize; 3], precision: Precision) -> [Case; 2] {
    let op = Attention { shape: shape.into(), heads: 1 };
    let (elements, rows) = (images * tokens * channels, images * tokens);
    // q kᵀ and p v; backward dp, dv, dq, dk and the scores.
    let product = 2 * (rows * tokens * channels) as u64;
    let gradient = AttentionGradient { attention: op.clone() };
    let activations = |len| Content::of(precision, len);
    let forward = Case::new(
        named(shape),
        [attention::cuda::launch(&op, precision)],
        vec![activations(3 * elements)],
        vec![activations(elements), Content::F32(rows)],
    );
    let backward = Case::new(
        named(shape),
        attention::cuda::launches_gradient(&gradient, precision, false),
        vec![activations(3 * elements), activations(elements), Content::F32(rows), activations(elements)],
        vec![activations(3 * elements)],
    );
    [
        Case { products: 2 * product, ..forward },
        Case {
            name: backward.name.replace("dots", "gradient"),
            scratch: 4 * attention::cuda::dots(&gradient),
            // As is usual, without the scores that are computed again.
            products: 5 * product,
            ..backward
        },
    ]
}
