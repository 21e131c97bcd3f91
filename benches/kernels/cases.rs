//! What is measured: kernels, their operands, and what they must move and compute.

use ddpm_dist::device::cuda::{Launch, Precision};
use ddpm_dist::diffusion::{DiffusionConfig, SamplerConfig, SamplerTable, Schedule};
use ddpm_dist::ops::accumulate::{self, Accumulate};
use ddpm_dist::ops::add::{self, Add};
use ddpm_dist::ops::attention::{self, Attention, AttentionGradient};
use ddpm_dist::ops::copy::{self, Copy};
use ddpm_dist::ops::group_norm::{self, Columns, Dropout, GroupNorm, GroupNormGradient};
use ddpm_dist::ops::loss::{self, MseLoss};
use ddpm_dist::ops::p_sample::{self, PSample};
use ddpm_dist::ops::q_sample::{self, TrainingBatch};
use ddpm_dist::ops::silu::{self, Silu, SiluGradient};
use ddpm_dist::ops::upsample::{self, Upsample, UpsampleGradient};
use ddpm_dist::ops::{adam_ema, grad_norm, linear};

/// What a buffer holds.
pub enum Content {
    /// So many normal numbers.
    F32(usize),
    /// The same.
    Bf16(usize),
    /// So many squares of them, f32.
    Squares(usize),
    /// So many random bytes.
    Bytes(usize),
    /// These.
    Exactly(Vec<u8>),
}

/// Launches that belong together, on buffers of their own.
pub struct Case {
    /// Of the kernel that does the work.
    pub name: String,
    pub shape: String,
    pub launches: Vec<Launch>,
    pub inputs: Vec<Content>,
    pub outputs: Vec<Content>,
    /// Bytes of the workspace.
    pub scratch: usize,
    /// Bytes that must be moved.
    pub bytes: u64,
    /// FLOPs of matrix products.
    pub products: u64,
}

/// Largest activation of the CIFAR-10 model at a batch of 128, and of the 256² model at 16.
const ACTIVATIONS: [[usize; 4]; 2] = [[128, 32, 32, 128], [16, 256, 256, 128]];
/// Norms: sizes, channels of both sources, and whether a timestep term and dropout are there. The largest of each model, the widest with two
/// sources, and one whose slab needs two passes.
const NORMS: [([usize; 3], [usize; 2], bool); 5] = [
    ([128, 32, 32], [128, 0], false),
    ([512, 32, 32], [128, 0], true),
    ([128, 16, 16], [256, 256], false),
    ([16, 256, 256], [128, 0], false),
    ([16, 128, 128], [128, 128], true),
];
/// Attentions: images, tokens, channels of the one head. Those of the models, then others that benches/pytorch/attention.py has too.
const ATTENTIONS: [[usize; 3]; 4] = [[128, 256, 256], [16, 256, 512], [16, 1024, 64], [4, 4096, 128]];
/// Their pictures; more of them in the last one, so that 256 MB are moved.
const PICTURES: [[usize; 4]; 3] = [[128, 32, 32, 3], [16, 256, 256, 3], [256, 256, 256, 3]];
/// Their parameters.
const PARAMETERS: [usize; 2] = [35_746_816, 113_673_216];

const BF16: Precision = Precision::Bf16;

pub fn all() -> Vec<Case> {
    let activations = ACTIVATIONS.into_iter().flat_map(of_activations);
    let norms = NORMS.into_iter().flat_map(of_norm);
    let attentions = ATTENTIONS.into_iter().flat_map(of_attention);
    let pictures = PICTURES.into_iter().flat_map(of_pictures);
    let parameters = PARAMETERS.into_iter().flat_map(of_parameters);
    activations.chain(norms).chain(attentions).chain(pictures).chain(parameters).collect()
}

fn named<const N: usize>(shape: [usize; N]) -> String {
    shape.map(|size| size.to_string()).join("×")
}

/// Kernels whose work is to pass over activations.
fn of_activations(shape @ [images, height, width, channels]: [usize; 4]) -> Vec<Case> {
    let len: usize = shape.iter().product();
    let case = |name: &str, launches: Vec<Launch>, inputs: &[usize], output: usize| {
        let elements = inputs.iter().sum::<usize>() + output;
        Case {
            name: name.into(),
            shape: named(shape),
            launches,
            inputs: inputs.iter().map(|&len| Content::Bf16(len)).collect(),
            outputs: vec![Content::Bf16(output)],
            scratch: 0,
            bytes: 2 * elements as u64,
            products: 0,
        }
    };
    let small = [images, height / 2, width / 2, channels];
    let (up, down) = (Upsample { shape: small.into() }, UpsampleGradient { shape: small.into() });
    let rows = images * height * width;
    vec![
        case("add_bf16", vec![add::cuda::launch(&Add { shape: shape.into() }, BF16)], &[len, len], len),
        case("silu_bf16", vec![silu::cuda::launch(&Silu { shape: shape.into() }, BF16)], &[len], len),
        case(
            "silu_gradient_bf16",
            vec![silu::cuda::launch_gradient(&SiluGradient { shape: shape.into() }, BF16, false)],
            &[len, len],
            len,
        ),
        case("upsample_bf16", vec![upsample::cuda::launch(&up, BF16)], &[len / 4], len),
        case("upsample_gradient_bf16", vec![upsample::cuda::launch_gradient(&down, BF16, false)], &[len], len / 4),
        Case {
            inputs: vec![Content::F32(len)],
            bytes: 6 * len as u64,
            ..case("cast_to_bf16", vec![copy::cuda::cast(len, BF16)], &[], len)
        },
        Case {
            outputs: vec![Content::F32(len)],
            bytes: 6 * len as u64,
            ..case("cast_to_f32", vec![copy::cuda::cast(len, Precision::F32)], &[len], 0)
        },
        case("copy_bf16", vec![copy::cuda::launch(&Copy { shape: shape.into() }, BF16, false)], &[len], len),
        Case {
            outputs: vec![Content::F32(channels)],
            scratch: 4 * linear::cuda::pieces(rows) * channels,
            ..case("bias_gradient_bf16", linear::cuda::bias_gradient([rows, channels], BF16, false).into(), &[len], 0)
        },
        Case {
            // y is read too.
            bytes: 6 * len as u64,
            ..case("bias_bf16", vec![linear::cuda::bias([rows, channels], BF16, true)], &[channels, len], len)
        },
    ]
}

/// A norm with SiLU, and its gradient.
fn of_norm((size, channels, is_full): ([usize; 3], [usize; 2], bool)) -> Vec<Case> {
    let [images, pixels, total] = [size[0], size.iter().product(), channels[0] + channels[1]];
    let op = GroupNorm {
        size,
        channels,
        groups: 32,
        eps: 1e-6,
        silu: true,
        timestep: is_full.then_some(Columns { offset: 0, total }),
        dropout: is_full.then_some(Dropout { probability: 0.1, seed: 1, layer: 3 }),
    };
    let sources = channels.into_iter().filter(|&c| c > 0).map(move |c| pixels * c);
    let inputs = || -> Vec<Content> {
        let parameters = [(); 2].map(|()| Content::F32(total));
        let more = is_full.then(|| [Content::Bf16(images * total), words([7, 0, 0, 0])]);
        sources.clone().map(Content::Bf16).chain(parameters).chain(more.into_iter().flatten()).collect()
    };
    let statistics = || Content::F32(images * 32 * 2);
    let activations = 2 * (pixels * total) as u64;
    let text = |parts: &str| format!("{}×{}{parts}", named(size), channels.map(|c| c.to_string()).join("+"));
    let shape = text(if is_full { ", timestep and dropout" } else { "" });
    let gradient = GroupNormGradient { norm: op.clone() };
    let [forward, backward] =
        [group_norm::cuda::forward_passes(&op, BF16), group_norm::cuda::backward_passes(&gradient, BF16)];
    let of_parameters = [(); 2].map(|()| Content::F32(total));
    let of_timestep = is_full.then_some(Content::Bf16(images * total));
    vec![
        Case {
            name: "group_norm_bf16".into(),
            shape: shape.clone(),
            launches: group_norm::cuda::launches(&op, BF16),
            inputs: inputs(),
            outputs: vec![Content::Bf16(pixels * total), statistics()],
            scratch: group_norm::cuda::workspace(&op, forward),
            bytes: 2 * activations,
            products: 0,
        },
        Case {
            name: "group_norm_gradient_bf16".into(),
            shape,
            launches: group_norm::cuda::gradient_launches(&gradient, BF16, 0),
            inputs: [Content::Bf16(pixels * total)].into_iter().chain(inputs()).chain([statistics()]).collect(),
            outputs: sources.clone().map(Content::Bf16).chain(of_parameters).chain(of_timestep).collect(),
            scratch: group_norm::cuda::gradient_workspace(&gradient, backward),
            bytes: 3 * activations,
            products: 0,
        },
    ]
}

/// Attention with one head, and its gradient.
fn of_attention(shape @ [images, tokens, channels]: [usize; 3]) -> Vec<Case> {
    let op = Attention { shape: shape.into(), heads: 1 };
    let (elements, rows) = (images * tokens * channels, images * tokens);
    // q kᵀ and p v; backward dp, dv, dq, dk and the scores.
    let product = 2 * (rows * tokens * channels) as u64;
    let gradient = AttentionGradient { attention: op.clone() };
    vec![
        Case {
            name: "attention_bf16".into(),
            shape: named(shape),
            launches: vec![attention::cuda::launch(&op, BF16)],
            inputs: vec![Content::Bf16(3 * elements)],
            outputs: vec![Content::Bf16(elements), Content::F32(rows)],
            scratch: 0,
            bytes: 8 * elements as u64,
            products: 2 * product,
        },
        Case {
            name: "attention_gradient_bf16".into(),
            shape: named(shape),
            launches: attention::cuda::launches_gradient(&gradient, BF16, false).into(),
            inputs: vec![
                Content::Bf16(3 * elements),
                Content::Bf16(elements),
                Content::F32(rows),
                Content::Bf16(elements),
            ],
            outputs: vec![Content::Bf16(3 * elements)],
            scratch: 4 * attention::cuda::dots(&gradient),
            bytes: 16 * elements as u64,
            // As is usual, without the scores that are computed again.
            products: 5 * product,
        },
    ]
}

fn words(values: impl IntoIterator<Item = u32>) -> Content {
    Content::Exactly(values.into_iter().flat_map(u32::to_ne_bytes).collect())
}

fn floats(values: &[f32]) -> Content {
    Content::Exactly(values.iter().flat_map(|value| value.to_ne_bytes()).collect())
}

/// Kernels at the two ends of the network, where pictures have 3 channels and activations 8.
fn of_pictures(shape @ [images, height, width, channels]: [usize; 4]) -> Vec<Case> {
    const PADDED: usize = 8;
    let (pixels, elements) = (images * height * width, images * height * width * channels);
    let batch = TrainingBatch { images, height, width, channels, timesteps: 1000, flip: true, seed: 1 };
    let config = DiffusionConfig::default();
    let schedule = Schedule::new(&config).expect("the default schedule");
    let table = || floats(schedule.target_table().as_flattened());
    let clock = || words([7, 0, 0, 0]);
    let mse = MseLoss { batch: batch.clone(), global_batch: images };
    let sampler = SamplerTable::new(&schedule, &SamplerConfig::default()).expect("the default sampler");
    let rows: Vec<[f32; 9]> = sampler.steps.iter().map(|step| p_sample::row(step, sampler.clip)).collect();
    let timesteps = sampler.steps.iter().map(|step| step.timestep);
    let case = |name: &str, launches: Vec<Launch>, inputs, outputs, scratch, bytes: usize| Case {
        name: name.into(),
        shape: named(shape),
        launches,
        inputs,
        outputs,
        scratch,
        bytes: bytes as u64,
        products: 0,
    };
    vec![
        case(
            "q_sample_bf16",
            vec![q_sample::cuda::launch(&batch, BF16, PADDED, false)],
            vec![Content::Bytes(elements), table(), clock()],
            vec![Content::Bf16(PADDED * pixels), Content::Bytes(4 * images)],
            0,
            elements + 2 * PADDED * pixels,
        ),
        case(
            "mse_loss_bf16",
            loss::cuda::launches(&mse, BF16, PADDED, false).into(),
            vec![
                Content::Bf16(PADDED * pixels),
                Content::Bytes(elements),
                words((0..images as u32).map(|i| i * 37 % 1000)),
                table(),
                clock(),
            ],
            vec![Content::Bf16(PADDED * pixels), Content::F32(images)],
            8 * images * loss::cuda::partials(&batch),
            elements + 4 * PADDED * pixels,
        ),
        case(
            "p_sample_bf16",
            vec![p_sample::cuda::launch(&PSample { shape: shape.into() }, BF16, PADDED, 0)],
            vec![
                Content::Bf16(PADDED * pixels),
                floats(rows.as_flattened()),
                words(timesteps),
                words([3]),
                words([1, 0]),
            ],
            vec![Content::F32(elements), Content::Bf16(PADDED * pixels)],
            0,
            8 * elements + 4 * PADDED * pixels,
        ),
    ]
}

/// Kernels that pass over all parameters.
fn of_parameters(len: usize) -> Vec<Case> {
    let scalars = [2e-4, 0.1, 0.001, 1e-8, 0.0, 0.9, 0.999, 1.0, 1e-4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let case = |name: &str, launches, inputs, outputs, scratch, bytes: usize| Case {
        name: name.into(),
        shape: named([len]),
        launches,
        inputs,
        outputs,
        scratch,
        bytes: bytes as u64,
        products: 0,
    };
    let ([weights, m, ema], v) = ([(); 3].map(|()| Content::F32(len)), Content::Squares(len));
    vec![
        case(
            "adam_ema",
            vec![adam_ema::cuda::launch(len, false, true)],
            vec![Content::F32(len), floats(&[1.0, 1.0]), floats(&scalars)],
            vec![weights, m, v, ema, Content::Bf16(len)],
            0,
            38 * len,
        ),
        case(
            "accumulate",
            accumulate::cuda::launches(&Accumulate { sums: 1, elements: len }),
            vec![Content::F32(len)],
            vec![Content::F32(len)],
            0,
            12 * len,
        ),
        case(
            "grad_norm_partial",
            grad_norm::cuda::launches(len).into(),
            vec![Content::F32(len)],
            vec![Content::F32(2)],
            8 * grad_norm::cuda::partials(len),
            4 * len,
        ),
    ]
}
