//! What a rank was doing: the ring of its last operations, and what the loop around it says of itself.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Operations that are remembered once they are over.
const REMEMBERED: usize = 16;
/// Operations that are asked for ahead, in most programs: noting so many takes no memory in a step.
const AHEAD: usize = 64;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Asked for, and behind others.
    Queued,
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
    /// The last ones that are over, the one under way, and those that are queued, in the order of their numbers.
    operations: VecDeque<Operation>,
    /// Number of operations that were asked for.
    asked: u64,
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
    /// The last operations that it took part in, the one that it is at, and those that it has queued, in order.
    pub operations: Vec<Operation>,
}

impl Record {
    /// The operations that were begun, the last one first.
    pub fn begun(&self) -> impl Iterator<Item = &Operation> {
        self.operations.iter().rev().filter(|operation| operation.progress != Progress::Queued)
    }
}

impl Activity {
    /// Nothing yet.
    pub fn new(rank: usize) -> Activity {
        let operations = VecDeque::with_capacity(REMEMBERED + AHEAD);
        let state = State { operations, asked: 0, step: 0, phase: "" };
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
        state.asked += 1;
        let sequence = state.asked;
        state.operations.push_back(Operation { sequence, name: name.into(), bytes, progress: Progress::Queued });
        sequence
    }

    /// The next operation begins: they do so in the order in which they were asked for.
    pub(super) fn begun(&self) {
        self.lock().change(Progress::Queued, Progress::Waiting);
    }

    /// The operation that was begun last is over.
    pub(super) fn completed(&self) {
        let mut state = self.lock();
        state.change(Progress::Waiting, Progress::Done);
        if state.operations.get(REMEMBERED).is_some_and(|operation| operation.progress == Progress::Done) {
            state.operations.pop_front();
        }
    }

    /// What to publish.
    pub fn record(&self, beat: u64) -> Record {
        let state = self.lock();
        let (phase, operations) = (state.phase.to_string(), state.operations.iter().cloned().collect());
        Record { rank: self.rank, beat, step: state.step, phase, operations }
    }
}

impl State {
    /// Of the first operation that is as far as `from`.
    fn change(&mut self, from: Progress, to: Progress) {
        if let Some(operation) = self.operations.iter_mut().find(|operation| operation.progress == from) {
            operation.progress = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_operations_of_a_rank_are_published() {
        let activity = Activity::new(3);
        assert!(activity.record(1).operations.is_empty());
        activity.note(57, "backward");
        for sequence in 1..=100 {
            assert_eq!(activity.queued("all-reduce", 1 << 20), sequence);
            activity.begun();
            activity.completed();
        }
        // Two are asked for, of which the first is under way.
        assert_eq!((activity.queued("gather", 8), activity.queued("gather", 16)), (101, 102));
        activity.begun();
        let record = activity.record(8);
        let found: Vec<(u64, &str, usize, Progress)> =
            record.operations.iter().map(|o| (o.sequence, &*o.name, o.bytes, o.progress)).collect();
        let done = (101 - REMEMBERED as u64..101).map(|sequence| (sequence, "all-reduce", 1 << 20, Progress::Done));
        let rest = [(101, "gather", 8, Progress::Waiting), (102, "gather", 16, Progress::Queued)];
        assert_eq!(found, done.chain(rest).collect::<Vec<_>>());
        assert_eq!(record.begun().map(|operation| operation.sequence).take(3).collect::<Vec<_>>(), [101, 100, 99]);
        assert_eq!((record.rank, record.beat, record.step, record.phase.as_str()), (3, 8, 57, "backward"));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record, "{json}");
    }
}
