//! The lock on a run directory: one process owns it, and the system gives it up when that process dies.

use super::{RunDirError, io_error};
use crate::rendezvous::host_name;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The lock's file name. The file stays when the lock is released: removing it would let two processes lock two files.
pub(super) const FILE: &str = "run.lock";

/// Who holds a lock, as the holder wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Name of the machine.
    pub host: Option<String>,
    /// Process id there.
    pub pid: Option<u32>,
    /// When it took the lock, in UTC.
    pub since: Option<String>,
}

impl Owner {
    fn this_process() -> Owner {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Owner { host: host_name(), pid: Some(std::process::id()), since: Some(utc(seconds)) }
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}")?,
            None => f.write_str("another process")?,
        }
        if let Some(host) = &self.host {
            write!(f, " on {host}")?;
        }
        if let Some(since) = &self.since {
            write!(f, " since {since}")?;
        }
        Ok(())
    }
}

/// An exclusive lock, held until it is dropped or the process dies.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Locks a directory without waiting.
    pub fn acquire(root: &Path) -> Result<RunLock, RunDirError> {
        let path = root.join(FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false) // the owner's name must stay readable until the lock is ours
            .open(&path)
            .map_err(io_error("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // A holder that has not written its name yet is simply not named.
                let _ = (&file).take(4096).read_to_string(&mut text);
                let owner = serde_json::from_str(&text).unwrap_or_default();
                return Err(RunDirError::Locked { path: root.to_path_buf(), owner });
            }
            Err(e) => return Err(io_error("lock", &path)(e.into())),
        }
        let write = |file: &mut File| {
            let text = serde_json::to_string(&Owner::this_process())?;
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(text.as_bytes())
        };
        write(&mut file).map_err(io_error("write", &path))?;
        Ok(RunLock { _file: file })
    }
}

/// `2026-01-31T12:34:56Z` from seconds since 1970 (Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
fn utc(seconds: u64) -> String {
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

    #[test]
    fn an_unnamed_owner_is_still_an_error() {
        let tmp = tempfile::tempdir().unwrap();
        let _held = RunLock::acquire(tmp.path()).unwrap();
        std::fs::write(tmp.path().join(FILE), b"garbage").unwrap();
        let e = RunLock::acquire(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("in use by another process"), "{e}");
    }
}
