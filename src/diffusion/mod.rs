//! The diffusion process in f64: schedules, q, p, objectives and samplers, each function headed by its equation.

mod config;

pub use config::{BetaSchedule, DiffusionConfig, Objective, SamplerConfig, SamplerKind, Spacing, Variance};
