//! The inner loops, over blocks of pixels. Channels are innermost: each loop takes 16 of them at a time (a vector register, or two),
//! keeps what it needs of them in registers, and walks over the pixels.

use crate::multiversion;
use crate::simd::sigmoid;
use std::array::from_fn;

/// Most pixels that are summed in f32 before the sum is added to a compensated one.
pub(super) const MAX_ROWS: usize = 64;

/// A sum per channel as an unevaluated pair of f32 (Knuth's two-sum): about 48 bits, in vectors.
pub(super) struct Sums<'a> {
    pub high: &'a mut [f32],
    pub low: &'a mut [f32],
}

impl<'a> Sums<'a> {
    /// Zero sums in `space`, half of which is for each part.
    pub fn zero(space: &'a mut [f32]) -> Sums<'a> {
        space.fill(0.0);
        let (high, low) = space.split_at_mut(space.len() / 2);
        Sums { high, low }
    }

    pub fn get(&self, channel: usize) -> f64 {
        f64::from(self.high[channel]) + f64::from(self.low[channel])
    }

    /// The sums of some of the channels.
    pub fn part(&mut self, channels: std::ops::Range<usize>) -> Sums<'_> {
        Sums { high: &mut self.high[channels.clone()], low: &mut self.low[channels] }
    }

    #[inline(always)]
    fn add<const W: usize>(&mut self, channel: usize, values: &[f32; W]) {
        let (high, low) = (lanes_mut::<W>(self.high, channel), lanes_mut::<W>(self.low, channel));
        let sum: [f32; W] = from_fn(|l| high[l] + values[l]);
        let error: [f32; W] = from_fn(|l| {
            let of_value = sum[l] - high[l];
            (high[l] - (sum[l] - of_value)) + (values[l] - of_value)
        });
        *low = from_fn(|l| low[l] + error[l]);
        *high = sum;
    }
}

#[inline(always)]
fn lanes<const W: usize>(x: &[f32], at: usize) -> &[f32; W] {
    match x[at..].first_chunk() {
        Some(lanes) => lanes,
        None => panic!("no {W} channels from {at} on"),
    }
}

#[inline(always)]
fn lanes_mut<const W: usize>(x: &mut [f32], at: usize) -> &mut [f32; W] {
    match x[at..].first_chunk_mut() {
        Some(lanes) => lanes,
        None => panic!("no {W} channels from {at} on"),
    }
}

/// Runs the body for all channels, 16, 4 or one at a time: `at` is the first channel, `WIDTH` their number.
macro_rules! for_channels {
    ($channels:expr, $at:ident, $width:ident, $body:block) => {
        let mut $at = 0;
        while $at + 16 <= $channels {
            const $width: usize = 16;
            $body
            $at += $width;
        }
        while $at + 4 <= $channels {
            const $width: usize = 4;
            $body
            $at += $width;
        }
        while $at < $channels {
            const $width: usize = 1;
            $body
            $at += $width;
        }
    };
}

multiversion! {
    /// Adds the first and second moments about `shift` [C] of the pixels `x` [rows, C], at most [`MAX_ROWS`].
    pub(super) fn moments(x: &[f32], shift: &[f32], first: &mut Sums<'_>, second: &mut Sums<'_>) {
        for_channels!(shift.len(), at, W, {
            let shift_lanes = *lanes::<W>(shift, at);
            let (mut sum, mut squares) = ([0.0; W], [0.0; W]);
            for x in x.chunks_exact(shift.len()) {
                let x = *lanes::<W>(x, at);
                let d: [f32; W] = from_fn(|l| x[l] - shift_lanes[l]);
                sum = from_fn(|l| sum[l] + d[l]);
                squares = from_fn(|l| squares[l] + d[l] * d[l]);
            }
            first.add(at, &sum);
            second.add(at, &squares);
        });
    }
}

/// What normalises each channel: z = (x − center)·scale + bias.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    pub center: &'a [f32],
    pub scale: &'a [f32],
    pub bias: &'a [f32],
}

impl<'a> Affine<'a> {
    pub fn part(&self, channels: std::ops::Range<usize>) -> Affine<'a> {
        let part = |x: &'a [f32]| &x[channels.clone()];
        Affine { center: part(self.center), scale: part(self.scale), bias: part(self.bias) }
    }
}

multiversion! {
    /// y = z or SiLU(z) for the pixels `x` [rows, C]; a row of y starts every `stride` elements.
    pub(super) fn normalise(y: &mut [f32], stride: usize, x: &[f32], affine: Affine<'_>, silu: bool) {
        if silu {
            normalise_rows::<true>(y, stride, x, affine);
        } else {
            normalise_rows::<false>(y, stride, x, affine);
        }
    }
}

#[inline(always)]
fn normalise_rows<const SILU: bool>(y: &mut [f32], stride: usize, x: &[f32], affine: Affine<'_>) {
    let channels = affine.center.len();
    for_channels!(channels, at, W, {
        let (center, scale) = (lanes::<W>(affine.center, at), lanes::<W>(affine.scale, at));
        let bias = lanes::<W>(affine.bias, at);
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_mut(stride)) {
            let (x, y) = (lanes::<W>(x, at), lanes_mut::<W>(y, at));
            for l in 0..W {
                let z = (x[l] - center[l]) * scale[l] + bias[l];
                y[l] = if SILU { z * sigmoid(z) } else { z };
            }
        }
    });
}

multiversion! {
    /// dz = dy·SiLU′(z), [rows, C]; a row of dy starts every `stride` elements.
    pub(super) fn silu_gradient(dz: &mut [f32], dy: &[f32], stride: usize, x: &[f32], affine: Affine<'_>) {
        let channels = affine.center.len();
        for_channels!(channels, at, W, {
            let (center, scale) = (lanes::<W>(affine.center, at), lanes::<W>(affine.scale, at));
            let bias = lanes::<W>(affine.bias, at);
            for ((x, dy), dz) in x.chunks_exact(channels).zip(dy.chunks(stride)).zip(dz.chunks_exact_mut(channels)) {
                let (x, dy, dz) = (lanes::<W>(x, at), lanes::<W>(dy, at), lanes_mut::<W>(dz, at));
                for l in 0..W {
                    let z = (x[l] - center[l]) * scale[l] + bias[l];
                    let s = sigmoid(z);
                    dz[l] = dy[l] * (s * (1.0 + z * (1.0 - s)));
                }
            }
        });
    }
}

/// Sums over the pixels of an image, for each channel.
pub(super) struct GradientSums<'a> {
    /// Σ dz
    pub dz: Sums<'a>,
    /// Σ dz·(x − center)
    pub dz_x: Sums<'a>,
    /// Σ (x − center)
    pub x: Sums<'a>,
}

impl GradientSums<'_> {
    pub fn part(&mut self, channels: std::ops::Range<usize>) -> GradientSums<'_> {
        let GradientSums { dz, dz_x, x } = self;
        GradientSums { dz: dz.part(channels.clone()), dz_x: dz_x.part(channels.clone()), x: x.part(channels) }
    }
}

multiversion! {
    /// Adds the sums over the pixels `dz` and `x` [rows, C], at most [`MAX_ROWS`].
    pub(super) fn gradient_sums(dz: &[f32], x: &[f32], center: &[f32], sums: &mut GradientSums<'_>) {
        for_channels!(center.len(), at, W, {
            let center_lanes = *lanes::<W>(center, at);
            let (mut sum_dz, mut sum_dz_x, mut sum_x) = ([0.0; W], [0.0; W], [0.0; W]);
            for (dz, x) in dz.chunks_exact(center.len()).zip(x.chunks_exact(center.len())) {
                let (dz, x) = (*lanes::<W>(dz, at), *lanes::<W>(x, at));
                let d: [f32; W] = from_fn(|l| x[l] - center_lanes[l]);
                sum_dz = from_fn(|l| sum_dz[l] + dz[l]);
                sum_dz_x = from_fn(|l| sum_dz_x[l] + dz[l] * d[l]);
                sum_x = from_fn(|l| sum_x[l] + d[l]);
            }
            sums.dz.add(at, &sum_dz);
            sums.dz_x.add(at, &sum_dz_x);
            sums.x.add(at, &sum_x);
        });
    }
}

/// dx = dz·scale − (x − center)·slope − offset, per channel.
#[derive(Clone, Copy)]
pub(super) struct Back<'a> {
    pub center: &'a [f32],
    pub scale: &'a [f32],
    pub slope: &'a [f32],
    pub offset: &'a [f32],
}

impl<'a> Back<'a> {
    pub fn part(&self, channels: std::ops::Range<usize>) -> Back<'a> {
        let part = |x: &'a [f32]| &x[channels.clone()];
        let Back { center, scale, slope, offset } = *self;
        Back { center: part(center), scale: part(scale), slope: part(slope), offset: part(offset) }
    }
}

multiversion! {
    /// Turns dz, found in `dx`, into dx; all [rows, C].
    pub(super) fn input_gradient(dx: &mut [f32], x: &[f32], back: Back<'_>) {
        let channels = back.center.len();
        for_channels!(channels, at, W, {
            let (center, scale) = (lanes::<W>(back.center, at), lanes::<W>(back.scale, at));
            let (slope, offset) = (lanes::<W>(back.slope, at), lanes::<W>(back.offset, at));
            for (dx, x) in dx.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                let (dx, x) = (lanes_mut::<W>(dx, at), lanes::<W>(x, at));
                for l in 0..W {
                    dx[l] = dx[l] * scale[l] - (x[l] - center[l]) * slope[l] - offset[l];
                }
            }
        });
    }
}

multiversion! {
    /// Adds the gradient to dx; all [rows, C].
    pub(super) fn add_input_gradient(dx: &mut [f32], dz: &[f32], x: &[f32], back: Back<'_>) {
        let channels = back.center.len();
        for_channels!(channels, at, W, {
            let (center, scale) = (lanes::<W>(back.center, at), lanes::<W>(back.scale, at));
            let (slope, offset) = (lanes::<W>(back.slope, at), lanes::<W>(back.offset, at));
            let rows = dx.chunks_exact_mut(channels).zip(dz.chunks_exact(channels)).zip(x.chunks_exact(channels));
            for ((dx, dz), x) in rows {
                let (dx, dz, x) = (lanes_mut::<W>(dx, at), lanes::<W>(dz, at), lanes::<W>(x, at));
                for l in 0..W {
                    dx[l] += dz[l] * scale[l] - (x[l] - center[l]) * slope[l] - offset[l];
                }
            }
        });
    }
}

multiversion! {
    /// y *= mask.
    pub(super) fn apply_mask(y: &mut [f32], mask: &[f32]) {
        for (y, mask) in y.iter_mut().zip(mask) {
            *y *= mask;
        }
    }
}

multiversion! {
    /// Adds `partial` to f64 sums.
    pub(super) fn widen_and_add(sums: &mut [f64], partial: &[f32]) {
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += f64::from(*partial);
        }
    }
}
