//! The transforms of one tile, a vector of channels at a time, compiled for every instruction set.

#[cfg(target_arch = "x86_64")]
use super::super::vector::{Avx2, Avx512};
use super::super::vector::{Plain, Vector};
use crate::simd::Level;

/// A square of pixels of some channels.
pub(super) struct Patch {
    /// The first channel of the first pixel.
    pub data: *const f32,
    /// Floats from one line to the next, and from one pixel to the next.
    pub line: usize,
    pub pixel: usize,
}

/// Writes place p of the transformed patch to `out + p * step`: `(patch, channels, out, step)`.
pub(super) type PatchTransform = unsafe fn(&Patch, usize, *mut f32, usize);

/// Four outputs, made from products and added to what a product is added to ([`Init`](super::super::Init)).
pub(super) struct OutputTile {
    /// Place p is at `products + p * step`.
    pub products: *const f32,
    pub step: usize,
    pub channels: usize,
    /// The first pixel of the result, and floats from one line and pixel to the next.
    pub y: *mut f32,
    pub line: usize,
    pub pixel: usize,
    /// Lines and pixels (1 or 2) that lie inside the picture.
    pub lines: usize,
    pub pixels: usize,
    /// Null if there is none.
    pub bias: *const f32,
    pub accumulate: bool,
    /// Addressed like `y`; null if there is none.
    pub residual: *const f32,
}

/// The filters of one output, `[3, 3, ld]`, some channels of it.
#[derive(Clone, Copy)]
pub(super) struct Taps {
    /// Floats from one tap to the next; negative to turn the filter.
    pub ld: isize,
    pub channels: usize,
    /// From one place of the transformed filter to the next.
    pub step: usize,
}

/// The transforms of one instruction set. All need a processor that has it, and pointers valid for what the arguments say.
pub(super) struct Transforms {
    /// Bᵀ d B of 4×4 inputs.
    pub input: PatchTransform,
    /// A dy Aᵀ of the gradient of 2×2 outputs.
    pub output_gradient: PatchTransform,
    /// Aᵀ m A of 16 products.
    pub output: unsafe fn(&OutputTile),
    /// G g Gᵀ: `(taps, g, out)`.
    pub filter: unsafe fn(&Taps, *const f32, *mut f32),
    /// dg (+)= Gᵀ u G: `(taps, u, dg, accumulate)`.
    pub filter_gradient: unsafe fn(&Taps, *const f32, *mut f32, bool),
}

impl Transforms {
    pub(super) fn of(level: Level) -> &'static Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &AVX2,
            _ => &PLAIN,
        }
    }
}

/// Calls `f::<V, FULL>(arguments…, first channel, lanes)` for every vector of `channels`; only the last may not be full.
macro_rules! for_vectors {
    ($vector:ty, $channels:expr, $f:ident($($argument:expr),*)) => {{
        let (channels, lanes) = ($channels, <$vector as Vector>::LANES);
        let mut at = 0;
        while at + lanes <= channels {
            $f::<$vector, true>($($argument,)* at, lanes);
            at += lanes;
        }
        if at < channels {
            $f::<$vector, false>($($argument,)* at, channels - at);
        }
    }};
}
/// Compiles the transforms for one instruction set.
macro_rules! transforms {
    ($table:ident, $vector:ty $(, #[$feature:meta])*) => {
        static $table: Transforms = {
            $(#[$feature])*
            unsafe fn input(patch: &Patch, channels: usize, out: *mut f32, step: usize) {
                // SAFETY: the caller's.
                unsafe { for_vectors!($vector, channels, input_vector(patch, out, step)) }
            }
            $(#[$feature])*
            unsafe fn output_gradient(patch: &Patch, channels: usize, out: *mut f32, step: usize) {
                // SAFETY: the caller's.
                unsafe { for_vectors!($vector, channels, output_gradient_vector(patch, out, step)) }
            }
            $(#[$feature])*
            unsafe fn output(tile: &OutputTile) {
                // SAFETY: the caller's.
                unsafe { for_vectors!($vector, tile.channels, output_vector(tile)) }
            }
            $(#[$feature])*
            unsafe fn filter(taps: &Taps, g: *const f32, out: *mut f32) {
                // SAFETY: the caller's.
                unsafe { for_vectors!($vector, taps.channels, filter_vector(taps, g, out)) }
            }
            $(#[$feature])*
            unsafe fn filter_gradient(taps: &Taps, u: *const f32, dg: *mut f32, accumulate: bool) {
                // SAFETY: the caller's.
                unsafe { for_vectors!($vector, taps.channels, filter_gradient_vector(taps, u, dg, accumulate)) }
            }
            Transforms { input, output_gradient, output, filter, filter_gradient }
        };
    };
}

#[cfg(target_arch = "x86_64")]
transforms!(AVX512, Avx512, #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi1,bmi2")]);
#[cfg(target_arch = "x86_64")]
transforms!(AVX2, Avx2, #[target_feature(enable = "avx2,fma,bmi1,bmi2")]);
transforms!(PLAIN, Plain);

#[inline(always)]
unsafe fn load<V: Vector, const FULL: bool>(from: *const f32, lanes: usize) -> V {
    // SAFETY: the caller's.
    unsafe { if FULL { V::load(from) } else { V::load_first(from, lanes) } }
}

#[inline(always)]
unsafe fn store<V: Vector, const FULL: bool>(value: V, to: *mut f32, lanes: usize) {
    // SAFETY: the caller's.
    unsafe { if FULL { value.store(to) } else { value.store_first(to, lanes) } }
}

/// Bᵀ d
#[inline(always)]
unsafe fn input_side<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 4] {
    // SAFETY: the caller's.
    unsafe { [a.sub(c), b.add(c), c.sub(b), b.sub(d)] }
}

/// A dy
#[inline(always)]
unsafe fn output_gradient_side<V: Vector>([a, b]: [V; 2]) -> [V; 4] {
    // SAFETY: the caller's.
    unsafe { [a, a.add(b), a.sub(b), V::splat(0.0).sub(b)] }
}

/// Aᵀ m
#[inline(always)]
unsafe fn output_side<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe { [a.add(b).add(c), b.sub(c).sub(d)] }
}

/// G g
#[inline(always)]
unsafe fn filter_side<V: Vector>([a, b, c]: [V; 3]) -> [V; 4] {
    // SAFETY: the caller's.
    unsafe {
        let (half, ends) = (V::splat(0.5), a.add(c));
        [a, half.times(ends.add(b)), half.times(ends.sub(b)), c]
    }
}

/// Gᵀ u
#[inline(always)]
unsafe fn filter_gradient_side<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 3] {
    // SAFETY: the caller's.
    unsafe {
        let half = V::splat(0.5);
        let (sum, difference) = (half.times(b.add(c)), half.times(b.sub(c)));
        [a.add(sum), difference, sum.add(d)]
    }
}

#[inline(always)]
unsafe fn input_vector<V: Vector, const FULL: bool>(
    patch: &Patch,
    out: *mut f32,
    step: usize,
    at: usize,
    lanes: usize,
) {
    // SAFETY: the caller promises pointers that are valid for what the arguments say.
    unsafe {
        let mut columns = [[V::splat(0.0); 4]; 4];
        for (j, column) in columns.iter_mut().enumerate() {
            let mut d = [V::splat(0.0); 4];
            for (i, d) in d.iter_mut().enumerate() {
                *d = load::<V, FULL>(patch.data.add(i * patch.line + j * patch.pixel + at), lanes);
            }
            *column = input_side(d);
        }
        let [a, b, c, d] = columns;
        for i in 0..4 {
            let line = input_side([a[i], b[i], c[i], d[i]]);
            for (j, value) in line.into_iter().enumerate() {
                store::<V, FULL>(value, out.add((4 * i + j) * step + at), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn output_gradient_vector<V: Vector, const FULL: bool>(
    patch: &Patch,
    out: *mut f32,
    step: usize,
    at: usize,
    lanes: usize,
) {
    // SAFETY: as in `input_vector`.
    unsafe {
        let mut columns = [[V::splat(0.0); 4]; 2];
        for (j, column) in columns.iter_mut().enumerate() {
            let mut dy = [V::splat(0.0); 2];
            for (i, dy) in dy.iter_mut().enumerate() {
                *dy = load::<V, FULL>(patch.data.add(i * patch.line + j * patch.pixel + at), lanes);
            }
            *column = output_gradient_side(dy);
        }
        let [a, b] = columns;
        for i in 0..4 {
            let line = output_gradient_side([a[i], b[i]]);
            for (j, value) in line.into_iter().enumerate() {
                store::<V, FULL>(value, out.add((4 * i + j) * step + at), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn output_vector<V: Vector, const FULL: bool>(tile: &OutputTile, at: usize, lanes: usize) {
    // SAFETY: as in `input_vector`.
    unsafe {
        let mut columns = [[V::splat(0.0); 2]; 4];
        for (j, column) in columns.iter_mut().enumerate() {
            let mut m = [V::splat(0.0); 4];
            for (i, m) in m.iter_mut().enumerate() {
                *m = load::<V, FULL>(tile.products.add((4 * i + j) * tile.step + at), lanes);
            }
            *column = output_side(m);
        }
        let [a, b, c, d] = columns;
        let bias = if tile.bias.is_null() { V::splat(0.0) } else { load::<V, FULL>(tile.bias.add(at), lanes) };
        for i in 0..tile.lines {
            let line = output_side([a[i], b[i], c[i], d[i]]);
            for (j, value) in line.into_iter().enumerate().take(tile.pixels) {
                let place = i * tile.line + j * tile.pixel + at;
                let mut sum = bias;
                if tile.accumulate {
                    sum = sum.add(load::<V, FULL>(tile.y.add(place), lanes));
                }
                if !tile.residual.is_null() {
                    sum = sum.add(load::<V, FULL>(tile.residual.add(place), lanes));
                }
                store::<V, FULL>(sum.add(value), tile.y.add(place), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn filter_vector<V: Vector, const FULL: bool>(
    taps: &Taps,
    g: *const f32,
    out: *mut f32,
    at: usize,
    lanes: usize,
) {
    // SAFETY: as in `input_vector`.
    unsafe {
        let mut columns = [[V::splat(0.0); 4]; 3];
        for (j, column) in columns.iter_mut().enumerate() {
            let mut g_column = [V::splat(0.0); 3];
            for (i, value) in g_column.iter_mut().enumerate() {
                *value = load::<V, FULL>(g.offset((3 * i + j) as isize * taps.ld).add(at), lanes);
            }
            *column = filter_side(g_column);
        }
        let [a, b, c] = columns;
        for i in 0..4 {
            let line = filter_side([a[i], b[i], c[i]]);
            for (j, value) in line.into_iter().enumerate() {
                store::<V, FULL>(value, out.add((4 * i + j) * taps.step + at), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn filter_gradient_vector<V: Vector, const FULL: bool>(
    taps: &Taps,
    u: *const f32,
    dg: *mut f32,
    accumulate: bool,
    at: usize,
    lanes: usize,
) {
    // SAFETY: as in `input_vector`.
    unsafe {
        let mut columns = [[V::splat(0.0); 3]; 4];
        for (j, column) in columns.iter_mut().enumerate() {
            let mut u_column = [V::splat(0.0); 4];
            for (i, value) in u_column.iter_mut().enumerate() {
                *value = load::<V, FULL>(u.add((4 * i + j) * taps.step + at), lanes);
            }
            *column = filter_gradient_side(u_column);
        }
        let [a, b, c, d] = columns;
        for i in 0..3 {
            let line = filter_gradient_side([a[i], b[i], c[i], d[i]]);
            for (j, mut value) in line.into_iter().enumerate() {
                let place = dg.offset((3 * i + j) as isize * taps.ld).add(at);
                if accumulate {
                    value = value.add(load::<V, FULL>(place, lanes));
                }
                store::<V, FULL>(value, place, lanes);
            }
        }
    }
}
