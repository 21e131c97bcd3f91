//! A world that exists only on paper: one rank of any number, sums that take virtual time, and a record of what was waited for.
//!
//! For plans and tests: what a step waits for its sums can be read off the events, on any machine and whatever else it does meanwhile.

use super::{Collective, CollectiveError, Exchange, slice_of};
use crate::device::{BufferId, Device};
use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// A time that passes only when someone says so. Clones are the same clock.
#[derive(Clone, Debug, Default)]
pub struct Clock(Rc<Cell<Duration>>);

impl Clock {
    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        self.0.get()
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        self.0.set(self.0.get() + time);
    }
}

/// How long a sum takes: one at a time, each begins when the one before it is done.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of every sum.
    pub each: Duration,
    /// Of every byte, in seconds.
    pub per_byte: f64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A sum or a gather was begun.
    Begun {
        /// Of what: floats, or the bytes of a gather.
        range: Range<usize>,
        /// When.
        at: Duration,
    },
    /// It was waited for.
    Waited {
        /// Of what.
        range: Range<usize>,
        /// When waiting began.
        from: Duration,
        /// When it was over: as long as this the step stood still.
        until: Duration,
    },
}

/// A rank among others that do just what it does: every sum is its own values times their number, and what it would gather of others stands
/// there already.
#[derive(Debug)]
pub struct Fake {
    rank: usize,
    size: usize,
    clock: Clock,
    cost: Cost,
    /// Sums not waited for, with the time they are done.
    under_way: VecDeque<(Range<usize>, Duration)>,
    /// When the last sum is done.
    free: Duration,
    events: Vec<Event>,
    lost: Option<(usize, usize)>,
}

impl Fake {
    /// Rank `rank` of `size`, whose sums take as long as `cost` says on `clock`.
    pub fn new(rank: usize, size: usize, clock: Clock, cost: Cost) -> Fake {
        let (under_way, free, events) = (VecDeque::new(), Duration::ZERO, Vec::new());
        Fake { rank, size, clock, cost, under_way, free, events, lost: None }
    }

    /// Lets a rank be lost when sum number `sum` (from 0) is to begin.
    pub fn losing(self, rank: usize, sum: usize) -> Fake {
        Fake { lost: Some((rank, sum)), ..self }
    }

    /// What happened, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The ranges whose sums or gathers were begun.
    pub fn begun(&self) -> Vec<Range<usize>> {
        let begun = |event: &Event| match event {
            Event::Begun { range, .. } => Some(range.clone()),
            Event::Waited { .. } => None,
        };
        self.events.iter().filter_map(begun).collect()
    }

    /// Time that was spent waiting for sums: what computing did not cover.
    pub fn exposed(&self) -> Duration {
        let exposed = |event: &Event| match event {
            Event::Begun { .. } => Duration::ZERO,
            Event::Waited { from, until, .. } => *until - *from,
        };
        self.events.iter().map(exposed).sum()
    }
}

impl Fake {
    fn end(&mut self, range: &Range<usize>) {
        let done = self.under_way.pop_front();
        let Some((_, done)) = done.filter(|(begun, _)| begun == range) else {
            panic!("sums are waited for in the order in which they were begun, not {range:?}");
        };
        let from = self.clock.now();
        self.clock.pass(done.saturating_sub(from));
        let until = self.clock.now();
        self.events.push(Event::Waited { range: range.clone(), from, until });
    }

    fn multiply(&self, device: &mut Device, buffer: BufferId, range: Range<usize>) -> Result<(), CollectiveError> {
        let factor = self.size as f32;
        device.upload_with(buffer, range, |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= factor))?;
        Ok(())
    }
}

impl Collective for Fake {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn start(
        &mut self,
        exchange: Exchange,
        _: &mut Device,
        _: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let number = self.begun().len();
        if let Some((rank, _)) = self.lost.filter(|(_, sum)| *sum == number) {
            return Err(CollectiveError::PeerLost { rank, operation: format!("{} {number}", exchange.name()) });
        }
        // What moves in a sum that all get is twice what moves in its halves.
        let moves = match exchange {
            Exchange::AllReduce => exchange.in_bytes(&range).len(),
            Exchange::ReduceScatter | Exchange::AllGather => exchange.in_bytes(&range).len() / 2,
        };
        let at = self.clock.now();
        let takes = self.cost.each + Duration::from_secs_f64(self.cost.per_byte * moves as f64);
        self.free = self.free.max(at) + takes;
        self.under_way.push_back((range.clone(), self.free));
        self.events.push(Event::Begun { range, at });
        Ok(())
    }

    fn wait(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.end(&range);
        match exchange {
            Exchange::AllReduce => self.multiply(device, buffer, range),
            Exchange::ReduceScatter => self.multiply(device, buffer, slice_of(&range, self.rank, self.size)),
            Exchange::AllGather => Ok(()),
        }
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![mine; self.size])
    }

    fn set_patience(&mut self, _: Duration) {}
}
