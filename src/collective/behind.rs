//! Which ranks the others wait for, from what all have published of themselves.

use super::activity::Record;
use std::cmp::Reverse;
use std::fmt;
use std::time::Duration;

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
    let records = || seen.iter().filter_map(|seen| seen.record.as_ref());
    let front = records().map(|record| record.begun).max().unwrap_or(0);
    // The same operation has the same number everywhere, so another rank may know its name.
    let name = |sequence: u64| {
        let known = records().find(|record| record.queued == sequence);
        known.map_or("operation", |record| &record.operation)
    };
    let mut behind: Vec<Behind> = seen
        .iter()
        .filter_map(|Seen { rank, record, silent }| {
            let operations = front - record.as_ref().map_or(0, |record| record.begun);
            let doing = match record {
                None => "it has never said what it does".to_string(),
                Some(record) => doing(record, front, name),
            };
            let lives = silent.is_none() && record.is_some();
            let is_behind = !lives || operations > 0;
            is_behind.then(|| Behind { rank: *rank, lives, operations, doing, silent: silent.unwrap_or_default() })
        })
        .collect();
    behind.sort_by_key(|b| (b.lives, Reverse(b.operations), b.rank));
    behind
}

fn doing<'a>(record: &Record, front: u64, name: impl Fn(u64) -> &'a str) -> String {
    let Record { step, phase, begun, completed, .. } = record;
    let operation = match begun {
        _ if begun > completed => format!("{} {begun} under way", name(*begun)),
        _ if *begun < front => format!("{} {} not begun", name(begun + 1), begun + 1),
        0 => "no operation begun".to_string(),
        _ => format!("{} {completed} done", name(*completed)),
    };
    match phase.as_str() {
        "" => operation,
        phase => format!("step {step}: {phase}, {operation}"),
    }
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Behind { rank, operations, doing, silent, .. } = self;
        if self.lives {
            let s = if *operations == 1 { "" } else { "s" };
            return write!(f, "rank {rank} lives but is {operations} operation{s} behind: {doing}");
        }
        write!(f, "rank {rank} has shown no sign of life for {} s; last seen: {doing}", silent.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// rank, seconds of silence, (step, phase), (queued, begun, completed).
    type Trace = (usize, Option<u64>, (u64, &'static str), (u64, u64, u64));

    fn said(trace: &[Trace]) -> Vec<String> {
        let seen: Vec<Seen> = trace
            .iter()
            .map(|&(rank, silent, (step, phase), (queued, begun, completed))| {
                let (phase, operation) = (phase.to_string(), "all-reduce".to_string());
                let record = Record { rank, beat: 9, step, phase, queued, begun, completed, operation };
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
                &[(0, None, at("backward"), (113, 113, 112)), (1, None, at("backward"), (113, 113, 112))],
                &[],
            ),
            (
                "a rank was stopped in its backward pass",
                &[
                    (0, None, at("waiting"), (113, 113, 112)),
                    (1, None, at("waiting"), (113, 113, 112)),
                    (2, Some(12), at("backward"), (112, 112, 112)),
                ],
                &["rank 2 has shown no sign of life for 12 s; last seen: step 57: backward, all-reduce 113 not begun"],
            ),
            (
                "a rank is slow, one is further ahead than the other",
                &[
                    (0, None, at("backward"), (113, 113, 112)),
                    (1, None, at("forward"), (110, 110, 110)),
                    (2, None, at("backward"), (112, 112, 112)),
                ],
                &[
                    "rank 1 lives but is 3 operations behind: step 57: forward, operation 111 not begun",
                    "rank 2 lives but is 1 operation behind: step 57: backward, all-reduce 113 not begun",
                ],
            ),
            (
                "it died in the middle of an operation",
                &[(0, None, at(""), (5, 5, 4)), (1, Some(2), at(""), (5, 5, 4))],
                &["rank 1 has shown no sign of life for 2 s; last seen: all-reduce 5 under way"],
            ),
            ("the network parts two that live", &[(0, None, at("a"), (5, 5, 4)), (1, None, at("a"), (5, 5, 4))], &[]),
            (
                "gone after everything was done",
                &[(0, None, at("b"), (5, 5, 5)), (1, Some(3), at("checkpoint"), (5, 5, 5))],
                &["rank 1 has shown no sign of life for 3 s; last seen: step 57: checkpoint, all-reduce 5 done"],
            ),
            (
                "the dead come before the slow",
                &[
                    (0, None, at(""), (9, 9, 8)),
                    (1, None, at(""), (2, 2, 2)),
                    (2, Some(4), at(""), (0, 0, 0)),
                    (3, Some(4), at(""), (8, 8, 8)),
                ],
                &[
                    "rank 2 has shown no sign of life for 4 s; last seen: operation 1 not begun",
                    "rank 3 has shown no sign of life for 4 s; last seen: all-reduce 9 not begun",
                    "rank 1 lives but is 7 operations behind: operation 3 not begun",
                ],
            ),
        ];
        for (case, trace, expected) in table {
            assert_eq!(said(trace), *expected, "{case}");
        }
    }

    #[test]
    fn a_rank_without_a_record_is_named() {
        let seen = [Seen { rank: 4, record: None, silent: Some(Duration::from_secs(2)) }];
        let said = behind(&seen)[0].to_string();
        assert_eq!(said, "rank 4 has shown no sign of life for 2 s; last seen: it has never said what it does");
        assert!(behind(&[]).is_empty());
    }
}
