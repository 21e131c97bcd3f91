//! Whether all ranks see one run directory: rank 0 leaves a file in it that the others look for.

use super::{RunDir, RunDirError, io_error};
use crate::files::{is_unique_id, unique_id};
use crate::machine::host_name;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What the name of such a file begins with. The rest is drawn anew each time, so that no cache of a network file system can know it.
const PREFIX: &str = "run.mark-";

/// A file in a run directory that vanishes when this is dropped.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
    nonce: String,
}

impl RunDir {
    /// Leaves a mark for the other ranks, which are told its [`nonce`](Mark::nonce) and ask [`sees_mark`]. It has to stay until all have.
    ///
    /// # Errors
    /// The system refuses the file.
    pub fn mark(&self) -> Result<Mark, RunDirError> {
        let nonce = unique_id();
        let path = self.root().join(format!("{PREFIX}{nonce}"));
        let write = |path: &Path| fs::File::create_new(path)?.write_all(nonce.as_bytes());
        let written = write(&path).map_err(io_error("write", &path));
        // Also removes what was not written whole.
        let mark = Mark { path, nonce };
        written.map(|()| mark)
    }
}

impl Mark {
    /// What the other ranks have to know.
    pub fn nonce(&self) -> &str {
        &self.nonce
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // If it stays, the next start removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether this is the name of such a file.
pub(super) fn is_mark(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(is_unique_id)
}

/// Whether `rank`, this one, finds the mark with this nonce in its own `root`.
///
/// # Errors
/// [`RunDirError::NotShared`].
pub fn sees_mark(root: &Path, nonce: &str, rank: usize) -> Result<(), RunDirError> {
    let name = format!("{PREFIX}{nonce}");
    let found = match is_mark(&name) {
        true => fs::read(root.join(&name)),
        false => Err(ErrorKind::NotFound.into()),
    };
    let reason = match found {
        Ok(bytes) if bytes == nonce.as_bytes() => return Ok(()),
        Ok(_) => "the file that rank 0 left there has other content".to_string(),
        Err(e) if e.kind() == ErrorKind::NotFound && root.is_dir() => "another directory is there".to_string(),
        Err(e) if e.kind() == ErrorKind::NotFound => "there is no such directory".to_string(),
        Err(e) => e.to_string(),
    };
    let path = std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
    Err(RunDirError::NotShared { rank, host: host_name(), path, reason })
}

#[cfg(test)]
mod tests {
    use super::super::Start;
    use super::*;

    fn names(root: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_directory_of_rank_0_is_told_from_any_other() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, other) = (tmp.path().join("run"), tmp.path().join("other"));
        let run = RunDir::open(&root, Start::Resume).unwrap();
        let mark = run.mark().unwrap();
        sees_mark(&root, mark.nonce(), 1).unwrap();
        let refused = |root: &Path, nonce: &str| sees_mark(root, nonce, 3).unwrap_err().to_string();
        let message = refused(&other, mark.nonce());
        for words in ["rank 3 on ", &*other.to_string_lossy(), "no such directory", "--run-dir"] {
            assert!(message.contains(words), "{message}");
        }
        // The same path on a node of its own, with a run of its own.
        let elsewhere = RunDir::open(&other, Start::Resume).unwrap();
        let their_mark = elsewhere.mark().unwrap();
        assert!(refused(&other, mark.nonce()).contains("another directory is there"));
        assert!(refused(&root, their_mark.nonce()).contains("another directory is there"));
        // What comes over the network names no file of another kind.
        for nonce in ["", "../run.lock", "/etc/passwd", &"g".repeat(32)] {
            assert!(refused(&root, nonce).contains("another directory is there"), "{nonce}");
        }
        drop(mark);
        assert_eq!(names(&root), ["run.lock"]);
    }

    #[test]
    fn a_mark_that_a_kill_left_is_no_run_and_goes_with_the_next_start() {
        for start in [Start::Resume, Start::Fresh { overwrite: false }, Start::Fresh { overwrite: true }] {
            let tmp = tempfile::tempdir().unwrap();
            let run = RunDir::open(tmp.path(), Start::Resume).unwrap();
            std::mem::forget(run.mark().unwrap());
            drop(run);
            assert_eq!(names(tmp.path()).len(), 2);
            let run = RunDir::open(tmp.path(), start).unwrap();
            assert_eq!(names(tmp.path()), ["run.lock"]);
            drop(run);
        }
    }
}
