//! Which ranks the others wait for, from what all have published of themselves.

use crate::collective::{Operation, Progress, Record};
use crate::tape::human_bytes;
use std::cmp::Reverse;
use std::fmt;
use std::time::Duration;

/// How many of the operations before the last are told.
const SHOWN: usize = 2;

/// One rank as it was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Who.
    pub rank: usize,
    /// What it published last, if anything.
    pub record: Option<Record>,
    /// How long it has published nothing new; nothing if it lives.
    pub silent: Option<Duration>,
}

/// A rank that holds up the others, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// Who.
    pub rank: usize,
    /// Whether it still gives signs of life.
    pub lives: bool,
    /// Operations it has not begun that another has.
    pub operations: u64,
    /// What it was doing.
    pub doing: String,
    silent: Duration,
}

/// The ranks that hold up the others: those without a sign of life first, then those that are furthest behind. None if all live and are
/// equally far.
pub fn behind(seen: &[Seen]) -> Vec<Behind> {
    let begun = |record: &Record| record.begun().next().map_or(0, |operation| operation.sequence);
    let front = seen.iter().filter_map(|seen| seen.record.as_ref()).map(begun).max().unwrap_or(0);
    let mut behind: Vec<Behind> = seen
        .iter()
        .filter_map(|Seen { rank, record, silent }| {
            let operations = front - record.as_ref().map_or(0, begun);
            let doing = match record {
                None => "it has never said what it does".to_string(),
                Some(record) => doing(record, front),
            };
            let lives = silent.is_none() && record.is_some();
            let is_behind = !lives || operations > 0;
            is_behind.then(|| Behind { rank: *rank, lives, operations, doing, silent: silent.unwrap_or_default() })
        })
        .collect();
    behind.sort_by_key(|b| (b.lives, Reverse(b.operations), b.rank));
    behind
}

/// Where in its work a rank is, and how far the others are where that is further.
fn doing(record: &Record, front: u64) -> String {
    let Record { step, phase, .. } = record;
    let said = |Operation { sequence, name, bytes, progress }: &Operation| {
        let progress = match progress {
            Progress::Queued => "queued",
            Progress::Waiting => "waiting",
            Progress::Done => "done",
        };
        format!("{name} {sequence} of {} ({progress})", human_bytes(*bytes as u64))
    };
    let mut begun = record.begun();
    let last = begun.next();
    let at = last.map_or("no operation begun".to_string(), |last| format!("at {}", said(last)));
    let before: Vec<String> = begun.take(SHOWN).map(said).collect();
    let before = if before.is_empty() { String::new() } else { format!(" after {}", before.join(", ")) };
    let step = if phase.is_empty() { String::new() } else { format!("step {step}: {phase}, ") };
    let is_behind = last.map_or(0, |last| last.sequence) < front;
    let others = if is_behind { format!(", the others at {front}") } else { String::new() };
    format!("{step}{at}{before}{others}")
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Behind { rank, doing, silent, .. } = self;
        match self.lives {
            true => write!(f, "rank {rank} lives but is behind: {doing}"),
            false => write!(f, "rank {rank} has shown no sign of life for {} s; last seen: {doing}", silent.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Progress::{Done, Waiting};

    /// rank, seconds of silence, (step, phase), (operation, progress).
    type Trace = (usize, Option<u64>, (u64, &'static str), (u64, Progress));

    fn said(trace: &[Trace]) -> Vec<String> {
        let seen: Vec<Seen> = trace
            .iter()
            .map(|&(rank, silent, (step, phase), (sequence, progress))| {
                let operation = Operation { sequence, name: "all-reduce".into(), bytes: 25 << 20, progress };
                let operations = (sequence > 0).then_some(operation).into_iter().collect();
                let record = Record { rank, beat: 9, step, phase: phase.to_string(), operations };
                Seen { rank, record: Some(record), silent: silent.map(Duration::from_secs) }
            })
            .collect();
        behind(&seen).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn recorded_traces_are_told_in_plain_words() {
        let at = |phase| (57, phase);
        let table: &[(&str, &[Trace], &[&str])] = &[
            (
                "all at work",
                &[(0, None, at("backward"), (113, Waiting)), (1, None, at("backward"), (113, Waiting))],
                &[],
            ),
            (
                "a rank was stopped in its backward pass",
                &[
                    (0, None, at("waiting"), (113, Waiting)),
                    (1, None, at("waiting"), (113, Waiting)),
                    (2, Some(12), at("backward"), (112, Done)),
                ],
                &[
                    "rank 2 has shown no sign of life for 12 s; last seen: step 57: backward, at all-reduce 112 of 25.00 MiB (done), the \
                   others at 113",
                ],
            ),
            (
                "a rank is slow, one is further ahead than the other",
                &[
                    (0, None, at("backward"), (113, Waiting)),
                    (1, None, at("forward"), (110, Done)),
                    (2, None, at("backward"), (112, Waiting)),
                ],
                &[
                    "rank 1 lives but is behind: step 57: forward, at all-reduce 110 of 25.00 MiB (done), the others at 113",
                    "rank 2 lives but is behind: step 57: backward, at all-reduce 112 of 25.00 MiB (waiting), the others at 113",
                ],
            ),
            (
                "it died in the middle of an operation",
                &[(0, None, at(""), (5, Waiting)), (1, Some(2), at(""), (5, Waiting))],
                &["rank 1 has shown no sign of life for 2 s; last seen: at all-reduce 5 of 25.00 MiB (waiting)"],
            ),
            (
                "the network parts two that live",
                &[(0, None, at("a"), (5, Waiting)), (1, None, at("a"), (5, Done))],
                &[],
            ),
            (
                "gone after everything was done",
                &[(0, None, at("b"), (5, Done)), (1, Some(3), at("checkpoint"), (5, Done))],
                &[
                    "rank 1 has shown no sign of life for 3 s; last seen: step 57: checkpoint, at all-reduce 5 of 25.00 MiB (done)",
                ],
            ),
            (
                "the dead come before the slow",
                &[
                    (0, None, at(""), (9, Waiting)),
                    (1, None, at(""), (2, Done)),
                    (2, Some(4), at(""), (0, Done)),
                    (3, Some(4), at(""), (8, Done)),
                ],
                &[
                    "rank 2 has shown no sign of life for 4 s; last seen: no operation begun, the others at 9",
                    "rank 3 has shown no sign of life for 4 s; last seen: at all-reduce 8 of 25.00 MiB (done), the others at 9",
                    "rank 1 lives but is behind: at all-reduce 2 of 25.00 MiB (done), the others at 9",
                ],
            ),
        ];
        for (case, trace, expected) in table {
            assert_eq!(said(trace), *expected, "{case}");
        }
    }

    #[test]
    fn what_a_rank_did_before_is_told() {
        let operation =
            |sequence, name: &'static str, bytes, progress| Operation { sequence, name: name.into(), bytes, progress };
        let operations = vec![
            operation(1, "gather", 43, Done),
            operation(2, "all-reduce", 1 << 20, Done),
            operation(3, "all-reduce", 25 << 20, Done),
            operation(4, "all-reduce", 25 << 20, Waiting),
            operation(5, "all-reduce", 6 << 20, Progress::Queued),
        ];
        let record = Record { rank: 1, beat: 9, step: 7, phase: "backward".into(), operations };
        let silent = Some(Duration::from_secs(3));
        let said = behind(&[Seen { rank: 1, record: Some(record), silent }])[0].to_string();
        assert_eq!(
            said,
            "rank 1 has shown no sign of life for 3 s; last seen: step 7: backward, at all-reduce 4 of 25.00 MiB (waiting) after \
             all-reduce 3 of 25.00 MiB (done), all-reduce 2 of 1.00 MiB (done)"
        );
    }

    #[test]
    fn a_rank_without_a_record_is_named() {
        let seen = [Seen { rank: 4, record: None, silent: Some(Duration::from_secs(2)) }];
        let said = behind(&seen)[0].to_string();
        assert_eq!(said, "rank 4 has shown no sign of life for 2 s; last seen: it has never said what it does");
        assert!(behind(&[]).is_empty());
    }
}
