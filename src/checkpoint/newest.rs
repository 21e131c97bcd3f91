//! The directory of a run's checkpoints: which there are, the newest that verifies, and what is removed.

use super::config::CheckpointConfig;
use super::error::{CheckpointError, Skipped};
use super::io::{Disk, Io, unique_id};
use super::layout::Layout;
use super::manifest::MANIFEST;
use super::read::{Want, inspect, load};
use super::snapshot::Snapshot;
use super::write::{dir_name, file_name, is_own_file, is_temporary, parse_dir_name, remove_checkpoint_files};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The newest checkpoint that verifies.
#[derive(Debug)]
pub struct Newest {
    /// Its directory.
    pub path: PathBuf,
    /// Its content.
    pub snapshot: Snapshot,
    /// The newer ones that were refused, newest first: to be shown loudly.
    pub skipped: Vec<Skipped>,
}

/// All committed checkpoints of a directory with their steps, oldest first, unverified. Empty if it does not exist.
pub fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found: Vec<_> =
        entries(checkpoints)?.into_iter().filter_map(|path| Some((parse_dir_name(file_name(&path))?, path))).collect();
    found.sort();
    Ok(found)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    match std::fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(CheckpointError::io("list", dir)(e)),
        Ok(entries) => {
            entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(CheckpointError::io("list", dir))
        }
    }
}

/// Loads the newest checkpoint that verifies; `None` where there is no checkpoint at all.
///
/// A damaged one (truncated, bit-flipped, a file missing) is passed over and returned in [`Newest::skipped`]. One that is whole
/// but of another format version or another model, or that the system keeps from being read, stops the search with its error, because
/// going on from an older one would silently throw work away. So does a directory in which nothing verifies.
pub fn load_newest(
    checkpoints: &Path,
    layout: Option<&Arc<Layout>>,
    want: Want,
) -> Result<Option<Newest>, CheckpointError> {
    let mut skipped = Vec::new();
    for (step, path) in list(checkpoints)?.into_iter().rev() {
        let loaded = load(&path, layout, want).and_then(|snapshot| match snapshot.meta.step {
            found if found == step => Ok(snapshot),
            found => Err(CheckpointError::Manifest {
                path: path.join(MANIFEST),
                reason: format!(
                    "it is of step {found} in a directory of step {step}: rename it to {}",
                    dir_name(found)
                ),
            }),
        });
        match loaded {
            Ok(snapshot) => return Ok(Some(Newest { path, snapshot, skipped })),
            Err(reason) if reason.is_damage() => skipped.push(Skipped { path, reason }),
            Err(reason @ CheckpointError::Io { .. }) => {
                return Err(CheckpointError::Unreadable { path, reason: Box::new(reason) });
            }
            Err(e) => return Err(e),
        }
    }
    if skipped.is_empty() {
        Ok(None)
    } else {
        Err(CheckpointError::NoneVerifies { dir: checkpoints.to_path_buf(), skipped })
    }
}

/// Removes what saves and removals that were killed left behind; only for the process that holds the run's lock. Gives the
/// paths removed, and an error for each that could not be: they are in nobody's way.
pub fn clean_stale(checkpoints: &Path) -> Result<(Vec<PathBuf>, Vec<CheckpointError>), CheckpointError> {
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for path in entries(checkpoints)?.into_iter().filter(|p| is_temporary(file_name(p))) {
        match remove_checkpoint_files(&Disk, &path) {
            Ok(()) => removed.push(path),
            Err(e) => failed.push(e),
        }
    }
    Ok((removed, failed))
}

/// Which of `present` go after a save of step `saved`, both oldest first: all but the newest `keep` of those up to `saved` and
/// the multiples of `keep_every`. A later step was left by a run that resumed before it; that is not ours to judge.
pub(super) fn superseded(present: &[u64], saved: u64, config: &CheckpointConfig) -> Vec<u64> {
    let past: Vec<u64> = present.iter().copied().filter(|&s| s <= saved).collect();
    let old = past.len().saturating_sub(config.keep.max(1));
    let stays = |s: u64| config.keep_every != 0 && s.is_multiple_of(config.keep_every);
    past[..old].iter().copied().filter(|&s| !stays(s)).collect()
}

/// Removes superseded checkpoints. Only those that pass [`inspect`] count as kept, so a truncated one never pushes out a good
/// one. Each is renamed first, so that a kill meanwhile leaves no half checkpoint. Gives the paths removed and what failed.
pub(super) fn retain(
    io: &dyn Io,
    checkpoints: &Path,
    saved: u64,
    config: &CheckpointConfig,
) -> (Vec<PathBuf>, Vec<CheckpointError>) {
    let present = match list(checkpoints) {
        Ok(present) => present,
        Err(e) => return (Vec::new(), vec![e]),
    };
    let sound: Vec<u64> = present.iter().filter(|(_, path)| inspect(path).is_ok()).map(|(step, _)| *step).collect();
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for step in superseded(&sound, saved, config) {
        let path = checkpoints.join(dir_name(step));
        match remove_one(io, &path) {
            Ok(()) => removed.push(path),
            Err(e) => failed.push(e),
        }
    }
    (removed, failed)
}

fn remove_one(io: &dyn Io, path: &Path) -> Result<(), CheckpointError> {
    if let Some(foreign) = entries(path)?.into_iter().find(|p| !is_own_file(p)) {
        let source = std::io::Error::other(format!("it holds {}, which no save wrote", file_name(&foreign)));
        return Err(CheckpointError::Io { action: "remove", path: path.to_path_buf(), source });
    }
    let aside = path.with_file_name(format!("{}.tmp-{}", file_name(path), unique_id()));
    io.rename(path, &aside).map_err(CheckpointError::io("remove", path))?;
    remove_checkpoint_files(io, &aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_n_and_every_mth_stay() {
        let config = |keep, keep_every| CheckpointConfig { every: 10, keep, keep_every };
        assert_eq!(superseded(&[10, 20, 30, 40, 50], 50, &config(2, 0)), [10, 20, 30]);
        assert_eq!(superseded(&[10, 20, 30, 40, 50], 50, &config(2, 20)), [10, 30]);
        assert!(superseded(&[10, 20], 20, &config(3, 0)).is_empty());
        // Step 90 is of a trajectory that was left; what was just saved is never pushed out by it.
        assert_eq!(superseded(&[10, 20, 90], 20, &config(1, 0)), [10]);
    }

    #[test]
    fn names_are_canonical() {
        assert_eq!(parse_dir_name(&dir_name(12000)), Some(12000));
        assert_eq!(parse_dir_name(&dir_name(u64::MAX)), Some(u64::MAX));
        for bad in ["step-12", "step-+0000012", "step-00012000x", "step-", "00012000", "step-099999999999999999999"] {
            assert_eq!(parse_dir_name(bad), None, "{bad}");
        }
        assert!(is_temporary(&format!("step-00000012.tmp-{}", unique_id())));
        assert!(!is_temporary("step-00000012.tmp-mine") && !is_temporary("step-00000012"));
    }
}
