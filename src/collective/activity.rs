//! What a rank was doing: at which operation it is, and what the loop around it says of itself.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Operations that are asked for ahead, in most programs: noting so many takes no memory in a step.
const AHEAD: usize = 64;

/// How far an operation is that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Under way: it waits for the other ranks.
    Waiting,
    /// Over.
    Done,
}

/// An operation of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Its number, from 1, the same at every rank.
    pub sequence: u64,
    /// What it is.
    pub name: Cow<'static, str>,
    /// Bytes of this rank that it is about.
    pub bytes: usize,
    /// How far it is.
    pub progress: Progress,
}

/// What one rank is doing, noted by itself and read by its watchdog. Noting costs a lock that is nearly always free.
#[derive(Debug)]
pub struct Activity {
    rank: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Name and bytes of what was asked for and is not begun, the next one first.
    queue: VecDeque<(&'static str, usize)>,
    /// The last one that was begun.
    last: Option<Operation>,
    step: u64,
    phase: &'static str,
}

/// What a rank publishes of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Who.
    pub rank: usize,
    /// How often it has published: it lives if this grows.
    pub beat: u64,
    /// Training step.
    pub step: u64,
    /// What it does in that step; empty if it has not said.
    pub phase: String,
    /// The last operation that it took part in, if any.
    pub operation: Option<Operation>,
}

impl Activity {
    /// Nothing yet.
    pub fn new(rank: usize) -> Activity {
        let state = State { queue: VecDeque::with_capacity(AHEAD), last: None, step: 0, phase: "" };
        Activity { rank, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what the loop does from now on.
    pub fn note(&self, step: u64, phase: &'static str) {
        let mut state = self.lock();
        (state.step, state.phase) = (step, phase);
    }

    /// An operation is asked for; gives its number.
    pub(super) fn queued(&self, name: &'static str, bytes: usize) -> u64 {
        let mut state = self.lock();
        state.queue.push_back((name, bytes));
        state.sequence() + state.queue.len() as u64
    }

    /// The next operation begins: they do so in the order in which they were asked for.
    pub(super) fn begun(&self) {
        let mut state = self.lock();
        if let Some((name, bytes)) = state.queue.pop_front() {
            let (sequence, progress) = (state.sequence() + 1, Progress::Waiting);
            state.last = Some(Operation { sequence, name: name.into(), bytes, progress });
        }
    }

    /// The operation that was begun last is over.
    pub(super) fn completed(&self) {
        if let Some(last) = &mut self.lock().last {
            last.progress = Progress::Done;
        }
    }

    /// What to publish.
    pub fn record(&self, beat: u64) -> Record {
        let state = self.lock();
        let (phase, operation) = (state.phase.to_string(), state.last.clone());
        Record { rank: self.rank, beat, step: state.step, phase, operation }
    }
}

impl State {
    /// Number of operations that were begun.
    fn sequence(&self) -> u64 {
        self.last.as_ref().map_or(0, |last| last.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operation_that_a_rank_is_at_is_published() {
        let activity = Activity::new(3);
        assert_eq!(activity.record(1).operation, None);
        activity.note(57, "backward");
        for sequence in 1..=100 {
            assert_eq!(activity.queued("all-reduce", 1 << 20), sequence);
            activity.begun();
            activity.completed();
        }
        // Two are asked for, of which the first is under way.
        assert_eq!((activity.queued("gather", 8), activity.queued("gather", 16)), (101, 102));
        let at = |progress, sequence, name: &'static str, bytes| {
            Some(Operation { sequence, name: name.into(), bytes, progress })
        };
        assert_eq!(activity.record(7).operation, at(Progress::Done, 100, "all-reduce", 1 << 20));
        activity.begun();
        let record = activity.record(8);
        assert_eq!(record.operation, at(Progress::Waiting, 101, "gather", 8));
        assert_eq!((record.rank, record.beat, record.step, record.phase.as_str()), (3, 8, 57, "backward"));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record, "{json}");
    }
}
