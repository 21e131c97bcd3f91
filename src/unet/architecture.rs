//! The UNet of Ho et al. 2020, appendix B, as the paper's code and diffusers' `UNet2DModel` build it.
//!
//! ```text
//! t ─► sin|cos ─► linear ─► SiLU ─► linear ─► SiLU ─► one projection for every residual block
//! x_t ─► conv ─► level 0: (residual block [+ attention]) × blocks, ↓ ─► level 1 … ─► middle: block, attention, block
//!         ... ─► level 1: (residual block [+ attention]) × (blocks + 1), ↑ ─► level 0 ─► norm, SiLU, conv ─► output
//! ```
//! Each block on the way up reads, beside the one before it, one value of the way down ("skip"), last in first out.

use super::{TimestepForm, UnetConfig};
use crate::ops::add::add;
use crate::ops::attention::attention;
use crate::ops::conv2d::{Stride, conv2d};
use crate::ops::group_norm::{Dropout, Norm, Timestep, group_norm};
use crate::ops::linear::linear;
use crate::ops::pad::pad;
use crate::ops::silu::silu;
use crate::ops::timestep_embedding::timestep_embedding;
use crate::ops::upsample::upsample;
use crate::tape::{Part, Shape, Tape, Var};
use std::ops::Range;

/// Dropout of a training pass: the run's seed, and the value that holds step and first sample.
#[derive(Clone, Copy, Debug)]
pub struct Randomness {
    /// Key of all draws.
    pub seed: u64,
    /// `[4]` u32: step, index of the first sample in the global batch.
    pub clock: Var,
}

/// Puts the network ε_θ(x_t, t) on the tape: `x` is `[N, H, W, C]` with C [filled up](Tape::padded), `t` `[N]`; the result has the shape of
/// `x`.
///
/// Dropout is active where `training` says how to draw it. The config must be [valid](UnetConfig::validate) for the size of `x`.
pub fn unet(tape: &mut Tape, config: &UnetConfig, x: Var, t: Var, training: Option<Randomness>) -> Var {
    let blocks = residual_blocks(config);
    let timestep = timestep_features(tape, config, t, &blocks);
    let out = Trace { config, training, timestep, blocks, dropouts: 0 }.body(tape, x);
    // x + F(x) of every residual block and attention, by F's last op: one pass over memory less.
    tape.fuse_residuals(|op| op == "add");
    out
}

/// State of the trace: what all residual blocks read, and which dropout mask comes next.
struct Trace<'c> {
    config: &'c UnetConfig,
    training: Option<Randomness>,
    /// The projections of the timestep embedding for all residual blocks, side by side.
    timestep: Var,
    /// The residual blocks, each with its columns of these.
    blocks: Vec<(String, Range<usize>)>,
    dropouts: u32,
}

impl Trace<'_> {
    fn body(&mut self, tape: &mut Tape, x: Var) -> Var {
        let UnetConfig { channels, blocks, image_channels, .. } = self.config;
        let lowest = channels.len() - 1;

        let mut h = tape.scope("conv_in", |tape| edge(tape, x, [*image_channels, channels[0]], false));
        let mut skips = vec![h];
        for (level, &width) in channels.iter().enumerate() {
            tape.scope(format!("down_blocks.{level}"), |tape| {
                for block in 0..*blocks {
                    h = self.resnet(tape, block, &[h], width);
                    h = self.attention(tape, block, h, level);
                    skips.push(h);
                }
                if level < lowest {
                    h = tape.scope("downsamplers.0.conv", |tape| conv3(tape, h, width, Stride::Two));
                    skips.push(h);
                }
            });
        }

        tape.scope("mid_block", |tape| {
            h = self.resnet(tape, 0, &[h], channels[lowest]);
            if self.config.mid_attention {
                h = self.attention_with_groups(tape, 0, h, self.config.norm_of_mid_attention());
            }
            h = self.resnet(tape, 1, &[h], channels[lowest]);
        });

        for (level, &width) in channels.iter().enumerate().rev() {
            tape.scope(format!("up_blocks.{}", lowest - level), |tape| {
                for block in 0..blocks + 1 {
                    let sources: Vec<Var> = std::iter::once(h).chain(skips.pop()).collect();
                    h = self.resnet(tape, block, &sources, width);
                    h = self.attention(tape, block, h, level);
                }
                if level > 0 {
                    h = tape.scope("upsamplers.0.conv", |tape| {
                        let large = upsample(tape, h);
                        conv3(tape, large, width, Stride::One)
                    });
                }
            });
        }

        h = tape.scope("conv_norm_out", |tape| norm(tape, &[h], self.norm(true), None, None));
        tape.scope("conv_out", |tape| edge(tape, h, [channels[0], *image_channels], true))
    }

    /// Norm, SiLU, conv, + timestep, norm, SiLU, dropout, conv, + input (through a 1×1 convolution where channels change); or the timestep
    /// scales and shifts what the second norm gives.
    fn resnet(&mut self, tape: &mut Tape, number: usize, sources: &[Var], out: usize) -> Var {
        tape.scope(format!("resnets.{number}"), |tape| {
            let h = tape.scope("norm1", |tape| norm(tape, sources, self.norm(true), None, None));
            let h = tape.scope("conv1", |tape| conv3(tape, h, out, Stride::One));
            let timestep = self.timestep_columns(tape);
            let dropout = self.dropout();
            let h = tape.scope("norm2", |tape| norm(tape, &[h], self.norm(true), Some(timestep), dropout));
            let h = tape.scope("conv2", |tape| conv3(tape, h, out, Stride::One));
            let channels: usize = sources.iter().map(|&s| tape.shape(s).rows_and_columns().1).sum();
            let shortcut = match sources {
                [x] if channels == out => *x,
                _ => tape.scope("conv_shortcut", |tape| dense(tape, sources, out)),
            };
            add(tape, shortcut, h)
        })
    }

    fn attention(&self, tape: &mut Tape, number: usize, x: Var, level: usize) -> Var {
        if !self.config.attention_levels.contains(&level) {
            return x;
        }
        self.attention_with_groups(tape, number, x, Some(self.config.groups))
    }

    /// Norm (of so many groups, if there is one), q/k/v by one 1×1 convolution, softmax(q·kᵀ/√d)·v, 1×1 convolution, + input.
    fn attention_with_groups(&self, tape: &mut Tape, number: usize, x: Var, groups: Option<usize>) -> Var {
        let channels = tape.shape(x).nhwc()[3];
        let heads = match self.config.head_channels {
            0 => 1,
            size => channels / size,
        };
        tape.scope(format!("attentions.{number}"), |tape| {
            let h = match groups.map(|groups| Norm { groups, ..self.norm(false) }) {
                Some(config) => tape.scope("group_norm", |tape| norm(tape, &[x], config, None, None)),
                None => x,
            };
            let qkv = |tape: &mut Tape, kind: &str, shape: Shape| -> Vec<Part> {
                ["to_q", "to_k", "to_v"]
                    .iter()
                    .map(|name| Part { name: tape.path(&format!("{name}.{kind}")), shape: shape.clone() })
                    .collect()
            };
            let weights = qkv(tape, "weight", [channels, channels].into());
            let biases = qkv(tape, "bias", [channels].into());
            let weight = tape.fused_param([3 * channels, channels], weights);
            let bias = tape.fused_param([3 * channels], biases);
            let h = tape.scope("to_qkv", |tape| linear(tape, &[h], weight, bias));
            let h = attention(tape, h, heads);
            let h = tape.scope("to_out.0", |tape| dense(tape, &[h], channels));
            add(tape, x, h)
        })
    }

    /// The timestep projections, and what the residual block whose scope is open does with its columns of them.
    ///
    /// # Panics
    /// If [`residual_blocks`] does not know a block that [`Trace::body`] runs.
    fn timestep_columns(&self, tape: &Tape) -> (Var, Timestep) {
        let block = tape.path("");
        let Some((_, columns)) = self.blocks.iter().find(|(name, _)| *name == block) else {
            panic!("no timestep projection for {block}")
        };
        let (offset, total) = (columns.start, tape.shape(self.timestep).rows_and_columns().1);
        let timestep = match self.config.timestep {
            TimestepForm::Add => Timestep::Add { offset, total },
            TimestepForm::ScaleShift => Timestep::ScaleShift { offset, total },
        };
        (self.timestep, timestep)
    }

    fn norm(&self, silu: bool) -> Norm {
        Norm { groups: self.config.groups, eps: self.config.norm_eps, silu }
    }

    fn dropout(&mut self) -> Option<(Dropout, Var)> {
        let randomness = self.training.filter(|_| self.config.dropout > 0.0)?;
        let layer = self.dropouts;
        self.dropouts += 1;
        Some((Dropout { probability: self.config.dropout as f32, seed: randomness.seed, layer }, randomness.clock))
    }
}

/// `[N, Σ columns]`: SiLU of the timestep embedding, projected for every residual block by one matrix.
fn timestep_features(tape: &mut Tape, config: &UnetConfig, t: Var, blocks: &[(String, Range<usize>)]) -> Var {
    let UnetConfig { channels, flip_sin_to_cos, freq_shift, .. } = config;
    let width = 4 * channels[0];
    let embedding = timestep_embedding(tape, t, channels[0], *freq_shift, *flip_sin_to_cos);
    let features = tape.scope("time_embedding", |tape| {
        let h = tape.scope("linear_1", |tape| dense(tape, &[embedding], width));
        let h = silu(tape, h);
        let h = tape.scope("linear_2", |tape| dense(tape, &[h], width));
        silu(tape, h)
    });
    let total = blocks.iter().map(|(_, columns)| columns.len()).sum();
    let part = |kind: &str, shape: &dyn Fn(usize) -> Shape| -> Vec<Part> {
        let name = |block: &str| format!("{block}.time_emb_proj.{kind}");
        blocks.iter().map(|(block, columns)| Part { name: name(block), shape: shape(columns.len()) }).collect()
    };
    let weight = tape.fused_param([total, width], part("weight", &|out| [out, width].into()));
    let bias = tape.fused_param([total], part("bias", &|out| [out].into()));
    tape.scope("time_emb_proj", |tape| linear(tape, &[features], weight, bias))
}

/// Names of all residual blocks, each with its columns of the timestep projections: one or two for each of its output channels.
fn residual_blocks(config: &UnetConfig) -> Vec<(String, Range<usize>)> {
    let lowest = config.channels.len() - 1;
    let (mut found, mut column) = (Vec::new(), 0);
    let mut add = |block: String, count: usize, out: usize| {
        let columns = config.timestep.columns() * out;
        for number in 0..count {
            found.push((format!("{block}.resnets.{number}"), column..column + columns));
            column += columns;
        }
    };
    for (level, &out) in config.channels.iter().enumerate() {
        add(format!("down_blocks.{level}"), config.blocks, out);
    }
    add("mid_block".into(), 2, config.channels[lowest]);
    for (level, &out) in config.channels.iter().enumerate().rev() {
        add(format!("up_blocks.{}", lowest - level), config.blocks + 1, out);
    }
    found
}

fn conv3(tape: &mut Tape, x: Var, out: usize, stride: Stride) -> Var {
    let channels = tape.shape(x).nhwc()[3];
    let weight = tape.param("weight", [out, 3, 3, channels]);
    let bias = tape.param("bias", [out]);
    conv2d(tape, x, weight, bias, stride)
}

/// The first or the last convolution, whose input or output has the channels of images, filled up.
fn edge(tape: &mut Tape, x: Var, [channels, out]: [usize; 2], is_out: bool) -> Var {
    let (padded, with_out) = match is_out {
        true => (channels, tape.padded(out)),
        false => (tape.padded(channels), out),
    };
    let weight = tape.param("weight", [out, 3, 3, channels]);
    let bias = tape.param("bias", [out]);
    let weight = pad(tape, weight, [with_out, padded]);
    let bias = pad(tape, bias, [with_out; 2]);
    conv2d(tape, x, weight, bias, Stride::One)
}

fn dense(tape: &mut Tape, sources: &[Var], out: usize) -> Var {
    let channels = sources.iter().map(|&s| tape.shape(s).rows_and_columns().1).sum();
    let weight = tape.param("weight", [out, channels]);
    let bias = tape.param("bias", [out]);
    linear(tape, sources, weight, bias)
}

fn norm(
    tape: &mut Tape,
    sources: &[Var],
    config: Norm,
    timestep: Option<(Var, Timestep)>,
    dropout: Option<(Dropout, Var)>,
) -> Var {
    let channels: usize = sources.iter().map(|&s| tape.shape(s).nhwc()[3]).sum();
    let gamma = tape.param("weight", [channels]);
    let beta = tape.param("bias", [channels]);
    group_norm(tape, &config, sources, [gamma, beta], timestep, dropout)
}
