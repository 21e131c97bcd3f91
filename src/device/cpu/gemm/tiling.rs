//! The microkernels compiled for every tile size and instruction set, and the tables they are chosen from.

use super::kernel::{OuterTile, RowTile, dot_kernel, outer_kernel, row_kernel};
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Plain, Vector};
use crate::simd::Level;

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
