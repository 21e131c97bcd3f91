//! C = A·B with A read in place and B packed.

use std::ops::Range;

use super::kernel::{MAX_RUN, RowTile, Run};
use super::tiling::{Tiling, is_dot};
use super::{Init, OutRows, Panels, Rows, Shared, ZERO_ROW, part, take_indices};
use crate::device::cpu::Pool;
use crate::device::cpu::pool::BASE_SCRATCH;
use crate::simd::{self, Level};

/// Floats of a packed panel that one pass reads again and again: they stay in the first-level cache (32 of 48 KiB).
const PANEL_BLOCK: usize = 8192;
/// Most rows of a task: with their part of the operands they stay in the second-level cache.
const MAX_ROWS: usize = 144;
/// Fewest rows of a task: below this a panel is read too often.
const MIN_ROWS: usize = 24;
/// Floats of packed panels that one task goes through, if it has the choice: 1 MiB, half of a second-level cache.
const GROUP: usize = 1 << 18;
/// Work for one task, in multiply-adds, that is large beside the cost of handing it out.
const TASK_WORK: usize = 1 << 20;
/// Tasks to aim for: enough to keep some tens of threads evenly busy.
const TASKS: usize = 32;
/// Segments shorter than this are copied together, so that the kernel has something to run along.
const SHORT: usize = 16;
/// Longest row that is copied together.
const MAX_GATHERED: usize = 512;
/// Most runs in one pass.
const MAX_RUNS: usize = 24;

/// `out[r][0..n] = init + Σ_k a[r][k] · b[k][0..n]` for `rows` logical rows, `b` packed by
/// [`pack_transposed`](super::pack_transposed) or [`pack_rows`](super::pack_rows) with k = [`Rows::k`].
///
/// A segment in which all rows of a microtile are [`ZERO_ROW`] costs nothing. Columns of `out` outside `0..n` of a row are
/// not touched.
#[allow(clippy::too_many_arguments)] // a product has that many parts; naming them in a struct would repeat the call
pub fn rows_times_packed(
    pool: &Pool,
    a: &Rows<'_>,
    rows: usize,
    n: usize,
    packed: &[f32],
    out: &mut [f32],
    out_rows: OutRows,
    init: Init<'_>,
) {
    rows_times_packed_at(simd::level(), pool, a, rows, n, packed, out, out_rows, init);
}

#[allow(clippy::too_many_arguments)]
pub(in super::super) fn rows_times_packed_at(
    level: Level,
    pool: &Pool,
    a: &Rows<'_>,
    rows: usize,
    n: usize,
    packed: &[f32],
    out: &mut [f32],
    out_rows: OutRows,
    init: Init<'_>,
) {
    if rows == 0 || n == 0 {
        return;
    }
    let tiling = Tiling::of(level);
    let panels = Panels::new(tiling, n);
    let k = a.k();
    let dot = is_dot(n, k);
    let needed = if dot { n } else { panels.vectors * tiling.lanes } * k;
    assert!(packed.len() >= needed, "a packed operand of {k} × {n} needs {needed} floats, found {}", packed.len());
    out_rows.check(rows, n, out.len());
    if let Some(bias) = init.bias {
        assert_eq!(bias.len(), n, "length of the bias of {n} columns");
    }
    if let Some(residual) = init.residual {
        assert_eq!(residual.len(), out.len(), "length of the residual against that of the result");
    }
    let plan = Plan::new(rows, k, a.segments.len(), &panels);
    let product = Product { tiling, panels, dot, a, k, packed, out: Shared(out.as_mut_ptr()), out_rows, init };
    pool.run(plan.row_blocks * plan.groups, &|task, scratch| {
        // Tasks that share panels follow each other.
        let panels = part(panels.count, plan.groups, task / plan.row_blocks);
        let rows = part(rows, plan.row_blocks, task % plan.row_blocks);
        product.block(rows, panels, scratch);
    });
}

impl OutRows {
    /// Refuses rows that would overlap or lie outside `len` floats.
    fn check(&self, rows: usize, n: usize, len: usize) {
        let (start, ld, last) = match *self {
            OutRows::Linear { start, ld } => (start, ld, rows - 1),
            OutRows::Grid { grid, start, ld } => {
                let pixels = grid.images.checked_mul(grid.height).and_then(|lines| lines.checked_mul(grid.width));
                assert!(
                    grid.stride > 0 && pixels.is_some_and(|pixels| rows <= pixels),
                    "{rows} rows of a result in the order of {grid:?}"
                );
                (start, ld, grid.len() - 1)
            }
        };
        let end = last.checked_mul(ld).and_then(|last| last.checked_add(start)).and_then(|last| last.checked_add(n));
        assert!(
            ld >= n && end.is_some_and(|end| end <= len),
            "{rows} rows of {n} columns at {self:?} do not fit in {len} floats"
        );
    }

    /// Offsets of `rows`.
    fn fill(&self, rows: Range<usize>, out: &mut [usize]) {
        match *self {
            OutRows::Linear { start, ld } => {
                for (r, out) in rows.zip(out) {
                    *out = start + r * ld;
                }
            }
            OutRows::Grid { grid, start, ld } => {
                let mut rest = out;
                grid.for_each_line(rows, |image, y, x, count| {
                    let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
                    let line = (image * grid.height + y) * grid.width;
                    for (i, out) in now.iter_mut().enumerate() {
                        *out = start + (line + x + i * grid.stride) * ld;
                    }
                    rest = later;
                });
            }
        }
    }
}

/// How a product is cut into tasks. This depends on its shape alone (and would not change its bits).
struct Plan {
    row_blocks: usize,
    /// Groups of panels.
    groups: usize,
}

impl Plan {
    fn new(rows: usize, k: usize, segments: usize, panels: &Panels) -> Self {
        // Offsets of a task's rows in all segments, and its rows themselves where they are copied together.
        let row_scratch = (segments + 1) * 2 + MAX_GATHERED;
        let max_rows = MAX_ROWS.min((BASE_SCRATCH - 1024) / row_scratch).max(1);
        let work = rows.saturating_mul(k.max(1)).saturating_mul(panels.vectors * panels.lanes);
        let target = (work / TASK_WORK).clamp(1, TASKS);

        let mut groups = (k * panels.vectors * panels.lanes).div_ceil(GROUP).clamp(1, panels.count);
        let mut row_blocks = rows.div_ceil(max_rows);
        if row_blocks * groups < target {
            groups = target.div_ceil(row_blocks).clamp(groups, panels.count);
        }
        if row_blocks * groups < target {
            row_blocks = target.div_ceil(groups).clamp(row_blocks, rows.div_ceil(MIN_ROWS).max(row_blocks));
        }
        Plan { row_blocks, groups }
    }
}

struct Product<'a> {
    tiling: &'static Tiling,
    panels: Panels,
    /// Whether the result has so few columns that lanes run along the reduction.
    dot: bool,
    a: &'a Rows<'a>,
    k: usize,
    packed: &'a [f32],
    out: Shared<f32>,
    out_rows: OutRows,
    init: Init<'a>,
}

/// Where the rows of a task lie.
struct Operand<'a> {
    /// Data and length of each segment.
    segments: &'a [super::Segment<'a>],
    /// Offsets of the task's rows, segment by segment.
    offsets: &'a [usize],
    rows: usize,
}

impl Product<'_> {
    /// One task: `rows` times a group of panels.
    fn block(&self, rows: Range<usize>, panels: Range<usize>, scratch: &mut [f32]) {
        let height = rows.len();
        let (out_rows, scratch) = take_indices(scratch, height);
        self.out_rows.fill(rows.clone(), out_rows);
        let segments = self.a.segments;
        let short = segments.len() > 1 && segments.iter().all(|s| s.k < SHORT) && self.k <= MAX_GATHERED;
        if short {
            let (offsets, scratch) = take_indices(scratch, height);
            let gathered = &mut scratch[..height * self.k];
            let mut at = 0;
            for (s, segment) in segments.iter().enumerate() {
                self.a.fill(s, rows.clone(), offsets);
                gather(segment.data, segment.k, offsets, &mut gathered[at..], self.k);
                at += segment.k;
            }
            for (i, offset) in offsets.iter_mut().enumerate() {
                *offset = i * self.k;
            }
            let segments = [super::Segment { data: gathered, k: self.k }];
            self.multiply(&Operand { segments: &segments, offsets, rows: height }, panels, out_rows);
        } else {
            let (offsets, _) = take_indices(scratch, height * segments.len());
            for (s, offsets) in offsets.chunks_exact_mut(height).enumerate() {
                self.a.fill(s, rows.clone(), offsets);
            }
            self.multiply(&Operand { segments, offsets, rows: height }, panels, out_rows);
        }
    }

    fn multiply(&self, a: &Operand<'_>, panels: Range<usize>, out_rows: &[usize]) {
        // All panels of a group are about equally wide; the first is the widest.
        let width = self.panels.get(panels.start).vectors * self.tiling.lanes;
        let most = (PANEL_BLOCK / width).min(MAX_RUN);
        // Even blocks, a multiple of 8 long. The few columns of the dot kernel stay in the cache as they are.
        let even = self.k.div_ceil(self.k.div_ceil(most).max(1)).next_multiple_of(8).min(most);
        let step = if self.dot { self.k } else { even };
        let mut runs = [Run { data: std::ptr::null(), rows: std::ptr::null(), k: 0 }; MAX_RUNS];
        let mut next = Position { segment: 0, k: 0 };
        let mut first_k = 0;
        loop {
            let (count, length) = next.advance(a, step, &mut runs);
            for panel in panels.clone() {
                self.pass(&runs[..count], first_k, panel, a.rows, out_rows);
            }
            first_k += length;
            if first_k >= self.k {
                break;
            }
        }
    }

    /// All rows of a task times one block of a panel that starts at row `first_k`; `runs` tell the same block of A.
    fn pass(&self, runs: &[Run], first_k: usize, panel: usize, rows: usize, out_rows: &[usize]) {
        let panel = self.panels.get(panel);
        let first = first_k == 0;
        let column = |data: Option<&[f32]>| data.map_or(std::ptr::null(), |data| data[panel.first_column..].as_ptr());
        let (max_mr, first_b) = if self.dot {
            (self.tiling.max_dot_mr(panel.columns), first_k)
        } else {
            let width = panel.vectors * self.tiling.lanes;
            (self.tiling.max_mr(panel.vectors), panel.first_column * self.k + first_k * width)
        };
        let tiles = rows.div_ceil(max_mr);
        let b = &self.packed[first_b..];
        let mut here = [Run { data: std::ptr::null(), rows: std::ptr::null(), k: 0 }; MAX_RUNS];
        for tile in 0..tiles {
            let tile = part(rows, tiles, tile);
            for (here, run) in here.iter_mut().zip(runs) {
                // SAFETY: the run's offsets are one for each row of the task.
                *here = Run { rows: unsafe { run.rows.add(tile.start) }, ..*run };
            }
            let row_tile = RowTile {
                runs: &here[..runs.len()],
                b: b.as_ptr(),
                ldb: self.k,
                // SAFETY: a column of the first row is inside the result.
                c: unsafe { self.out.get().add(panel.first_column) },
                c_rows: out_rows[tile.clone()].as_ptr(),
                lanes: panel.lanes,
                bias: column(if first { self.init.bias } else { None }),
                accumulate: !first || self.init.accumulate,
                residual: column(if first { self.init.residual } else { None }),
            };
            let kernel = if self.dot {
                self.tiling.dot_kernel(tile.len(), panel.columns)
            } else {
                self.tiling.row_kernel(tile.len(), panel.vectors)
            };
            // SAFETY: the level was detected. Runs: offsets were checked by `Rows::fill`, and each run stays inside its
            // segment's k. Panel: its length was asserted, `runs` cover at most the k − first_k rows left. Result:
            // `OutRows::check` keeps rows apart and inside, and no other task has these rows in these columns; the
            // residual is as long, the bias has n floats, and the last vector is cut to `lanes`.
            unsafe { kernel(&row_tile) };
        }
    }
}

/// Where the next block of the reduction begins.
struct Position {
    segment: usize,
    k: usize,
}

impl Position {
    /// Fills `runs` with the next `step` floats of every row (fewer at the end, or when there are too many runs) and
    /// returns the number of runs and of floats.
    fn advance(&mut self, a: &Operand<'_>, step: usize, runs: &mut [Run; MAX_RUNS]) -> (usize, usize) {
        let (mut count, mut length) = (0, 0);
        while count < MAX_RUNS && length < step && self.segment < a.segments.len() {
            let segment = &a.segments[self.segment];
            let k = (segment.k - self.k).min(step - length).min(MAX_RUN);
            if k > 0 {
                runs[count] = Run {
                    // (Wrapping, as a segment whose rows are all padding may be empty.)
                    data: segment.data.as_ptr().wrapping_add(self.k),
                    rows: a.offsets[self.segment * a.rows..].as_ptr(),
                    k,
                };
                count += 1;
                length += k;
                self.k += k;
            }
            if self.k == segment.k {
                *self = Position { segment: self.segment + 1, k: 0 };
            }
        }
        (count, length)
    }
}

/// Copies `k` floats at each offset to rows that start `ld` apart in `out`; zeros for padding.
pub(super) fn gather(data: &[f32], k: usize, offsets: &[usize], out: &mut [f32], ld: usize) {
    // The rows are too short for loops or calls of memcpy to pay.
    match k {
        0 => {}
        1 => gather_k::<1>(data, offsets, out, ld),
        2 => gather_k::<2>(data, offsets, out, ld),
        3 => gather_k::<3>(data, offsets, out, ld),
        4 => gather_k::<4>(data, offsets, out, ld),
        _ => {
            for (&offset, out) in offsets.iter().zip(out.chunks_mut(ld)) {
                if offset == ZERO_ROW {
                    out[..k].fill(0.0);
                } else {
                    out[..k].copy_from_slice(&data[offset..offset + k]);
                }
            }
        }
    }
}

fn gather_k<const K: usize>(data: &[f32], offsets: &[usize], out: &mut [f32], ld: usize) {
    for (&offset, out) in offsets.iter().zip(out.chunks_mut(ld)) {
        let from = data.get(offset..offset.wrapping_add(K)).and_then(|from| from.first_chunk::<K>());
        if let Some(out) = out.first_chunk_mut::<K>() {
            *out = from.copied().unwrap_or([0.0; K]);
        }
    }
}
