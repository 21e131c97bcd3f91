//! A run's config: the sections of the other rooms, and those of training itself.

use super::{Shards, Share};
use crate::checkpoint::CheckpointConfig;
use crate::cluster::ClusterConfig;
use crate::collective::{Adding, Collective};
use crate::config::OutOfRange;
use crate::data::DataConfig;
use crate::device::Precision;
use crate::diffusion::{DiffusionConfig, SamplerTable, Schedule};
use crate::sample::SampleConfig;
use crate::unet::UnetConfig;
use serde::{Deserialize, Serialize};

/// Everything that describes a run, one field per section of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[data]`: the images.
    pub data: DataConfig,
    /// `[model]`: the network.
    pub model: UnetConfig,
    /// `[diffusion]`: the process and the objective.
    pub diffusion: DiffusionConfig,
    /// `[train]`: how long and on how much at a time.
    pub train: TrainConfig,
    /// `[optim]`: the optimiser.
    pub optim: OptimConfig,
    /// `[ema]`: the moving average of the weights.
    pub ema: EmaConfig,
    /// `[checkpoint]`: when state is saved.
    pub checkpoint: CheckpointConfig,
    /// `[sample]`: images made while training.
    pub sample: SampleConfig,
    /// `[log]`: what is reported.
    pub log: LogConfig,
    /// `[cluster]`: how ranks watch each other.
    pub cluster: ClusterConfig,
}

/// The `[train]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps of the whole run.
    pub steps: u64,
    /// Images per step, over all ranks.
    pub batch: usize,
    /// Parts of a batch whose gradients are added along a fixed tree: a power of two for the same bits at any number of ranks, or `"auto"`.
    pub shards: Shards,
    /// Key of everything random in the run.
    pub seed: u64,
    /// What activations and products are computed in; sums, statistics, master weights and the optimiser are f32 in either case.
    pub precision: Precision,
    /// What gradients are summed in between the GPUs of several ranks: bf16 sends half the bytes and rounds wherever two are added.
    pub reduce: Precision,
}

impl Default for TrainConfig {
    fn default() -> Self {
        let (precision, reduce) = (Precision::F32, Precision::F32);
        TrainConfig { steps: 800_000, batch: 128, shards: Shards::Auto, seed: 0, precision, reduce }
    }
}

/// Which optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Kingma & Ba 2015; weight decay is added to the gradient.
    Adam,
    /// Loshchilov & Hutter 2019; weight decay is apart from the gradient.
    Adamw,
}

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It stays.
    Constant,
    /// Half a cosine from `lr` to `min_lr` over `decay_steps`.
    Cosine,
}

/// The `[optim]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Adam or AdamW.
    pub optimizer: Optimizer,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Decay of the gradient's moving average.
    pub beta1: f64,
    /// Decay of the squared gradient's moving average.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises from 0 in a straight line.
    pub warmup_steps: u64,
    /// What follows.
    pub decay: Decay,
    /// Step at which the cosine reaches `min_lr`; it is a key of its own so that a run can be made longer without changing the steps it
    /// has behind it.
    pub decay_steps: u64,
    /// Learning rate at the end of the decay.
    pub min_lr: f64,
    /// The global gradient norm above which gradients are scaled down; 0: never.
    pub clip: f64,
    /// Whether each of several ranks keeps and updates moments and averages of its slices of the parameters only, and gives the others what
    /// it has updated.
    pub sharded: bool,
}

impl Default for OptimConfig {
    fn default() -> Self {
        OptimConfig {
            optimizer: Optimizer::Adam,
            lr: 2e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            warmup_steps: 5000,
            decay: Decay::Constant,
            decay_steps: 0,
            min_lr: 0.0,
            clip: 1.0,
            sharded: false,
        }
    }
}

/// The `[ema]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Weight of the past in each step of the average.
    pub decay: f64,
    /// Whether the decay starts low, 0 and then min(decay, (1 + step)/(10 + step)), so that samples are not made of initial weights
    /// (diffusers' `EMAModel`).
    pub warmup: bool,
}

impl Default for EmaConfig {
    fn default() -> Self {
        EmaConfig { decay: 0.9999, warmup: false }
    }
}

/// The `[log]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Steps between two lines of `log.jsonl`.
    pub every: u64,
    /// Whether TensorBoard files are written to `tb/`.
    pub tensorboard: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { every: 100, tensorboard: true }
    }
}

impl Config {
    /// Checks every value that can be checked without the data set.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self) -> Result<(), OutOfRange> {
        self.data.validate()?;
        // Without a size, the smallest that the levels divide: then nothing but the images' size is left to check.
        let (height, width) = match self.data.size {
            Some(size) => (size.height, size.width),
            None => {
                let side = 1 << self.model.channels.len().saturating_sub(1).min(20);
                (side, side)
            }
        };
        self.model.validate(height, width)?;
        // A process and a sampler that cannot be built say why.
        let schedule = Schedule::new(&self.diffusion)?;
        SamplerTable::new(&schedule, &self.sample.sampler(&self.diffusion))?;
        self.train.validate()?;
        self.optim.validate()?;
        self.ema.validate()?;
        self.checkpoint.validate()?;
        self.sample.validate(&self.diffusion)?;
        self.cluster.validate()?;
        OutOfRange::check(self.log.every > 0, "log.every", self.log.every, "every ≥ 1", "steps between two lines")
    }
}

impl Config {
    /// Ranks among which the optimiser's state is divided, where so many compute a batch.
    pub fn ranks_of_state(&self, share: &Share) -> usize {
        if self.optim.sharded { share.world_size } else { 1 }
    }
}

impl TrainConfig {
    fn validate(&self) -> Result<(), OutOfRange> {
        OutOfRange::check(
            self.steps > 0 && self.steps < 1 << 32,
            "train.steps",
            self.steps,
            "1 ≤ steps < 2^32",
            "steps are counted in 32 bits by the random streams",
        )?;
        OutOfRange::check(
            self.batch > 0 && self.batch <= 1 << 20,
            "train.batch",
            self.batch,
            "1 ≤ batch ≤ 1048576",
            "images per optimiser step, over all ranks",
        )?;
        if let Shards::Fixed(shards) = self.shards {
            let why = "gradients are added along a binary tree over the shards";
            OutOfRange::check(shards.is_power_of_two(), "train.shards", shards, "\"auto\" or a power of two", why)?;
            // That they divide the batch.
            Share::new(self, 0, shards)?;
            let why = "a fixed train.shards promises the same bits at any number of ranks, and sums in bf16 keep no such promise";
            OutOfRange::check(self.reduce == Precision::F32, "train.reduce", self.reduce.name(), "f32", why)?;
        }
        Ok(())
    }

    /// How the gradients of several ranks are added up.
    pub fn adding(&self) -> Adding {
        match (self.shards, self.reduce) {
            (Shards::Fixed(_), _) => Adding::Tree,
            (Shards::Auto, Precision::F32) => Adding::Fast,
            (Shards::Auto, Precision::Bf16) => Adding::FastInBf16,
        }
    }

    /// Tells the ranks to add up as this says.
    ///
    /// # Errors
    /// They cannot.
    pub(super) fn choose_adding(&self, collective: &mut dyn Collective) -> Result<(), OutOfRange> {
        let why = "sums of bf16 are made between GPUs, by NCCL, which these ranks do not do";
        let can = collective.choose(self.adding());
        OutOfRange::check(can, "train.reduce", self.reduce.name(), "f32", why)
    }
}

impl OptimConfig {
    fn validate(&self) -> Result<(), OutOfRange> {
        OutOfRange::check(
            self.lr as f32 > 0.0 && self.lr <= 1.0,
            "optim.lr",
            self.lr,
            "0 < lr ≤ 1 in f32",
            "Adam's step has about this size",
        )?;
        for (key, beta) in [("optim.beta1", self.beta1), ("optim.beta2", self.beta2)] {
            OutOfRange::check((0.0..1.0).contains(&beta), key, beta, "0 ≤ beta < 1", "decay of a moving average")?;
        }
        OutOfRange::check(
            self.eps as f32 > 0.0 && self.eps < 1.0,
            "optim.eps",
            self.eps,
            "0 < eps < 1 in f32",
            "it keeps the division finite",
        )?;
        OutOfRange::check(
            (0.0..1.0).contains(&self.weight_decay),
            "optim.weight_decay",
            self.weight_decay,
            "0 ≤ weight_decay < 1",
            "0.01 is common for AdamW",
        )?;
        OutOfRange::check(
            self.decay == Decay::Constant || self.decay_steps > self.warmup_steps,
            "optim.decay_steps",
            self.decay_steps,
            format!("more than optim.warmup_steps = {}", self.warmup_steps),
            "the cosine ends at this step, often train.steps",
        )?;
        OutOfRange::check(
            (0.0..=self.lr).contains(&self.min_lr),
            "optim.min_lr",
            self.min_lr,
            format!("0 ≤ min_lr ≤ lr = {}", self.lr),
            "the decay goes down to it",
        )?;
        OutOfRange::check(
            self.clip == 0.0 || (self.clip as f32 > 0.0 && (self.clip as f32).is_finite()),
            "optim.clip",
            self.clip,
            "clip = 0, or clip > 0 in f32",
            "largest global gradient norm; 0 turns clipping off",
        )
    }

    /// Learning rate of optimiser step `step`, counted from 0, which is update k = step + 1: lr·min(k/warmup_steps, 1), then the decay,
    /// lr·½(1 + cos π(k − warmup_steps)/(decay_steps − warmup_steps)), whose end is update `decay_steps`.
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.decay {
            Decay::Constant => self.lr,
            Decay::Cosine => {
                let whole = self.decay_steps.saturating_sub(self.warmup_steps).max(1) as f64;
                let done = ((step + 1 - self.warmup_steps) as f64 / whole).min(1.0);
                self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

impl EmaConfig {
    fn validate(&self) -> Result<(), OutOfRange> {
        OutOfRange::check(
            (0.0..1.0).contains(&self.decay),
            "ema.decay",
            self.decay,
            "0 ≤ decay < 1",
            "weight of the past; 0.9999 averages over about 10,000 steps",
        )
    }

    /// Decay of optimiser step `step`, counted from 0.
    pub fn decay_at(&self, step: u64) -> f64 {
        match (self.warmup, step) {
            (true, 0) => 0.0,
            (true, _) => self.decay.min((1 + step) as f64 / (10 + step) as f64),
            (false, _) => self.decay,
        }
    }
}
