//! Algorithm 1: from a config and a data set to weights, with everything a run leaves behind.

mod bench;
mod config;
mod error;
mod grids;
mod reports;
mod resume;
mod run;
mod state;
mod step;

#[cfg(test)]
mod tests;

pub use bench::{BenchError, BenchOptions, Timings, forward_products, percentile, time_steps};
pub use config::{Config, Decay, EmaConfig, LogConfig, OptimConfig, Optimizer, TrainConfig};
pub use error::TrainError;
pub use resume::{Difference, differences, trajectory_hash};
pub use run::{Ended, Initial, Options, train};
pub use state::layout_for_checkpoints;
pub use step::{Metrics, STATE, Trainer, step_program};
