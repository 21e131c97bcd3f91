//! A collective that knows how long it was waited for.

use super::{Adding, Collective, CollectiveError, Exchange};
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

    fn reserve(&mut self, device: &mut Device, longest: usize) -> Result<(), CollectiveError> {
        self.inner.reserve(device, longest)
    }

    fn start(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.time(|inner| inner.start(exchange, device, buffer, range))
    }

    fn wait(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.time(|inner| inner.wait(exchange, device, buffer, range))
    }

    fn needs_the_host(&self) -> bool {
        self.inner.needs_the_host()
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.time(|inner| inner.all_gather(mine))
    }

    fn begin_step(&mut self, device: &mut Device, step: u64) -> Result<(), CollectiveError> {
        self.inner.begin_step(device, step)
    }

    fn own_time(&self) -> Option<Duration> {
        self.inner.own_time()
    }

    fn note_sums(&mut self) -> Result<(), CollectiveError> {
        self.inner.note_sums()
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        // On a GPU, what it computes itself is in this, too: what is left is the time of the host.
        self.time(|inner| inner.settle())
    }

    fn come_to_rest(&mut self) -> Result<(), CollectiveError> {
        self.time(|inner| inner.come_to_rest())
    }

    fn renew(&mut self, device: &mut Device) -> Result<(), CollectiveError> {
        self.time(|inner| inner.renew(device))
    }

    fn choose(&mut self, adding: Adding) -> bool {
        self.inner.choose(adding)
    }

    fn set_patience(&mut self, patience: Duration) {
        self.inner.set_patience(patience);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks that are waited for only when the device's queues are.
    #[derive(Debug)]
    struct Late;

    const LATE: Duration = Duration::from_millis(20);

    impl Collective for Late {
        fn rank(&self) -> usize {
            0
        }

        fn world_size(&self) -> usize {
            2
        }

        fn start(&mut self, _: Exchange, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
            Ok(())
        }

        fn wait(&mut self, _: Exchange, _: &mut Device, _: BufferId, _: Range<usize>) -> Result<(), CollectiveError> {
            Ok(())
        }

        fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
            Ok(vec![mine; 2])
        }

        fn settle(&mut self) -> Result<(), CollectiveError> {
            std::thread::sleep(LATE);
            Ok(())
        }

        fn set_patience(&mut self, _: Duration) {}
    }

    #[test]
    fn waiting_for_a_devices_queues_is_waiting_for_others() {
        let mut late = Late;
        let mut timed = Timed::new(&mut late);
        timed.settle().unwrap();
        assert!(timed.spent >= LATE, "{:?}", timed.spent);
    }
}
