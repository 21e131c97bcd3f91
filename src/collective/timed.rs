//! A collective that knows how long it was waited for.

use super::{Collective, CollectiveError};
use crate::device::{BufferId, Device};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Passes everything on, and adds up the time that the caller spent in it.
#[derive(Debug)]
pub struct Timed<'a> {
    inner: &'a mut dyn Collective,
    /// Time spent so far.
    pub spent: Duration,
}

impl<'a> Timed<'a> {
    /// Around `inner`, with nothing spent.
    pub fn new(inner: &'a mut dyn Collective) -> Timed<'a> {
        Timed { inner, spent: Duration::ZERO }
    }

    fn time<R>(&mut self, work: impl FnOnce(&mut dyn Collective) -> R) -> R {
        let start = Instant::now();
        let result = work(self.inner);
        self.spent += start.elapsed();
        result
    }
}

impl Collective for Timed<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_start(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.time(|inner| inner.all_reduce_start(device, buffer, range))
    }

    fn all_reduce_wait(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.time(|inner| inner.all_reduce_wait(device, buffer, range))
    }

    fn needs_the_host(&self) -> bool {
        self.inner.needs_the_host()
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.time(|inner| inner.all_gather(mine))
    }

    fn note_sums(&mut self) -> Result<(), CollectiveError> {
        self.inner.note_sums()
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        // Not only the others are waited for, but this rank's own GPU too.
        self.inner.settle()
    }

    fn allow_any_order(&mut self) {
        self.inner.allow_any_order();
    }

    fn set_patience(&mut self, patience: Duration) {
        self.inner.set_patience(patience);
    }
}
