//! Matrix products in f32 that take their operands from where they lie.
//!
//! With channels last, every factor of a convolution is made of rows of contiguous channels. So the left operand of these
//! products is not a matrix but a list of [`Segment`]s and a function that says where each logical row finds its part in
//! each of them, [`ZERO_ROW`] meaning padding. A linear layer has one segment, a 3×3 convolution nine (one for each tap,
//! all over the same activations), a layer over two concatenated inputs one for each input and tap. Nothing is unfolded
//! (im2col) or copied: the microkernel broadcasts single floats of the left operand straight from memory and multiplies
//! them by vectors of the right operand.
//!
//! | product | of use in | function |
//! |---|---|---|
//! | C = A·B, B packed | fprop and dgrad of convolutions and linear layers | [`pack_transposed`] or [`pack_rows`], [`rows_times_packed`] |
//! | dW = dYᵀ·A | wgrad of the same | [`transposed_times_rows`] |
//! | 3×3 convolutions of stride 1 with fewer products, and their gradients | fprop, dgrad and wgrad | [`winograd`] |
//! | small products inside one task | attention | [`serial`] |
//!
//! [`window`] computes the row offsets of convolutions.
//!
//! **Bits.** Every element of a result is one chain of fused multiply-adds in a fixed order, or a fixed number of such
//! chains added in a fixed order. The order depends on shapes and on [`simd::level`](crate::simd::level) (which
//! also fixes the layout of packed operands), not on the number of threads.
//!
//! **Memory.** Calls allocate nothing; they use at most [`BASE_SCRATCH`](super::pool::BASE_SCRATCH) of each worker's
//! scratch, which every pool has.
//!
//! Packed operands and results should start on a 64-byte boundary: vectors that straddle cache lines cost up to a third of the
//! speed.
//!
//! **Panics.** Arguments that contradict each other (a slice too short, an offset outside its segment) are mistakes of
//! the calling code and panic with the numbers, before memory is touched out of bounds.
//!
//! A 3×3 convolution, stride 1, of `x` `[N, H, W, Cin]` with OHWI weights `w` `[Cout, 3, 3, Cin]`:
//! ```
//! use ddpm_dist::device::cpu::Pool;
//! use ddpm_dist::device::cpu::gemm::{self, Init, OutRows, Rows, Segment, window::Window};
//!
//! let (images, size, cin, cout) = (2, 8, 16, 24);
//! let x = vec![1.0; images * size * size * cin];
//! let w = vec![0.5; cout * 9 * cin];
//! let bias = vec![0.25; cout];
//! let mut y = vec![0.0; images * size * size * cout];
//! let pool = Pool::new(2);
//!
//! let window = Window::same(images, size, size, 3);
//! let segments = [Segment { data: &x, k: cin }; 9];
//! let offsets = |tap, rows, out: &mut [usize]| window.input_offsets(tap / 3, tap % 3, rows, cin, out);
//! let mut packed = vec![0.0; gemm::packed_len(cout, 9 * cin)];
//! gemm::pack_transposed(&pool, &w, cout, 9 * cin, &mut packed);
//! gemm::rows_times_packed(
//!     &pool,
//!     &Rows { segments: &segments, offsets: &offsets },
//!     window.outputs(),
//!     cout,
//!     &packed,
//!     &mut y,
//!     OutRows::Linear { start: 0, ld: cout },
//!     Init { bias: Some(&bias), ..Init::ZERO },
//! );
//! assert_eq!(y[0], 0.25 + 4.0 * 16.0 * 0.5); // the corner sees 4 of the 9 taps
//! ```

mod kernel;
mod outer;
mod pack;
mod rows;
pub mod serial;
mod tiling;
mod vector;
pub mod window;
pub mod winograd;

use std::ops::Range;

pub use outer::transposed_times_rows;
pub use pack::{pack_rows, pack_transposed, packed_len};
pub use rows::rows_times_packed;
pub use window::Grid;

// For tests, which run every instruction set.
#[cfg(test)]
pub(super) use {
    outer::transposed_times_rows_at,
    pack::{pack_rows_at, pack_transposed_at},
    rows::rows_times_packed_at,
};

use tiling::Tiling;

/// The offset of a row that is all zeros: padding.
pub const ZERO_ROW: usize = usize::MAX;

/// One part of every row of a left operand.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Where the part of each row lies: `k` contiguous floats at the row's offset.
    pub data: &'a [f32],
    /// Floats of this part.
    pub k: usize,
}

/// Writes the offset into `segments[segment].data` of each row in `rows`, or [`ZERO_ROW`].
///
/// Arguments: the number of the segment, the logical rows, and a slice as long as the range.
pub type Offsets<'a> = dyn Fn(usize, Range<usize>, &mut [usize]) + Sync + 'a;

/// A left operand: row r is the concatenation over all segments of `k` floats each.
///
/// The offsets of one range of rows are asked for at most a few times in a call.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub segments: &'a [Segment<'a>],
    pub offsets: &'a Offsets<'a>,
}

/// Where the rows of a result lie.
#[derive(Clone, Copy, Debug)]
pub enum OutRows {
    /// Row r starts at `start + r * ld`; `ld` is at least the number of columns.
    Linear { start: usize, ld: usize },
    /// Row r is pixel [`Grid::pixel`]`(r)` and starts at `start + pixel * ld`.
    Grid { grid: Grid, start: usize, ld: usize },
}

/// What a product is added to: the sum of the parts that are there.
#[derive(Clone, Copy, Debug)]
pub struct Init<'a> {
    /// `[n]`, added to every row.
    pub bias: Option<&'a [f32]>,
    /// Whether the result holds something that stays in the sum.
    pub accumulate: bool,
    /// Added element by element; as long as the result and addressed like it.
    pub residual: Option<&'a [f32]>,
}

impl Init<'_> {
    /// Nothing: the product alone.
    pub const ZERO: Self = Init { bias: None, accumulate: false, residual: None };
    /// What the result holds.
    pub const ACCUMULATE: Self = Init { bias: None, accumulate: true, residual: None };
}

impl Rows<'_> {
    /// Length of a row.
    pub fn k(&self) -> usize {
        self.segments.iter().map(|s| s.k).sum()
    }

    /// The offsets of `rows` in segment `s`, checked against its data.
    fn fill(&self, s: usize, rows: Range<usize>, out: &mut [usize]) {
        (self.offsets)(s, rows.clone(), out);
        let Segment { data, k } = self.segments[s];
        let highest = highest(out);
        assert!(
            highest == 0 || (k <= data.len() && highest - 1 <= data.len() - k),
            "segment {s}, rows {rows:?}: a row of {k} floats starts at {} of {}",
            highest - 1,
            data.len()
        );
    }
}

crate::multiversion! {
    /// One more than the highest offset, 0 if all are padding.
    fn highest(offsets: &[usize]) -> usize {
        // Wrapping: ZERO_ROW becomes the smallest value instead of the largest.
        offsets.iter().fold(0, |highest, offset| offset.wrapping_add(1).max(highest))
    }
}

/// Part `i` of `0..total` cut into `parts` ranges whose lengths differ by at most one.
fn part(total: usize, parts: usize, i: usize) -> Range<usize> {
    let (base, longer) = (total / parts, total % parts);
    let start = i * base + i.min(longer);
    start..start + base + usize::from(i < longer)
}

/// The columns of a right operand cut into panels of whole vectors, as even as can be.
#[derive(Clone, Copy)]
struct Panels {
    columns: usize,
    lanes: usize,
    vectors: usize,
    count: usize,
}

/// One of [`Panels`].
struct Panel {
    first_column: usize,
    columns: usize,
    vectors: usize,
    /// Lanes in use of the last vector.
    lanes: usize,
}

impl Panels {
    fn new(tiling: &Tiling, columns: usize) -> Self {
        let vectors = columns.div_ceil(tiling.lanes);
        Panels { columns, lanes: tiling.lanes, vectors, count: vectors.div_ceil(tiling.max_nv) }
    }

    fn get(&self, i: usize) -> Panel {
        let vectors = part(self.vectors, self.count, i);
        let first_column = vectors.start * self.lanes;
        let columns = (vectors.end * self.lanes).min(self.columns) - first_column;
        let vectors = vectors.len();
        Panel { first_column, columns, vectors, lanes: columns - (vectors - 1) * self.lanes }
    }
}

/// A pointer that tasks share. What they reach through it is disjoint; each use says why.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: sharing the address is harmless; dereferencing it is unsafe and argued for where it happens.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// (A method, so that closures capture the whole and not the field.)
    fn get(&self) -> *mut T {
        self.0
    }
}

/// The first `count` indices' worth of a scratch slice, and the rest of it.
fn take_indices(scratch: &mut [f32], count: usize) -> (&mut [usize], &mut [f32]) {
    const FLOATS: usize = size_of::<usize>() / size_of::<f32>();
    // Whole cache lines, so that what follows stays aligned.
    let (head, rest) = scratch.split_at_mut((count * FLOATS).next_multiple_of(16));
    // SAFETY: any bits are valid for both types; `align_to_mut` finds the aligned part.
    let (_, indices, _) = unsafe { head.align_to_mut::<usize>() };
    (&mut indices[..count], rest)
}
