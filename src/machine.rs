//! This program, this machine and its clock, for messages and for the names of files.

use crate::files::digest;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The program and the commit it was built from.
pub fn build() -> String {
    format!("ddpm-dist {} ({})", env!("CARGO_PKG_VERSION"), env!("DDPM_DIST_COMMIT"))
}

/// What this process runs: the program, the first digits of the SHA-256 of its file, as two compilers may make different bits of one commit,
/// and the instructions it uses.
///
/// # Errors
/// A file that cannot be read.
pub fn this_program() -> io::Result<String> {
    // What runs, whatever lies at its path by now.
    let file = digest(&std::fs::read("/proc/self/exe")?);
    Ok(format!("{}, file {file}, with {} instructions", build(), crate::simd::level().name()))
}

/// The name of this machine.
pub fn host_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    if name.is_empty() { "localhost".to_string() } else { name.into_owned() }
}

/// Lets this process open as many files and sockets as it may: a store has four for each rank, a rank one for each other, and the usual
/// limit is 1024.
pub fn raise_descriptor_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // What the system refuses shows where it matters: when there are no more.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// Time since 1970; none before.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `2026-01-31T12:34:56Z` from seconds since 1970 (Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // March is 0
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        // date -u -d @N +%FT%TZ
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
