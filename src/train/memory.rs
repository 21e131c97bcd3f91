//! How much memory a rank's training takes, which is known before it begins: nothing is allocated later.

use super::grids::reverse_step;
use super::{Config, STATE, Share, step_programs};
use crate::config::OutOfRange;
use crate::device::cpu::pool::BASE_SCRATCH;
use crate::device::cuda::WORKSPACE;
use crate::device::{Device, DeviceError, DeviceKind, Precision, Region, Shortage, Target};
use crate::diffusion::{SamplerTable, Schedule};
use crate::sample::ReverseStep;
use crate::tape::{Program, human_bytes};
use serde::Serialize;

/// A part of a training process's memory.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// What it is called.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Whether the host has it, and not the device that computes.
    pub on_host: bool,
    /// What it holds.
    pub holds: String,
}

/// A training run's memory as far as it grows with the config, the data set aside; of a rank with `share` and `programs`, which computes on
/// so many threads if it has no GPU.
///
/// # Errors
/// A reverse process that cannot be built.
pub fn memory(
    config: &Config,
    size: [usize; 2],
    share: &Share,
    programs: &[Program],
    threads: usize,
) -> Result<Vec<Part>, OutOfRange> {
    let largest = |size: fn(&Program) -> usize| programs.iter().map(size).max().unwrap_or(0);
    let flat = largest(|program| program.summary().flat_bytes);
    let gradients = match programs.len() {
        1 => "of the parameters".to_string(),
        buffers => format!("of the parameters: {buffers} buffers, as shards are added along a tree"),
    };
    let ranks = config.ranks_of_state(share);
    let of_state = if ranks > 1 { format!("1/{ranks} of ") } else { String::new() };
    let part =
        |name, bytes: usize, holds: &str| Part { name, bytes: bytes as u64, on_host: false, holds: holds.to_string() };
    let mut parts = vec![
        part("weights", flat, "parameters, f32"),
        part("gradients", programs.len() * flat, &gradients),
        part("moments", 2 * flat / ranks, &format!("{of_state}Adam's averages of gradients and their squares")),
        part("ema", flat / ranks, &format!("{of_state}moving average of the parameters")),
        part("arena", largest(|program| program.arena_bytes), "activations and temporaries of a step"),
        part("io", largest(|program| program.io_bytes), "pixels, tables and results of a step"),
    ];
    let target = programs[0].target;
    match target.kind {
        DeviceKind::Cpu => {
            let floats = largest(|program| program.thread_scratch).max(BASE_SCRATCH);
            parts.push(part("scratch", threads * floats * size_of::<f32>(), "workspace of the CPU threads"));
        }
        DeviceKind::Cuda => parts.push(part("workspace", WORKSPACE, "of cuDNN and cuBLASLt")),
    }
    let grids = grids(config, size, share, &programs[programs.len() - 1])?;
    if target.precision == Precision::Bf16 {
        let copies = 1 + usize::from(grids.is_some());
        parts.push(part("copies", copies * flat / 2, "parameters in bf16, for training and for the grids' sampler"));
    }
    let sums = config.train.adding().scratch(programs[programs.len() - 1].longest_sum(), share.world_size);
    if target.kind == DeviceKind::Cuda && share.world_size > 1 && sums > 0 {
        parts.push(part("sums", sums, "gradients on their way between GPUs"));
    }
    if let Some((images, program)) = grids {
        let holds = format!("arena of the grids' sampler, {images} at a time");
        parts.push(part("sampler arena", program.arena_bytes, &holds));
        parts.push(part("sampler io", program.io_bytes, "its images and tables"));
    }
    let copies: Vec<&str> = STATE.map(Region::name).to_vec();
    let of = if share.world_size > 1 { format!("1/{} of ", share.world_size) } else { String::new() };
    let on_host = if target.kind == DeviceKind::Cuda { "on the host, " } else { "" };
    let holds = format!("{on_host}copy to be written: {of}{}", copies.join(", "));
    let checkpoint = part("checkpoint", copies.len() * flat.div_ceil(share.world_size), &holds);
    parts.push(Part { on_host: true, ..checkpoint });
    Ok(parts)
}

/// The program that makes grids while the run trains, and its images at a time; none where the config wants no grids.
fn grids(
    config: &Config,
    size: [usize; 2],
    share: &Share,
    step: &Program,
) -> Result<Option<(usize, Program)>, OutOfRange> {
    let Some(reverse) = reverse_step(config, step.target.kind, *share, size) else { return Ok(None) };
    let schedule = Schedule::new(&config.diffusion)?;
    let steps = SamplerTable::new(&schedule, &config.sample.sampler(&config.diffusion))?.steps.len();
    let reverse = ReverseStep { steps, layout: Some(&step.layout), ..reverse };
    Ok(Some((reverse.batch, reverse.program(step.target))))
}

/// Refuses a rank's training that takes more memory than its GPU has free, with the largest batch that would fit. Gives the bytes that stay
/// free; none on CPU cores, of which the system has to say what is free.
///
/// # Errors
/// That it does not fit; what keeps the GPU from saying how much is free.
pub fn must_fit<E>(device: &Device, config: &Config, size: [usize; 2], share: &Share) -> Result<Option<u64>, E>
where
    E: From<DeviceError> + From<OutOfRange>,
{
    let Some([free, total]) = device.free_memory()? else { return Ok(None) };
    let target = device.target(config.train.precision);
    // It is there already.
    let taken = WORKSPACE as u64;
    let needed = on_device(config, size, share, target)? - taken;
    if needed <= free {
        return Ok(Some(free - needed));
    }
    let now = config.train.batch;
    let advice = match largest_batch(config, size, share, target, free + taken)? {
        Some(batch) => format!("set `train.batch` to {batch} (now {now})"),
        None => "even the smallest `train.batch` does not fit: take a smaller model".into(),
    };
    let [needed, free, total] = [needed, free, total].map(human_bytes);
    Err(DeviceError::TooLarge(Box::new(Shortage { device: device.name(), needed, free, total, advice })).into())
}

fn on_device(config: &Config, size: [usize; 2], share: &Share, target: Target) -> Result<u64, OutOfRange> {
    let (programs, _) = step_programs(config, size, share, target);
    let parts = memory(config, size, share, &programs, 1)?;
    Ok(parts.iter().filter(|part| !part.on_host).map(|part| part.bytes).sum())
}

/// The largest batch below the config's, divided likewise, with which training takes no more than `room` bytes.
fn largest_batch(
    config: &Config,
    size: [usize; 2],
    share: &Share,
    target: Target,
    room: u64,
) -> Result<Option<usize>, OutOfRange> {
    // A batch is a multiple of all shards of all ranks.
    let unit = share.shards * share.world_size;
    let (mut fits, mut too_large) = (0, config.train.batch / unit);
    while too_large - fits > 1 {
        let middle = fits.midpoint(too_large);
        let mut smaller = config.clone();
        smaller.train.batch = middle * unit;
        let share = Share::new(&smaller.train, share.rank, share.world_size)?;
        match on_device(&smaller, size, &share, target)? <= room {
            true => fits = middle,
            false => too_large = middle,
        }
    }
    Ok((fits > 0).then_some(fits * unit))
}
