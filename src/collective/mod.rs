//! Sums between ranks. One rank for now: [`Solo`].

use crate::device::{BufferId, Device};
use std::fmt;
use std::ops::Range;
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
/// A sum is begun and waited for separately, so that it can run while the backward pass computes the next gradients. Between the two,
/// the program leaves the range alone, and the collective keeps no reference to it: on host memory it works on a copy, on an accelerator
/// on the device's own queues.
pub trait Collective: fmt::Debug {
    /// This process's number, from 0.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Begins to replace `range` of `buffer` (f32) by its sum over all ranks.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn all_reduce_start(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError>;

    /// Returns when the sum stands in `range` of `buffer`, or, on a device with queues, when what is launched next will find it there.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn all_reduce_wait(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError>;
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

    fn all_reduce_start(&mut self, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_reduce_wait(&mut self, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
        Ok(())
    }
}
