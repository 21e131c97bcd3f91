//! Why a training run ends before its last step.

use super::Difference;
use crate::checkpoint::{CheckpointError, LayoutError, RunDirError};
use crate::collective::CollectiveError;
use crate::config::{ConfigError, OutOfRange};
use crate::data::DataError;
use crate::device::DeviceError;
use crate::rendezvous::store::StoreError;
use crate::report::ReportError;
use crate::sample::SampleError;
use crate::tape::RunError;
use std::path::PathBuf;
use thiserror::Error;

/// Why a run ended.
#[derive(Debug, Error)]
pub enum TrainError {
    /// A value of the config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value that does not fit the data set.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The data set.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The checkpoints.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The places of parameters.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The config would leave the trajectory of the checkpoint.
    #[error("the config contradicts {}:{}\nset {} back, or begin anew in another --run-dir", .checkpoint.display(), lines(.differences), keys(.differences))]
    Contradiction {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The keys that differ.
        differences: Vec<Difference>,
    },
    /// The checkpoint does not say what it was trained with.
    #[error(
        "{} was trained with another config, which it does not hold: begin anew in another --run-dir", .checkpoint.display()
    )]
    UnknownConfig {
        /// The checkpoint.
        checkpoint: PathBuf,
    },
    /// The checkpoint was trained on other pixels.
    #[error(
        "{} was trained on other images than those of {}: restore the data set, or begin anew in another --run-dir",
        .checkpoint.display(), .data.display()
    )]
    OtherData {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The data set.
        data: PathBuf,
    },
    /// `--init` cannot be used.
    #[error("cannot begin with the given weights: {0}")]
    Initial(String),
    /// Loss or gradient is not a number.
    #[error(
        "step {step}: {what} is not finite; training has diverged. {kept}. Lower `optim.lr`, lengthen `optim.warmup_steps`, or clip \
         gradients (`optim.clip`)"
    )]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// Loss or gradient.
        what: &'static str,
        /// What is left of the run.
        kept: String,
    },
    /// The GPU computes nothing any more.
    #[error("after step {step}: {source}. What was computed since the last checkpoint is lost with the GPU. {kept}")]
    DeviceLost {
        /// Steps done.
        step: u64,
        /// What is left of the run.
        kept: String,
        /// What it was noticed by.
        source: Box<TrainError>,
    },
    /// The last state could not be saved.
    #[error("the state at step {step} could not be saved: {source}")]
    NotSaved {
        /// The step.
        step: u64,
        /// Why.
        source: CheckpointError,
    },
    /// Images could not be made.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The logs cannot be opened.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The store of the ranks.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another rank cannot begin.
    #[error("rank {rank} cannot begin: {message}")]
    OtherRank {
        /// The rank.
        rank: usize,
        /// Why.
        message: String,
    },
    /// Ranks that would not train the same model.
    #[error("the ranks do not belong together: {what}; {remedy}")]
    Unequal {
        /// In what they differ.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Ranks that hold other weights than the rest.
    #[error(
        "after step {step}, {} weights or averages that differ from {}: a fault of memory or of a device. Nothing is saved of this state; \
         the same command goes on from the checkpoint before. If it happens again, take {} out", whose(.ranks), .rest, nodes(.ranks)
    )]
    Corrupt {
        /// Steps done.
        step: u64,
        /// The minority; all ranks, where there is no majority.
        ranks: Vec<usize>,
        /// The others, in words.
        rest: &'static str,
    },
    /// Asked to stop before it began.
    #[error("stopped before the first step; the same command begins again")]
    Stopped,
    /// The file of this program.
    #[error("cannot read this program's own file: {0}")]
    Program(std::io::Error),
    /// An image of a step.
    #[error("step {step}: {source}")]
    Loading {
        /// The step, from 1.
        step: u64,
        /// Why it cannot be read.
        source: DataError,
    },
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The step.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl TrainError {
    /// What went wrong between ranks, if that is what it is.
    pub fn collective(&self) -> Option<&CollectiveError> {
        match self {
            TrainError::Run(error) => error.collective(),
            TrainError::Sample(error) => error.collective(),
            _ => None,
        }
    }

    /// Whether all ranks end with this error, or with one that tells of it.
    pub fn is_joint(&self) -> bool {
        use TrainError::{Corrupt, Diverged, OtherRank, Unequal};
        matches!(self, Diverged { .. } | Corrupt { .. } | OtherRank { .. } | Unequal { .. })
    }
}

fn whose(ranks: &[usize]) -> String {
    match ranks {
        [rank] => format!("rank {rank} holds"),
        _ => format!("ranks {} hold", listed(ranks)),
    }
}

fn nodes(ranks: &[usize]) -> &'static str {
    if ranks.len() == 1 { "its node" } else { "one node after the other" }
}

fn listed(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

fn lines(differences: &[Difference]) -> String {
    let line = |d: &Difference| format!("\n  {}: {} there, {} here", d.key, d.saved, d.now);
    differences.iter().map(line).collect()
}

fn keys(differences: &[Difference]) -> String {
    differences.iter().map(|d| format!("`{}`", d.key)).collect::<Vec<_>>().join(", ")
}
