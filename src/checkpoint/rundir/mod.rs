//! The directory a run lives in: `config.toml`, `log.jsonl`, `tb/`, `samples/`, `checkpoints/`, `run.lock` and `launch`.

mod lock;
mod mark;
#[cfg(test)]
mod tests;

pub use lock::{Owner, RunLock};
pub use mark::{Mark, sees_mark};

use super::newest::list;
use super::write::{is_own_file, is_temporary, parse_dir_name};
use crate::files::write_synced;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// How a run meets what its directory already holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Goes on from the newest checkpoint if there is one.
    Resume,
    /// Begins anew; refuses a directory that holds a run unless `overwrite` removes it.
    Fresh {
        /// Remove the files of the earlier run first.
        overwrite: bool,
    },
}

/// An error of opening a run directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process runs here.
    #[error("{} is in use by {owner}: stop that run, or choose another --run-dir", path.display())]
    Locked {
        /// The run directory.
        path: PathBuf,
        /// What the lock file says about its holder.
        owner: Owner,
    },
    /// A fresh start would mix two runs.
    #[error(
        "{} already holds a run ({found}): leave --fresh out to resume it, add --overwrite to remove it, \
         or choose another --run-dir", path.display()
    )]
    HoldsRun {
        /// The run directory.
        path: PathBuf,
        /// The first thing found in it.
        found: String,
    },
    /// The directory has content, and no run made it.
    #[error(
        "{} holds {found} and is not a run directory: choose an empty or new one with --run-dir", path.display()
    )]
    NotARun {
        /// The directory.
        path: PathBuf,
        /// The first thing found in it.
        found: String,
    },
    /// A rank has another directory at this path than rank 0, or none.
    #[error(
        "rank {rank} on {host} does not see the run directory of rank 0 at {}: {reason}; choose a --run-dir on a file system that all \
         nodes share, at the same path on each", path.display()
    )]
    NotShared {
        /// The rank.
        rank: usize,
        /// Its machine.
        host: String,
        /// The run directory as that rank has it.
        path: PathBuf,
        /// What is there instead.
        reason: String,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_path_buf();
    move |source| RunDirError::Io { action, path, source }
}

/// A run directory that this process owns until the value is dropped or the process dies.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    start: Start,
    _lock: RunLock,
}

const CONFIG: &str = "config.toml";
const LOG: &str = "log.jsonl";
const TENSORBOARD: &str = "tb";
const SAMPLES: &str = "samples";
const CHECKPOINTS: &str = "checkpoints";
/// Names the launch that has begun the run anew.
const LAUNCH: &str = "launch";

impl RunDir {
    /// Refuses a directory that [`RunDir::open`] would refuse for what it holds; touches nothing.
    pub fn check(root: &Path, start: Start) -> Result<(), RunDirError> {
        let entries = names_if_there(root)?;
        if let (false, Some(found)) = (is_run_dir(root), entries.first()) {
            return Err(RunDirError::NotARun { path: root.to_path_buf(), found: found.clone() });
        }
        let holds = |name: &String| name != lock::FILE && !mark::is_mark(name) && !is_empty_dir(&root.join(name));
        match entries.into_iter().find(holds) {
            Some(found) if start == (Start::Fresh { overwrite: false }) => {
                Err(RunDirError::HoldsRun { path: root.to_path_buf(), found })
            }
            _ => Ok(()),
        }
    }

    /// Makes the directory where it is missing and locks it: of several ranks, only rank 0 does, and the others need no more than
    /// [`config_of`] and [`checkpoints_of`]. What it holds stays until [`RunDir::settle`].
    pub fn open(root: &Path, start: Start) -> Result<RunDir, RunDirError> {
        fs::create_dir_all(root).map_err(io_error("create", root))?;
        RunDir::check(root, start)?;
        let lock = RunLock::acquire(root)?;
        // Another process may have been faster.
        RunDir::check(root, start)?;
        remove_matching(root, mark::is_mark)?;
        Ok(RunDir { root: root.to_path_buf(), start, _lock: lock })
    }

    /// Whether `launch` has begun this run anew, and removed what was here before: started again, it goes on.
    pub fn is_begun_by(root: &Path, launch: &str) -> bool {
        fs::read(root.join(LAUNCH)).is_ok_and(|name| name == launch.as_bytes())
    }

    /// Removes the earlier run if it is to be overwritten, and makes the directories of this one: to be called when nothing else can
    /// keep the run from starting. A fresh start is noted as that of `launch`. Gives what was left in place because no run makes such
    /// files.
    pub fn settle(&self, launch: Option<&str>) -> Result<Vec<PathBuf>, RunDirError> {
        let left = match self.start {
            Start::Fresh { overwrite: true } => remove_run(&self.root)?,
            Start::Fresh { overwrite: false } | Start::Resume => Vec::new(),
        };
        if let (Start::Fresh { .. }, Some(launch)) = (self.start, launch) {
            let path = self.root.join(LAUNCH);
            write_synced(&path, launch.as_bytes()).map_err(io_error("write", &path))?;
        }
        for dir in [TENSORBOARD, SAMPLES, CHECKPOINTS] {
            let path = self.root.join(dir);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        Ok(left)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved config of the run.
    pub fn config(&self) -> PathBuf {
        config_of(&self.root)
    }

    /// One line per logged step.
    pub fn log(&self) -> PathBuf {
        self.root.join(LOG)
    }

    /// TensorBoard event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join(TENSORBOARD)
    }

    /// Sample grids; `--overwrite` removes those whose names begin with `step-`.
    pub fn samples(&self) -> PathBuf {
        self.root.join(SAMPLES)
    }

    /// The sample file of a step, for example `samples/step-00012000.png`.
    pub fn sample(&self, step: u64, extension: &str) -> PathBuf {
        self.samples().join(format!("{}.{extension}", super::write::dir_name(step)))
    }

    /// Bytes of the checkpoints that [`RunDir::settle`] will remove.
    pub fn to_be_freed(&self) -> u64 {
        let files = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let bytes = |entry: fs::DirEntry| entry.metadata().map_or(0, |metadata| metadata.len());
        match self.start {
            Start::Fresh { overwrite: true } => {
                let checkpoints = list(&self.checkpoints()).unwrap_or_default();
                checkpoints.into_iter().flat_map(|(_, dir)| files(dir)).map(bytes).sum()
            }
            Start::Fresh { overwrite: false } | Start::Resume => 0,
        }
    }

    /// Checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints_of(&self.root)
    }

    /// Stores the resolved config; a reader sees the old one or the new one whole.
    pub fn write_config(&self, toml: &str) -> Result<(), RunDirError> {
        let path = self.config();
        write_synced(&path, toml.as_bytes()).map_err(io_error("write", &path))
    }
}

/// Where the config of a run directory is, for those who only read it.
pub fn config_of(root: &Path) -> PathBuf {
    root.join(CONFIG)
}

/// Where the checkpoints of a run directory are, for those who only read them.
pub fn checkpoints_of(root: &Path) -> PathBuf {
    root.join(CHECKPOINTS)
}

/// Whether a run has been in this directory.
pub fn is_run_dir(root: &Path) -> bool {
    root.join(lock::FILE).is_file() || list(&checkpoints_of(root)).is_ok_and(|found| !found.is_empty())
}

fn names(dir: &Path) -> Result<Vec<String>, RunDirError> {
    let list = || io_error("list", dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(list())? {
        found.push(entry.map_err(list())?.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    Ok(found)
}

fn is_empty_dir(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Removes what a run makes, by name, and nothing else; gives what stayed. The lock file stays, since it is held.
fn remove_run(root: &Path) -> Result<Vec<PathBuf>, RunDirError> {
    // The checkpoints go first: a kill half-way must not leave them under another run's config.
    let checkpoints = root.join(CHECKPOINTS);
    if !unlink(&checkpoints)? {
        for name in names_if_there(&checkpoints)? {
            let dir = checkpoints.join(&name);
            if (parse_dir_name(&name).is_some() || is_temporary(&name)) && !unlink(&dir)? {
                remove_matching(&dir, |name| is_own_file(Path::new(name)))?;
                remove_if_empty(&dir)?;
            }
        }
        remove_if_empty(&checkpoints)?;
    }
    for (dir, ours) in [(SAMPLES, "step-"), (TENSORBOARD, "events.out.tfevents.")] {
        let dir = root.join(dir);
        if !unlink(&dir)? {
            remove_matching(&dir, |name| name.starts_with(ours))?;
            remove_if_empty(&dir)?;
        }
    }
    remove_matching(root, |name| {
        let own = name.split_once(".tmp-").map_or(name, |(own, _)| own);
        [CONFIG, LOG, LAUNCH].contains(&own)
    })?;
    let mut left = Vec::new();
    for name in names(root)?.into_iter().filter(|n| n != lock::FILE) {
        left.push(root.join(name));
    }
    Ok(left)
}

fn names_if_there(dir: &Path) -> Result<Vec<String>, RunDirError> {
    match names(dir) {
        Err(RunDirError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

/// Removes regular files and links of matching names; directories are never entered.
fn remove_matching(dir: &Path, ours: impl Fn(&str) -> bool) -> Result<(), RunDirError> {
    for name in names_if_there(dir)?.into_iter().filter(|n| ours(n)) {
        let path = dir.join(name);
        let kind = fs::symlink_metadata(&path).map_err(io_error("remove", &path))?.file_type();
        if !kind.is_dir() {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Removes `path` if it is a link, and says whether it was: what it leads to is not in the run directory, and is left as it is.
fn unlink(path: &Path) -> Result<bool, RunDirError> {
    if !fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) {
        return Ok(false);
    }
    fs::remove_file(path).map_err(io_error("remove", path))?;
    Ok(true)
}

fn remove_if_empty(dir: &Path) -> Result<(), RunDirError> {
    match fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => Ok(()),
        Err(e) => Err(io_error("remove", dir)(e)),
    }
}
