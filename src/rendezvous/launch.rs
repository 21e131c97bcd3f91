//! Whether a launcher or a batch system has started the same command before.

use super::{Environment, OWN_ATTEMPT, OWN_RUN_ID};

/// One start of a run by its user. Those who start its ranks may do so again: after a failure, or from the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The same each time, another for what the user starts later.
    pub name: String,
    /// Whether it is not the first time.
    pub is_again: bool,
}

impl Launch {
    /// What the environment says; nothing where nobody would start the command again, or does not say so (Kubernetes).
    pub fn detect(e: &Environment) -> Option<Launch> {
        // The outermost first: a job that comes back from the queue may start a launcher of its own in each of its lives.
        let name = [("Slurm job", "SLURM_JOB_ID"), ("torchrun", "TORCHELASTIC_RUN_ID"), ("ddpm-dist", OWN_RUN_ID)]
            .into_iter()
            .find_map(|(who, variable)| Some(format!("{who} {}", e.get(variable)?)))?;
        let is_again = ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", OWN_ATTEMPT]
            .into_iter()
            .any(|counter| e.get(counter).is_some_and(|count| count != "0"));
        Some(Launch { name, is_again })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_known_by_whoever_would_repeat_it() {
        let launch = |variables: &[(&str, &str)]| {
            Launch::detect(&variables.iter().copied().collect()).map(|launch| (launch.name, launch.is_again))
        };
        let is = |name: &str, again| Some((name.to_string(), again));
        assert_eq!(launch(&[("RANK", "0"), ("WORLD_SIZE", "2")]), None);
        assert_eq!(launch(&[(OWN_RUN_ID, "a1"), (OWN_ATTEMPT, "0")]), is("ddpm-dist a1", false));
        assert_eq!(launch(&[(OWN_RUN_ID, "a1"), (OWN_ATTEMPT, "2")]), is("ddpm-dist a1", true));
        let torchrun = [("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RESTART_COUNT", "1")];
        assert_eq!(launch(&torchrun), is("torchrun none", true));
        assert_eq!(launch(&[("SLURM_JOB_ID", "7")]), is("Slurm job 7", false));
        let requeued = [("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "1"), (OWN_RUN_ID, "b2"), (OWN_ATTEMPT, "0")];
        assert_eq!(launch(&requeued), is("Slurm job 7", true));
        let failed = [("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0"), (OWN_RUN_ID, "b2"), (OWN_ATTEMPT, "1")];
        assert_eq!(launch(&failed), is("Slurm job 7", true));
    }
}
