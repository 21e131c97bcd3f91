//! Norms with SiLU, and their gradients.

use super::{BOTH, Case, Content, named, words};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::group_norm::{self, Dropout, GroupNorm, GroupNormGradient, Timestep};

/// Sizes, channels of both sources, and whether a timestep term and dropout are there. The largest of each model, the widest with two
/// sources, and one whose slab needs two passes.
const NORMS: [([usize; 3], [usize; 2], bool); 5] = [
    ([128, 32, 32], [128, 0], false),
    ([512, 32, 32], [128, 0], true),
    ([128, 16, 16], [256, 256], false),
    ([16, 256, 256], [128, 0], false),
    ([16, 128, 128], [128, 128], true),
];

pub fn cases() -> Vec<Case> {
    NORMS.into_iter().flat_map(|norm| BOTH.into_iter().flat_map(move |precision| of(norm, precision))).collect()
}

fn of((size, channels, is_full): ([usize; 3], [usize; 2], bool), precision: Precision) -> [Case; 2] {
    let [images, pixels, total] = [size[0], size.iter().product(), channels[0] + channels[1]];
    let op = GroupNorm {
        size,
        channels,
        groups: 32,
        eps: 1e-6,
        silu: true,
        timestep: is_full.then_some(Timestep::Add { offset: 0, total }),
        dropout: is_full.then_some(Dropout { probability: 0.1, seed: 1, layer: 3 }),
    };
    let activations = |len| Content::of(precision, len);
    let sources = || channels.into_iter().filter(|&c| c > 0).map(|c| activations(pixels * c));
    let inputs = || -> Vec<Content> {
        let parameters = [(); 2].map(|()| Content::F32(total));
        let more = is_full.then(|| [activations(images * total), words([7, 0, 0, 0])]);
        sources().chain(parameters).chain(more.into_iter().flatten()).collect()
    };
    let statistics = || Content::F32(images * 32 * 2);
    let parts = if is_full { ", timestep and dropout" } else { "" };
    let shape = || format!("{}×{}{parts}", named(size), channels.map(|c| c.to_string()).join("+"));
    let gradient = GroupNormGradient { norm: op.clone() };
    let [forward, backward] =
        [group_norm::cuda::forward_passes(&op, precision), group_norm::cuda::backward_passes(&gradient, precision)];
    let of_parameters = [(); 2].map(|()| Content::F32(total));
    let of_timestep = is_full.then(|| activations(images * total));
    let name = |what: &str| format!("{what}_{}", if precision == Precision::F32 { "f32" } else { "bf16" });
    [
        Case {
            name: name("group_norm"),
            scratch: group_norm::cuda::workspace(&op, forward),
            ..Case::new(
                shape(),
                group_norm::cuda::launches(&op, precision),
                inputs(),
                vec![activations(pixels * total), statistics()],
            )
        },
        Case {
            name: name("group_norm_gradient"),
            scratch: group_norm::cuda::gradient_workspace(&gradient, backward),
            ..Case::new(
                shape(),
                group_norm::cuda::gradient_launches(&gradient, precision, 0),
                [activations(pixels * total)].into_iter().chain(inputs()).chain([statistics()]).collect(),
                sources().chain(of_parameters).chain(of_timestep).collect(),
            )
        },
    ]
}
