//! What a rank was doing: its last operations, and what the loop around them says of itself.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Operations that are remembered.
const REMEMBERED: usize = 64;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Asked for.
    Queued,
    /// Under way with the other ranks.
    Running,
    /// Over.
    Done,
}

/// An operation of this rank.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Its number, from 1, the same at every rank.
    pub sequence: u64,
    /// What it is.
    pub name: &'static str,
    /// Bytes of this rank that it is about.
    pub bytes: usize,
    /// How far it is.
    pub progress: Progress,
    /// Since when.
    pub since: Instant,
}

/// What one rank is doing, noted by itself and read by its watchdog. Noting costs a lock that is nearly always free.
#[derive(Debug)]
pub struct Activity {
    rank: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    operations: VecDeque<Operation>,
    queued: u64,
    begun: u64,
    completed: u64,
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
    /// Number of the last operation it asked for.
    pub queued: u64,
    /// Number of the last operation it took part in.
    pub begun: u64,
    /// Number of the last operation that is over.
    pub completed: u64,
    /// What the last operation is that it asked for.
    pub operation: String,
}

impl Activity {
    /// Nothing yet.
    pub fn new(rank: usize) -> Activity {
        let operations = VecDeque::with_capacity(REMEMBERED);
        Activity {
            rank,
            state: Mutex::new(State { operations, queued: 0, begun: 0, completed: 0, step: 0, phase: "" }),
        }
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
        state.queued += 1;
        let sequence = state.queued;
        if state.operations.len() == REMEMBERED {
            state.operations.pop_front();
        }
        let since = Instant::now();
        state.operations.push_back(Operation { sequence, name, bytes, progress: Progress::Queued, since });
        sequence
    }

    pub(super) fn begun(&self, sequence: u64) {
        let mut state = self.lock();
        state.begun = sequence;
        state.change(sequence, Progress::Running);
    }

    pub(super) fn completed(&self, sequence: u64) {
        let mut state = self.lock();
        state.completed = sequence;
        state.change(sequence, Progress::Done);
    }

    /// The last operations, oldest first.
    pub fn operations(&self) -> Vec<Operation> {
        self.lock().operations.iter().copied().collect()
    }

    /// What to publish.
    pub fn record(&self, beat: u64) -> Record {
        let state = self.lock();
        Record {
            rank: self.rank,
            beat,
            step: state.step,
            phase: state.phase.to_string(),
            queued: state.queued,
            begun: state.begun,
            completed: state.completed,
            operation: state.operations.back().map_or_else(String::new, |last| last.name.to_string()),
        }
    }
}

impl State {
    fn change(&mut self, sequence: u64, progress: Progress) {
        if let Some(operation) = self.operations.iter_mut().rev().find(|operation| operation.sequence == sequence) {
            (operation.progress, operation.since) = (progress, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_operations_are_remembered_with_how_far_they_are() {
        let activity = Activity::new(3);
        activity.note(57, "backward");
        for _ in 0..100 {
            let sequence = activity.queued("all-reduce", 1 << 20);
            activity.begun(sequence);
            activity.completed(sequence);
        }
        let running = activity.queued("gather", 8);
        activity.begun(running);
        activity.queued("gather", 16);
        let operations = activity.operations();
        assert_eq!((operations.len(), operations[0].sequence, operations[63].sequence), (64, 39, 102));
        let progress: Vec<Progress> = operations[61..].iter().map(|o| o.progress).collect();
        assert_eq!(progress, [Progress::Done, Progress::Running, Progress::Queued]);
        let record = activity.record(7);
        assert_eq!((record.rank, record.beat, record.step, record.phase.as_str()), (3, 7, 57, "backward"));
        assert_eq!((record.queued, record.begun, record.completed), (102, 101, 100));
    }
}
