//! The diffusion process in f64: schedules, q, p, objectives and samplers, each function headed by its equation.
//!
//! Equations are those of Ho, Jain & Abbeel 2020 unless another paper is named; `docs/equations.md` lists them all.

mod config;
#[cfg(test)]
mod library_tests;
mod process;
mod sampler;
mod schedule;
mod spacing;
#[cfg(test)]
mod tests;

pub use config::{BetaSchedule, DiffusionConfig, Objective, SamplerConfig, SamplerKind, Spacing, Variance};
pub use sampler::{SamplerStep, SamplerTable, p_sample_step};
pub use schedule::{BETA_RANGE, MAX_TIMESTEPS, Schedule, is_beta};
