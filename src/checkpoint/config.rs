//! The `[checkpoint]` section of a config.

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

/// A value of `[checkpoint]` that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("checkpoint.{key} = {found} is out of range: expected {expected}, because {why}")]
pub struct CheckpointConfigError {
    /// The key without its section.
    pub key: &'static str,
    /// What the config says.
    pub found: u64,
    /// What it may say.
    pub expected: String,
    /// The reason.
    pub why: &'static str,
}

impl CheckpointConfig {
    /// Whether the state after `step` steps is saved by interval.
    pub fn is_due(&self, step: u64) -> bool {
        self.every != 0 && step != 0 && step.is_multiple_of(self.every)
    }

    /// Refuses what would lose state or keep nothing that was asked for.
    pub fn validate(&self) -> Result<(), CheckpointConfigError> {
        if self.keep == 0 {
            return Err(CheckpointConfigError {
                key: "keep",
                found: 0,
                expected: "1 or more".into(),
                why: "a run must be able to resume from its newest checkpoint",
            });
        }
        if self.keep_every != 0 && (self.every == 0 || !self.keep_every.is_multiple_of(self.every)) {
            return Err(CheckpointConfigError {
                key: "keep_every",
                found: self.keep_every,
                expected: match self.every {
                    0 => "0 while checkpoint.every is 0".into(),
                    every => format!("0 or a multiple of checkpoint.every = {every}"),
                },
                why: "no checkpoint is written at the other steps",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_lose_checkpoints_are_refused() {
        assert!(CheckpointConfig::default().validate().is_ok());
        assert_eq!(CheckpointConfig { keep: 0, ..Default::default() }.validate().unwrap_err().key, "keep");
        let odd = CheckpointConfig { every: 1000, keep: 1, keep_every: 2500 };
        let message = odd.validate().unwrap_err().to_string();
        assert!(message.contains("checkpoint.keep_every = 2500") && message.contains("multiple of"), "{message}");
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
