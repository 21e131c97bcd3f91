//! The microkernels, generic in tile size and instruction set; `tiling.rs` compiles them.
//!
//! Two of them hold a tile of `MR` rows by `NV` vectors of the result in registers, and for each step of the reduction load `NV`
//! vectors and multiply them by `MR` broadcast floats. [`RowTile`] takes the vectors from a packed panel and walks along
//! `MR` rows of the left operand; [`OuterTile`] takes the vectors and `MR` neighbouring floats from two lists of rows.
//! The third is for results of so few columns that most lanes would idle: it holds `MR` by `N` sums, whose lanes run along
//! the reduction, and takes the columns of B from a packed operand that holds them one after another.

use super::ZERO_ROW;
use super::vector::Vector;

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
pub(super) unsafe fn row_kernel<V: Vector, const MR: usize, const NV: usize>(t: &RowTile) {
    // SAFETY: the caller promises that every pointer of the tile is valid for what the fields say.
    unsafe {
        let mut acc: Tile<V, MR, NV> = [[V::splat(0.0); NV]; MR];
        if !t.bias.is_null() {
            let mut bias = [V::splat(0.0); NV];
            for (j, bias) in bias.iter_mut().enumerate() {
                *bias = load::<V, NV>(t.bias, j, t.lanes);
            }
            acc.fill(bias);
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
                    for (acc, row) in acc.iter_mut().zip(&rows) {
                        let a = V::splat(*row.add(k));
                        for (acc, b) in acc.iter_mut().zip(&panel) {
                            *acc = acc.add_product(a, *b);
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
pub(super) unsafe fn outer_kernel<V: Vector, const MR: usize, const NV: usize>(t: &OuterTile) {
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
            for (i, acc) in acc.iter_mut().enumerate() {
                let a = V::splat(*d.add(i));
                for (acc, x) in acc.iter_mut().zip(&x) {
                    *acc = acc.add_product(a, *x);
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
pub(super) unsafe fn dot_kernel<V: Vector, const MR: usize, const N: usize>(t: &RowTile) {
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
                    for (acc, row) in acc.iter_mut().zip(&rows) {
                        let a = V::load(row.add(k));
                        for (acc, column) in acc.iter_mut().zip(&columns) {
                            *acc = acc.add_product(a, *column);
                        }
                    }
                }
                if whole < run.k {
                    let lanes = run.k - whole;
                    for (acc, row) in acc.iter_mut().zip(&rows) {
                        let a = V::load_first(row.add(whole), lanes);
                        for (j, acc) in acc.iter_mut().enumerate() {
                            let column = V::load_first(b.add(j * t.ldb + whole), lanes);
                            *acc = acc.add_product(a, column);
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
