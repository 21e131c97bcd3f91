//! The `[diffusion]` section of a config and the choice of a sampler.

use serde::{Deserialize, Serialize};

/// How β_1 … β_T are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4).
    Linear,
    /// Evenly spaced in √β (latent diffusion; met in published diffusers directories).
    ScaledLinear,
    /// ᾱ_t falls like a squared cosine (Nichol & Dhariwal 2021, eq. 17), β clipped at 0.999.
    Cosine,
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The noise ε (the paper's choice, eq. 14).
    Epsilon,
    /// The clean image x_0.
    X0,
    /// v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022).
    V,
}

/// The variance σ_t² of the reverse step (section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// σ² = β_t.
    FixedLarge,
    /// σ² = β̃_t, the variance of the forward posterior (eq. 7).
    FixedSmall,
}

/// The diffusion process and its objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiffusionConfig {
    /// T, the number of steps of the forward process.
    pub timesteps: usize,
    /// How β is chosen.
    pub schedule: BetaSchedule,
    /// β_1 of the linear schedules.
    pub beta_start: f64,
    /// β_T of the linear schedules.
    pub beta_end: f64,
    /// All T values of β, in place of a schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_betas: Option<Vec<f64>>,
    /// What the network predicts.
    pub objective: Objective,
    /// The variance of the reverse step.
    pub variance: Variance,
    /// x̂_0 is clipped to [−clip, clip] before the mean is computed; 0 turns clipping off.
    pub clip: f64,
}

impl Default for DiffusionConfig {
    /// The paper's CIFAR-10 process.
    fn default() -> Self {
        DiffusionConfig {
            timesteps: 1000,
            schedule: BetaSchedule::Linear,
            beta_start: 1e-4,
            beta_end: 0.02,
            trained_betas: None,
            objective: Objective::Epsilon,
            variance: Variance::FixedLarge,
            clip: 1.0,
        }
    }
}

/// Which reverse process is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplerKind {
    /// Algorithm 2 of the paper.
    Ddpm,
    /// Song, Meng, Ermon 2020.
    Ddim,
}

/// Which of the T timesteps a sampler with fewer steps visits (the names are diffusers').
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// i·⌊T/K⌋ + offset.
    Leading,
    /// Counted down from T−1 in steps of T/K, rounded.
    Trailing,
    /// Evenly spaced over 0 … T−1, both ends included, rounded.
    Linspace,
}

/// A reverse process: sampler, number of steps, and which timesteps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// Algorithm 2 or DDIM.
    pub sampler: SamplerKind,
    /// K, the number of network evaluations; at most T.
    pub steps: usize,
    /// DDIM's η: 0 is deterministic, 1 has the variance of Algorithm 2 with β̃.
    pub eta: f64,
    /// Which timesteps are visited.
    pub spacing: Spacing,
    /// Added to every timestep of the leading spacing.
    pub steps_offset: usize,
    /// ᾱ of the state after the last step: 1 if true, ᾱ_0 if false (diffusers' `set_alpha_to_one`, DDIM only).
    pub final_alpha_one: bool,
    /// Whether DDIM steps from t to t − ⌊T/K⌋, as diffusers' `DDIMScheduler` does, in place of the timestep visited next. Set for
    /// imported schedulers alone: the two differ where timesteps are not ⌊T/K⌋ apart, and then only the latter ends at the data.
    pub uniform_stride: bool,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        SamplerConfig {
            sampler: SamplerKind::Ddpm,
            steps: 1000,
            eta: 0.0,
            spacing: Spacing::Leading,
            steps_offset: 0,
            final_alpha_one: true,
            uniform_stride: false,
        }
    }
}
