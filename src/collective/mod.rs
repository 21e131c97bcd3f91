//! Sums between ranks: [`Solo`] for one, [`Host`](host::Host) for those on host memory, [`Nccl`](nccl::Nccl) for those on GPUs,
//! [`Fake`](fake::Fake) for plans and tests.

mod activity;
mod beside;
mod exchange;
pub mod fake;
pub mod host;
pub mod nccl;
#[cfg(test)]
pub(crate) mod testing;
mod timed;
mod tree;

pub use activity::{Activity, Operation, Progress, Record};
pub use beside::beside;
pub use exchange::{Exchange, slice_of};
pub use timed::Timed;
pub use tree::sum_along_tree;

pub use crate::device::cuda::nccl::Adding;

use crate::device::{BufferId, Device, DeviceError};
use std::fmt;
use std::ops::Range;
use std::time::Duration;
use thiserror::Error;

/// What can go wrong between ranks.
#[derive(Debug, Error)]
pub enum CollectiveError {
    /// A rank is gone.
    #[error("rank {rank} was lost during {operation}")]
    PeerLost {
        /// The missing rank.
        rank: usize,
        /// What was under way.
        operation: String,
    },
    /// Ranks that did not take part by the deadline.
    #[error("ranks {ranks:?} did not answer within {} s during {operation}", .after.as_secs())]
    TimedOut {
        /// Who is missing.
        ranks: Vec<usize>,
        /// What was under way.
        operation: String,
        /// The deadline.
        after: Duration,
    },
    /// A rank that does something else.
    #[error(
        "rank {rank} is out of step: it is at {theirs}, this rank at {ours}; are all ranks of one version and config?"
    )]
    OutOfStep {
        /// Who.
        rank: usize,
        /// What is due.
        ours: String,
        /// What came.
        theirs: String,
    },
    /// More than ranks tell each other.
    #[error(
        "{bytes} bytes are too many for a {operation}, which takes {most} of each rank: write what is large to a file"
    )]
    TooLong {
        /// What was asked for.
        operation: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        most: usize,
    },
    /// The system.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was under way.
        operation: String,
        /// Why.
        source: std::io::Error,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device of another rank failed, as that rank has told.
    #[error("rank {rank}: {message}")]
    DeviceOf {
        /// Whose.
        rank: usize,
        /// Why.
        message: String,
    },
    /// All ranks are there, and what their devices do together does not end.
    #[error(transparent)]
    Stuck(DeviceError),
    /// An earlier operation failed, after which there are no more.
    #[error("the ranks have parted after an earlier error")]
    Ended,
}

/// The ranks of a run, which add up their gradients bucket by bucket.
///
/// A sum is begun and waited for separately, so that it can run while the backward pass computes the next gradients; so is what else they
/// [exchange](Exchange). Between the two, the program leaves the range alone, and the collective keeps no reference to it: on host memory it
/// works on a copy, on an accelerator on the device's own queues.
pub trait Collective: fmt::Debug {
    /// This process's number, from 0.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Takes what memory of the device sums of up to `longest` floats need; before the first of them, which may not be captured.
    ///
    /// # Errors
    /// Too little memory.
    fn reserve(&mut self, _device: &mut Device, _longest: usize) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Begins an exchange of `range` of `buffer`, in elements: floats (f32) of a sum, bytes otherwise.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn start(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError>;

    /// Returns when the result of the exchange that was begun first stands there, or, on a device with queues, when what is launched next
    /// will find it there.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn wait(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError>;

    /// Whether the host takes part in its sums when a program runs. If not, all that they are is on a device's queues, and a program that
    /// has been captured there needs no call of this room.
    fn needs_the_host(&self) -> bool {
        true
    }

    /// The bytes of all ranks, in their order, at every rank: for what is small (16 MiB at most) and for the host. No sum may be under way.
    ///
    /// # Errors
    /// A rank that does not take part, or more bytes than that.
    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Tells the device that step `step` begins, to be noted when all of it has been begun.
    ///
    /// # Errors
    /// The device's.
    fn begin_step(&mut self, _device: &mut Device, _step: u64) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Notes that a step has been begun on a device's queues, instruction by instruction or as a graph, whose sums [`Collective::settle`] will
    /// be called for.
    ///
    /// # Errors
    /// The device's.
    fn note_sums(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Returns when the sums of the first step that was noted and not settled are there, or their deadline has passed: to be called before
    /// anything is read that was computed from them, for a device with queues would not return from that before a rank comes that never
    /// does.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn settle(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// How long this rank's device computed for the step that was settled last, where it tells: what it waited for sums is left out.
    fn own_time(&self) -> Option<Duration> {
        None
    }

    /// Returns when nothing of the steps that were noted is under way, or their deadline has passed. They are still to be settled.
    ///
    /// # Errors
    /// A rank that does not take part.
    fn come_to_rest(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Begins anew where devices were to keep sums for later and that has failed at a rank: what is between devices may be of no more use
    /// then. All ranks call it, with nothing under way and no sums kept.
    ///
    /// # Errors
    /// A rank that does not take part, or devices that do not find each other.
    fn renew(&mut self, _device: &mut Device) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Chooses how sums are added up from now on, which is along the tree if nobody chooses; gives whether the ranks can do that. Ranks on host
    /// memory always add along the tree, in f32.
    fn choose(&mut self, adding: Adding) -> bool {
        adding != Adding::FastInBf16
    }

    /// Changes the deadline of the operations that are begun from now on.
    fn set_patience(&mut self, patience: Duration);
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

    fn start(&mut self, _: Exchange, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn wait(&mut self, _: Exchange, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn needs_the_host(&self) -> bool {
        false
    }

    fn choose(&mut self, _: Adding) -> bool {
        true
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![mine])
    }

    fn set_patience(&mut self, _: Duration) {}
}
