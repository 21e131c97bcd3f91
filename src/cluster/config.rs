//! The `[cluster]` section of a config.

use crate::config::OutOfRange;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How ranks watch each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Seconds that a rank waits for the others in one operation before it gives them up.
    pub timeout: u64,
    /// Steps between two comparisons of the weights that the ranks hold, which are compared before each checkpoint too; 0: only then.
    pub compare_every: u64,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        ClusterConfig { timeout: 300, compare_every: 100 }
    }
}

impl ClusterConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self) -> Result<(), OutOfRange> {
        OutOfRange::check(
            (1..=86_400).contains(&self.timeout),
            "cluster.timeout",
            self.timeout,
            "1 ≤ timeout ≤ 86400",
            "seconds; longer than the slowest step",
        )
    }

    /// [`ClusterConfig::timeout`] as a duration.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// Whether weights are compared after `step` steps.
    pub fn compares_after(&self, step: u64) -> bool {
        self.compare_every > 0 && step.is_multiple_of(self.compare_every)
    }
}
