//! The optimiser's state, divided among the ranks: of each bucket of gradients a rank has the state of its slice, one slice after another.

use super::Share;
use crate::collective::{Collective, Exchange, slice_of};
use crate::device::{BufferId, Device, DeviceError, Region};
use crate::tape::{Program, RunError};
use std::ops::Range;

/// What is divided. Weights are not: every rank reads all of them, those of norms and biases in f32 whatever it computes in.
pub(super) const DIVIDED: [Region; 3] = [Region::Moment1, Region::Moment2, Region::Ema];

/// Which slices of the flat buffers are a rank's.
#[derive(Debug)]
pub(super) struct Division {
    rank: usize,
    ranks: usize,
    buckets: Vec<Range<usize>>,
}

impl Division {
    /// That of a program, if it divides its update.
    pub fn of(program: &Program, share: &Share) -> Option<Division> {
        let scattered = program.exchanges().filter(|(_, bucket)| bucket.exchange == Exchange::ReduceScatter);
        let buckets: Vec<_> = scattered.map(|(_, bucket)| bucket.range.clone()).collect();
        (!buckets.is_empty()).then_some(Division { rank: share.rank, ranks: share.world_size, buckets })
    }

    /// Each of the rank's slices: where it stands in a whole buffer, and the first of its elements in the rank's own.
    fn slices(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        self.buckets.iter().map(|bucket| (slice_of(bucket, self.rank, self.ranks), bucket.start / self.ranks))
    }

    /// Sets what the rank has, from what all have together; that may end before the last gap does.
    pub fn put(&self, device: &mut Device, own: BufferId, flat: &[f32]) -> Result<(), DeviceError> {
        for (slice, at) in self.slices() {
            let end = slice.end.min(flat.len());
            if slice.start < end {
                device.upload(own, at, &flat[slice.start..end])?;
            }
        }
        Ok(())
    }

    /// Gathers in `whole` what the ranks have of their own.
    pub fn gather(
        &self,
        device: &mut Device,
        collective: &mut dyn Collective,
        own: BufferId,
        whole: BufferId,
    ) -> Result<(), RunError> {
        let in_bytes = |range: &Range<usize>| range.start * size_of::<f32>()..range.end * size_of::<f32>();
        let mut values = Vec::new();
        for (bucket, (slice, at)) in self.buckets.iter().zip(self.slices()) {
            values.resize(slice.len(), 0.0f32);
            device.download(own, at, &mut values)?;
            device.upload(whole, slice.start, &values)?;
            collective.start(Exchange::AllGather, device, whole, in_bytes(bucket))?;
        }
        for bucket in &self.buckets {
            collective.wait(Exchange::AllGather, device, whole, in_bytes(bucket))?;
        }
        // Before it is read, for a device with queues would wait for ever for a rank that is gone.
        collective.note_sums()?;
        Ok(collective.settle()?)
    }
}
