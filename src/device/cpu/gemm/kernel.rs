//! The two microkernels, compiled for every tile size and instruction set, and the tables they are chosen from.
//!
//! Both hold a tile of `MR` rows by `NV` vectors of the result in registers, and for each step of the reduction load `NV`
//! vectors and multiply them by `MR` broadcast floats. [`RowTile`] takes the vectors from a packed panel and walks along
//! `MR` rows of the left operand; [`OuterTile`] takes the vectors and `MR` neighbouring floats from two lists of rows.

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
    /// `Σ k` rows of `NV` full vectors.
    pub(super) b: *const f32,
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
            let mut rows = [ZEROS.0.as_ptr(); MR];
            let mut any = false;
            for (i, row) in rows.iter_mut().enumerate() {
                let offset = *run.rows.add(i);
                if offset != ZERO_ROW {
                    *row = run.data.add(offset);
                    any = true;
                }
            }
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
                *x = load::<V, NV>(row, j, t.lanes);
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

/// The tiles of one instruction set.
pub(super) struct Tiling {
    pub(super) lanes: usize,
    /// Widest panel in vectors.
    pub(super) max_nv: usize,
    /// Highest tile for panels of 1, 2, … vectors.
    max_mr: [usize; MAX_NV],
    rows: [[RowKernel; MAX_MR]; MAX_NV],
    outer: [[OuterKernel; MAX_MR]; MAX_NV],
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
