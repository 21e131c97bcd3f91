//! dW = dYᵀ·A with both read in place: a sum of outer products of rows.

use std::ops::Range;

use super::kernel::OuterTile;
use super::rows::gather;
use super::tiling::Tiling;
use super::{Panels, Rows, Shared, ZERO_ROW, part, take_indices};
use crate::device::cpu::Pool;
use crate::device::cpu::pool::{BASE_SCRATCH, COMMON_SCRATCH};
use crate::simd::{self, Level};

/// Widest panel of columns of dW, on any instruction set.
const MAX_COLUMNS: usize = 64;
/// Rows summed in one pass: their part of a panel stays in the first-level cache.
const PASS_ROWS: usize = 128;
/// Most rows of dW for one task.
const MAX_M: usize = 128;
/// Most panels for one task: their sums must fit in a worker's scratch.
const MAX_GROUP: usize = 16;
/// Segments shorter than this share a panel.
const SHORT: usize = 16;
/// Most parts the rows are cut into, and fewest rows of a part.
const MAX_PARTS: usize = 16;
const MIN_PART: usize = 512;
/// Work for one task, in multiply-adds, that is large beside the cost of handing it out.
const TASK_WORK: usize = 1 << 20;
/// Tasks to aim for.
const TASKS: usize = 32;

const _: () = assert!(
    MAX_GROUP * MAX_M * MAX_COLUMNS + PASS_ROWS * (MAX_COLUMNS + 4) + MAX_M + 256 <= BASE_SCRATCH,
    "the sums, panel and offsets of a task fit in every worker's scratch"
);

/// `dw[i][0..k] (+)= Σ_r dy[r * ld + i] · a[r][0..k]` for i in `0..m`, and `db[i] (+)= Σ_r dy[r * ld + i]`, over `rows`
/// rows; k = [`Rows::k`], `dw` is `[m, k]` without gaps and `db` `[m]`.
///
/// With `accumulate` the sums are added to what `dw` and `db` hold. Rows of padding cost nothing.
#[allow(clippy::too_many_arguments)] // a product has that many parts; naming them in a struct would repeat the call
pub fn transposed_times_rows(
    pool: &Pool,
    dy: &[f32],
    ld: usize,
    m: usize,
    a: &Rows<'_>,
    rows: usize,
    dw: &mut [f32],
    accumulate: bool,
    db: Option<&mut [f32]>,
) {
    transposed_times_rows_at(simd::level(), pool, dy, ld, m, a, rows, dw, accumulate, db);
}

#[allow(clippy::too_many_arguments)]
pub(in super::super) fn transposed_times_rows_at(
    level: Level,
    pool: &Pool,
    dy: &[f32],
    ld: usize,
    m: usize,
    a: &Rows<'_>,
    rows: usize,
    dw: &mut [f32],
    accumulate: bool,
    db: Option<&mut [f32]>,
) {
    if m == 0 {
        return;
    }
    let tiling = Tiling::of(level);
    let k = a.k();
    assert_eq!(dw.len(), m * k, "length of a weight gradient of {m} × {k}");
    let end = rows.saturating_sub(1).saturating_mul(ld).saturating_add(m);
    assert!(ld >= m && (rows == 0 || end <= dy.len()), "{rows} rows of {m} at {ld} do not fit in {}", dy.len());
    if let Some(db) = &db {
        assert_eq!(db.len(), m, "length of a bias gradient of {m}");
    }
    let plan = Plan::new(tiling, a, m, rows);
    let sum =
        Sum { tiling, a, dy, ld, k, dw: Shared(dw.as_mut_ptr()), db: db.map(|db| Shared(db.as_mut_ptr())), accumulate };
    if plan.parts == 1 {
        pool.run(plan.blocks(), &|task, scratch| {
            let (sums, scratch) = scratch.split_at_mut(plan.block_len);
            let block = plan.block(task, m);
            sum.add_rows(&block, 0..rows, sums, scratch);
            // SAFETY: blocks are disjoint parts of the gradients, one for each task.
            unsafe { sum.store(&block, std::iter::once(&*sums)) };
        });
        return;
    }
    let mut common = pool.common();
    let partial = &mut common.floats()[..plan.parts * plan.blocks() * plan.block_len];
    // Tasks that read the same rows follow each other.
    pool.for_chunks(partial, plan.block_len, |task, sums, scratch| {
        let rows = part(rows, plan.parts, task / plan.blocks());
        sum.add_rows(&plan.block(task % plan.blocks(), m), rows, sums, scratch);
    });
    let partial = &*partial;
    pool.run(plan.blocks(), &|task, _| {
        let parts = partial.chunks_exact(plan.block_len).skip(task).step_by(plan.blocks());
        // SAFETY: blocks are disjoint parts of the gradients, one for each task.
        unsafe { sum.store(&plan.block(task, m), parts) };
    });
}

/// Columns of dW that are summed together: a part of one segment, or some short segments.
#[derive(Clone, Copy)]
struct Strip {
    /// Segments it covers.
    segments: (usize, usize),
    /// Columns of the (first) segment.
    from: usize,
    /// Columns of dW.
    first_column: usize,
    columns: usize,
}

/// Lists the strips in the order of their columns.
struct Strips<'a> {
    tiling: &'a Tiling,
    a: &'a Rows<'a>,
    segment: usize,
    /// Part of a long segment.
    piece: usize,
    column: usize,
}

impl<'a> Strips<'a> {
    fn new(tiling: &'a Tiling, a: &'a Rows<'a>) -> Self {
        Strips { tiling, a, segment: 0, piece: 0, column: 0 }
    }
}

impl Iterator for Strips<'_> {
    type Item = Strip;

    fn next(&mut self) -> Option<Strip> {
        let segments = self.a.segments;
        while segments.get(self.segment)?.k == 0 {
            self.segment += 1;
        }
        let k = segments[self.segment].k;
        let first_column = self.column;
        let most = self.tiling.max_columns();
        if k < SHORT.min(most) {
            let first = self.segment;
            let mut columns = 0;
            while let Some(s) = segments.get(self.segment) {
                if s.k >= SHORT || columns + s.k > most {
                    break;
                }
                columns += s.k;
                self.segment += 1;
            }
            self.column += columns;
            return Some(Strip { segments: (first, self.segment), from: 0, first_column, columns });
        }
        let pieces = Panels::new(self.tiling, k);
        let piece = pieces.get(self.piece);
        let strip = Strip {
            segments: (self.segment, self.segment + 1),
            from: piece.first_column,
            first_column,
            columns: piece.columns,
        };
        self.column += piece.columns;
        self.piece += 1;
        if self.piece == pieces.count {
            (self.segment, self.piece) = (self.segment + 1, 0);
        }
        Some(strip)
    }
}

/// How the sum is cut into tasks; by shape alone, as the number of parts of the rows shows in the bits.
struct Plan {
    /// Parts of the rows, each summed on its own.
    parts: usize,
    strips: usize,
    /// Groups of strips.
    groups: usize,
    /// Blocks of rows of dW.
    m_blocks: usize,
    /// Floats of the sums of one task.
    block_len: usize,
}

/// The part of the gradients that one task sums.
struct Block {
    m: Range<usize>,
    strips: Range<usize>,
    /// Whether it sums the bias gradient of its rows as well.
    bias: bool,
}

impl Plan {
    fn new(tiling: &Tiling, a: &Rows<'_>, m: usize, rows: usize) -> Self {
        let strips = Strips::new(tiling, a).count();
        let m_blocks = m.div_ceil(MAX_M);
        let m_len = m.div_ceil(m_blocks);
        let columns = tiling.max_columns();
        let work = rows.saturating_mul(a.k().max(1)).saturating_mul(m);
        let target = (work / TASK_WORK).clamp(1, TASKS);
        // Rows first: what is read stays in the caches then. Partial sums are written and read once each.
        let sums = (strips.max(1) * columns + 16) * m_len * m_blocks;
        let parts = target.min(MAX_PARTS).min(rows / MIN_PART).min(COMMON_SCRATCH / sums).max(1);
        let groups = target.div_ceil(parts * m_blocks).max(strips.div_ceil(MAX_GROUP)).min(strips).max(1);
        // The sums of each strip, then those of the bias.
        let block_len = (strips.div_ceil(groups) * columns * m_len + m_len).next_multiple_of(16);
        let parts = parts.min(COMMON_SCRATCH / (groups * m_blocks * block_len)).max(1);
        Plan { parts, strips, groups, m_blocks, block_len }
    }

    fn blocks(&self) -> usize {
        self.groups * self.m_blocks
    }

    fn block(&self, i: usize, m: usize) -> Block {
        let group = i / self.m_blocks;
        Block {
            m: part(m, self.m_blocks, i % self.m_blocks),
            strips: part(self.strips, self.groups, group),
            bias: group == 0,
        }
    }
}

struct Sum<'a> {
    tiling: &'static Tiling,
    a: &'a Rows<'a>,
    dy: &'a [f32],
    ld: usize,
    /// Columns of dW.
    k: usize,
    dw: Shared<f32>,
    db: Option<Shared<f32>>,
    accumulate: bool,
}

impl Sum<'_> {
    /// Vectors of a panel of `columns`.
    fn vectors(&self, columns: usize) -> usize {
        columns.div_ceil(self.tiling.lanes)
    }

    fn strips(&self, block: &Block) -> impl Iterator<Item = Strip> {
        Strips::new(self.tiling, self.a).skip(block.strips.start).take(block.strips.len())
    }

    /// Sets `sums` to the block's sums over `rows`: `[strip][m][vectors]`, and at the end `[m]` of the bias.
    fn add_rows(&self, block: &Block, rows: Range<usize>, sums: &mut [f32], scratch: &mut [f32]) {
        let (m, max_columns) = (block.m.len(), self.tiling.max_columns());
        let (sums, bias) = sums.split_at_mut(block.strips.len() * max_columns * m);
        let bias = &mut bias[..m];
        bias.fill(0.0);
        let (x_rows, scratch) = take_indices(scratch, PASS_ROWS);
        let (dy_rows, scratch) = take_indices(scratch, PASS_ROWS);
        let panel = &mut scratch[..PASS_ROWS * max_columns];
        let passes = rows.len().div_ceil(PASS_ROWS).max(1);
        for pass in 0..passes {
            let here = part(rows.len(), passes, pass);
            let here = rows.start + here.start..rows.start + here.end;
            if block.bias && self.db.is_some() {
                add_columns(self.dy, self.ld, here.clone(), block.m.clone(), bias);
            }
            for (strip, sums) in self.strips(block).zip(sums.chunks_exact_mut(max_columns * m)) {
                let (x_rows, dy_rows) = (&mut x_rows[..here.len()], &mut dy_rows[..here.len()]);
                let (x, count) = self.list(&strip, here.clone(), x_rows, dy_rows, panel);
                self.multiply(&strip, block.m.clone(), (x, &x_rows[..count]), &dy_rows[..count], pass > 0, sums);
            }
        }
    }

    /// Lists where the strip's part of each of `rows` starts in the slice returned, and where the matching rows of dY
    /// start. Also returns the number of rows: those that are padding are left out.
    fn list<'x>(
        &'x self,
        strip: &Strip,
        rows: Range<usize>,
        x_rows: &mut [usize],
        dy_rows: &mut [usize],
        panel: &'x mut [f32],
    ) -> (&'x [f32], usize) {
        let (first, end) = strip.segments;
        if end - first > 1 {
            let mut at = 0;
            for s in first..end {
                let segment = self.a.segments[s];
                self.a.fill(s, rows.clone(), x_rows);
                gather(segment.data, segment.k, x_rows, &mut panel[at..], strip.columns);
                at += segment.k;
            }
            for (i, (r, (x_row, dy_row))) in rows.clone().zip(x_rows.iter_mut().zip(dy_rows)).enumerate() {
                (*x_row, *dy_row) = (i * strip.columns, r * self.ld);
            }
            return (panel, rows.len());
        }
        self.a.fill(first, rows.clone(), x_rows);
        let mut count = 0;
        for (i, r) in rows.enumerate() {
            let offset = x_rows[i];
            // Without a branch: what is not counted is overwritten by the next.
            (x_rows[count], dy_rows[count]) = (offset, r * self.ld);
            count += usize::from(offset != ZERO_ROW);
        }
        let data = self.a.segments[first].data;
        (&data[strip.from.min(data.len())..], count)
    }

    /// `sums[i][..] (+)= Σ over rows of dy[dy_row + i] · x[x_row..]`.
    fn multiply(
        &self,
        strip: &Strip,
        m: Range<usize>,
        (x, x_rows): (&[f32], &[usize]),
        dy_rows: &[usize],
        accumulate: bool,
        sums: &mut [f32],
    ) {
        let vectors = self.vectors(strip.columns);
        let width = vectors * self.tiling.lanes;
        let tiles = m.len().div_ceil(self.tiling.max_mr(vectors));
        for tile in 0..tiles {
            let tile = part(m.len(), tiles, tile);
            let outer_tile = OuterTile {
                r: dy_rows.len(),
                d: self.dy[(m.start + tile.start).min(self.dy.len())..].as_ptr(),
                d_rows: dy_rows.as_ptr(),
                x: x.as_ptr(),
                x_rows: x_rows.as_ptr(),
                c: sums[tile.start * width..tile.end * width].as_mut_ptr(),
                ldc: width,
                lanes: strip.columns + self.tiling.lanes - width,
                accumulate,
            };
            let kernel = self.tiling.outer_kernel(tile.len(), vectors);
            // SAFETY: the level was detected. `dy` was asserted to hold m floats of every row. The rows of x were checked
            // by `Rows::fill` or lie in the panel, and the last vector is cut to the strip's columns. `sums` was just cut
            // to the tile.
            unsafe { kernel(&outer_tile) };
        }
    }

    /// Adds the partial sums of a block in their order, to the gradients or to zero.
    ///
    /// # Safety
    /// No one else uses the block's part of `dw` and `db` meanwhile.
    unsafe fn store<'s>(&self, block: &Block, parts: impl Iterator<Item = &'s [f32]>) {
        let (m, max_columns) = (block.m.len(), self.tiling.max_columns());
        let mut accumulate = self.accumulate;
        for sums in parts {
            let (sums, bias) = sums.split_at(block.strips.len() * max_columns * m);
            for (strip, sums) in self.strips(block).zip(sums.chunks_exact(max_columns * m)) {
                let width = self.vectors(strip.columns) * self.tiling.lanes;
                for (i, sums) in block.m.clone().zip(sums.chunks_exact(width)) {
                    // SAFETY: `dw` is m × k; these columns are the block's.
                    let out = unsafe {
                        let start = self.dw.get().add(i * self.k + strip.first_column);
                        std::slice::from_raw_parts_mut(start, strip.columns)
                    };
                    add_or_set(out, sums, accumulate);
                }
            }
            if let Some(db) = self.db.filter(|_| block.bias) {
                // SAFETY: `db` has m floats; the first group of each block of rows has these.
                let out = unsafe { std::slice::from_raw_parts_mut(db.get().add(block.m.start), m) };
                add_or_set(out, bias, accumulate);
            }
            accumulate = true;
        }
    }
}

crate::multiversion! {
    fn add_or_set(out: &mut [f32], values: &[f32], add: bool) {
        if add {
            for (out, value) in out.iter_mut().zip(values) {
                *out += value;
            }
        } else {
            out.copy_from_slice(&values[..out.len()]);
        }
    }
}

crate::multiversion! {
    /// `sums[i] += Σ over rows of dy[r * ld + columns.start + i]`.
    fn add_columns(dy: &[f32], ld: usize, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32]) {
        // The rows of one pass are summed on their own first: shorter chains of additions round less.
        let mut here = [0.0f32; MAX_M];
        let here = &mut here[..sums.len()];
        for r in rows {
            for (sum, dy) in here.iter_mut().zip(&dy[r * ld + columns.start..r * ld + columns.end]) {
                *sum += dy;
            }
        }
        for (sum, here) in sums.iter_mut().zip(here) {
            *sum += *here;
        }
    }
}
