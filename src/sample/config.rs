//! The `[sample]` section of a config.

use crate::config::OutOfRange;
use crate::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, Spacing};
use serde::{Deserialize, Serialize};

/// Images made while training, and the defaults of `ddpm-dist sample`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Algorithm 2 (`ddpm`) or `ddim`.
    pub sampler: SamplerKind,
    /// Network evaluations per image; 0 means all T steps.
    pub steps: usize,
    /// DDIM's η.
    pub eta: f64,
    /// Which timesteps are visited.
    pub spacing: Spacing,
    /// Training steps between two grids of samples; 0: only at the end.
    pub every: u64,
    /// Images of a grid; 0: no grids.
    pub count: usize,
    /// Key of the grids' random numbers.
    pub seed: u64,
    /// Images that go through the network together: a matter of speed and memory, which changes no image.
    pub batch: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        SampleConfig {
            sampler: SamplerKind::Ddpm,
            steps: 0,
            eta: 0.0,
            spacing: Spacing::Leading,
            every: 10_000,
            count: 64,
            seed: 0,
            batch: 32,
        }
    }
}

impl SampleConfig {
    /// Checks the section against the process it samples from.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self, diffusion: &DiffusionConfig) -> Result<(), OutOfRange> {
        OutOfRange::check(
            self.steps <= diffusion.timesteps,
            "sample.steps",
            self.steps,
            format!("0 ≤ steps ≤ diffusion.timesteps = {}", diffusion.timesteps),
            "a sampler visits some of the timesteps (0: all)",
        )?;
        OutOfRange::check(
            (0.0..=1.0).contains(&self.eta),
            "sample.eta",
            self.eta,
            "0 ≤ eta ≤ 1",
            "0 is deterministic",
        )?;
        OutOfRange::check(
            (1..=4096).contains(&self.batch),
            "sample.batch",
            self.batch,
            "1 ≤ batch ≤ 4096",
            "images that go through the network together",
        )?;
        OutOfRange::check(self.count <= 4096, "sample.count", self.count, "0 ≤ count ≤ 4096", "images of one grid")
    }

    /// The reverse process that the section describes.
    pub fn sampler(&self, diffusion: &DiffusionConfig) -> SamplerConfig {
        let steps = if self.steps == 0 { diffusion.timesteps } else { self.steps };
        let SampleConfig { sampler, eta, spacing, .. } = *self;
        SamplerConfig { sampler, steps, eta, spacing, ..SamplerConfig::default() }
    }
}
