//! The `[checkpoint]` section of a config.

use crate::config::OutOfRange;
use serde::{Deserialize, Serialize};

/// When a run saves its state and what it keeps.
///
/// Between the start of a save and the removal of the oldest checkpoint there are `keep` + 1 of them on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between two saves; 0 saves only at the end and on a signal.
    pub every: u64,
    /// How many of the newest checkpoints are kept.
    pub keep: usize,
    /// Checkpoints whose step is a multiple of this stay for good; 0 keeps none beyond the newest `keep`.
    pub keep_every: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every: 5000, keep: 3, keep_every: 0 }
    }
}

impl CheckpointConfig {
    /// Whether the state after `step` steps is saved by interval.
    pub fn is_due(&self, step: u64) -> bool {
        self.every != 0 && step != 0 && step.is_multiple_of(self.every)
    }

    /// Refuses what would lose state or keep nothing that was asked for.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self) -> Result<(), OutOfRange> {
        let why = "a run must be able to resume from its newest checkpoint";
        OutOfRange::check(self.keep > 0, "checkpoint.keep", self.keep, "keep ≥ 1", why)?;
        let range = match self.every {
            0 => "0 while checkpoint.every is 0".into(),
            every => format!("0 or a multiple of checkpoint.every = {every}"),
        };
        let is_possible = self.keep_every == 0 || (self.every != 0 && self.keep_every.is_multiple_of(self.every));
        let why = "no checkpoint is written at the other steps";
        OutOfRange::check(is_possible, "checkpoint.keep_every", self.keep_every, range, why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_lose_checkpoints_are_refused() {
        assert!(CheckpointConfig::default().validate().is_ok());
        assert_eq!(CheckpointConfig { keep: 0, ..Default::default() }.validate().unwrap_err().key, "checkpoint.keep");
        let odd = CheckpointConfig { every: 1000, keep: 1, keep_every: 2500 };
        let message = odd.validate().unwrap_err().to_string();
        assert!(message.contains("`checkpoint.keep_every` = 2500") && message.contains("multiple of"), "{message}");
        assert!(CheckpointConfig { every: 1000, keep: 1, keep_every: 5000 }.validate().is_ok());
        assert!(CheckpointConfig { every: 0, keep: 1, keep_every: 5000 }.validate().is_err());
    }

    #[test]
    fn the_start_is_never_due() {
        let config = CheckpointConfig { every: 10, ..Default::default() };
        assert_eq!((0..=30).filter(|&s| config.is_due(s)).collect::<Vec<_>>(), [10, 20, 30]);
        assert!(!CheckpointConfig { every: 0, ..Default::default() }.is_due(10));
    }
}
