//! Who started this process, for launchers that give their runs no name.

use rustix::process::{Pid, getppid};

/// Ancestors that are looked at, at most.
const GENERATIONS: usize = 64;

/// The nearest ancestor without that variable in its environment. Where a launcher sets it for each rank, that is the launcher itself, or
/// its helper on this machine, the same for all ranks here; shells and scripts between have the variable too. Nothing where it cannot be
/// seen: a container with processes of its own, a launcher of another user.
pub(super) fn nearest_without(variable: &str) -> Option<i32> {
    let mut ancestor = getppid()?.as_raw_pid();
    for _ in 0..GENERATIONS {
        if ancestor <= Pid::INIT.as_raw_pid() {
            return None;
        }
        let environment = std::fs::read(format!("/proc/{ancestor}/environ")).ok()?;
        let has = environment
            .split(|byte| *byte == 0)
            .any(|entry| entry.strip_prefix(variable.as_bytes()).is_some_and(|rest| rest.starts_with(b"=")));
        if !has {
            return Some(ancestor);
        }
        ancestor = parent(ancestor)?;
    }
    None
}

fn parent(process: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const MARK: &str = "DDPM_DIST_TEST_MARK";

    /// What the process says that the test below starts.
    #[test]
    fn says_who_started_it() {
        if std::env::var_os(MARK).is_some() {
            println!("started by {:?}", nearest_without(MARK));
        }
    }

    #[test]
    fn ranks_below_shells_have_the_launcher_in_common() {
        let program = std::env::current_exe().unwrap();
        let call =
            format!("{} --exact --nocapture rendezvous::ancestry::tests::says_who_started_it", program.display());
        for script in [format!("exec {call}"), format!("{call}; true"), format!("sh -c '{call}; true'; true")] {
            let output = Command::new("sh").args(["-c", &script]).env(MARK, "1").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(said.contains(&format!("started by Some({})", std::process::id())), "{script}: {said}");
        }
    }
}
