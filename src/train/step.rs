//! Algorithm 1 as a program, and the state it works on.
//!
//! ```text
//! 2:  x_0 ~ q(x_0)                                   pixels of the batch
//! 3:  t ~ Uniform({1, …, T})                         ┐
//! 4:  ε ~ N(0, I)                                    ┘ q_sample draws both
//! 5:  gradient step on ∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖²
//!                                                    unet, loss, backward, grad_norm, adam_ema
//! ```

use super::{Config, Optimizer};
use crate::collective::Collective;
use crate::device::{Binding, BufferId, Device, DeviceError, Element, Region, Slot};
use crate::diffusion::Schedule;
use crate::ops::adam_ema::{Hyper, adam_ema, bias_correction};
use crate::ops::grad_norm::grad_norm;
use crate::ops::loss::{LossInputs, mse_loss};
use crate::ops::q_sample::{TrainingBatch, q_sample};
use crate::tape::{Buckets, Phase, Program, RunError, Spec, Tape, plan};
use crate::unet::{Randomness, initial_parameters, unet};

/// Traces one training step for `batch` images of `[height, width]`: inputs `pixels`, `clock` and `hyper`; results `loss` (per image),
/// `t` and `norm`.
pub fn step_program(config: &Config, [height, width]: [usize; 2]) -> (Program, Tape) {
    let (batch, channels) = (config.train.batch, config.model.image_channels);
    let timesteps = config.diffusion.timesteps;
    let mut tape = Tape::new();
    let pixels = tape.io("pixels", Spec::u8([batch, height, width, channels]));
    let clock = tape.io("clock", Spec::u32([4]));
    let hyper = tape.io("hyper", Spec::f32([Hyper::LEN]));
    let forward_table = tape.io("forward_table", Spec::f32([timesteps, 2]));
    let target_table = tape.io("target_table", Spec::f32([timesteps, 2]));
    let seed = config.train.seed;
    let samples = TrainingBatch { images: batch, height, width, channels, timesteps, flip: config.data.flip, seed };

    let (x_t, t) = q_sample(&mut tape, &samples, pixels, forward_table, clock);
    let out = unet(&mut tape, &config.model, x_t, t, Some(Randomness { seed, clock }));

    tape.begin(Phase::Backward);
    let inputs = LossInputs { out, pixels, t, table: target_table, clock };
    let (dout, loss) = mse_loss(&mut tape, &samples, batch, inputs);
    tape.backward(out, dout);

    tape.begin(Phase::Update);
    let norm = tape.io("norm", Spec::f32([2]));
    grad_norm(&mut tape, norm);
    adam_ema(&mut tape, config.optim.optimizer == Optimizer::Adamw, norm, hyper);
    tape.publish(t, "t");
    tape.publish(loss, "loss");
    (plan(&tape, None, Some(Buckets::default())), tape)
}

/// What a step measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// L_simple (eq. 14): mean over the batch.
    pub loss: f64,
    /// Mean loss of the samples whose t lies in each quarter of 0 … T−1, where there are any.
    pub quartiles: [Option<f64>; 4],
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Whether loss and gradients were finite; if not, the step changed nothing.
    pub finite: bool,
}

/// Weights, optimiser and program of a run on a device.
pub struct Trainer {
    program: Program,
    binding: Binding,
    buffers: [BufferId; 4],
    io: BufferId,
    slots: Slots,
    timesteps: usize,
    losses: Vec<f32>,
    drawn: Vec<u32>,
}

struct Slots {
    pixels: Slot,
    clock: Slot,
    hyper: Slot,
    loss: Slot,
    t: Slot,
    norm: Slot,
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
    ) -> Result<Trainer, DeviceError> {
        let (program, tape) = step_program(config, size);
        let flat_bytes = program.layout.len() * size_of::<f32>();
        let io = device.allocate(program.io_bytes)?;
        let mut binding = Binding::default()
            .with(Region::Io, io)
            .with(Region::Arena, device.allocate(program.arena_bytes)?)
            .with(Region::Gradients, device.allocate(flat_bytes)?);
        let mut buffers = [io; 4];
        for (buffer, region) in buffers.iter_mut().zip(STATE) {
            *buffer = device.allocate(flat_bytes)?;
            binding = binding.with(region, *buffer);
        }
        // After the device's share, which is the larger one: what does not fit is then refused before anything is drawn.
        let initial = initial_parameters(&tape, &program.layout, config.train.seed)
            .map_err(|_| DeviceError::OutOfMemory { device: "this machine".into(), bytes: flat_bytes })?;
        let slot = |name| program.io(name);
        let slots = Slots {
            pixels: slot("pixels"),
            clock: slot("clock"),
            hyper: slot("hyper"),
            loss: slot("loss"),
            t: slot("t"),
            norm: slot("norm"),
        };
        let trainer = Trainer {
            losses: vec![0.0; config.train.batch],
            drawn: vec![0; config.train.batch],
            timesteps: config.diffusion.timesteps,
            program,
            binding,
            buffers,
            io,
            slots,
        };
        trainer.upload(device, trainer.program.io("forward_table"), schedule.q_sample_table().as_flattened());
        trainer.upload(device, trainer.program.io("target_table"), schedule.target_table().as_flattened());
        trainer.set_parameters(device, &initial);
        Ok(trainer)
    }

    /// The program of a step.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The flat buffer of a part of the state.
    ///
    /// # Panics
    /// If `region` is not one of [`STATE`].
    pub fn buffer(&self, region: Region) -> BufferId {
        match STATE.iter().position(|&r| r == region) {
            Some(i) => self.buffers[i],
            None => panic!("{} is not part of the state", region.name()),
        }
    }

    /// Sets the weights and, as they are at the start, their moving average.
    pub fn set_parameters(&self, device: &mut Device, flat: &[f32]) {
        device.upload(self.buffer(Region::Weights), 0, flat);
        device.upload(self.buffer(Region::Ema), 0, flat);
    }

    /// Runs step `step` (from 0) on `pixels` `[N, H, W, C]`.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub fn step(
        &mut self,
        device: &mut Device,
        collective: &mut dyn Collective,
        config: &Config,
        step: u64,
        pixels: &[u8],
    ) -> Result<Metrics, RunError> {
        self.step_observed(device, collective, config, step, pixels, &mut |_| ())
    }

    /// [`Trainer::step`], with `done` called after each instruction with its number.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn step_observed(
        &mut self,
        device: &mut Device,
        collective: &mut dyn Collective,
        config: &Config,
        step: u64,
        pixels: &[u8],
        done: &mut dyn FnMut(usize),
    ) -> Result<Metrics, RunError> {
        self.prepare(device, config, step, pixels);
        self.program.run_observed(device, &self.binding, collective, done)?;
        Ok(self.metrics(device))
    }

    fn prepare(&self, device: &mut Device, config: &Config, step: u64, pixels: &[u8]) {
        self.upload(device, self.slots.pixels, pixels);
        self.upload(device, self.slots.clock, &[step as u32, 0, 0, 0]);
        self.upload(device, self.slots.hyper, &hyper(config, step).to_array());
    }

    fn metrics(&mut self, device: &Device) -> Metrics {
        let mut norm = [0.0f32; 2];
        download(device, self.io, self.slots.norm, &mut norm);
        download(device, self.io, self.slots.loss, &mut self.losses);
        download(device, self.io, self.slots.t, &mut self.drawn);
        let mut sums = [(0.0f64, 0usize); 4];
        for (loss, &t) in self.losses.iter().zip(&self.drawn) {
            let (sum, count) = &mut sums[(4 * t as usize / self.timesteps).min(3)];
            *sum += f64::from(*loss);
            *count += 1;
        }
        let loss = self.losses.iter().map(|&l| f64::from(l)).sum::<f64>() / self.losses.len() as f64;
        Metrics {
            loss,
            quartiles: sums.map(|(sum, count)| (count > 0).then(|| sum / count as f64)),
            grad_norm: f64::from(norm[0]),
            finite: norm[1] == 1.0 && loss.is_finite(),
        }
    }

    fn upload<T: Element>(&self, device: &mut Device, slot: Slot, data: &[T]) {
        device.upload(self.io, slot.offset / size_of::<T>(), data);
    }
}

fn download<T: Element>(device: &Device, io: BufferId, slot: Slot, out: &mut [T]) {
    device.download(io, slot.offset / size_of::<T>(), out);
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
