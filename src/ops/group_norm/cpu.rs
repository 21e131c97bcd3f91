//! One task per image: two passes over its pixels forward, two backward. What depends on the channel alone stands in the thread's
//! workspace, so that the passes are a few vector operations per element.

mod kernels;

use super::{GroupNorm, Timestep};
use crate::device::cpu::Launch;
use crate::rng::{Kind, Stream};
use kernels::{Affine, Back, GradientSums, Sums};
use std::ops::Range;

/// Floats of a block of pixels: a few such blocks fit the first-level cache.
const BLOCK: usize = 4096;

/// Channels whose gradients one task sums over the images.
const CHANNELS_PER_TASK: usize = 64;

/// Pixels that are worked on at a time, by shape alone.
fn block_rows(norm: &GroupNorm) -> usize {
    (BLOCK / norm.total_channels()).clamp(1, kernels::MAX_ROWS)
}

/// Floats of a mask for a block of pixels.
fn mask_block(norm: &GroupNorm) -> usize {
    if norm.dropout.is_some() { block_rows(norm) * norm.total_channels() } else { 0 }
}

pub(super) fn forward_scratch(norm: &GroupNorm) -> usize {
    8 * norm.total_channels() + mask_block(norm)
}

pub(super) fn backward_scratch(norm: &GroupNorm) -> usize {
    (11 + block_rows(norm)) * norm.total_channels() + mask_block(norm)
}

/// Floats per image that wait for the sum over images, dγ and dβ, or for their columns, the timestep's gradient.
pub(super) fn partial_sums(norm: &GroupNorm) -> usize {
    let channels = norm.total_channels();
    2 * channels + norm.timestep.map_or(0, |timestep| timestep.columns(channels).len())
}

/// The inputs of the norm.
struct Inputs<'a> {
    norm: &'a GroupNorm,
    sources: [&'a [f32]; 2],
    gamma: &'a [f32],
    beta: &'a [f32],
    timestep: &'a [f32],
    clock: &'a [u32],
}

impl<'a> Inputs<'a> {
    /// They stand from operand `first` on.
    fn new(norm: &'a GroupNorm, launch: &Launch<'a>, first: usize) -> Inputs<'a> {
        let gamma = first + norm.gamma_index();
        let clock = gamma + 2 + usize::from(norm.timestep.is_some());
        Inputs {
            norm,
            sources: [launch.input(first), if norm.sources().len() == 2 { launch.input(first + 1) } else { &[] }],
            gamma: launch.input(gamma),
            beta: launch.input(gamma + 1),
            timestep: if norm.timestep.is_some() { launch.input(gamma + 2) } else { &[] },
            clock: if norm.dropout.is_some() { launch.input(clock) } else { &[] },
        }
    }

    fn image(&self, index: usize) -> Image<'_> {
        let pixels = self.norm.pixels();
        let source = |s: usize| {
            let len = pixels * self.norm.channels[s];
            &self.sources[s][index * len..][..len]
        };
        let channels = self.norm.total_channels();
        let columns = self.norm.timestep.map(|timestep| {
            let row = &self.timestep[index * timestep.total()..][..timestep.total()];
            (timestep, &row[timestep.columns(channels)])
        });
        let (term, modulation) = match columns {
            Some((Timestep::Add { .. }, term)) => (Some(term), None),
            Some((Timestep::ScaleShift { .. }, columns)) => (None, Some(columns.split_at(channels))),
            None => (None, None),
        };
        Image { inputs: self, index, sources: [source(0), source(1)], term, modulation }
    }
}

/// What belongs to one image.
struct Image<'a> {
    inputs: &'a Inputs<'a>,
    index: usize,
    /// [H·W, C1] and [H·W, C2].
    sources: [&'a [f32]; 2],
    /// What the timestep adds before the norm, [C].
    term: Option<&'a [f32]>,
    /// The timestep's scale and shift after the norm, [C] each.
    modulation: Option<(&'a [f32], &'a [f32])>,
}

impl Image<'_> {
    /// Number and columns of each source.
    fn columns(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let [c1, c2] = self.inputs.norm.channels;
        [(0, 0..c1), (1, c1..c1 + c2)].into_iter().filter(|(_, columns)| !columns.is_empty())
    }

    /// Consecutive blocks of pixels.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (pixels, rows) = (self.inputs.norm.pixels(), block_rows(self.inputs.norm));
        (0..pixels).step_by(rows).map(move |start| start..(start + rows).min(pixels))
    }

    /// Some pixels of a source.
    fn block(&self, source: usize, rows: &Range<usize>) -> &[f32] {
        let channels = self.inputs.norm.channels[source];
        &self.sources[source][rows.start * channels..rows.end * channels]
    }

    /// Groups with the channels of each.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let size = self.inputs.norm.total_channels() / self.inputs.norm.groups;
        (0..self.inputs.norm.groups).map(move |g| (g, g * size..(g + 1) * size))
    }

    fn term(&self, channel: usize) -> f32 {
        self.term.map_or(0.0, |term| term[channel])
    }

    /// 1 + scale
    fn factor(&self, channel: usize) -> f32 {
        self.modulation.map_or(1.0, |(scale, _)| 1.0 + scale[channel])
    }

    /// Draws the dropout mask of a block of pixels, if there is dropout: 0 or 1/(1 − probability).
    fn draw_mask<'m>(&self, rows: &Range<usize>, mask: &'m mut [f32]) -> Option<&'m [f32]> {
        let dropout = self.inputs.norm.dropout?;
        let [step, first_sample] = [self.inputs.clock[0], self.inputs.clock[1]];
        let sample = first_sample.wrapping_add(self.index as u32);
        let stream = Stream { seed: dropout.seed, kind: Kind::Dropout, layer: dropout.layer, sample, step };
        let channels = self.inputs.norm.total_channels();
        let mask = &mut mask[..rows.len() * channels];
        stream.fill_keep((rows.start * channels) as u64, 1.0 - dropout.probability, mask);
        Some(mask)
    }

    /// center = mean − term, scale = γ·rstd·(1 + scale) and bias = β·(1 + scale) + shift of every channel, from the stored statistics
    /// [groups, 2].
    fn fill_affine(&self, statistics: &[f32], center: &mut [f32], scale: &mut [f32], bias: &mut [f32]) {
        for (group, channels) in self.groups() {
            let (mean, rstd) = (statistics[2 * group], statistics[2 * group + 1]);
            for c in channels {
                center[c] = mean - self.term(c);
                scale[c] = self.inputs.gamma[c] * rstd * self.factor(c);
                bias[c] = match self.modulation {
                    Some((_, shift)) => self.inputs.beta[c] * self.factor(c) + shift[c],
                    None => self.inputs.beta[c],
                };
            }
        }
    }
}

/// Cuts a workspace into parts of the given lengths.
fn parts<const N: usize>(mut space: &mut [f32], lengths: [usize; N]) -> [&mut [f32]; N] {
    lengths.map(|len| {
        let (part, rest) = std::mem::take(&mut space).split_at_mut(len);
        space = rest;
        part
    })
}

pub(super) fn group_norm(norm: &GroupNorm, launch: &Launch<'_>) {
    let inputs = Inputs::new(norm, launch, 0);
    let (y, statistics) = (launch.output::<f32>(0), launch.output::<f32>(1));
    let (y_len, statistics_len) = (norm.pixels() * norm.total_channels(), 2 * norm.groups);
    launch.pool().for_chunks2((y, y_len), (statistics, statistics_len), |i, y, statistics, scratch| {
        forward(&inputs.image(i), y, statistics, scratch);
    });
}

fn forward(image: &Image<'_>, y: &mut [f32], statistics: &mut [f32], scratch: &mut [f32]) {
    let norm = image.inputs.norm;
    let channels = norm.total_channels();
    let [shift, first, second, center, scale, bias, mask] =
        parts(scratch, [channels, 2 * channels, 2 * channels, channels, channels, channels, mask_block(norm)]);

    // Moments are taken about a value of the channel itself, so that a mean far from zero costs no digits.
    let (mut first, mut second) = (Sums::zero(first), Sums::zero(second));
    for (source, columns) in image.columns() {
        shift[columns.clone()].copy_from_slice(&image.sources[source][..columns.len()]);
        for rows in image.blocks() {
            let (first, second) = (&mut first.part(columns.clone()), &mut second.part(columns.clone()));
            kernels::moments(image.block(source, &rows), &shift[columns.clone()], first, second);
        }
    }
    fill_statistics(image, shift, &first, &second, statistics);

    image.fill_affine(statistics, center, scale, bias);
    let affine = Affine { center, scale, bias };
    for rows in image.blocks() {
        let y = &mut y[rows.start * channels..rows.end * channels];
        for (source, columns) in image.columns() {
            let x = image.block(source, &rows);
            kernels::normalise(&mut y[columns.start..], channels, x, affine.part(columns), norm.silu);
        }
        if let Some(mask) = image.draw_mask(&rows, mask) {
            kernels::apply_mask(y, mask);
        }
    }
}

/// Mean and rstd of each group from the channels' moments about `shift`.
fn fill_statistics(image: &Image<'_>, shift: &[f32], first: &Sums<'_>, second: &Sums<'_>, statistics: &mut [f32]) {
    let pixels = image.inputs.norm.pixels() as f64;
    for (group, channels) in image.groups() {
        let size = channels.len() as f64;
        let mean_of = |c: usize| f64::from(shift[c]) + first.get(c) / pixels + f64::from(image.term(c));
        let mean = channels.clone().map(mean_of).sum::<f64>() / size;
        let variance_of = |c: usize| (second.get(c) / pixels - (first.get(c) / pixels).powi(2)).max(0.0);
        let spread = |c: usize| variance_of(c) + (mean_of(c) - mean).powi(2);
        let variance = channels.map(spread).sum::<f64>() / size;
        statistics[2 * group] = mean as f32;
        statistics[2 * group + 1] = (1.0 / (variance + image.inputs.norm.eps).sqrt()) as f32;
    }
}

/// The gradient of one source for one image, to be set or to be added to.
struct Target<'a> {
    dx: &'a mut [f32],
    adds: bool,
}

pub(super) fn group_norm_gradient(norm: &GroupNorm, launch: &Launch<'_>) {
    let inputs = Inputs::new(norm, launch, 1);
    let dy = launch.input::<f32>(0);
    let statistics = launch.input::<f32>(launch.inputs() - 1);
    let two = norm.sources().len() == 2;
    let adds = [launch.updates(0), two && launch.updates(1)];
    let partials = launch.scratch();
    let partial_len = partial_sums(norm);

    let [len1, len2] = norm.channels.map(|c| norm.pixels() * c);
    let dx1 = launch.output(0);
    let dx2 = if two { launch.output(1) } else { &mut [] };
    launch.pool().for_chunks3(
        (dx1, len1),
        (dx2, len2),
        (&mut *partials, partial_len),
        |i, dx1, dx2, partial, scratch| {
            let (dy_len, statistics_len) = (norm.pixels() * norm.total_channels(), 2 * norm.groups);
            let (dy, statistics) = (&dy[i * dy_len..][..dy_len], &statistics[i * statistics_len..][..statistics_len]);
            let targets = [Target { dx: dx1, adds: adds[0] }, Target { dx: dx2, adds: adds[1] }];
            backward(&inputs.image(i), dy, statistics, targets, partial, scratch);
        },
    );
    add_up_images(norm, partials, launch);
}

fn backward(
    image: &Image<'_>,
    dy: &[f32],
    statistics: &[f32],
    targets: [Target<'_>; 2],
    partial: &mut [f32],
    scratch: &mut [f32],
) {
    let norm = image.inputs.norm;
    let channels = norm.total_channels();
    let sums = [2 * channels; 3];
    let lengths = [channels, channels, channels, channels, channels, sums[0], sums[1], sums[2]];
    let (per_channel, blocks) = scratch.split_at_mut(lengths.iter().sum());
    let [center, scale, bias, slope, offset, sum_dz, sum_dz_x, sum_x] = parts(per_channel, lengths);
    let [spare, mask] = parts(blocks, [block_rows(norm) * channels, mask_block(norm)]);

    image.fill_affine(statistics, center, scale, bias);
    let affine = Affine { center, scale, bias };
    let mut sums = GradientSums { dz: Sums::zero(sum_dz), dz_x: Sums::zero(sum_dz_x), x: Sums::zero(sum_x) };
    let mut targets = targets;

    for rows in image.blocks() {
        let dy = masked(image, &rows, dy, mask);
        for (source, columns) in image.columns() {
            let x = image.block(source, &rows);
            // dz is kept where dx will be, unless a gradient stands there: then it is computed again.
            let Target { dx, adds } = &mut targets[source];
            let dz = if *adds { &mut spare[..x.len()] } else { &mut dx[rows.start * columns.len()..][..x.len()] };
            fill_dz(dz, &dy[columns.start..], x, affine.part(columns.clone()), norm);
            kernels::gradient_sums(dz, x, &center[columns.clone()], &mut sums.part(columns));
        }
    }
    fill_coefficients(image, statistics, &sums, slope, offset, partial);

    let back = Back { center, scale, slope, offset };
    for rows in image.blocks() {
        let any_adds = targets.iter().any(|t| t.adds);
        let dy = if any_adds { masked(image, &rows, dy, mask) } else { &[] };
        for (source, columns) in image.columns() {
            let x = image.block(source, &rows);
            let back = back.part(columns.clone());
            let Target { dx, adds } = &mut targets[source];
            let dx = &mut dx[rows.start * columns.len()..][..x.len()];
            if *adds {
                let dz = &mut spare[..x.len()];
                fill_dz(dz, &dy[columns.start..], x, affine.part(columns), norm);
                kernels::add_input_gradient(dx, dz, x, back);
            } else {
                kernels::input_gradient(dx, x, back);
            }
        }
    }
}

/// The gradient with respect to the output of SiLU for a block of pixels: dy, or dy times the dropout mask.
fn masked<'a>(image: &Image<'_>, rows: &Range<usize>, dy: &'a [f32], space: &'a mut [f32]) -> &'a [f32] {
    let channels = image.inputs.norm.total_channels();
    let dy = &dy[rows.start * channels..rows.end * channels];
    if image.draw_mask(rows, space).is_none() {
        return dy;
    }
    let masked = &mut space[..dy.len()];
    kernels::apply_mask(masked, dy);
    masked
}

/// dz, the gradient with respect to what goes into SiLU, for a block of a source.
fn fill_dz(dz: &mut [f32], dy: &[f32], x: &[f32], affine: Affine<'_>, norm: &GroupNorm) {
    let channels = norm.total_channels();
    if norm.silu {
        kernels::silu_gradient(dz, dy, channels, x, affine);
    } else {
        let columns = affine.center.len();
        for (dz, dy) in dz.chunks_exact_mut(columns).zip(dy.chunks(channels)) {
            dz.copy_from_slice(&dy[..columns]);
        }
    }
}

/// From the sums over pixels what dx needs per channel, and this image's part of dγ, dβ and the gradient of the timestep's columns.
///
/// With γ' = γ·(1 + scale) and M elements per group, dx = rstd·(γ'·dz − Σγ'·dz/M − x̂·Σγ'·dz·x̂/M), where the sums are over the group.
fn fill_coefficients(
    image: &Image<'_>,
    statistics: &[f32],
    sums: &GradientSums<'_>,
    slope: &mut [f32],
    offset: &mut [f32],
    partial: &mut [f32],
) {
    let norm = image.inputs.norm;
    let factor = |c: usize| f64::from(image.factor(c));
    let gamma = |c: usize| f64::from(image.inputs.gamma[c]) * factor(c);
    let (d_gamma, rest) = partial.split_at_mut(norm.total_channels());
    let (d_beta, d_timestep) = rest.split_at_mut(norm.total_channels());
    for (group, channels) in image.groups() {
        let rstd = f64::from(statistics[2 * group + 1]);
        let elements = (channels.len() * norm.pixels()) as f64;
        let mean_dz = channels.clone().map(|c| gamma(c) * sums.dz.get(c)).sum::<f64>() / elements;
        let mean_dz_x = channels.clone().map(|c| gamma(c) * sums.dz_x.get(c) * rstd).sum::<f64>() / elements;
        for c in channels {
            slope[c] = (rstd * rstd * mean_dz_x) as f32;
            offset[c] = (rstd * mean_dz) as f32;
            let (sum_dz, sum_dz_xhat) = (sums.dz.get(c), rstd * sums.dz_x.get(c));
            d_gamma[c] = (factor(c) * sum_dz_xhat) as f32;
            d_beta[c] = (factor(c) * sum_dz) as f32;
            match norm.timestep {
                Some(Timestep::Add { .. }) => {
                    // The sum of dx over the pixels.
                    let sum = gamma(c) * sum_dz - norm.pixels() as f64 * mean_dz - sums.x.get(c) * rstd * mean_dz_x;
                    d_timestep[c] = (rstd * sum) as f32;
                }
                Some(Timestep::ScaleShift { .. }) => {
                    let [gamma, beta] = [image.inputs.gamma[c], image.inputs.beta[c]].map(f64::from);
                    let (d_scale, d_shift) = d_timestep.split_at_mut(norm.total_channels());
                    d_scale[c] = (gamma * sum_dz_xhat + beta * sum_dz) as f32;
                    d_shift[c] = sum_dz as f32;
                }
                None => {}
            }
        }
    }
}

/// dγ and dβ as sums over the images in their order; the timestep's gradients to their columns.
fn add_up_images(norm: &GroupNorm, partials: &[f32], launch: &Launch<'_>) {
    let channels = norm.total_channels();
    let (partial_len, gamma) = (partial_sums(norm), norm.gamma_index());
    let adds = [launch.updates(gamma), launch.updates(gamma + 1)];
    let (d_gamma, d_beta) = (launch.output::<f32>(gamma), launch.output::<f32>(gamma + 1));
    let step = CHANNELS_PER_TASK;
    launch.pool().for_chunks2((d_gamma, step), (d_beta, step), |i, d_gamma, d_beta, _| {
        for (k, out) in [d_gamma, d_beta].into_iter().enumerate() {
            let mut sums = [0.0; CHANNELS_PER_TASK];
            for partial in partials.chunks_exact(partial_len) {
                let part = &partial[k * channels + i * CHANNELS_PER_TASK..][..out.len()];
                kernels::widen_and_add(&mut sums, part);
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = if adds[k] { (f64::from(*out) + sum) as f32 } else { sum as f32 };
            }
        }
    });
    if let Some(timestep) = norm.timestep {
        let rows = launch.output::<f32>(gamma + 2).chunks_exact_mut(timestep.total());
        for (row, partial) in rows.zip(partials.chunks_exact(partial_len)) {
            row[timestep.columns(channels)].copy_from_slice(&partial[2 * channels..]);
        }
    }
}
