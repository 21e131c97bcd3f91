//! Algorithm 1: from a config and a data set to weights, with everything a run leaves behind.

mod bench;
mod accounts;
mod checksum;
mod config;
mod divided;
mod error;
mod feed;
mod grids;
mod memory;
mod metrics;
mod plans;
mod ranks;
mod reports;
mod resume;
mod run;
mod shards;
mod state;
mod step;
mod transfer;

#[cfg(test)]
mod shards_tests;
#[cfg(test)]
mod tests;

pub use bench::{BenchError, BenchOptions, Timings, forward_products, percentile, step_groups, time_steps};
pub use checksum::checksum;
pub use config::{Config, Decay, EmaConfig, LogConfig, OptimConfig, Optimizer, TrainConfig};
pub use error::TrainError;
pub use memory::{Part, memory, must_fit};
pub use metrics::Metrics;
pub use resume::{Difference, differences, trajectory_hash};
pub use run::{Ended, Initial, Options, train};
pub use shards::{Shards, Share};
pub use state::layout_for_checkpoints;
pub use step::{STATE, Trainer, step_programs, step_runs};
pub use transfer::{Images, Losses};
