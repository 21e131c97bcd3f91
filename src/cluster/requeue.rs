//! A job of Slurm that comes back: once its state is saved, it is put into the queue again.
//!
//! Slurm requeues a preempted job only if it is still there when its grace time ends, and never one that reaches its time limit. A run that
//! leaves as soon as it has saved must therefore ask for it. It must not where its user cancels the job: `scancel` sends SIGTERM, as a
//! preemption does, and only Slurm's record of the job tells them apart.

use crate::rendezvous::Environment;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::{self, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long Slurm's controller may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Pause between two looks whether it has.
const LOOK: Duration = Duration::from_millis(20);

/// What is to become of a job whose run has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It ends.
    Ends,
    /// It goes into the queue again.
    Returns,
    /// It goes into the queue again if Slurm is preempting it.
    ReturnsIfPreempted,
}

/// Why a job is not in the queue again.
#[derive(Debug, Error)]
pub enum RequeueError {
    /// `scontrol` cannot be started.
    #[error("cannot run `{command}`: {source}")]
    Start {
        /// The command.
        command: String,
        /// Why not.
        source: io::Error,
    },
    /// `scontrol` does not end.
    #[error("`{command}` has not answered within {} s", .after.as_secs())]
    Silent {
        /// The command.
        command: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// Slurm refuses.
    #[error("`{command}` failed ({status}): {said}")]
    Refused {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it printed.
        said: String,
    },
}

/// What a signal says of a job; 0: none came, and the run left because its own time was over.
fn fate(signal: i32) -> Fate {
    match signal {
        SIGINT => Fate::Ends,
        SIGTERM => Fate::ReturnsIfPreempted,
        // `#SBATCH --signal` and `scancel --signal`: whoever sends those wants the run to make room.
        _ => Fate::Returns,
    }
}

/// Whether `scontrol show job` shows a job that is being preempted.
fn is_being_preempted(shown: &str) -> bool {
    shown.split_whitespace().filter_map(|field| field.strip_prefix("PreemptTime=")).any(|time| time != "None")
}

/// The Slurm job that `environment` belongs to.
pub fn slurm_job(environment: &Environment) -> Option<String> {
    environment.get("SLURM_JOB_ID").map(str::to_string)
}

/// Puts a job into the queue again whose run left, its state saved, because of `signal` (0: of its own accord), unless its user or someone
/// at a terminal wants it to end. Gives whether it is in the queue.
///
/// # Errors
/// A `scontrol` that is missing, refuses, or does not answer.
pub fn requeue(job: &str, signal: i32) -> Result<bool, RequeueError> {
    let returns = match fate(signal) {
        Fate::Ends => false,
        Fate::Returns => true,
        Fate::ReturnsIfPreempted => is_being_preempted(&scontrol(&["show", "job", job])?),
    };
    if returns {
        scontrol(&["requeue", job])?;
    }
    Ok(returns)
}

/// What `scontrol` prints.
fn scontrol(arguments: &[&str]) -> Result<String, RequeueError> {
    let command = || format!("scontrol {}", arguments.join(" "));
    let failed = |source| RequeueError::Start { command: command(), source };
    let mut child = Command::new("scontrol")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let since = Instant::now();
    // What it prints, a few lines, fits into the pipe.
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if since.elapsed() >= ANSWER => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(RequeueError::Silent { command: command(), after: ANSWER });
            }
            None => std::thread::sleep(LOOK),
        }
    };
    let (mut out, mut said) = (String::new(), String::new());
    child.stdout.take().map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut out)).map_err(failed)?;
    child.stderr.take().map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut said)).map_err(failed)?;
    if status.success() {
        return Ok(out);
    }
    Err(RequeueError::Refused { command: command(), status, said: said.trim().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::{SIGUSR1, SIGUSR2};

    #[test]
    fn which_signals_bring_a_job_back() {
        for (signal, expected) in [
            (0, Fate::Returns),
            (SIGUSR1, Fate::Returns),
            (SIGUSR2, Fate::Returns),
            (SIGTERM, Fate::ReturnsIfPreempted),
            (SIGINT, Fate::Ends),
        ] {
            assert_eq!(fate(signal), expected, "signal {signal}");
        }
    }

    #[test]
    fn a_preemption_is_read_from_slurms_record() {
        // Lines of Slurm 22.05: of a job that is cancelled, and of one in its grace time.
        let cancelled =
            "   PreemptEligibleTime=2026-11-22T11:40:05 PreemptTime=None\n   SuspendTime=None SecsPreSuspend=0";
        let preempted = "   PreemptEligibleTime=2026-11-22T11:40:05 PreemptTime=2026-11-22T11:40:31\n   SuspendTime=None SecsPreSuspend=0";
        for (shown, expected) in [(cancelled, false), (preempted, true), ("", false), ("JobId=7 JobName=x", false)] {
            assert_eq!(is_being_preempted(shown), expected, "{shown}");
        }
    }
}
