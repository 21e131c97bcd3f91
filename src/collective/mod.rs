//! Sums between ranks. One rank for now: [`Solo`].

use std::fmt;
use thiserror::Error;

/// What can go wrong between ranks.
#[derive(Debug, Error)]
pub enum CollectiveError {
    /// A rank did not take part in time.
    #[error("rank {rank} did not answer during {operation}")]
    PeerLost {
        /// The missing rank.
        rank: usize,
        /// What was under way.
        operation: String,
    },
}

/// The ranks of a run, which add up their gradients bucket by bucket.
///
/// A sum is begun and waited for separately, so that it can run while the backward pass computes the next gradients.
pub trait Collective: fmt::Debug {
    /// This process's number, from 0.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Begins to replace `data` (host memory) by its sum over all ranks.
    fn all_reduce_start(&mut self, bucket: usize, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Returns when the sum of `bucket` stands in `data`.
    fn all_reduce_wait(&mut self, bucket: usize, data: &mut [f32]) -> Result<(), CollectiveError>;
}

/// A world of one rank: every sum is already there.
#[derive(Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_start(&mut self, _bucket: usize, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_reduce_wait(&mut self, _bucket: usize, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
}
