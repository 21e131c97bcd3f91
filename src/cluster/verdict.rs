//! Verdicts over what ranks report of themselves; no clocks, no sockets.

use std::collections::VecDeque;
use std::time::Duration;

/// The ranks whose value is not that of the majority: those to be suspected where all values should be equal. Where no value has more than
/// half of the ranks, nobody knows who is right, and all are named.
pub fn minority(values: &[u64]) -> Vec<usize> {
    let votes = |value: u64| values.iter().filter(|&&v| v == value).count();
    match values.iter().copied().find(|&value| 2 * votes(value) > values.len()) {
        Some(right) => (0..values.len()).filter(|&rank| values[rank] != right).collect(),
        None => (0..values.len()).collect(),
    }
}

/// Steps that a verdict on speed is based on.
const WINDOW: usize = 15;
/// A rank that takes so many times as long as the typical one is slow …
const SLOW: f64 = 1.5;
/// … until it takes less than this many times as long.
const RECOVERED: f64 = 1.2;

/// A change of what is known of a rank's speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpeedChange {
    /// The rank.
    pub rank: usize,
    /// Its own time per step, waiting for others left out, over that of the typical rank.
    pub ratio: f64,
    /// Whether it has become slow, or is no longer.
    pub is_slow: bool,
}

/// Compares the time that ranks spend on their own work. A rank's time is the median of its last steps, so that single slow steps (a
/// checkpoint, a page fault) say nothing; it is compared with the lower median over ranks, so that of two ranks the faster one counts.
#[derive(Clone, Debug)]
pub struct Stragglers {
    /// Per rank, seconds of its last steps.
    last: Vec<VecDeque<f64>>,
    slow: Vec<bool>,
}

impl Stragglers {
    /// For so many ranks.
    pub fn new(ranks: usize) -> Stragglers {
        Stragglers { last: vec![VecDeque::with_capacity(WINDOW); ranks], slow: vec![false; ranks] }
    }

    /// Takes note of one step, given as the time of each rank; says for whom the verdict changes.
    pub fn note(&mut self, busy: impl Iterator<Item = Duration>) -> Vec<SpeedChange> {
        for (last, time) in self.last.iter_mut().zip(busy) {
            if last.len() == WINDOW {
                last.pop_front();
            }
            last.push_back(time.as_secs_f64());
        }
        if self.last.iter().any(|last| last.len() < WINDOW) {
            return Vec::new();
        }
        let times: Vec<f64> = self.last.iter().map(|last| lower_median(last.iter().copied())).collect();
        let typical = lower_median(times.iter().copied());
        let mut changes = Vec::new();
        for (rank, (time, slow)) in times.iter().zip(&mut self.slow).enumerate() {
            let ratio = time / typical;
            let is_slow = ratio > if *slow { RECOVERED } else { SLOW };
            if is_slow != *slow {
                *slow = is_slow;
                changes.push(SpeedChange { rank, ratio, is_slow });
            }
        }
        changes
    }
}

fn lower_median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minority_is_named_and_of_two_both() {
        assert!(minority(&[7, 7, 7, 7]).is_empty());
        assert_eq!(minority(&[7, 7, 3, 7]), [2]);
        assert_eq!(minority(&[1, 7, 3, 7, 7]), [0, 2]);
        assert_eq!(minority(&[7, 3]), [0, 1]);
        assert_eq!(minority(&[7, 7, 3, 3]), [0, 1, 2, 3]);
        assert!(minority(&[5]).is_empty() && minority(&[]).is_empty());
    }

    /// Times of a step in microseconds that are as noisy as those of machines that others use too: up to a fifth longer, every now and then
    /// three times as long.
    fn noisy(state: &mut u64) -> Duration {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let draw = *state >> 33;
        let hiccup = if draw.is_multiple_of(10) { 3 } else { 1 };
        Duration::from_micros(hiccup * (100_000 + draw / 10 % 20_000))
    }

    #[test]
    fn a_rank_that_becomes_twice_as_slow_is_named_within_twenty_steps() {
        for ranks in [2, 3, 8] {
            let (mut stragglers, mut state) = (Stragglers::new(ranks), 1);
            let mut changes = Vec::new();
            for step in 0..400 {
                let slow_now = (100..200).contains(&step);
                let times: Vec<Duration> = (0..ranks)
                    .map(|rank| noisy(&mut state) * if slow_now && rank == ranks - 1 { 2 } else { 1 })
                    .collect();
                let said = stragglers.note(times.into_iter());
                changes.extend(said.into_iter().map(|change| (step, change)));
            }
            let [(at, slow), (over, fast)] = changes[..] else { panic!("{ranks} ranks: {changes:?}") };
            assert!((100..120).contains(&at) && slow.is_slow && slow.rank == ranks - 1, "{changes:?}");
            assert!((200..220).contains(&over) && !fast.is_slow && fast.rank == ranks - 1, "{changes:?}");
        }
    }

    #[test]
    fn a_thousand_steps_without_a_false_alarm() {
        for ranks in [2, 4, 16] {
            let (mut stragglers, mut state) = (Stragglers::new(ranks), 2);
            for step in 0..1000 {
                let times: Vec<Duration> = (0..ranks).map(|_| noisy(&mut state)).collect();
                assert_eq!(stragglers.note(times.into_iter()), [], "{ranks} ranks, step {step}");
            }
        }
    }
}
