//! y = x ∗ g, and dx = dy ∗ g turned.

use super::super::pack::transpose_block;
use super::super::serial::row_tiles;
use super::super::tiling::Tiling;
use super::super::{Init, Panel, Panels, Shared, part};
use super::transform::{OutputTile, Taps, Transforms};
use super::{Convolution, INPUT, OUTPUT, PLACES, Pixels, SKEW};
use crate::device::cpu::Pool;
use crate::device::cpu::pool::BASE_SCRATCH;
use crate::simd::{self, Level};

/// Filter taps.
const TAPS: usize = 9;
/// Input channels whose filters one task transforms.
const FILTER_CHANNELS: usize = 32;
/// Most tiles of a task; with fewer than the least, filters are read too often.
const MAX_TILES: usize = 48;
const MIN_TILES: usize = 24;
/// Most floats of transformed patches in a task: half of its scratch.
const MAX_PATCHES: usize = BASE_SCRATCH / 2;
/// Floats of filters that one task goes through, if it has the choice: 1 MiB, half of a second-level cache.
const GROUP: usize = 1 << 18;
/// Floats of a filter panel that are read again and again by the rows of a task: they stay in the first-level cache.
const PANEL_BLOCK: usize = 8192;
/// Longest part of a reduction.
const MAX_K: usize = 512;
/// Tasks to aim for.
const TASKS: usize = 32;

/// How a convolution's filters are read from weights `[O, 3, 3, C]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// From C channels to O.
    Upright,
    /// From O channels to C, turned by 180°: the convolution that makes dx of dy.
    Turned,
}

/// Length in floats of the transformed filters: enough for every instruction set.
pub fn filters_len(s: &Convolution) -> usize {
    PLACES * super::super::packed_len(s.out, s.channels)
}

/// Transforms the filters of `s` for [`convolve`]: `[place]` packed panels of channels × out. `filters` needs [`filters_len`] floats.
///
/// # Panics
/// If `w` is not `[O, 3, 3, C]`, or `filters` too short.
pub fn transform_filters(pool: &Pool, s: &Convolution, filter: Filter, w: &[f32], filters: &mut [f32]) {
    transform_filters_at(simd::level(), pool, s, filter, w, filters);
}

/// y = init + x ∗ filters, for x `[N, H, W, channels]` and y `[N, H, W, out]`.
///
/// # Panics
/// If a length contradicts `s`, or there are more than 4096 channels ([`Convolution::pays`] says no to that).
pub fn convolve(pool: &Pool, s: &Convolution, x: &[f32], filters: &[f32], y: &mut [f32], init: Init<'_>) {
    convolve_at(simd::level(), pool, s, x, filters, y, init);
}

/// The filters' panels, and the length of one place of them.
fn layout(tiling: &Tiling, s: &Convolution) -> (Panels, usize) {
    let panels = Panels::new(tiling, s.out);
    let place = panels.vectors * tiling.lanes * s.channels;
    (panels, place)
}

pub(in super::super::super) fn transform_filters_at(
    level: Level,
    pool: &Pool,
    s: &Convolution,
    filter: Filter,
    w: &[f32],
    filters: &mut [f32],
) {
    let (tiling, transforms) = (Tiling::of(level), Transforms::of(level));
    let (panels, place) = layout(tiling, s);
    assert_eq!(w.len(), s.out * TAPS * s.channels, "weights of {s:?}");
    assert!(filters.len() >= PLACES * place, "filters of {s:?} need {} floats, not {}", PLACES * place, filters.len());
    let parts = s.channels.div_ceil(FILTER_CHANNELS);
    let filters = Shared(filters.as_mut_ptr());
    pool.run(panels.count * parts, &|task, scratch| {
        let (panel, ks) = (panels.get(task / parts), part(s.channels, parts, task % parts));
        let width = panel.vectors * tiling.lanes;
        // The task's part of each place: some rows of the panel.
        let (start, len) = (panel.first_column * s.channels + ks.start * width, ks.len() * width);
        match filter {
            Filter::Upright => {
                // [place][out][channel], then turned over.
                let taps = Taps { ld: s.channels as isize, channels: ks.len(), step: panel.columns * ks.len() };
                for (i, o) in (panel.first_column..).enumerate().take(panel.columns) {
                    let g = &w[o * TAPS * s.channels + ks.start..][..8 * s.channels + ks.len()];
                    let out = &mut scratch[i * ks.len()..][..15 * taps.step + ks.len()];
                    // SAFETY: nine taps and 16 places of `ks.len()` floats, as just cut.
                    unsafe { (transforms.filter)(&taps, g.as_ptr(), out.as_mut_ptr()) };
                }
                for (p, u) in scratch.chunks_exact(taps.step).take(PLACES).enumerate() {
                    // SAFETY: rows of a panel of one place, inside the length asserted, and no other task's.
                    let out = unsafe { std::slice::from_raw_parts_mut(filters.get().add(p * place + start), len) };
                    transpose_block(u, ks.len(), panel.columns, 0..ks.len(), width, 1.0, out);
                }
            }
            Filter::Turned => {
                let taps = Taps { ld: -(s.out as isize), channels: panel.columns, step: place };
                for (i, o) in ks.clone().enumerate() {
                    let g = &w[o * TAPS * s.out + panel.first_column..][..8 * s.out + panel.columns];
                    // SAFETY: the taps are read from the last to the first; they lie in `g`. Row o of the panel in all places: inside
                    // the length asserted, and no other task's.
                    unsafe {
                        let out = filters.get().add(start + i * width);
                        (transforms.filter)(&taps, g[8 * s.out..].as_ptr(), out);
                        for p in 0..PLACES {
                            out.add(p * place + panel.columns).write_bytes(0, width - panel.columns);
                        }
                    }
                }
            }
        }
    });
}

pub(in super::super::super) fn convolve_at(
    level: Level,
    pool: &Pool,
    s: &Convolution,
    x: &[f32],
    filters: &[f32],
    y: &mut [f32],
    init: Init<'_>,
) {
    let (tiling, transforms) = (Tiling::of(level), Transforms::of(level));
    let (panels, place) = layout(tiling, s);
    assert!(filters.len() >= PLACES * place, "filters of {s:?} need {} floats, not {}", PLACES * place, filters.len());
    assert_eq!(y.len(), s.pixels() * s.out, "result of {s:?}");
    assert!(init.bias.is_none_or(|bias| bias.len() == s.out), "bias of {s:?}");
    assert!(init.residual.is_none_or(|residual| residual.len() == y.len()), "residual of {s:?}");
    let groups = (PLACES * place).div_ceil(GROUP).clamp(1, panels.count.max(1));
    let tiles = s.tiles();
    let most = (MAX_PATCHES / PLACES / s.channels - 1).clamp(1, MAX_TILES);
    let blocks = tiles.div_ceil(most).max(TASKS.min(tiles / MIN_TILES));
    let work = Work { tiling, transforms, panels, place, s, x, filters, y: Shared(y.as_mut_ptr()), init };
    pool.run(groups * blocks, &|task, scratch| {
        // Tasks that share panels follow each other.
        work.block(part(tiles, blocks, task % blocks), part(panels.count, groups, task / blocks), scratch);
    });
}

struct Work<'a> {
    tiling: &'static Tiling,
    transforms: &'static Transforms,
    panels: Panels,
    /// Floats of one place of the filters.
    place: usize,
    s: &'a Convolution,
    x: &'a [f32],
    filters: &'a [f32],
    y: Shared<f32>,
    init: Init<'a>,
}

impl Work<'_> {
    /// One task: some tiles times some panels of filters.
    fn block(&self, tiles: std::ops::Range<usize>, panels: std::ops::Range<usize>, scratch: &mut [f32]) {
        let (s, k) = (self.s, self.s.channels);
        let step = tiles.len() * k + SKEW;
        let (patches, scratch) = scratch.split_at_mut(PLACES * step);
        let (patch, scratch) = scratch.split_at_mut(INPUT * INPUT * k);
        let pixels = Pixels { data: self.x, ld: k, first: 0, channels: k };
        s.transform_patches::<INPUT>(self.transforms.input, pixels, tiles.clone(), patch, patches, step);
        for panel in panels.map(|i| self.panels.get(i)) {
            let width = panel.vectors * self.tiling.lanes;
            let product_step = tiles.len() * width + SKEW;
            let products = &mut scratch[..PLACES * product_step];
            for (p, product) in products.chunks_exact_mut(product_step).enumerate() {
                let filter = &self.filters[p * self.place + panel.first_column * k..][..k * width];
                self.multiply((&patches[p * step..], k), tiles.len(), filter, &panel, product);
            }
            for (i, tile) in tiles.clone().map(|t| s.tile(t)).enumerate() {
                let first = s.pixel(tile.image, tile.y, tile.x) * s.out + panel.first_column;
                let column = |data: Option<&[f32]>, at: usize| data.map_or(std::ptr::null(), |d| d[at..].as_ptr());
                let output = OutputTile {
                    products: products[i * width..].as_ptr(),
                    step: product_step,
                    channels: panel.columns,
                    // SAFETY: the tile's first pixel lies inside the picture.
                    y: unsafe { self.y.get().add(first) },
                    line: s.width * s.out,
                    pixel: s.out,
                    lines: OUTPUT.min(s.height - tile.y),
                    pixels: OUTPUT.min(s.width - tile.x),
                    bias: column(self.init.bias, panel.first_column),
                    accumulate: self.init.accumulate,
                    residual: column(self.init.residual, first),
                };
                // SAFETY: the pixels named lie inside the result and, where there is one, the residual of equal length; no other task
                // has these tiles in these columns. The bias has `out` floats, each product a row for every tile.
                unsafe { (self.transforms.output)(&output) };
            }
        }
    }

    /// `product[tiles, panel] = patches[tiles, k] · filter[k, panel]`.
    fn multiply(&self, patches: (&[f32], usize), tiles: usize, filter: &[f32], panel: &Panel, product: &mut [f32]) {
        let (k, width) = (self.s.channels, panel.vectors * self.tiling.lanes);
        let panel = Panel { first_column: 0, ..*panel };
        let blocks = k.div_ceil((PANEL_BLOCK / width).min(MAX_K));
        for ks in (0..blocks).map(|i| part(k, blocks, i)) {
            let block = &filter[ks.start * width..ks.end * width];
            row_tiles(self.tiling, 0..tiles, ks.clone(), patches, block, &panel, (product, width), ks.start > 0);
        }
    }
}
