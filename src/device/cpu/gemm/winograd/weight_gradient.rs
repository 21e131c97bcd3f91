//! dg from x and dy.

use super::super::serial::outer_tiles;
use super::super::tiling::Tiling;
use super::super::{Panels, Shared, part, take_indices};
use super::transform::{Taps, Transforms};
use super::{Convolution, INPUT, OUTPUT, PLACES, Pixels, SKEW};
use crate::device::cpu::Pool;
use crate::device::cpu::pool::{BASE_SCRATCH, COMMON_SCRATCH};
use crate::simd::{self, Level};
use std::ops::Range;

/// Filter taps.
const TAPS: usize = 9;
/// Most output and input channels of one task.
const BLOCK: usize = 64;
/// The place of A dy Aᵀ that holds the sum of the four outputs.
const SUM_PLACE: usize = 5;
/// Tiles that are transformed before their products are summed.
const PASS_TILES: usize = 40;
/// Fewest tiles of a part, and most parts, each of which is summed on its own.
const MIN_PART: usize = 192;
const MAX_PARTS: usize = 16;
/// Tasks to aim for, by halving the blocks of output channels where there are few parts.
const TASKS: usize = 8;

const _: () = assert!(
    PLACES * (BLOCK * BLOCK + PASS_TILES * 2 * BLOCK + 2 * SKEW + INPUT * INPUT * BLOCK) + BLOCK + 4 * PASS_TILES + 64
        <= BASE_SCRATCH,
    "the sums and transformed tiles of a task fit in every worker's scratch"
);

/// `dw (+)= Σ dy ⋆ x`, `[out, 3, 3, channels]`, and `db (+)= Σ dy`, `[out]`, over all pixels; with `accumulate` both are added to what
/// they hold.
///
/// # Panics
/// If a length contradicts `s`.
pub fn weight_gradient(
    pool: &Pool,
    s: &Convolution,
    dy: &[f32],
    x: &[f32],
    dw: &mut [f32],
    db: &mut [f32],
    accumulate: bool,
) {
    weight_gradient_at(simd::level(), pool, s, dy, x, dw, db, accumulate);
}

#[allow(clippy::too_many_arguments)] // the operands of the gradient
pub(in super::super::super) fn weight_gradient_at(
    level: Level,
    pool: &Pool,
    s: &Convolution,
    dy: &[f32],
    x: &[f32],
    dw: &mut [f32],
    db: &mut [f32],
    accumulate: bool,
) {
    assert_eq!(dw.len(), s.out * TAPS * s.channels, "weight gradient of {s:?}");
    assert_eq!(db.len(), s.out, "bias gradient of {s:?}");
    let plan = Plan::new(s);
    let (tiling, transforms) = (Tiling::of(level), Transforms::of(level));
    let (dw, db) = (Shared(dw.as_mut_ptr()), Shared(db.as_mut_ptr()));
    let work = Work { tiling, transforms, s, dy, x, dw, db, accumulate };
    if plan.parts == 1 {
        return pool.run(plan.blocks(), &|task, scratch| {
            let block = plan.block(task, s);
            let (sums, scratch) = scratch.split_at_mut(plan.block_len);
            work.add_tiles(&block, 0..s.tiles(), sums, scratch);
            for o in 0..block.out.len() {
                // SAFETY: blocks are disjoint parts of the gradients, one for each task.
                unsafe { work.store(&block, o, std::iter::once(&*sums), scratch) };
            }
        });
    }
    let mut common = pool.common();
    let partial = &mut common.floats()[..plan.parts * plan.blocks() * plan.block_len];
    // Tasks that read the same tiles follow each other.
    pool.for_chunks(partial, plan.block_len, |task, sums, scratch| {
        let tiles = part(s.tiles(), plan.parts, task / plan.blocks());
        work.add_tiles(&plan.block(task % plan.blocks(), s), tiles, sums, scratch);
    });
    let partial = &*partial;
    pool.run(plan.blocks() * plan.most_out, &|task, scratch| {
        let (i, o) = (task / plan.most_out, task % plan.most_out);
        let block = plan.block(i, s);
        if o < block.out.len() {
            let parts = partial.chunks_exact(plan.block_len).skip(i).step_by(plan.blocks());
            // SAFETY: each task has an output of a block of its own.
            unsafe { work.store(&block, o, parts, scratch) };
        }
    });
}

/// How the sum is cut into tasks: by shape alone, as the number of parts shows in the bits.
struct Plan {
    /// Parts of the tiles, each summed on its own.
    parts: usize,
    out_blocks: usize,
    channel_blocks: usize,
    /// Outputs of the largest block.
    most_out: usize,
    /// Floats of a block's sums.
    block_len: usize,
}

/// The part of the gradients that one task sums.
struct Block {
    out: Range<usize>,
    channels: Range<usize>,
    /// Whether it sums the bias gradient of its outputs as well.
    bias: bool,
}

impl Plan {
    fn new(s: &Convolution) -> Self {
        let channel_blocks = s.channels.div_ceil(BLOCK);
        let mut out_blocks = s.out.div_ceil(BLOCK);
        let mut parts = (s.tiles() / MIN_PART).clamp(1, MAX_PARTS);
        if parts * channel_blocks * out_blocks < TASKS {
            out_blocks = s.out.div_ceil(BLOCK / 2);
        }
        let (most_out, most_channels) = (s.out.div_ceil(out_blocks), s.channels.div_ceil(channel_blocks));
        let block_len = (PLACES * most_out * most_channels + most_out).next_multiple_of(16);
        parts = parts.min(COMMON_SCRATCH / (out_blocks * channel_blocks * block_len)).max(1);
        Plan { parts, out_blocks, channel_blocks, most_out, block_len }
    }

    fn blocks(&self) -> usize {
        self.out_blocks * self.channel_blocks
    }

    fn block(&self, i: usize, s: &Convolution) -> Block {
        let (o, c) = (i / self.channel_blocks, i % self.channel_blocks);
        Block { out: part(s.out, self.out_blocks, o), channels: part(s.channels, self.channel_blocks, c), bias: c == 0 }
    }
}

struct Work<'a> {
    tiling: &'static Tiling,
    transforms: &'static Transforms,
    s: &'a Convolution,
    dy: &'a [f32],
    x: &'a [f32],
    dw: Shared<f32>,
    db: Shared<f32>,
    accumulate: bool,
}

impl Work<'_> {
    /// Sets `sums` to the block's sums over `tiles`: `[place][out][channel]`, and `[out]` of the bias at the end.
    fn add_tiles(&self, block: &Block, tiles: Range<usize>, sums: &mut [f32], scratch: &mut [f32]) {
        let (m, n) = (block.out.len(), block.channels.len());
        let (sums, bias) = sums.split_at_mut(PLACES * m * n);
        let bias = &mut bias[..m];
        bias.fill(0.0);
        let (dy_rows, scratch) = take_indices(scratch, PASS_TILES);
        let (x_rows, scratch) = take_indices(scratch, PASS_TILES);
        for i in 0..PASS_TILES {
            (dy_rows[i], x_rows[i]) = (i * m, i * n);
        }
        let (dy_step, x_step) = (PASS_TILES * m + SKEW, PASS_TILES * n + SKEW);
        let (dy_patches, scratch) = scratch.split_at_mut(PLACES * dy_step);
        let (x_patches, scratch) = scratch.split_at_mut(PLACES * x_step);
        let patch = &mut scratch[..INPUT * INPUT * m.max(n)];
        let dy = Pixels { data: self.dy, ld: self.s.out, first: block.out.start, channels: m };
        let x = Pixels { data: self.x, ld: self.s.channels, first: block.channels.start, channels: n };
        let panels = Panels::new(self.tiling, n);
        let passes = tiles.len().div_ceil(PASS_TILES);
        for pass in 0..passes {
            let here = part(tiles.len(), passes, pass);
            let here = tiles.start + here.start..tiles.start + here.end;
            let count = here.len();
            let s = self.s;
            s.transform_patches::<OUTPUT>(
                self.transforms.output_gradient,
                dy,
                here.clone(),
                patch,
                dy_patches,
                dy_step,
            );
            s.transform_patches::<INPUT>(self.transforms.input, x, here, patch, x_patches, x_step);
            for (p, sums) in sums.chunks_exact_mut(m * n).enumerate() {
                let (dy, x) = (&dy_patches[p * dy_step..][..count * m], &x_patches[p * x_step..][..count * n]);
                for panel in (0..panels.count).map(|i| panels.get(i)) {
                    let rows = (&dy_rows[..count], &x_rows[..count]);
                    let x = &x[panel.first_column..];
                    outer_tiles(self.tiling, 0..m, rows, dy, x, &panel, (sums, n), pass > 0);
                }
            }
            if block.bias {
                add_rows(&dy_patches[SUM_PLACE * dy_step..][..count * m], bias);
            }
        }
    }

    /// Adds up the parts of one output of a block, `o`, in their order, and transforms the sum back into the gradients.
    ///
    /// # Safety
    /// No one else uses this output's part of `dw` and `db` meanwhile.
    unsafe fn store<'s>(&self, block: &Block, o: usize, parts: impl Iterator<Item = &'s [f32]>, scratch: &mut [f32]) {
        let (m, n) = (block.out.len(), block.channels.len());
        let total = &mut scratch[..PLACES * n];
        total.fill(0.0);
        let mut bias = 0.0;
        for sums in parts {
            for (p, total) in total.chunks_exact_mut(n).enumerate() {
                add_rows(&sums[(p * m + o) * n..][..n], total);
            }
            bias += sums[PLACES * m * n + o];
        }
        let taps = Taps { ld: self.s.channels as isize, channels: n, step: n };
        let output = block.out.start + o;
        // SAFETY: `total` is 16 places of n floats; dw is [out, 3, 3, channels] and db [out], of which this is one output.
        unsafe {
            let dw = self.dw.get().add(output * TAPS * self.s.channels + block.channels.start);
            (self.transforms.filter_gradient)(&taps, total.as_ptr(), dw, self.accumulate);
            if block.bias {
                let db = self.db.get().add(output);
                *db = if self.accumulate { *db + bias } else { bias };
            }
        }
    }
}

crate::multiversion! {
    /// Adds the rows, as long as `sums`, to it.
    fn add_rows(rows: &[f32], sums: &mut [f32]) {
        for row in rows.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
