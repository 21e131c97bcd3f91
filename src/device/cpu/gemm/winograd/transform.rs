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

impl Patch {
    fn strides(&self) -> (isize, isize) {
        (self.line as isize, self.pixel as isize)
    }
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

/// A matrix of the transforms, N columns and M lines.
trait Matrix<const N: usize, const M: usize> {
    /// Its product with a column of vectors.
    ///
    /// # Safety
    /// A processor that has the vectors' instruction set.
    unsafe fn times<V: Vector>(x: [V; N]) -> [V; M];
}

/// Bᵀ
struct Bt;
/// A
struct A;
/// Aᵀ
struct At;
/// G
struct G;
/// Gᵀ
struct Gt;

impl Matrix<4, 4> for Bt {
    #[inline(always)]
    unsafe fn times<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe { [a.sub(c), b.add(c), c.sub(b), b.sub(d)] }
    }
}

impl Matrix<2, 4> for A {
    #[inline(always)]
    unsafe fn times<V: Vector>([a, b]: [V; 2]) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe { [a, a.add(b), a.sub(b), V::splat(0.0).sub(b)] }
    }
}

impl Matrix<4, 2> for At {
    #[inline(always)]
    unsafe fn times<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { [a.add(b).add(c), b.sub(c).sub(d)] }
    }
}

impl Matrix<3, 4> for G {
    #[inline(always)]
    unsafe fn times<V: Vector>([a, b, c]: [V; 3]) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let (half, ends) = (V::splat(0.5), a.add(c));
            [a, half.times(ends.add(b)), half.times(ends.sub(b)), c]
        }
    }
}

impl Matrix<4, 3> for Gt {
    #[inline(always)]
    unsafe fn times<V: Vector>([a, b, c, d]: [V; 4]) -> [V; 3] {
        // SAFETY: the caller's.
        unsafe {
            let half = V::splat(0.5);
            let (sum, difference) = (half.times(b.add(c)), half.times(b.sub(c)));
            [a.add(sum), difference, sum.add(d)]
        }
    }
}

/// m x mᵀ, where x has the value of line i and column j at `from + i * line + j * column`; the result is lines.
#[inline(always)]
unsafe fn both_sides<X: Matrix<N, M>, V: Vector, const FULL: bool, const N: usize, const M: usize>(
    from: *const f32,
    (line, column): (isize, isize),
    lanes: usize,
) -> [[V; M]; M] {
    // SAFETY: the caller promises pointers that are valid for what the arguments say.
    unsafe {
        let mut lines = [[V::splat(0.0); N]; M];
        for j in 0..N {
            let mut x = [V::splat(0.0); N];
            for (i, x) in x.iter_mut().enumerate() {
                *x = load::<V, FULL>(from.offset(i as isize * line + j as isize * column), lanes);
            }
            for (line, value) in lines.iter_mut().zip(X::times(x)) {
                line[j] = value;
            }
        }
        let mut result = [[V::splat(0.0); M]; M];
        for (result, line) in result.iter_mut().zip(lines) {
            *result = X::times(line);
        }
        result
    }
}

/// Stores 4×4 values at 16 places `step` apart.
#[inline(always)]
unsafe fn store_places<V: Vector, const FULL: bool>(values: [[V; 4]; 4], to: *mut f32, step: usize, lanes: usize) {
    for (place, value) in values.into_iter().flatten().enumerate() {
        // SAFETY: the caller's.
        unsafe { store::<V, FULL>(value, to.add(place * step), lanes) };
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
    // SAFETY: the caller's.
    unsafe {
        let values = both_sides::<Bt, V, FULL, 4, 4>(patch.data.add(at), patch.strides(), lanes);
        store_places::<V, FULL>(values, out.add(at), step, lanes);
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
    // SAFETY: the caller's.
    unsafe {
        let values = both_sides::<A, V, FULL, 2, 4>(patch.data.add(at), patch.strides(), lanes);
        store_places::<V, FULL>(values, out.add(at), step, lanes);
    }
}

#[inline(always)]
unsafe fn output_vector<V: Vector, const FULL: bool>(tile: &OutputTile, at: usize, lanes: usize) {
    // SAFETY: the caller's.
    unsafe {
        let step = tile.step as isize;
        let values = both_sides::<At, V, FULL, 4, 2>(tile.products.add(at), (4 * step, step), lanes);
        let bias = if tile.bias.is_null() { V::splat(0.0) } else { load::<V, FULL>(tile.bias.add(at), lanes) };
        for (i, line) in values.into_iter().enumerate().take(tile.lines) {
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
    // SAFETY: the caller's.
    unsafe {
        let values = both_sides::<G, V, FULL, 3, 4>(g.add(at), (3 * taps.ld, taps.ld), lanes);
        store_places::<V, FULL>(values, out.add(at), taps.step, lanes);
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
    // SAFETY: the caller's.
    unsafe {
        let step = taps.step as isize;
        let values = both_sides::<Gt, V, FULL, 4, 3>(u.add(at), (4 * step, step), lanes);
        for (tap, mut value) in values.into_iter().flatten().enumerate() {
            let place = dg.offset(tap as isize * taps.ld).add(at);
            if accumulate {
                value = value.add(load::<V, FULL>(place, lanes));
            }
            store::<V, FULL>(value, place, lanes);
        }
    }
}
