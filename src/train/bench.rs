//! How long steps take, as a whole and op by op.

use super::feed::fits;
use super::plans::pieces_of_steps;
use super::step::step_runs;
use super::{Config, Images, Share, Trainer, must_fit};
use crate::collective::Collective;
use crate::data::Order;
use crate::device::{Device, DeviceError};
use crate::diffusion::Schedule;
use crate::rng::{Kind as Random, Stream};
use crate::sample::SampleConfig;
use crate::tape::{Kind, OpGroup, Phase, Program, RunError, agree_on_plans};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Images that a GPU holds at least while it is measured.
const HELD: usize = 1024;

/// How a measurement is made.
#[derive(Clone, Copy, Debug)]
pub struct BenchOptions<'a> {
    /// Steps before the clock counts: memory is touched and caches are filled by then.
    pub warmup: u64,
    /// Steps that are measured.
    pub steps: u64,
    /// Whether every op is measured too, by the device's clock; looking at it costs a microsecond per instruction at most.
    pub per_op: bool,
    /// Ends the measurement after the step in progress.
    pub stop: &'a AtomicBool,
}

/// What was measured.
#[derive(Debug)]
pub struct Timings {
    /// Duration of each measured step, in order; fewer than asked for if it was stopped.
    pub steps: Vec<Duration>,
    /// For each group of [`Program::op_groups`], its part of each measured step; empty unless ops were measured.
    pub ops: Vec<(OpGroup, Vec<Duration>)>,
    /// FLOPs of a step by the common convention: 3 × the matrix products of the forward pass.
    pub step_flops: u64,
    /// Steps, also of the warm-up, whose loss or gradient was not finite: such a step leaves out the update.
    pub not_finite: u64,
}

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum BenchError {
    /// A process that cannot be built.
    #[error(transparent)]
    OutOfRange(#[from] crate::config::OutOfRange),
    /// Too little memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A step that stopped.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// FLOPs of the matrix products in a forward pass, a multiply-add counting as two ([`Op::products`](crate::tape::Op::products)).
pub fn forward_products(program: &Program) -> u64 {
    let forward = program.instructions.iter().filter(|instruction| instruction.phase == Phase::Forward);
    forward
        .map(|instruction| match &instruction.kind {
            Kind::Launch(op) => op.products(),
            _ => 0,
        })
        .sum()
}

/// Measures training steps on random images of `size` = [H, W]. `done` is called after each step, warm-up included, with their number.
///
/// A step is all of training except fetching images: upload, forward, backward, sums over ranks, norm, Adam, EMA, and reading the loss.
///
/// # Errors
/// Too little memory for the config, or a rank that is lost.
pub fn time_steps(
    device: &mut Device,
    collective: &mut dyn Collective,
    config: &Config,
    size: [usize; 2],
    options: BenchOptions<'_>,
    mut done: impl FnMut(u64),
) -> Result<Timings, BenchError> {
    config.train.choose_adding(collective)?;
    let schedule = Schedule::new(&config.diffusion)?;
    let share = Share::new(&config.train, collective.rank(), collective.world_size())?;
    // No grids are made here.
    let without_grids = Config { sample: SampleConfig { count: 0, ..config.sample.clone() }, ..config.clone() };
    let room = must_fit::<BenchError>(device, &without_grids, size, &share)?;
    let pieces = pieces_of_steps(device, config, size, &share);
    if !agree_on_plans(device, collective, &pieces, options.stop)? {
        return Ok(Timings { steps: vec![], ops: vec![], step_flops: 0, not_finite: 0 });
    }
    // On a GPU as with a data set that it holds.
    let images = share.images().max(HELD);
    let image = size[0] * size[1] * config.model.image_channels;
    let held = room.filter(|room| fits((images * image) as u64, *room)).map(|_| images);
    let mut trainer = Trainer::holding(device, config, &schedule, size, share, held)?;
    let pixels = random_pixels(config.train.seed, held.unwrap_or(share.images()) * image);
    if let Some(buffer) = trainer.images() {
        device.upload(buffer, 0, &pixels)?;
    }
    let order = Order { seed: config.train.seed, len: images as u64 };
    let numbers: Vec<u32> = (0..share.images() as u64).map(|place| order.index(place) as u32).collect();
    let images = if held.is_some() { Images::Numbers(&numbers) } else { Images::Pixels(&pixels) };
    let (groups, group_of) = if options.per_op { step_groups(trainer.programs()) } else { Default::default() };
    let mut timings = Timings {
        steps: Vec::new(),
        ops: groups.into_iter().map(|group| (group, Vec::new())).collect(),
        step_flops: 3 * (share.shards * share.world_size) as u64 * forward_products(trainer.program()),
        not_finite: 0,
    };
    let mut sums = vec![Duration::ZERO; timings.ops.len()];
    // Ops are measured in steps that wait for each other, and all others as training runs them.
    let ahead = if options.per_op { 0 } else { device.steps_ahead() };
    let (mut begun, mut finished) = (0, 0);
    let mut since = Instant::now();
    loop {
        // All ranks stop at the same step, whichever of them was told to.
        let stops = collective.all_gather(vec![u8::from(options.stop.load(Ordering::Relaxed))]);
        let is_stopped = stops.map_err(RunError::from)?.iter().any(|stop| *stop == [1]);
        let goes_on = begun < options.warmup + options.steps && !is_stopped;
        let mut ticks = Vec::new();
        if goes_on && options.per_op {
            ticks = trainer.begin_timed(device, collective, config, begun, images)?;
        } else if goes_on {
            trainer.begin(device, collective, config, begun, images)?;
        }
        begun += u64::from(goes_on);
        match trainer.under_way() {
            0 => break,
            under_way if goes_on && under_way <= ahead => continue,
            _ => {}
        }
        let losses = trainer.finish(device, collective)?;
        let finite = losses.norm[1] == 1.0 && losses.losses.iter().all(|loss| loss.is_finite());
        let whole = since.elapsed();
        since = Instant::now();
        timings.not_finite += u64::from(!finite);
        sums.fill(Duration::ZERO);
        for (program, ticks) in ticks {
            for (pair, &group) in ticks.windows(2).zip(&group_of[program]) {
                sums[group] += device.time_between(&pair[0], &pair[1])?;
            }
        }
        if finished >= options.warmup {
            timings.steps.push(whole);
            timings.ops.iter_mut().zip(&sums).for_each(|((_, durations), &sum)| durations.push(sum));
        }
        finished += 1;
        done(finished);
    }
    Ok(timings)
}

/// The groups of ops of a rank's step, whose instructions are counted as often as they run, and for each instruction of each of the step's
/// programs the number of its group.
pub fn step_groups<'a>(programs: impl ExactSizeIterator<Item = &'a Program>) -> (Vec<OpGroup>, Vec<Vec<usize>>) {
    let mut groups: Vec<OpGroup> = Vec::new();
    let mut group_of = Vec::new();
    for (runs, program) in step_runs(programs) {
        let mut numbers = vec![0; program.instructions.len()];
        for mut group in program.op_groups() {
            let count = std::mem::take(&mut group.instructions);
            let at = groups.iter().position(|g| (g.phase, g.name) == (group.phase, group.name)).unwrap_or_else(|| {
                groups.push(OpGroup { flops: 0, bytes: 0, ..group.clone() });
                groups.len() - 1
            });
            groups[at].flops += runs * group.flops;
            groups[at].bytes += runs * group.bytes;
            count.iter().for_each(|&number| numbers[number] = at);
            for _ in 0..runs {
                groups[at].instructions.extend(&count);
            }
        }
        group_of.push(numbers);
    }
    (groups, group_of)
}

/// Pixels that are as good as any for measuring time.
fn random_pixels(seed: u64, len: usize) -> Vec<u8> {
    let mut words = vec![0u32; len.div_ceil(4)];
    Stream { seed, kind: Random::Sample, layer: 0, sample: 0, step: 0 }.fill_bits(0, &mut words);
    let mut pixels: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    pixels.truncate(len);
    pixels
}

/// The `p`-th percentile (0 to 100) of `values`, linear between neighbours; not a number if there are none.
pub fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = p / 100.0 * last as f64;
    let below = (at as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `statistics.quantiles(values, n=100, method="inclusive")` of Python, with which the PyTorch benchmark computes its own.
    #[test]
    fn percentiles_are_those_of_python() {
        let values = [5.0, 1.0, 4.0, 2.0];
        let expected = [(0.0, 1.0), (10.0, 1.3), (50.0, 3.0), (90.0, 4.7), (100.0, 5.0)];
        for (p, expected) in expected {
            assert!((percentile(&values, p) - expected).abs() < 1e-12, "{p}: {}", percentile(&values, p));
        }
        assert_eq!(percentile(&[7.0], 10.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    /// One level, no attention: conv_in, two convolutions in each of five blocks (two of which read a skip and have a shortcut),
    /// the timestep's layers, and conv_out, counted by hand.
    #[test]
    fn forward_products_of_a_small_network() {
        let mut config = Config::default();
        config.model.image_channels = 1;
        config.model.channels = vec![8];
        config.model.blocks = 1;
        config.model.groups = 4;
        config.model.attention_levels = vec![];
        config.model.mid_attention = false;
        config.train.batch = 3;
        let forward = |config: &Config| {
            let share = Share::solo(&config.train).unwrap();
            forward_products(&super::super::step_programs(config, [4, 4], &share, Default::default()).0[0])
        };
        let without = forward(&config);
        let conv = |from: u64, to: u64| 2 * 16 * 9 * from * to;
        let down = conv(8, 8) + conv(8, 8);
        let up = conv(16, 8) + conv(8, 8) + 2 * 16 * 16 * 8;
        let time = 2 * (8 * 32 + 32 * 32) + 5 * 2 * 32 * 8;
        assert_eq!(without, 3 * (conv(1, 8) + 3 * down + 2 * up + time + conv(8, 1)));

        // Attention in the middle: q, k, v and the output, then q·kᵀ and p·v over 16 pixels.
        config.model.mid_attention = true;
        for head_channels in [0, 4] {
            config.model.head_channels = head_channels;
            let with = forward(&config);
            assert_eq!(with - without, 3 * (4 * 2 * 16 * 8 * 8 + 2 * 2 * 16 * 16 * 8));
        }
    }
}
