//! The microkernels, compiled for every tile size and instruction set, and the tables they are chosen from.
//!
//! Two of them hold a tile of `MR` rows by `NV` vectors of the result in registers, and for each step of the reduction load `NV`
//! vectors and multiply them by `MR` broadcast floats. [`RowTile`] takes the vectors from a packed panel and walks along
//! `MR` rows of the left operand; [`OuterTile`] takes the vectors and `MR` neighbouring floats from two lists of rows.
//! The third is for results of so few columns that most lanes would idle: it holds `MR` by `N` sums, whose lanes run along
//! the reduction, and takes the columns of B from a packed operand that holds them one after another.

use super::ZERO_ROW;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Plain, Vector};
use crate::simd::Level;

/// Longest [`Run`], in floats.
pub(super) const MAX_RUN: usize = 512;

/// What rows of padding point to.
#[repr(align(64))]
struct Zeros([f32; MAX_RUN]);
static ZEROS: Zeros = Zeros([0.0; MAX_RUN]);

/// A stretch of the reduction over which every row of the left operand is contiguous.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// Row i of the tile starts at `data + rows[i]`; a row that is [`ZERO_ROW`] is zeros.
    pub(super) data: *const f32,
    pub(super) rows: *const usize,
    /// At most [`MAX_RUN`].
    pub(super) k: usize,
}

/// C tile = init + Σ over runs of A rows × B panel.
pub(super) struct RowTile<'a> {
    pub(super) runs: &'a [Run],
    /// `Σ k` rows of `NV` full vectors; for the dot kernel, columns of `Σ k` floats that start `ldb` apart.
    pub(super) b: *const f32,
    pub(super) ldb: usize,
    /// Row i of the result starts at `c + c_rows[i]`.
    pub(super) c: *mut f32,
    pub(super) c_rows: *const usize,
    /// Lanes in use of the last vector.
    pub(super) lanes: usize,
    /// Added to every row, or null.
    pub(super) bias: *const f32,
    /// Whether the result is added to what it holds already.
    pub(super) accumulate: bool,
    /// Added with the addressing of `c`, or null.
    pub(super) residual: *const f32,
}

/// C tile = init + Σ over r of (MR floats of row r of D)ᵀ × (row r of X).
pub(super) struct OuterTile {
    /// Rows to sum over.
    pub(super) r: usize,
    /// Row r is at `d + d_rows[r]`.
    pub(super) d: *const f32,
    pub(super) d_rows: *const usize,
    /// Row r is at `x + x_rows[r]`.
    pub(super) x: *const f32,
    pub(super) x_rows: *const usize,
    pub(super) c: *mut f32,
    pub(super) ldc: usize,
    /// Lanes in use of the last vector, of x and of the result.
    pub(super) lanes: usize,
    pub(super) accumulate: bool,
}

/// Registers for the tile of the result: `MR` rows of `NV` vectors.
type Tile<V, const MR: usize, const NV: usize> = [[V; NV]; MR];

#[inline(always)]
unsafe fn row_kernel<V: Vector, const MR: usize, const NV: usize>(t: &RowTile) {
    // SAFETY: the caller promises that every pointer of the tile is valid for what the fields say.
    unsafe {
        let mut acc: Tile<V, MR, NV> = [[V::splat(0.0); NV]; MR];
        if !t.bias.is_null() {
            let mut bias = [V::splat(0.0); NV];
            for (j, bias) in bias.iter_mut().enumerate() {
                *bias = load::<V, NV>(t.bias, j, t.lanes);
            }
            for row in &mut acc {
                *row = bias;
            }
        }
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                let c = t.c.add(*t.c_rows.add(i));
                for (j, acc) in row.iter_mut().enumerate() {
                    *acc = acc.add(load::<V, NV>(c, j, t.lanes));
                }
            }
        }
        if !t.residual.is_null() {
            for (i, row) in acc.iter_mut().enumerate() {
                let c = t.residual.add(*t.c_rows.add(i));
                for (j, acc) in row.iter_mut().enumerate() {
                    *acc = acc.add(load::<V, NV>(c, j, t.lanes));
                }
            }
        }
        let mut b = t.b;
        for run in t.runs {
            let (rows, any) = row_starts::<MR>(run);
            if any {
                for k in 0..run.k {
                    let mut panel = [V::splat(0.0); NV];
                    for (j, panel) in panel.iter_mut().enumerate() {
                        *panel = V::load(b.add((k * NV + j) * V::LANES));
                    }
                    for i in 0..MR {
                        let a = V::splat(*rows[i].add(k));
                        for j in 0..NV {
                            acc[i][j] = acc[i][j].add_product(a, panel[j]);
                        }
                    }
                }
            }
            b = b.add(run.k * NV * V::LANES);
        }
        for (i, row) in acc.iter().enumerate() {
            let c = t.c.add(*t.c_rows.add(i));
            store::<V, NV>(row, c, t.lanes);
        }
    }
}

#[inline(always)]
unsafe fn outer_kernel<V: Vector, const MR: usize, const NV: usize>(t: &OuterTile) {
    // SAFETY: the caller's.
    unsafe {
        // Two loops, as a load of some lanes takes up a port that multiplies.
        if t.lanes == V::LANES { outer_loop::<V, MR, NV, true>(t) } else { outer_loop::<V, MR, NV, false>(t) }
    }
}

#[inline(always)]
unsafe fn outer_loop<V: Vector, const MR: usize, const NV: usize, const FULL: bool>(t: &OuterTile) {
    // SAFETY: the caller promises that every pointer of the tile is valid for what the fields say.
    unsafe {
        let mut acc: Tile<V, MR, NV> = [[V::splat(0.0); NV]; MR];
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, acc) in row.iter_mut().enumerate() {
                    *acc = load::<V, NV>(t.c.add(i * t.ldc), j, t.lanes);
                }
            }
        }
        for r in 0..t.r {
            let d = t.d.add(*t.d_rows.add(r));
            let row = t.x.add(*t.x_rows.add(r));
            let mut x = [V::splat(0.0); NV];
            for (j, x) in x.iter_mut().enumerate() {
                *x = if FULL { V::load(row.add(j * V::LANES)) } else { load::<V, NV>(row, j, t.lanes) };
            }
            for i in 0..MR {
                let a = V::splat(*d.add(i));
                for j in 0..NV {
                    acc[i][j] = acc[i][j].add_product(a, x[j]);
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            store::<V, NV>(row, t.c.add(i * t.ldc), t.lanes);
        }
    }
}

/// [`RowTile`] by lanes along the reduction.
#[inline(always)]
unsafe fn dot_kernel<V: Vector, const MR: usize, const N: usize>(t: &RowTile) {
    // SAFETY: the caller promises that every pointer of the tile is valid for what the fields say.
    unsafe {
        let mut acc: Tile<V, MR, N> = [[V::splat(0.0); N]; MR];
        let mut b = t.b;
        for run in t.runs {
            let (rows, any) = row_starts::<MR>(run);
            if any {
                let whole = run.k - run.k % V::LANES;
                for k in (0..whole).step_by(V::LANES) {
                    let mut columns = [V::splat(0.0); N];
                    for (j, column) in columns.iter_mut().enumerate() {
                        *column = V::load(b.add(j * t.ldb + k));
                    }
                    for i in 0..MR {
                        let a = V::load(rows[i].add(k));
                        for j in 0..N {
                            acc[i][j] = acc[i][j].add_product(a, columns[j]);
                        }
                    }
                }
                if whole < run.k {
                    let lanes = run.k - whole;
                    for i in 0..MR {
                        let a = V::load_first(rows[i].add(whole), lanes);
                        for j in 0..N {
                            let column = V::load_first(b.add(j * t.ldb + whole), lanes);
                            acc[i][j] = acc[i][j].add_product(a, column);
                        }
                    }
                }
            }
            b = b.add(run.k);
        }
        for (i, row) in acc.iter().enumerate() {
            let offset = *t.c_rows.add(i);
            for (j, acc) in row.iter().enumerate() {
                let c = t.c.add(offset + j);
                let mut sum = if t.bias.is_null() { 0.0 } else { *t.bias.add(j) };
                if t.accumulate {
                    sum += *c;
                }
                if !t.residual.is_null() {
                    sum += *t.residual.add(offset + j);
                }
                *c = sum + acc.sum();
            }
        }
    }
}

/// Where the tile's rows start in a run, and whether any of them is not padding.
#[inline(always)]
unsafe fn row_starts<const MR: usize>(run: &Run) -> ([*const f32; MR], bool) {
    let mut rows = [ZEROS.0.as_ptr(); MR];
    let mut any = false;
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller promises offsets for MR rows, inside the data.
        unsafe {
            let offset = *run.rows.add(i);
            if offset != ZERO_ROW {
                *row = run.data.add(offset);
                any = true;
            }
        }
    }
    (rows, any)
}

/// Vector `j` of a row of `NV` vectors of which the last has `lanes` lanes.
#[inline(always)]
unsafe fn load<V: Vector, const NV: usize>(row: *const f32, j: usize, lanes: usize) -> V {
    // SAFETY: the caller's.
    unsafe { if j + 1 < NV { V::load(row.add(j * V::LANES)) } else { V::load_first(row.add(j * V::LANES), lanes) } }
}

#[inline(always)]
unsafe fn store<V: Vector, const NV: usize>(values: &[V; NV], row: *mut f32, lanes: usize) {
    // SAFETY: the caller's.
    unsafe {
        for (j, value) in values.iter().enumerate() {
            if j + 1 < NV {
                value.store(row.add(j * V::LANES));
            } else {
                value.store_first(row.add(j * V::LANES), lanes);
            }
        }
    }
}

pub(super) type RowKernel = unsafe fn(&RowTile);
pub(super) type OuterKernel = unsafe fn(&OuterTile);

/// Panels of this many vectors are the widest there are.
const MAX_NV: usize = 4;
/// The highest tile of any width.
pub(super) const MAX_MR: usize = 12;

/// Results of at most this many columns are made by the dot kernel.
const MAX_DOT_N: usize = 3;
/// Shortest reduction that it is for.
const MIN_DOT_K: usize = 64;
/// Its highest tiles, for 1, 2, … columns.
const DOT_MR: [usize; MAX_DOT_N] = [8, 6, 4];

/// Whether a packed operand of `k` rows and `n` columns is for the dot kernel.
pub(super) fn is_dot(n: usize, k: usize) -> bool {
    n <= MAX_DOT_N && k >= MIN_DOT_K
}

/// The tiles of one instruction set.
pub(super) struct Tiling {
    pub(super) lanes: usize,
    /// Widest panel in vectors.
    pub(super) max_nv: usize,
    /// Highest tile for panels of 1, 2, … vectors.
    max_mr: [usize; MAX_NV],
    rows: [[RowKernel; MAX_MR]; MAX_NV],
    outer: [[OuterKernel; MAX_MR]; MAX_NV],
    dot: [[RowKernel; DOT_MR[0]]; MAX_DOT_N],
}

impl Tiling {
    pub(super) fn of(level: Level) -> &'static Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &AVX2,
            _ => &PLAIN,
        }
    }

    /// Highest tile of a panel of `nv` vectors.
    pub(super) fn max_mr(&self, nv: usize) -> usize {
        self.max_mr[nv - 1]
    }

    pub(super) fn row_kernel(&self, mr: usize, nv: usize) -> RowKernel {
        self.rows[nv - 1][mr - 1]
    }

    /// Highest tile of the dot kernel for `n` columns.
    pub(super) fn max_dot_mr(&self, n: usize) -> usize {
        DOT_MR[n - 1]
    }

    pub(super) fn dot_kernel(&self, mr: usize, n: usize) -> RowKernel {
        self.dot[n - 1][mr - 1]
    }

    pub(super) fn outer_kernel(&self, mr: usize, nv: usize) -> OuterKernel {
        self.outer[nv - 1][mr - 1]
    }

    /// Widest panel in columns.
    pub(super) fn max_columns(&self) -> usize {
        self.max_nv * self.lanes
    }
}

/// Makes the wrappers of both kernels for one instruction set, and the table of the tiles it has registers for. Tiles
/// that it has not are filled with the smallest one and never asked for (`max_mr`).
macro_rules! tiling {
    ($table:ident, $vector:ty, $(#[$feature:meta])* { $($nv:literal: $max:literal [$($mr:literal)*] [$($pad:literal)*],)* }) => {
        static $table: Tiling = {
            $(#[$feature])*
            unsafe fn rows<const MR: usize, const NV: usize>(t: &RowTile) {
                // SAFETY: the caller's.
                unsafe { row_kernel::<$vector, MR, NV>(t) }
            }
            $(#[$feature])*
            unsafe fn dot<const MR: usize, const N: usize>(t: &RowTile) {
                // SAFETY: the caller's.
                unsafe { dot_kernel::<$vector, MR, N>(t) }
            }
            $(#[$feature])*
            unsafe fn outer<const MR: usize, const NV: usize>(t: &OuterTile) {
                // SAFETY: the caller's.
                unsafe { outer_kernel::<$vector, MR, NV>(t) }
            }
            Tiling {
                lanes: <$vector as Vector>::LANES,
                max_nv: { let mut n = 0; $( if $max > 0 { n = $nv; } )* n },
                max_mr: [$($max),*],
                rows: [$([$(rows::<$mr, $nv>,)* $({ let _ = $pad; rows::<1, 1> },)*]),*],
                outer: [$([$(outer::<$mr, $nv>,)* $({ let _ = $pad; outer::<1, 1> },)*]),*],
                dot: [
                    [dot::<1, 1>, dot::<2, 1>, dot::<3, 1>, dot::<4, 1>, dot::<5, 1>, dot::<6, 1>, dot::<7, 1>, dot::<8, 1>],
                    [dot::<1, 2>, dot::<2, 2>, dot::<3, 2>, dot::<4, 2>, dot::<5, 2>, dot::<6, 2>, dot::<1, 1>, dot::<1, 1>],
                    [dot::<1, 3>, dot::<2, 3>, dot::<3, 3>, dot::<4, 3>, dot::<1, 1>, dot::<1, 1>, dot::<1, 1>, dot::<1, 1>],
                ],
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
tiling!(AVX512, Avx512, #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi1,bmi2")] {
    1: 12 [1 2 3 4 5 6 7 8 9 10 11 12] [],
    2: 12 [1 2 3 4 5 6 7 8 9 10 11 12] [],
    3: 8 [1 2 3 4 5 6 7 8] [9 10 11 12],
    4: 6 [1 2 3 4 5 6] [7 8 9 10 11 12],
});

#[cfg(target_arch = "x86_64")]
tiling!(AVX2, Avx2, #[target_feature(enable = "avx2,fma,bmi1,bmi2")] {
    1: 12 [1 2 3 4 5 6 7 8 9 10 11 12] [],
    2: 6 [1 2 3 4 5 6] [7 8 9 10 11 12],
    3: 0 [] [1 2 3 4 5 6 7 8 9 10 11 12],
    4: 0 [] [1 2 3 4 5 6 7 8 9 10 11 12],
});

tiling!(PLAIN, Plain, {
    1: 4 [1 2 3 4] [5 6 7 8 9 10 11 12],
    2: 0 [] [1 2 3 4 5 6 7 8 9 10 11 12],
    3: 0 [] [1 2 3 4 5 6 7 8 9 10 11 12],
    4: 0 [] [1 2 3 4 5 6 7 8 9 10 11 12],
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_what_they_promise() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            let tiling = Tiling::of(level);
            assert!(tiling.max_columns() <= 64);
            for nv in 1..=tiling.max_nv {
                assert!((1..=MAX_MR).contains(&tiling.max_mr(nv)), "{nv}");
            }
        }
    }
}
