//! The lock on a run directory: one process owns it, and the system gives it up when that process dies.

use super::{RunDirError, io_error};
use crate::machine::{host_name, since_1970, utc};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

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
        let since = utc(since_1970().as_secs());
        Owner { host: Some(host_name()), pid: Some(std::process::id()), since: Some(since) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unnamed_owner_is_still_an_error() {
        let tmp = tempfile::tempdir().unwrap();
        let _held = RunLock::acquire(tmp.path()).unwrap();
        std::fs::write(tmp.path().join(FILE), b"garbage").unwrap();
        let e = RunLock::acquire(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("in use by another process"), "{e}");
    }
}
