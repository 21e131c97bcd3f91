//! What can go wrong with a checkpoint.

use super::layout::LayoutError;
use super::team::TeamFailure;
use crate::rendezvous::store::StoreError;
use crate::tape::human_bytes;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An error of saving, verifying or loading a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The disk is too full for a save that has not begun.
    #[error(
        "not enough space for a checkpoint in {}: it needs {}, free are {}; \
         free some space or lower checkpoint.keep (the older checkpoints are intact, the next interval tries again)",
        path.display(), human_bytes(*needed), human_bytes(*free)
    )]
    NoSpace {
        /// The directory of the checkpoints.
        path: PathBuf,
        /// Bytes of the new checkpoint, some slack included.
        needed: u64,
        /// Bytes that this user may still write there.
        free: u64,
    },
    /// The disk is too full for the checkpoints that a run is about to write.
    #[error(
        "there is no room for a checkpoint in {}: it needs {}, free are {}; free some space, or choose a directory on another disk",
        path.display(), human_bytes(*needed), human_bytes(*free)
    )]
    NoRoom {
        /// The directory of the checkpoints.
        path: PathBuf,
        /// Bytes of a checkpoint, some slack included.
        needed: u64,
        /// Bytes that this user may still write there.
        free: u64,
    },
    /// A checkpoint is to be written where something is.
    #[error("{} exists, and nothing is written over it: choose another directory", path.display())]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// What was written does not hold the values that were read.
    #[error(
        "{} does not hold the tensors of {}, though its files are whole: it is removed; is another program changing them?",
        path.display(), of.display()
    )]
    Differs {
        /// The copy.
        path: PathBuf,
        /// What it was to be a copy of.
        of: PathBuf,
    },
    /// A file of a checkpoint is not there, or is no regular file.
    #[error("{} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file is longer or shorter than the manifest says.
    #[error("{} has {found} bytes, its manifest says {expected}: it was truncated or overwritten", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on the disk.
        found: u64,
    },
    /// A file's content is not what was written.
    #[error("{} is corrupt: its SHA-256 is {found}, expected {expected}", path.display())]
    WrongHash {
        /// The file.
        path: PathBuf,
        /// Hash by the manifest.
        expected: String,
        /// Hash of what is on the disk.
        found: String,
    },
    /// A safetensors file is garbled, or disagrees with its manifest.
    #[error("{} is damaged: {reason}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What disagrees.
        reason: String,
    },
    /// The manifest is garbled or contradicts itself.
    #[error("{} is not a valid manifest: {reason}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The checkpoint was written by another version of the format.
    #[error(
        "{} has checkpoint format version {found}; this build reads version {supported}: use the build that wrote it, \
         or move that checkpoint away to go on from an older one", path.display()
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version of this build.
        supported: u64,
    },
    /// The checkpoint is whole but belongs to another model.
    #[error("the model of {} is not the configured one: {reason}; use the [model] section it was trained with", path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The first tensors that differ.
        reason: String,
    },
    /// The system kept the newest checkpoint from being read, which says nothing about whether it is whole.
    #[error(
        "{reason}; {} may be whole: make it readable, or move it away to go on from an older one", path.display()
    )]
    Unreadable {
        /// The checkpoint.
        path: PathBuf,
        /// What could not be done.
        reason: Box<CheckpointError>,
    },
    /// There are checkpoints, but none that verifies.
    #[error("no checkpoint in {} verifies:{}\nrestore one of them, or begin anew with --fresh --overwrite", dir.display(), skipped_lines(skipped))]
    NoneVerifies {
        /// The directory of the checkpoints.
        dir: PathBuf,
        /// Every checkpoint and why it was refused, newest first.
        skipped: Vec<Skipped>,
    },
    /// A layout that cannot be one flat buffer.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A snapshot whose buffers do not fit its layout (a fault of the caller).
    #[error("the snapshot's {group} buffer has {found} elements, its layout {expected}")]
    Snapshot {
        /// The buffer.
        group: &'static str,
        /// Elements by the layout.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A snapshot that is not the share of its rank (a fault of the caller).
    #[error("the snapshot holds the elements {found:?}, the share of this rank is {expected:?}")]
    Share {
        /// The rank's share.
        expected: Range<usize>,
        /// What the snapshot holds.
        found: Range<usize>,
    },
    /// One of several ranks could not do its part of a save, and nothing was saved.
    #[error(transparent)]
    Team(#[from] TeamFailure),
    /// The ranks of a save cannot meet.
    #[error("the writers of the ranks cannot meet: {source}")]
    Store {
        /// What is wrong with the store.
        source: StoreError,
    },
    /// This rank wrote its shard and was not told what became of the whole.
    #[error(
        "rank 0 did not say within {} s whether it is saved: if it is, the next start finds it", after.as_secs_f32()
    )]
    NoOutcome {
        /// How long it was waited for.
        after: std::time::Duration,
    },
    /// The caller took the save back.
    #[error("the save was called off")]
    CalledOff,
    /// There is not enough memory to load into.
    #[error("not enough memory for the {bytes} bytes of {}", path.display())]
    OutOfMemory {
        /// The checkpoint.
        path: PathBuf,
        /// Size of the allocation that failed.
        bytes: u64,
    },
    /// The background writer panicked or could not be started.
    #[error("the checkpoint writer of step {step} died: {reason}; nothing was saved, the next interval tries again")]
    WriterLost {
        /// The step it was writing.
        step: u64,
        /// The panic message or the system's reason.
        reason: String,
    },
}

impl CheckpointError {
    /// For `map_err`: gives an I/O error its operation and path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
        let path = path.to_path_buf();
        move |source| CheckpointError::Io { action, path, source }
    }

    /// Whether an older checkpoint may be taken in place of the one with this error. Another version or another model is a
    /// contradiction for the user to settle, and memory will not suffice for the older one either. A file that the system does not let
    /// be read (no permission, a disk that is away) may be whole: to go on from an older one would throw its steps away.
    pub fn is_damage(&self) -> bool {
        use std::io::ErrorKind::{NotADirectory, NotFound, UnexpectedEof};
        match self {
            CheckpointError::Io { source, .. } => {
                matches!(source.kind(), NotFound | NotADirectory | UnexpectedEof)
            }
            CheckpointError::Version { .. }
            | CheckpointError::OtherModel { .. }
            | CheckpointError::OutOfMemory { .. }
            | CheckpointError::Unreadable { .. } => false,
            // These are errors of writing.
            CheckpointError::Exists { .. }
            | CheckpointError::Differs { .. }
            | CheckpointError::NoSpace { .. }
            | CheckpointError::NoRoom { .. }
            | CheckpointError::Share { .. }
            | CheckpointError::Team(_)
            | CheckpointError::Store { .. }
            | CheckpointError::NoOutcome { .. }
            | CheckpointError::CalledOff
            | CheckpointError::WriterLost { .. } => false,
            _ => true,
        }
    }
}

/// A vector of `len` zeros for what is read from `path`.
pub(super) fn zeros(len: usize, path: &Path) -> Result<Vec<f32>, CheckpointError> {
    let mut values = Vec::new();
    let bytes = (len as u64).saturating_mul(size_of::<f32>() as u64);
    let no_memory = |_| CheckpointError::OutOfMemory { path: path.to_path_buf(), bytes };
    values.try_reserve_exact(len).map_err(no_memory)?;
    values.resize(len, 0.0);
    Ok(values)
}

/// A checkpoint that was passed over, and why.
#[derive(Debug)]
pub struct Skipped {
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Why it was refused.
    pub reason: CheckpointError,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "skipped {}: {}", self.path.display(), self.reason)
    }
}

fn skipped_lines(skipped: &[Skipped]) -> String {
    skipped.iter().map(|s| format!("\n  {s}")).collect()
}
