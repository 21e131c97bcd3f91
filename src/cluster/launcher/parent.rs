//! No rank outlives its launcher.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// The variable that tells a rank who its launcher is.
pub(super) const LAUNCHER_PID: &str = "DDPM_DIST_LAUNCHER_PID";

/// Ties this process to the launcher that started it, if one of ours did: it is killed when that ends, however that ends. To be called
/// first of all, and on a process that no launcher of ours started it does nothing.
///
/// Gives false if the launcher is gone already. (The system sends the signal when the *thread* that started this process ends: launchers
/// start ranks from their first.)
pub fn stay_with_launcher() -> bool {
    let launcher = std::env::var(LAUNCHER_PID).ok().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    let Some(launcher) = launcher else { return true };
    // Where the system has no such signal, a rank still notices that the store is gone.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    getppid() == Some(launcher)
}
