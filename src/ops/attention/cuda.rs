//! `kernels/attention.cu` and `kernels/attention_gradient.cu`, and `kernels/attention_fma.cu` for f32 and for heads that tensor cores do not take.

use super::{Attention, AttentionGradient};
use crate::device::cuda::{Argument, Launch, Precision};

/// Heads that a kernel for tensor cores fills up with zeros, at most so many channels each.
const SIZES: [usize; 5] = [32, 64, 128, 256, 512];

/// How a kernel of the first two cuts its work; `kernels/attention_tiles.cuh` says what the numbers mean.
#[derive(Clone, Copy)]
struct Tile {
    size: usize,
    own: usize,
    other: usize,
    warps: usize,
}

/// o and the logarithms.
const FORWARD: [Tile; 5] = tiles([[64, 64, 4], [64, 64, 4], [64, 64, 4], [64, 64, 4], [64, 32, 8]]);
/// dq; dk and dv.
const GRADIENT: [Tile; 5] = tiles([[64, 64, 4], [64, 64, 4], [64, 64, 4], [64, 64, 8], [32, 32, 8]]);

const fn tiles(numbers: [[usize; 3]; 5]) -> [Tile; 5] {
    let mut tiles = [Tile { size: 0, own: 0, other: 0, warps: 0 }; 5];
    let mut i = 0;
    while i < 5 {
        let [own, other, warps] = numbers[i];
        tiles[i] = Tile { size: SIZES[i], own, other, warps };
        i += 1;
    }
    tiles
}

impl Tile {
    /// Bytes of `own` and `other` tiles of channels, and of matrices of scores; rows are 16 bytes longer than what they hold.
    fn bytes(&self, own: usize, other: usize, scores: usize) -> usize {
        let channels = (own * self.own + other * self.other) * (self.size + 8);
        2 * (channels + scores * self.own * (self.other + 8))
    }

    /// q; k, v; probabilities; a number for each row of up to two warps.
    fn forward_bytes(&self) -> usize {
        self.bytes(1, 2, 1) + 4 * 2 * self.own
    }

    /// q, do; k, v; ds.
    fn queries_bytes(&self) -> usize {
        self.bytes(2, 2, 1)
    }

    /// k, v; q, do; probabilities, ds; two numbers for each query.
    fn keys_bytes(&self) -> usize {
        self.bytes(2, 2, 2) + 4 * 2 * self.other
    }
}

/// The tile for tensor cores, if they take such heads.
fn tile_of(tiles: &[Tile; 5], op: &Attention, precision: Precision) -> Option<Tile> {
    let d = op.head_channels();
    let is_for_tensor_cores = precision == Precision::Bf16 && d.is_multiple_of(8);
    tiles.iter().find(|tile| is_for_tensor_cores && d <= tile.size).copied()
}

/// Of `kernels/attention_fma.cu`: threads, rows of a tile, and channels of a result that a block computes.
const THREADS: usize = 256;
const ROWS: usize = 32;
const SLICE: usize = 512;

/// A kernel for tensor cores if there is a tile, or the other one, which has `sums` f32 in shared memory for each element of its result.
fn launch_of(
    op: &Attention,
    name: &str,
    precision: Precision,
    tile: Option<(Tile, usize)>,
    sums: usize,
    arguments: Vec<Argument>,
) -> Launch {
    let d = op.head_channels();
    let grid = |own: usize, slices: usize| [op.tokens().div_ceil(own) * op.heads * op.images(), slices, 1];
    if let Some((tile, shared)) = tile {
        let name = format!("{name}_{}", tile.size);
        return Launch { shared, ..Launch::new(&name, precision, grid(tile.own, 1), 32 * tile.warps, arguments) };
    }
    let shared = 4 * sums * ROWS * d.min(SLICE).next_multiple_of(ROWS);
    Launch { shared, ..Launch::new(name, precision, grid(ROWS, d.div_ceil(SLICE)), THREADS, arguments) }
}

/// T, heads, d
fn sizes(op: &Attention) -> Argument {
    Argument::struct_of([op.tokens(), op.heads, op.head_channels()])
}

/// o and the logarithms.
pub fn launch(op: &Attention, precision: Precision) -> Launch {
    let tile = tile_of(&FORWARD, op, precision).map(|tile| (tile, tile.forward_bytes()));
    let arguments =
        vec![Argument::Input(0), Argument::Output(0), Argument::Output(1), sizes(op), Argument::f32(op.scale())];
    launch_of(op, "attention", precision, tile, 1, arguments)
}

/// Floats of the gradient's workspace: Σ do·o for each query of each head.
pub fn dots(op: &AttentionGradient) -> usize {
    let attention = &op.attention;
    attention.images() * attention.heads * attention.tokens()
}

/// Σ do·o to the workspace; dq; dk and dv. The last two may run in either order, and each writes or adds to its own part of dqkv.
pub fn launches_gradient(op: &AttentionGradient, precision: Precision, adds: bool) -> [Launch; 3] {
    let attention = &op.attention;
    let rows = dots(op);
    let first =
        vec![Argument::Input(1), Argument::Input(3), Argument::Scratch, sizes(attention), Argument::u64(rows as u64)];
    let arguments = vec![
        Argument::Input(0),
        Argument::Input(2),
        Argument::Input(3),
        Argument::Scratch,
        Argument::Output(0),
        sizes(attention),
        Argument::f32(attention.scale()),
        Argument::flag(adds),
    ];
    let tile = tile_of(&GRADIENT, attention, precision);
    let queries = tile.map(|tile| (tile, tile.queries_bytes()));
    let keys = tile.map(|tile| (tile, tile.keys_bytes()));
    [
        Launch::new("attention_dots", precision, [rows.div_ceil(THREADS / 32), 1, 1], THREADS, first),
        launch_of(attention, "attention_dq", precision, queries, 1, arguments.clone()),
        launch_of(attention, "attention_dkv", precision, keys, 2, arguments),
    ]
}
