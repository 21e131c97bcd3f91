//! Algorithm 1 as a program, and the state it works on.
//!
//! ```text
//! 2:  x_0 ~ q(x_0)                                   pixels of the batch
//! 3:  t ~ Uniform({1, …, T})                         ┐
//! 4:  ε ~ N(0, I)                                    ┘ q_sample draws both
//! 5:  gradient step on ∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖²
//!                                                    unet, loss, backward, grad_norm, adam_ema
//! ```
//!
//! A batch is divided into shards ([`Share`]). For each shard but the last one of a rank, lines 3 to 5 end with the gradient, which is added
//! to those of the shards before it ([`accumulate`]).

use super::divided::{DIVIDED, Division};
use super::transfer::{Images, Losses, Transfer};
use super::{Config, Optimizer, Share};
use crate::collective::Collective;
use crate::device::{Binding, BufferId, Device, DeviceError, Region, Target, Tick};
use crate::diffusion::Schedule;
use crate::ops::accumulate::{Accumulate, accumulate};
use crate::ops::adam_ema::{Hyper, adam_ema, bias_correction};
use crate::ops::cast::ComputeCopy;
use crate::ops::grad_norm::{BLOCK, grad_norm};
use crate::ops::loss::{LossInputs, mse_loss};
use crate::ops::q_sample::{Given, TrainingBatch, q_sample};
use crate::tape::{
    Buckets, Loaded, Op, ParamLayout, Phase, Program, Reduction, RunError, Slices, Spec, Tape, in_slices, plan,
};
use crate::unet::{Randomness, initial_parameters, unet};
use std::sync::Arc;

/// Traces one training step of a rank with the given share of images of `[height, width]`: one program for each number of ones in which the
/// number of a shard can end (in binary), of which the last one, that of the last shard, also sums over ranks and updates the weights.
///
/// All have the inputs `pixels`, `clock` and `hyper`, and the results `loss` (per image), `t` and `norm` at the same places.
pub fn step_programs(config: &Config, size: [usize; 2], share: &Share, target: Target) -> (Vec<Program>, Tape) {
    step_programs_on(config, size, share, target, None)
}

/// The same where the device holds so many images ([`Region::Images`]): in place of `pixels` they have `numbers`.
pub fn step_programs_on(
    config: &Config,
    size: [usize; 2],
    share: &Share,
    target: Target,
    held: Option<usize>,
) -> (Vec<Program>, Tape) {
    let shard = |target, ones| shard(config, size, share.shard, target, held, ones);
    let last = share.partial_sums();
    let before = |elements: usize| Arc::new(Accumulate { sums: last, elements }) as Arc<dyn Op>;
    let before: Option<&dyn Fn(usize) -> Arc<dyn Op>> = if last > 0 { Some(&before) } else { None };
    let slices = Slices { rank: share.rank, ranks: config.ranks_of_state(share), own: &DIVIDED };
    let granule = if slices.ranks > 1 { slices.ranks * BLOCK } else { 0 };
    let reduction = Reduction { buckets: Buckets::default(), before, granule };
    let tape = shard(target, None);
    // Parameters stand where they do on CPU cores, though other instructions may complete their gradients.
    let places = (target != Target::default()).then(|| layout_of_step(config, size, share));
    let whole = plan(&tape, places.as_ref(), Some(reduction));
    let accumulating = |t: usize| plan(&shard(target, Some(t)), Some(&whole.layout), None);
    let mut programs: Vec<Program> = (0..last).map(accumulating).collect();
    programs.push(if slices.ranks > 1 { in_slices(whole, &slices) } else { whole });
    (programs, tape)
}

/// The places of a step's parameters, which are the same on all devices.
pub(super) fn layout_of_step(config: &Config, size: [usize; 2], share: &Share) -> ParamLayout {
    plan(&shard(config, size, share.shard, Target::default(), None, None), None, None).layout
}

/// The programs of a step, each with how often the step runs it: of 2^L shards, 2^(L−1−t) have numbers that end in exactly t < L ones.
pub fn step_runs<'a>(programs: impl ExactSizeIterator<Item = &'a Program>) -> impl Iterator<Item = (u64, &'a Program)> {
    let last = programs.len() - 1;
    programs.enumerate().map(move |(t, program)| (if t == last { 1 } else { 1 << (last - 1 - t) }, program))
}

/// Forward and backward pass of one shard of `images` images; then what follows from the number of ones in which the shard's number ends:
/// its gradients are kept with those before it, or, for the last shard (none given), the weights are updated.
fn shard(
    config: &Config,
    [height, width]: [usize; 2],
    images: usize,
    target: Target,
    held: Option<usize>,
    trailing_ones: Option<usize>,
) -> Tape {
    let channels = config.model.image_channels;
    let timesteps = config.diffusion.timesteps;
    let mut tape = Tape::on(target);
    let clock = tape.io("clock", Spec::u32([4]));
    let hyper = tape.io("hyper", Spec::f32([Hyper::LEN]));
    let norm = tape.io("norm", Spec::f32([2]));
    let forward_table = tape.io("forward_table", Spec::f32([timesteps, 2]));
    let target_table = tape.io("target_table", Spec::f32([timesteps, 2]));
    let seed = config.train.seed;
    let samples = TrainingBatch { images, height, width, channels, timesteps, flip: config.data.flip, seed, held };
    let given = match held {
        None => Given { pixels: tape.io("pixels", samples.pixels()), numbers: None },
        Some(_) => {
            let numbers = Some(tape.io("numbers", Spec::u32([images])));
            Given { pixels: tape.held(Region::Images, samples.pixels()), numbers }
        }
    };

    let (x_t, t) = q_sample(&mut tape, &samples, given, forward_table, clock);
    let out = unet(&mut tape, &config.model, x_t, t, Some(Randomness { seed, clock }));

    tape.begin(Phase::Backward);
    let inputs = LossInputs { out, images: given, t, table: target_table, clock };
    let (dout, loss) = mse_loss(&mut tape, &samples, config.train.batch, inputs);
    tape.publish(t, "t");
    tape.publish(loss, "loss");
    if let Some(ones) = trailing_ones {
        tape.write_gradients_to(1 + ones);
    }
    tape.backward(out, dout);

    match trailing_ones {
        Some(0) => {}
        Some(ones) => accumulate(&mut tape, ones),
        None => {
            tape.begin(Phase::Update);
            grad_norm(&mut tape, norm);
            adam_ema(&mut tape, config.optim.optimizer == Optimizer::Adamw, norm, hyper);
        }
    }
    tape
}

/// Weights, optimiser and programs of a rank on a device.
pub struct Trainer {
    programs: Vec<Loaded>,
    copy: Option<ComputeCopy>,
    share: Share,
    binding: Binding,
    buffers: [BufferId; 4],
    /// Where a rank has only its slices of some of them.
    division: Option<Division>,
    transfer: Transfer,
}

/// The flat buffers that make up the state of a run.
pub const STATE: [Region; 4] = [Region::Weights, Region::Moment1, Region::Moment2, Region::Ema];

impl Trainer {
    /// Plans the step, allocates its memory, and draws the initial parameters.
    ///
    /// # Errors
    /// Too little memory on the device.
    pub fn new(
        device: &mut Device,
        config: &Config,
        schedule: &Schedule,
        size: [usize; 2],
        share: Share,
    ) -> Result<Trainer, RunError> {
        Trainer::holding(device, config, schedule, size, share, None)
    }

    /// The same on a device that holds so many images, whose pixels are to be uploaded to [`Trainer::images`].
    ///
    /// # Errors
    /// Too little memory on the device.
    pub fn holding(
        device: &mut Device,
        config: &Config,
        schedule: &Schedule,
        size: [usize; 2],
        share: Share,
        held: Option<usize>,
    ) -> Result<Trainer, RunError> {
        let target = device.target(config.train.precision);
        let (programs, tape) = step_programs_on(config, size, &share, target, held);
        let whole = &programs[programs.len() - 1];
        let flat_bytes = whole.layout.len() * size_of::<f32>();
        let arena_bytes = programs.iter().map(|program| program.arena_bytes).max().unwrap_or(0);
        let io = device.allocate(whole.io_bytes)?;
        let mut binding = Binding::default()
            .with(Region::Io, io)
            .with(Region::Arena, device.allocate(arena_bytes)?)
            .with(Region::Gradients, device.allocate((1 + share.partial_sums()) * flat_bytes)?);
        if let Some(held) = held {
            let bytes = held * size[0] * size[1] * config.model.image_channels;
            binding = binding.with(Region::Images, device.allocate(bytes)?);
        }
        let division = Division::of(whole, &share);
        let mut buffers = [io; 4];
        for (buffer, region) in buffers.iter_mut().zip(STATE) {
            let is_divided = division.is_some() && DIVIDED.contains(&region);
            *buffer = device.allocate(if is_divided { flat_bytes / share.world_size } else { flat_bytes })?;
            binding = binding.with(region, *buffer);
        }
        let copy = ComputeCopy::new(device, whole, &mut binding)?;
        // After the device's share, which is the larger one: what does not fit is then refused before anything is drawn.
        let initial = initial_parameters(&tape, &whole.layout, config.train.seed)
            .map_err(|_| DeviceError::OutOfMemory { device: "this machine".into(), bytes: flat_bytes })?;
        let tables = [
            (whole.io("forward_table"), schedule.q_sample_table()),
            (whole.io("target_table"), schedule.target_table()),
        ];
        for (slot, table) in tables {
            device.upload(io, slot.offset / size_of::<f32>(), table.as_flattened())?;
        }
        let transfer = Transfer::new(device, whole, io, share, held.is_some())?;
        let load = |program: Program| Arc::new(program).load(device, binding);
        let programs = programs.into_iter().map(load).collect::<Result<_, _>>()?;
        let trainer = Trainer { programs, copy, share, binding, buffers, division, transfer };
        trainer.set_parameters(device, &initial)?;
        Ok(trainer)
    }

    /// The program of the last shard: the whole step, where there is one.
    pub fn program(&self) -> &Program {
        self.programs[self.programs.len() - 1].program()
    }

    /// The buffer of the images that the device holds.
    pub fn images(&self) -> Option<BufferId> {
        self.binding.get(Region::Images)
    }

    /// The images of this rank.
    pub fn share(&self) -> Share {
        self.share
    }

    /// The flat buffer of a part of the state, of which this rank may have only its slices ([`Trainer::has_whole`]).
    ///
    /// # Panics
    /// If `region` is not one of [`STATE`].
    pub fn buffer(&self, region: Region) -> BufferId {
        match STATE.iter().position(|&r| r == region) {
            Some(i) => self.buffers[i],
            None => panic!("{} is not part of the state", region.name()),
        }
    }

    /// Whether this rank has all of that part of the state.
    pub fn has_whole(&self, region: Region) -> bool {
        self.division.is_none() || !DIVIDED.contains(&region)
    }

    /// A buffer with all of a part of the state, where no step is under way: its own, or that of the gradients, in which the ranks then have
    /// gathered it together. Between steps that is free, and it is as long.
    ///
    /// # Errors
    /// A rank that does not take part; the device's.
    pub fn whole(
        &self,
        device: &mut Device,
        collective: &mut dyn Collective,
        region: Region,
    ) -> Result<BufferId, RunError> {
        let own = self.buffer(region);
        match (&self.division, self.binding.get(Region::Gradients)) {
            (Some(division), Some(gradients)) if !self.has_whole(region) => {
                division.gather(device, collective, own, gradients)?;
                Ok(gradients)
            }
            _ => Ok(own),
        }
    }

    /// Sets a part of the state, given as a whole: what of it this rank has. The weights are then to be
    /// [said to have changed](Trainer::weights_changed).
    ///
    /// # Errors
    /// The device's.
    pub fn put(&self, device: &mut Device, region: Region, flat: &[f32]) -> Result<(), DeviceError> {
        match &self.division {
            Some(division) if !self.has_whole(region) => division.put(device, self.buffer(region), flat),
            _ => device.upload(self.buffer(region), 0, flat),
        }
    }

    /// Copies the sum of the gradients of the last step.
    ///
    /// # Errors
    /// The device's.
    pub fn gradients(&self, device: &Device, out: &mut [f32]) -> Result<(), DeviceError> {
        self.binding.get(Region::Gradients).map_or(Ok(()), |buffer| device.download(buffer, 0, out))
    }

    /// Sets the weights and, as they are at the start, their moving average.
    ///
    /// # Errors
    /// The device's.
    pub fn set_parameters(&self, device: &mut Device, flat: &[f32]) -> Result<(), RunError> {
        self.put(device, Region::Weights, flat)?;
        self.put(device, Region::Ema, flat)?;
        self.weights_changed(device)
    }

    /// To be called when something else than a step has changed the weights.
    ///
    /// # Errors
    /// The device's.
    pub fn weights_changed(&self, device: &mut Device) -> Result<(), RunError> {
        self.copy.as_ref().map_or(Ok(()), |copy| copy.refresh(device, &self.binding))
    }

    /// Begins step `step` (from 0) on this rank's `images`, which may be others as soon as this returns.
    ///
    /// # Errors
    /// A rank that does not answer; what the device did wrong, also in earlier steps.
    ///
    /// # Panics
    /// If two steps are under way already.
    pub fn begin(
        &mut self,
        device: &mut Device,
        collective: &mut dyn Collective,
        config: &Config,
        step: u64,
        images: Images<'_>,
    ) -> Result<(), RunError> {
        collective.begin_step(device, step + 1)?;
        self.begin_with(device, config, step, images, &mut |_, program, device| program.run(device, collective))?;
        Ok(collective.note_sums()?)
    }

    /// Steps that have been begun and not finished.
    pub fn under_way(&self) -> usize {
        self.transfer.under_way()
    }

    /// Waits for the first of the steps that are under way, and gives what it gave.
    ///
    /// # Errors
    /// As [`Trainer::begin`].
    ///
    /// # Panics
    /// If there is none.
    pub fn finish(&mut self, device: &mut Device, collective: &mut dyn Collective) -> Result<Losses<'_>, RunError> {
        collective.settle()?;
        Ok(self.transfer.finish(device)?)
    }

    /// [`Trainer::begin`] and [`Trainer::finish`], where no other step is under way.
    ///
    /// # Errors
    /// As they have.
    pub fn step(
        &mut self,
        device: &mut Device,
        collective: &mut dyn Collective,
        config: &Config,
        step: u64,
        images: Images<'_>,
    ) -> Result<Losses<'_>, RunError> {
        self.begin(device, collective, config, step, images)?;
        self.finish(device, collective)
    }

    /// [`Trainer::begin`], and for each program that runs its number and the moments between its instructions, whose distance is known when the
    /// step is finished: no program is a CUDA graph.
    ///
    /// # Errors
    /// As [`Trainer::begin`].
    pub fn begin_timed(
        &mut self,
        device: &mut Device,
        collective: &mut dyn Collective,
        config: &Config,
        step: u64,
        images: Images<'_>,
    ) -> Result<Vec<(usize, Vec<Tick>)>, RunError> {
        let mut ticks = Vec::new();
        collective.begin_step(device, step + 1)?;
        self.begin_with(device, config, step, images, &mut |which, program, device| {
            ticks.push((which, program.run_timed(device, collective)?));
            Ok(())
        })?;
        collective.note_sums()?;
        Ok(ticks)
    }

    /// Begins the step, where `run` runs a program of a number.
    fn begin_with(
        &mut self,
        device: &mut Device,
        config: &Config,
        step: u64,
        images: Images<'_>,
        run: &mut dyn FnMut(usize, &mut Loaded, &mut Device) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let mut begin = || {
            self.transfer.open(device, step, &hyper(config, step), images)?;
            for shard in 0..self.share.shards {
                self.transfer.give(device, shard)?;
                let which = shard.trailing_ones() as usize;
                run(which, &mut self.programs[which], device)?;
                self.transfer.take(device, shard)?;
            }
            Ok(self.transfer.close(device)?)
        };
        let begun = begin();
        if begun.is_err() {
            // Nothing of it may be taken for results.
            self.transfer.withdraw();
        }
        begun
    }

    /// Programs, of which a step runs program t for each shard whose number ends in t ones.
    pub fn programs(&self) -> impl ExactSizeIterator<Item = &Program> {
        self.programs.iter().map(Loaded::program)
    }
}

/// The scalars of step `step` (from 0).
pub(super) fn hyper(config: &Config, step: u64) -> Hyper {
    let optim = &config.optim;
    Hyper {
        lr: optim.lr_at(step),
        beta1: optim.beta1,
        beta2: optim.beta2,
        eps: optim.eps,
        weight_decay: optim.weight_decay,
        bias_correction1: bias_correction(optim.beta1, step + 1),
        bias_correction2: bias_correction(optim.beta2, step + 1),
        max_grad_norm: optim.clip,
        ema_decay: config.ema.decay_at(step),
    }
}
