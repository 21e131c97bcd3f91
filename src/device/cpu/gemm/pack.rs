//! The packed form of a right operand: panels of at most four vectors of columns, each panel's rows one after another. For
//! the dot kernel: its columns one after another.

use std::ops::Range;

use super::tiling::{Tiling, is_dot};
use super::{Panels, Shared, part};
use crate::device::cpu::Pool;
use crate::simd::{self, Level};

/// Rows of a panel that one task packs.
const ROWS_PER_TASK: usize = 256;
/// Floats that are packed in the time it takes to wake a thread.
const SMALL: usize = 1 << 14;

/// Length in floats of a packed right operand of `k` rows and `n` columns: enough for every instruction set.
pub fn packed_len(n: usize, k: usize) -> usize {
    n.next_multiple_of(16) * k
}

/// Packs the transpose of `w`, a row-major `[n, k]`: the weights of a linear layer or a convolution (`[Cout, taps × Cin]`)
/// for the forward pass. `packed` needs [`packed_len`] floats.
pub fn pack_transposed(pool: &Pool, w: &[f32], n: usize, k: usize, packed: &mut [f32]) {
    pack_transposed_at(simd::level(), pool, w, n, k, packed);
}

/// Packs rows that are contiguous in `w`: row i of the right operand is `w[row(i)..row(i) + n]`.
///
/// For the data gradient of a convolution, where row (tap, co) is `w[co][tap][0..Cin]`. `packed` needs [`packed_len`]
/// floats.
pub fn pack_rows(pool: &Pool, n: usize, k: usize, row: impl Fn(usize) -> usize + Sync, w: &[f32], packed: &mut [f32]) {
    pack_rows_at(simd::level(), pool, n, k, row, w, packed);
}

pub(in super::super) fn pack_transposed_at(
    level: Level,
    pool: &Pool,
    w: &[f32],
    n: usize,
    k: usize,
    packed: &mut [f32],
) {
    assert!(w.len() >= n * k, "weights of {n} × {k} have {} floats", w.len());
    if is_dot(n, k) {
        assert!(packed.len() >= n * k, "a packed operand of {k} × {n} needs {} floats, found {}", n * k, packed.len());
        return packed[..n * k].copy_from_slice(&w[..n * k]);
    }
    pack(level, pool, n, k, packed, |columns, rows, width, out| {
        transpose_block(&w[columns.start * k..], k, columns.len(), rows, width, 1.0, out);
    });
}

pub(in super::super) fn pack_rows_at(
    level: Level,
    pool: &Pool,
    n: usize,
    k: usize,
    row: impl Fn(usize) -> usize + Sync,
    w: &[f32],
    packed: &mut [f32],
) {
    if is_dot(n, k) {
        assert!(packed.len() >= n * k, "a packed operand of {k} × {n} needs {} floats, found {}", n * k, packed.len());
        for i in 0..k {
            for (column, x) in w[row(i)..][..n].iter().enumerate() {
                packed[column * k + i] = *x;
            }
        }
        return;
    }
    pack(level, pool, n, k, packed, |columns, rows, width, out| {
        for (i, out) in rows.zip(out.chunks_exact_mut(width)) {
            let from = &w[row(i) + columns.start..][..columns.len()];
            out[..columns.len()].copy_from_slice(from);
            out[columns.len()..].fill(0.0);
        }
    });
}

/// Calls `fill(columns, rows, width, out)` for every part of the packed operand: `out` is `rows.len()` rows of `width`
/// floats, of which the first `columns.len()` are columns of the operand and the rest must be zeroed.
fn pack(
    level: Level,
    pool: &Pool,
    n: usize,
    k: usize,
    packed: &mut [f32],
    fill: impl Fn(Range<usize>, Range<usize>, usize, &mut [f32]) + Sync,
) {
    let tiling = Tiling::of(level);
    let panels = Panels::new(tiling, n);
    let len = panels.vectors * tiling.lanes * k;
    assert!(packed.len() >= len, "a packed operand of {k} × {n} needs {len} floats, found {}", packed.len());
    let parts = k.div_ceil(ROWS_PER_TASK);
    let start = Shared(packed.as_mut_ptr());
    let tasks = panels.count * parts;
    let one = |task: usize| {
        let panel = panels.get(task / parts);
        let rows = part(k, parts, task % parts);
        let width = panel.vectors * tiling.lanes;
        let from = panel.first_column * k + rows.start * width;
        // SAFETY: panels follow each other, `k` rows of their width each; this is a run of rows of one of them, inside the
        // length asserted above, and no other task's.
        let out = unsafe { std::slice::from_raw_parts_mut(start.get().add(from), rows.len() * width) };
        fill(panel.first_column..panel.first_column + panel.columns, rows, width, out);
    };
    if len <= SMALL { pool.run(1, &|_, _| (0..tasks).for_each(one)) } else { pool.run(tasks, &|task, _| one(task)) }
}

crate::multiversion! {
    /// Writes `rows` of the transpose of `w`, whose row c starts at `c * ld`, times `scale`, as rows of `width` floats.
    pub(super) fn transpose_block(
        w: &[f32],
        ld: usize,
        columns: usize,
        rows: Range<usize>,
        width: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        const SIDE: usize = 16;
        for c in (0..width).step_by(SIDE) {
            // Columns of the operand, then columns of zeros.
            let (some, all) = (columns.saturating_sub(c).min(SIDE), (width - c).min(SIDE));
            for i in (0..rows.len()).step_by(SIDE) {
                let height = (rows.len() - i).min(SIDE);
                let mut square = [[0.0f32; SIDE]; SIDE];
                for (j, line) in square.iter_mut().enumerate().take(some) {
                    let from = &w[(c + j) * ld + rows.start + i..][..height];
                    match from.first_chunk() {
                        Some(from) => *line = *from,
                        None => line[..height].copy_from_slice(from),
                    }
                }
                for (j, row) in out[i * width..].chunks_mut(width).take(height).enumerate() {
                    let row = &mut row[c..c + all];
                    match row.first_chunk_mut::<SIDE>() {
                        Some(row) => *row = std::array::from_fn(|column| scale * square[column][j]),
                        None => row.iter_mut().zip(&square).for_each(|(out, line)| *out = scale * line[j]),
                    }
                }
            }
        }
    }
}
