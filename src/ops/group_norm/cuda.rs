//! `kernels/group_norm.cu`

use super::{GroupNorm, GroupNormGradient, Timestep};
use crate::device::cuda::{Argument, Launch, Precision};
use crate::rng::Keep;

/// Most threads of a block.
const THREADS: usize = 256;
const WARP: usize = 32;
/// Shared memory that a block can have on every card that kernels are compiled for.
const SHARED_LIMIT: usize = 163 << 10;
/// As much as lets a multiprocessor of an H100 hold three blocks: one computes while others read.
const SHARED_OF_THREE: usize = 74 << 10;
/// Bytes of neighbouring channels that a slab should have, and the fewest where that takes too much shared memory: two sectors and one.
const ROW: [usize; 2] = [64, 32];
/// A slab of fewer bytes is not worth a block, unless the tensor has no more.
const SMALL_SLAB: usize = 4096;
/// Accesses of a thread to a tensor where there are two passes: what a block does once must not count.
const ACCESSES: usize = 16;

/// How often a tensor is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// Once: slabs of whole groups are held on the chip.
    One,
    /// Once for sums over chunks of so many pixels, and once again.
    Two {
        /// Pixels of a chunk.
        chunk: usize,
    },
}

/// How an image is cut into blocks of `chunk` pixels and `tile` channels, which `threads` read `pack` neighbours at a time.
#[derive(Clone, Copy, Debug)]
struct Cut {
    pack: usize,
    tile: usize,
    chunk: usize,
    threads: usize,
}

impl Cut {
    fn new(pack: usize, tile: usize, chunk: usize) -> Cut {
        let columns = tile / pack;
        let threads = (columns * chunk).div_ceil(4).max(columns).next_multiple_of(WARP).min(THREADS);
        Cut { pack, tile, chunk, threads }
    }

    /// All pixels of some whole groups, `tensors` of which are on the chip at a time; `None` where they do not fit.
    fn slab(op: &GroupNorm, precision: Precision, tensors: usize) -> Option<Cut> {
        let (channels, pixels, pack) = (op.total_channels(), op.pixels(), pack(op, precision));
        let group = channels / op.groups;
        let is_whole =
            |tile: &usize| channels.is_multiple_of(*tile) && tile.is_multiple_of(group) && tile.is_multiple_of(pack);
        let cuts: Vec<Cut> =
            (1..=channels.min(pack * THREADS)).filter(is_whole).map(|tile| Cut::new(pack, tile, pixels)).collect();
        // The narrowest slab with such rows, or all channels.
        let with_rows = |bytes: usize| {
            let is_wide = |cut: &&Cut| cut.tile * precision.bytes() >= bytes;
            cuts.iter().find(is_wide).or(cuts.last()).copied()
        };
        let wide = with_rows(ROW[0].max(SMALL_SLAB / pixels))?;
        let cut = if wide.shared(precision, tensors) <= SHARED_OF_THREE { wide } else { with_rows(ROW[1])? };
        (cut.shared(precision, tensors) <= SHARED_LIMIT).then_some(cut)
    }

    /// Chunks of pixels and tiles of channels, groups or not.
    fn chunks(op: &GroupNorm, precision: Precision, chunk: usize) -> Cut {
        let pack = pack(op, precision);
        Cut::new(pack, pack * columns(op, pack), chunk)
    }

    /// Bytes of shared memory: `slabs` of T, room for a sum over the block, and three values of each channel. `Chip` of the kernel.
    fn shared(&self, precision: Precision, slabs: usize) -> usize {
        let slab = (self.chunk * self.tile * precision.bytes()).next_multiple_of(16);
        let columns = self.tile / self.pack;
        let rows = if WARP.is_multiple_of(columns) { self.threads / WARP } else { self.threads / columns };
        slabs * slab + 4 * (rows + 3) * self.tile
    }

    /// Tiles, chunks, images.
    fn grid(&self, op: &GroupNorm) -> [usize; 3] {
        [op.total_channels().div_ceil(self.tile), op.pixels().div_ceil(self.chunk), op.images()]
    }

    /// `Norm` of the kernel.
    fn sizes(&self, op: &GroupNorm) -> Argument {
        let keep = Keep::new(1.0 - op.dropout.map_or(0.0, |dropout| dropout.probability));
        let [seed, layer] = op.dropout.map_or([0; 2], |dropout| [dropout.seed, dropout.layer.into()]);
        let [first_column, columns] = op.timestep.map_or([0; 2], |timestep| [timestep.offset(), timestep.total()]);
        Argument::struct_of([
            op.images(),
            op.pixels(),
            op.channels[0],
            op.channels[1],
            op.groups,
            op.total_channels() / op.groups,
            op.silu.into(),
            (op.eps as f32).to_bits() as usize,
            first_column,
            columns,
            op.timestep.is_some_and(Timestep::scales).into(),
            seed as u32 as usize,
            (seed >> 32) as usize,
            layer as usize,
            keep.limit as usize,
            keep.scale.to_bits() as usize,
            self.pack,
            self.tile,
            self.chunk,
        ])
    }

    /// A kernel with a block for each tile of each chunk and `slabs` of T on the chip, or one that has no need of shared memory.
    fn launch(
        &self,
        name: &str,
        op: &GroupNorm,
        precision: Precision,
        slabs: Option<usize>,
        arguments: Vec<Argument>,
    ) -> Launch {
        let shared = slabs.map_or(0, |slabs| self.shared(precision, slabs));
        Launch { shared, ..Launch::new(name, precision, self.grid(op), self.threads, arguments) }
    }
}

/// Neighbouring channels that a thread reads at once: 16 bytes, or one where 16 bytes do not divide a source's channels.
fn pack(op: &GroupNorm, precision: Precision) -> usize {
    let pack = 16 / precision.bytes();
    if op.channels.iter().all(|channels| channels.is_multiple_of(pack)) { pack } else { 1 }
}

/// Packs of a pixel that a block has where there are two passes: a warp's, or fewer that divide the channels better.
fn columns(op: &GroupNorm, pack: usize) -> usize {
    let all = op.total_channels() / pack;
    all.div_ceil(all.div_ceil(WARP))
}

fn passes(op: &GroupNorm, precision: Precision, tensors: usize) -> Passes {
    match Cut::slab(op, precision, tensors) {
        Some(_) => Passes::One,
        None => Passes::Two { chunk: (ACCESSES * THREADS / columns(op, pack(op, precision))).min(op.pixels()) },
    }
}

/// How the norm reads its sources: once if a slab fits.
pub fn forward_passes(op: &GroupNorm, precision: Precision) -> Passes {
    passes(op, precision, 1)
}

/// How the gradient does, which has two tensors on the chip.
pub fn backward_passes(op: &GroupNormGradient, precision: Precision) -> Passes {
    passes(&op.norm, precision, 2)
}

/// Bytes of the norm's workspace.
pub fn workspace(op: &GroupNorm, passes: Passes) -> usize {
    match passes {
        Passes::One => 0,
        Passes::Two { chunk } => 8 * op.images() * op.pixels().div_ceil(chunk) * op.total_channels(),
    }
}

/// Bytes of the gradient's workspace.
pub fn gradient_workspace(op: &GroupNormGradient, passes: Passes) -> usize {
    let norm = &op.norm;
    let sums = match passes {
        Passes::One => 0,
        Passes::Two { chunk } => 3 * norm.pixels().div_ceil(chunk) * norm.total_channels(),
    };
    4 * norm.images() * (2 * norm.total_channels() + 2 * norm.groups + sums)
}

/// Addresses of the norm's inputs, which stand from operand `first` on.
struct Inputs {
    x1: Argument,
    x2: Argument,
    gamma: Argument,
    beta: Argument,
    timestep: Argument,
    clock: Argument,
}

impl Inputs {
    fn new(op: &GroupNorm, first: usize) -> Inputs {
        let gamma = first + op.gamma_index();
        let input_if = |is_there: bool, place: usize| if is_there { Argument::Input(place) } else { Argument::Null };
        Inputs {
            x1: Argument::Input(first),
            x2: input_if(op.sources().len() == 2, first + 1),
            gamma: Argument::Input(gamma),
            beta: Argument::Input(gamma + 1),
            timestep: input_if(op.timestep.is_some(), gamma + 2),
            clock: input_if(op.dropout.is_some(), gamma + 2 + usize::from(op.timestep.is_some())),
        }
    }

    /// All of them, as most of the kernels begin, and what follows.
    fn and(&self, more: &[Argument]) -> Vec<Argument> {
        let Inputs { x1, x2, gamma, beta, timestep, clock } = self;
        [&[x1, x2, gamma, beta, timestep, clock].map(Argument::clone), more].concat()
    }
}

/// y and the statistics. The timestep matrix has the type of the activations.
pub fn launches(op: &GroupNorm, precision: Precision) -> Vec<Launch> {
    launches_in(op, precision, forward_passes(op, precision))
}

/// As [`launches`], with the passes given.
///
/// # Panics
/// If there is to be one pass and the slabs do not fit.
pub fn launches_in(op: &GroupNorm, precision: Precision, passes: Passes) -> Vec<Launch> {
    let inputs = Inputs::new(op, 0);
    let (y, statistics) = (Argument::Output(0), Argument::Output(1));
    let Passes::Two { chunk } = passes else {
        let cut = one_pass(op, precision, 1);
        let arguments = inputs.and(&[y, statistics, cut.sizes(op)]);
        return vec![cut.launch("group_norm", op, precision, Some(1), arguments)];
    };
    let cut = Cut::chunks(op, precision, chunk);
    let sizes = cut.sizes(op);
    let moments = inputs.and(&[Argument::Scratch, sizes.clone()]);
    let apply = inputs.and(&[statistics.clone(), y, sizes.clone()]);
    let grid = [op.groups.div_ceil(THREADS / WARP), op.images(), 1];
    let statistics = vec![inputs.timestep, Argument::Scratch, statistics, sizes];
    vec![
        cut.launch("group_norm_moments", op, precision, Some(1), moments),
        Launch::new("group_norm_statistics", precision, grid, THREADS, statistics),
        cut.launch("group_norm_apply", op, precision, None, apply),
    ]
}

/// All gradients. Bit i of `updates`: output i is added to, unless it is the timestep's, whose columns are written.
pub fn gradient_launches(op: &GroupNormGradient, precision: Precision, updates: u32) -> Vec<Launch> {
    gradient_launches_in(op, precision, updates, backward_passes(op, precision))
}

/// As [`gradient_launches`], with the passes given.
///
/// # Panics
/// If there is to be one pass and the slabs do not fit.
pub fn gradient_launches_in(op: &GroupNormGradient, precision: Precision, updates: u32, passes: Passes) -> Vec<Launch> {
    let norm = &op.norm;
    let inputs = Inputs::new(norm, 1);
    let (dy, statistics) = (Argument::Input(0), Argument::Input(1 + norm.inputs().len()));
    let adds = |output: usize| Argument::flag(updates >> output & 1 != 0);
    let gamma = norm.gamma_index();
    let [dx1, dx2] = [0, 1].map(|i| if i < gamma { Argument::Output(i) } else { Argument::Null });
    let d_timestep = if norm.timestep.is_some() { Argument::Output(gamma + 2) } else { Argument::Null };
    let adds_x = [adds(0), if gamma == 2 { adds(1) } else { Argument::flag(false) }];

    let mut launches = match passes {
        Passes::One => {
            let cut = one_pass(norm, precision, 2);
            let outputs = [dy, statistics, dx1, dx2, d_timestep, Argument::Scratch, cut.sizes(norm)];
            let arguments = inputs.and(&[&outputs[..], &adds_x].concat());
            vec![cut.launch("group_norm_gradient", norm, precision, Some(2), arguments)]
        }
        Passes::Two { chunk } => {
            let cut = Cut::chunks(norm, precision, chunk);
            let sums = [dy.clone(), statistics.clone(), Argument::Scratch, cut.sizes(norm)];
            let apply = [dy, statistics.clone(), dx1, dx2, Argument::Scratch, cut.sizes(norm)];
            let apply = inputs.and(&[&apply[..], &adds_x].concat());
            vec![
                cut.launch("group_norm_gradient_sums", norm, precision, Some(0), inputs.and(&sums)),
                coefficients(norm, precision, chunk, inputs, statistics, d_timestep),
                cut.launch("group_norm_gradient_apply", norm, precision, None, apply),
            ]
        }
    };
    launches.push(parameters(norm, gamma, adds(gamma), adds(gamma + 1)));
    launches
}

fn one_pass(op: &GroupNorm, precision: Precision, tensors: usize) -> Cut {
    match Cut::slab(op, precision, tensors) {
        Some(cut) => cut,
        None => panic!("group_norm: a slab of {} pixels does not fit into shared memory", op.pixels()),
    }
}

/// Adds up the chunks, a block for some whole groups of an image.
fn coefficients(
    norm: &GroupNorm,
    precision: Precision,
    chunk: usize,
    inputs: Inputs,
    statistics: Argument,
    d_timestep: Argument,
) -> Launch {
    let group = norm.total_channels() / norm.groups;
    let cut = Cut { pack: 1, tile: group * (THREADS / 4 / group).max(1), chunk, threads: THREADS };
    let [tiles, _, images] = cut.grid(norm);
    let Inputs { gamma, beta, timestep, .. } = inputs;
    let arguments = vec![gamma, beta, timestep, statistics, d_timestep, Argument::Scratch, cut.sizes(norm)];
    Launch {
        shared: 12 * cut.tile,
        ..Launch::new("group_norm_gradient_coefficients", precision, [tiles, images, 1], THREADS, arguments)
    }
}

/// dγ and dβ from each image's part: a lane for each.
fn parameters(norm: &GroupNorm, gamma: usize, adds_gamma: Argument, adds_beta: Argument) -> Launch {
    Launch {
        kernel: "group_norm_parameters".into(),
        grid: [(2 * norm.total_channels()).div_ceil(WARP), 1, 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments: vec![
            Argument::Scratch,
            Argument::Output(gamma),
            Argument::Output(gamma + 1),
            Argument::u32(norm.images()),
            Argument::u32(norm.total_channels()),
            adds_gamma,
            adds_beta,
        ],
    }
}
