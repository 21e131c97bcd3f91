//! When the ranks of a node are told to end: a machine without clocks or processes of its own.

use super::ends::Asked;
use std::time::{Duration, Instant};

/// What is known of an attempt at some moment. Nothing that was true becomes false.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// A rank failed, here or elsewhere.
    pub failed: bool,
    /// A rank left with its state saved, although nobody here told it to.
    pub left: bool,
    /// Someone wants the run to leave, by this signal.
    pub stop: Option<i32>,
    /// Someone wants it to end at once.
    pub kill: bool,
}

/// What to send to the ranks that still run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// A signal that lets them save, and why.
    Ask(i32, Asked),
    /// SIGKILL.
    Kill(Asked),
}

/// How far an attempt is from its end.
#[derive(Debug)]
pub(super) struct Winding {
    /// How long those whom a failure leaves over may take to notice it themselves.
    settle: Duration,
    /// How long ranks may take to leave once they are told.
    grace: Duration,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Running,
    /// They are leaving by themselves, until then; and what they are told after that.
    Settling {
        until: Instant,
        asked: Asked,
    },
    Leaving {
        until: Instant,
        asked: Asked,
    },
    Killed,
}

impl Winding {
    pub(super) fn new(settle: Duration, grace: Duration) -> Winding {
        Winding { settle, grace, phase: Phase::Running }
    }

    /// What is to be done now.
    pub(super) fn next(&mut self, now: Instant, seen: &Seen) -> Option<Act> {
        use signal_hook::consts::SIGTERM;
        let asked_to_leave = |phase| matches!(phase, Phase::Leaving { asked: Asked::ToLeave, .. } | Phase::Killed);
        if seen.kill && self.phase != Phase::Killed {
            self.phase = Phase::Killed;
            return Some(Act::Kill(Asked::ToLeave));
        }
        if let Some(signal) = seen.stop
            && !asked_to_leave(self.phase)
        {
            // As it came: ranks may care which it was.
            self.phase = Phase::Leaving { until: now + self.grace, asked: Asked::ToLeave };
            return Some(Act::Ask(signal, Asked::ToLeave));
        }
        match self.phase {
            Phase::Running if seen.failed => {
                self.phase = Phase::Settling { until: now + self.settle, asked: Asked::ByFailure };
                None
            }
            // All save the same step, and then write it: that takes the time that saving may take.
            Phase::Running if seen.left => {
                self.phase = Phase::Settling { until: now + self.grace, asked: Asked::ToLeave };
                None
            }
            Phase::Settling { until, asked } if now >= until => {
                self.phase = Phase::Leaving { until: now + self.grace, asked };
                Some(Act::Ask(SIGTERM, asked))
            }
            Phase::Leaving { until, asked } if now >= until => {
                self.phase = Phase::Killed;
                Some(Act::Kill(asked))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

    const RUNS: Seen = Seen { failed: false, left: false, stop: None, kill: false };
    const FAILED: Seen = Seen { failed: true, ..RUNS };
    const LEFT: Seen = Seen { left: true, ..RUNS };

    fn stop(signal: i32, seen: Seen) -> Seen {
        Seen { stop: Some(signal), ..seen }
    }

    /// What is sent, by second, if the settling takes 5 s and leaving 60 s.
    fn timeline(seen: &[(u64, Seen)]) -> Vec<(u64, Act)> {
        let start = Instant::now();
        let mut winding = Winding::new(Duration::from_secs(5), Duration::from_secs(60));
        let at = |second| seen.iter().rev().find(|(from, _)| *from <= second).map_or(RUNS, |(_, seen)| *seen);
        let next =
            |second: u64| winding.next(start + Duration::from_secs(second), &at(second)).map(|act| (second, act));
        (0..300).filter_map(next).collect()
    }

    #[test]
    fn who_is_told_what_and_when() {
        use Act::{Ask, Kill};
        use Asked::{ByFailure, ToLeave};
        let killed = Seen { kill: true, ..stop(SIGINT, RUNS) };
        for (name, seen, expected) in [
            ("nothing happens", vec![], vec![]),
            ("a failure", vec![(3, FAILED)], vec![(8, Ask(SIGTERM, ByFailure)), (68, Kill(ByFailure))]),
            ("a rank leaves", vec![(3, LEFT)], vec![(63, Ask(SIGTERM, ToLeave)), (123, Kill(ToLeave))]),
            ("a stop", vec![(2, stop(SIGUSR1, RUNS))], vec![(2, Ask(SIGUSR1, ToLeave)), (62, Kill(ToLeave))]),
            ("Ctrl-C", vec![(2, stop(SIGINT, RUNS))], vec![(2, Ask(SIGINT, ToLeave)), (62, Kill(ToLeave))]),
            (
                "Ctrl-C twice",
                vec![(2, stop(SIGINT, RUNS)), (4, killed)],
                vec![(2, Ask(SIGINT, ToLeave)), (4, Kill(ToLeave))],
            ),
            (
                "a stop while a failure settles",
                vec![(1, FAILED), (3, stop(SIGTERM, FAILED))],
                vec![(3, Ask(SIGTERM, ToLeave)), (63, Kill(ToLeave))],
            ),
            (
                "a failure while all leave",
                vec![(1, stop(SIGTERM, RUNS)), (3, stop(SIGTERM, FAILED))],
                vec![(1, Ask(SIGTERM, ToLeave)), (61, Kill(ToLeave))],
            ),
        ] {
            assert_eq!(timeline(&seen), expected, "{name}");
        }
    }
}
