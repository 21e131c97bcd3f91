//! Products of plain matrices by the calling thread alone, for use inside a task: attention.
//!
//! All compute `c = alpha · op(a) · op(b) + beta · c` on row-major matrices with leading dimensions, for any sizes. With
//! `beta` 0 what `c` holds is ignored, not multiplied. `scratch` needs [`SCRATCH`] floats; its contents do not matter.
//! Each element is one chain of fused multiply-adds over k, its factors `a` and `alpha · b`.

use std::ops::Range;

use super::kernel::{OuterTile, RowTile, Run};
use super::pack::transpose_block;
use super::tiling::{MAX_MR, Tiling};
use super::{Panel, Panels, part, take_indices};
use crate::simd::{self, Level};

/// Floats of scratch that each call needs.
pub const SCRATCH: usize = BLOCK_FLOATS + 2 * 2 * MAX_BLOCK_K + 16;

/// Floats of a block of b: it stays in the first-level cache.
const BLOCK_FLOATS: usize = 8192;
/// Longest block of the reduction.
const MAX_BLOCK_K: usize = 512;
/// Rows of a that are gone through before the next columns of b are packed: they stay in the second-level cache.
const BLOCK_ROWS: usize = 512;

/// How the operands lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Form {
    Nn,
    Nt,
    Tn,
}

/// `c[m, n] = alpha · a[m, k] · b[k, n] + beta · c`.
///
/// # Panics
/// When a slice is too short for its matrix, a leading dimension shorter than a row, or `scratch` shorter than [`SCRATCH`].
#[allow(clippy::too_many_arguments)] // the arguments of BLAS
pub fn gemm_nn(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    c: &mut [f32],
    ldc: usize,
    scratch: &mut [f32],
) {
    gemm_at(simd::level(), Form::Nn, [m, n, k], alpha, (a, lda), (b, ldb), beta, (c, ldc), scratch);
}

/// `c[m, n] = alpha · a[m, k] · b[n, k]ᵀ + beta · c`.
///
/// # Panics
/// As [`gemm_nn`].
#[allow(clippy::too_many_arguments)] // the arguments of BLAS
pub fn gemm_nt(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    c: &mut [f32],
    ldc: usize,
    scratch: &mut [f32],
) {
    gemm_at(simd::level(), Form::Nt, [m, n, k], alpha, (a, lda), (b, ldb), beta, (c, ldc), scratch);
}

/// `c[m, n] = alpha · a[k, m]ᵀ · b[k, n] + beta · c`.
///
/// # Panics
/// As [`gemm_nn`].
#[allow(clippy::too_many_arguments)] // the arguments of BLAS
pub fn gemm_tn(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    c: &mut [f32],
    ldc: usize,
    scratch: &mut [f32],
) {
    gemm_at(simd::level(), Form::Tn, [m, n, k], alpha, (a, lda), (b, ldb), beta, (c, ldc), scratch);
}

#[allow(clippy::too_many_arguments)]
pub(in super::super) fn gemm_at(
    level: Level,
    form: Form,
    [m, n, k]: [usize; 3],
    alpha: f32,
    (a, lda): (&[f32], usize),
    (b, ldb): (&[f32], usize),
    beta: f32,
    (c, ldc): (&mut [f32], usize),
    scratch: &mut [f32],
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(scratch.len() >= SCRATCH, "scratch of {} floats, {SCRATCH} are needed", scratch.len());
    let (a_shape, b_shape) = match form {
        Form::Nn => ((m, k), (k, n)),
        Form::Nt => ((m, k), (n, k)),
        Form::Tn => ((k, m), (k, n)),
    };
    check("a", a_shape, lda, a.len());
    check("b", b_shape, ldb, b.len());
    check("c", (m, n), ldc, c.len());
    if beta != 1.0 {
        for row in c.chunks_mut(ldc).take(m) {
            if beta == 0.0 {
                row[..n].fill(0.0);
            } else {
                row[..n].iter_mut().for_each(|c| *c *= beta);
            }
        }
    }
    let tiling = Tiling::of(level);
    let panels = Panels::new(tiling, n);
    let width = panels.get(0).vectors * tiling.lanes;
    let blocks = k.div_ceil((BLOCK_FLOATS / width).min(MAX_BLOCK_K));
    // Vectors that straddle cache lines would be loaded at half the speed.
    let skip = scratch.as_ptr().align_offset(64).min(16);
    let (block, scratch) = scratch[skip..].split_at_mut(BLOCK_FLOATS);
    let (d_rows, scratch) = take_indices(scratch, MAX_BLOCK_K);
    let (x_rows, _) = take_indices(scratch, MAX_BLOCK_K);
    let row_blocks = m.div_ceil(BLOCK_ROWS);
    for rows in (0..row_blocks).map(|i| part(m, row_blocks, i)) {
        for ks in (0..blocks).map(|i| part(k, blocks, i)) {
            for panel in (0..panels.count).map(|i| panels.get(i)) {
                let width = panel.vectors * tiling.lanes;
                let block = &mut block[..ks.len() * width];
                pack(form, alpha, (b, ldb), ks.clone(), &panel, width, block);
                match form {
                    Form::Nn | Form::Nt => {
                        row_tiles(tiling, rows.clone(), ks.clone(), (a, lda), block, &panel, (c, ldc), true);
                    }
                    Form::Tn => {
                        for (offset, k) in d_rows.iter_mut().zip(ks.clone()) {
                            *offset = k * lda;
                        }
                        for (i, offset) in x_rows[..ks.len()].iter_mut().enumerate() {
                            *offset = i * width;
                        }
                        let lists = (&d_rows[..ks.len()], &x_rows[..ks.len()]);
                        outer_tiles(tiling, rows.clone(), lists, a, block, &panel, (c, ldc), true);
                    }
                }
            }
        }
    }
}

/// Refuses a matrix that does not fit in its slice.
fn check(name: &str, (rows, columns): (usize, usize), ld: usize, len: usize) {
    let end = rows.saturating_sub(1).saturating_mul(ld).saturating_add(columns);
    assert!(
        ld >= columns && ld > 0 && (rows == 0 || end <= len),
        "{name}: {rows} × {columns} with leading dimension {ld} does not fit in {len} floats"
    );
}

/// Copies `alpha` times a block of op(b) to rows of `width` floats.
fn pack(
    form: Form,
    alpha: f32,
    (b, ldb): (&[f32], usize),
    ks: Range<usize>,
    panel: &Panel,
    width: usize,
    block: &mut [f32],
) {
    if form == Form::Nt {
        return transpose_block(&b[panel.first_column * ldb..], ldb, panel.columns, ks, width, alpha, block);
    }
    for (k, out) in ks.zip(block.chunks_exact_mut(width)) {
        let from = &b[k * ldb + panel.first_column..][..panel.columns];
        for (out, x) in out.iter_mut().zip(from) {
            *out = alpha * x;
        }
        out[panel.columns..].fill(0.0);
    }
}

/// `c[rows] (+)= a[rows][ks] · block`.
#[allow(clippy::too_many_arguments)]
pub(super) fn row_tiles(
    tiling: &Tiling,
    rows: Range<usize>,
    ks: Range<usize>,
    (a, lda): (&[f32], usize),
    block: &[f32],
    panel: &Panel,
    (c, ldc): (&mut [f32], usize),
    accumulate: bool,
) {
    let tiles = rows.len().div_ceil(tiling.max_mr(panel.vectors));
    for tile in (0..tiles).map(|i| part(rows.len(), tiles, i)) {
        let first = rows.start + tile.start;
        let (mut a_rows, mut c_rows) = ([0; MAX_MR], [0; MAX_MR]);
        for (i, (a_row, c_row)) in a_rows.iter_mut().zip(&mut c_rows).take(tile.len()).enumerate() {
            *a_row = (first + i) * lda + ks.start;
            *c_row = (first + i) * ldc + panel.first_column;
        }
        let row_tile = RowTile {
            runs: &[Run { data: a.as_ptr(), rows: a_rows.as_ptr(), k: ks.len() }],
            b: block.as_ptr(),
            ldb: 0,
            c: c.as_mut_ptr(),
            c_rows: c_rows.as_ptr(),
            lanes: panel.lanes,
            bias: std::ptr::null(),
            accumulate,
            residual: std::ptr::null(),
        };
        // SAFETY: the level was detected; `check` showed that these rows and columns lie inside a and c; the block holds
        // `ks` rows of the panel's vectors.
        unsafe { tiling.row_kernel(tile.len(), panel.vectors)(&row_tile) };
    }
}

/// `c[rows] (+)= (rows of a at d_rows)ᵀ[rows] · (rows of the block at x_rows)`.
#[allow(clippy::too_many_arguments)]
pub(super) fn outer_tiles(
    tiling: &Tiling,
    rows: Range<usize>,
    (d_rows, x_rows): (&[usize], &[usize]),
    a: &[f32],
    block: &[f32],
    panel: &Panel,
    (c, ldc): (&mut [f32], usize),
    accumulate: bool,
) {
    let tiles = rows.len().div_ceil(tiling.max_mr(panel.vectors));
    for tile in (0..tiles).map(|i| part(rows.len(), tiles, i)) {
        let first = rows.start + tile.start;
        let outer_tile = OuterTile {
            r: d_rows.len(),
            d: a[first.min(a.len())..].as_ptr(),
            d_rows: d_rows.as_ptr(),
            x: block.as_ptr(),
            x_rows: x_rows.as_ptr(),
            c: c[first * ldc + panel.first_column..].as_mut_ptr(),
            ldc,
            lanes: panel.lanes,
            accumulate,
        };
        // SAFETY: as in `row_tiles`.
        unsafe { tiling.outer_kernel(tile.len(), panel.vectors)(&outer_tile) };
    }
}
