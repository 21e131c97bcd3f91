//! Writing a checkpoint so that it either verifies or does not exist.
//!
//! 1. [`Staging::create`], at rank 0 ([`Staging::at`] at the others): `step-00012000.tmp-<uuid>/` is made.
//! 2. [`Staging::write_shard`]: each rank writes and fsyncs its shard there.
//! 3. [`Staging::commit`], when all shards are written: the manifest is written and fsynced, then the directory is fsynced,
//!    renamed to `step-00012000/`, and the parent is fsynced.
//!
//! A death before the rename leaves a `.tmp-` directory, which the next start removes; after it, a whole checkpoint. With
//! several ranks, rank 0 chooses the uuid and commits once every rank has handed in its [`ShardFile`] (`team.rs` says how they meet).

use super::error::CheckpointError;
use super::io::{Disk, Io, unique_id};
use super::layout::{Layout, Piece, TensorSpec};
use super::manifest::{MANIFEST, Manifest, Meta, ShardFile};
use super::snapshot::{GROUPS, Group};
use super::stream::{Writer, header};
use crate::files::{is_unique_id, parent};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The `format` of a shard's safetensors metadata.
const SHARD_FORMAT: &str = "ddpm-dist checkpoint shard, OHWI";

/// The directory name of a checkpoint, `step-00012000`.
pub fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a directory name that [`dir_name`] could have given.
pub fn parse_dir_name(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (dir_name(step) == name).then_some(step)
}

/// Whether this is the name of a checkpoint that was never committed or is being removed.
pub(super) fn is_temporary(name: &str) -> bool {
    name.split_once(".tmp-").is_some_and(|(step, id)| parse_dir_name(step).is_some() && is_unique_id(id))
}

/// The name a tensor is stored under: `ema.conv_in.weight`.
pub(super) fn stored_name(group: Group, tensor: &TensorSpec) -> String {
    format!("{}.{}", group.name(), tensor.name)
}

/// Names and shapes of a shard's safetensors file, in file order: group by group, and inside a group by offset.
fn shard_tensors(layout: &Layout, range: &Range<usize>) -> Vec<(String, Vec<usize>)> {
    let group = |group| layout.pieces(range.clone()).map(move |p| (stored_name(group, p.tensor), p.shape()));
    GROUPS.into_iter().flat_map(group).collect()
}

/// A checkpoint being written.
pub(super) struct Staging {
    io: Arc<dyn Io>,
    dir: PathBuf,
    target: PathBuf,
    /// Set when the caller no longer wants it.
    called_off: Arc<AtomicBool>,
}

impl Staging {
    /// Makes the temporary directory in `checkpoints` under a fresh uuid, which is returned for the other ranks.
    pub(super) fn create(io: Arc<dyn Io>, checkpoints: &Path, step: u64) -> Result<(Staging, String), CheckpointError> {
        let id = unique_id();
        let staging = Staging::at(io, checkpoints, step, &id);
        staging.io.create_dir(&staging.dir).map_err(CheckpointError::io("create", &staging.dir))?;
        Ok((staging, id))
    }

    /// The directory that another rank made.
    pub(super) fn at(io: Arc<dyn Io>, checkpoints: &Path, step: u64, uuid: &str) -> Staging {
        let name = dir_name(step);
        let (dir, target) = (checkpoints.join(format!("{name}.tmp-{uuid}")), checkpoints.join(name));
        Staging { io, dir, target, called_off: Arc::default() }
    }

    /// Makes the temporary directory for a checkpoint that is to be `target`, whatever that is called.
    pub(super) fn toward(target: &Path) -> Result<Staging, CheckpointError> {
        let create = CheckpointError::io("create", target);
        let Some(name) = target.file_name() else {
            return Err(create(std::io::Error::new(ErrorKind::InvalidInput, "the path does not end in a name")));
        };
        let mut temporary = name.to_os_string();
        temporary.push(format!(".tmp-{}", unique_id()));
        let dir = target.with_file_name(temporary);
        let staging = Staging { io: Arc::new(Disk), dir, target: target.to_path_buf(), called_off: Arc::default() };
        staging.io.create_dir(&staging.dir).map_err(CheckpointError::io("create", &staging.dir))?;
        Ok(staging)
    }

    /// Stops between two tensors once the flag is set.
    pub(super) fn until(self, called_off: &Arc<AtomicBool>) -> Staging {
        Staging { called_off: called_off.clone(), ..self }
    }

    /// The checkpoint it is to become.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// What it is until then.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a shard is until then.
    pub(super) fn path_of(&self, shard: &ShardFile) -> PathBuf {
        self.dir.join(&shard.name)
    }

    /// Waits until the disk has the names of the files.
    pub(super) fn sync(&self) -> Result<(), CheckpointError> {
        self.io.sync_dir(&self.dir).map_err(CheckpointError::io("flush to disk", &self.dir))
    }

    /// Writes shard `index` of `count`. Each of `groups` (params, adam_m, adam_v, ema) is the part of the flat buffer that
    /// [`Layout::shard`] names, so a rank that holds only its own part can write it.
    pub fn write_shard(
        &self,
        layout: &Layout,
        index: usize,
        count: usize,
        groups: [&[f32]; 4],
    ) -> Result<ShardFile, CheckpointError> {
        let range = layout.shard(index, count);
        for (values, group) in groups.iter().zip(GROUPS) {
            if values.len() != range.len() {
                let (expected, found) = (range.len(), values.len());
                return Err(CheckpointError::Snapshot { group: group.name(), expected, found });
            }
        }
        self.write_shard_of(layout, index, count, |group, piece, file| {
            let Range { start, end } = piece.elements;
            file.write_f32(&groups[group as usize][start - range.start..end - range.start])
        })
    }

    /// Writes shard `index` of `count`; `put` is called for each piece of each group in file order and must write all of its values.
    pub(super) fn write_shard_of(
        &self,
        layout: &Layout,
        index: usize,
        count: usize,
        mut put: impl FnMut(Group, &Piece, &mut Writer) -> Result<(), CheckpointError>,
    ) -> Result<ShardFile, CheckpointError> {
        let range = layout.shard(index, count);
        let name = ShardFile::file_name(index, count);
        let path = self.dir.join(&name);
        let bad =
            |e: safetensors::SafeTensorError| CheckpointError::Shard { path: path.clone(), reason: e.to_string() };
        let mut file = Writer::create(&*self.io, &path)?;
        file.write(&header(&shard_tensors(layout, &range), SHARD_FORMAT).map_err(bad)?)?;
        for group in GROUPS {
            for piece in layout.pieces(range.clone()) {
                if self.called_off.load(Ordering::Relaxed) {
                    return Err(CheckpointError::CalledOff);
                }
                put(group, &piece, &mut file)?;
            }
        }
        let (bytes, sha256) = file.finish()?;
        Ok(ShardFile { name, begin: range.start, end: range.end, bytes, sha256 })
    }

    /// Writes the manifest over all shards (in any order) and gives the checkpoint its final name. A checkpoint of the same
    /// step that is already there is replaced, atomically where the file system can exchange directories.
    pub fn commit(&self, meta: &Meta, layout: &Arc<Layout>, files: Vec<ShardFile>) -> Result<PathBuf, CheckpointError> {
        self.seal(meta, layout, files)?;
        let replaced = self.rename()?;
        self.sync_parent()?;
        if let Some(old) = replaced {
            // The new checkpoint is safe; what is left of the old one is removed at the next start.
            let _ = remove_checkpoint_files(&*self.io, &old);
        }
        Ok(self.target.clone())
    }

    /// Writes the manifest: the directory is then a whole checkpoint under its temporary name, and on the disk.
    pub(super) fn seal(
        &self,
        meta: &Meta,
        layout: &Arc<Layout>,
        mut files: Vec<ShardFile>,
    ) -> Result<(), CheckpointError> {
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Manifest { meta: meta.clone(), layout: layout.clone(), files };
        let path = self.dir.join(MANIFEST);
        let bytes =
            manifest.encode().map_err(|e| CheckpointError::Manifest { path: path.clone(), reason: e.to_string() })?;
        // What would be refused when it is read must not be committed.
        Manifest::decode(&path, &bytes)?;
        let mut file = Writer::create(&*self.io, &path)?;
        file.write(&bytes)?;
        file.finish()?;
        self.sync()
    }

    /// Gives a sealed checkpoint its final name where nothing has that name.
    pub(super) fn commit_new(&self) -> Result<(), CheckpointError> {
        if self.target.symlink_metadata().is_ok() {
            return Err(CheckpointError::Exists { path: self.target.clone() });
        }
        self.io.rename(&self.dir, &self.target).map_err(CheckpointError::io("rename to its final name", &self.dir))?;
        self.sync_parent()
    }

    fn sync_parent(&self) -> Result<(), CheckpointError> {
        let parent = parent(&self.target);
        self.io.sync_dir(parent).map_err(CheckpointError::io("flush to disk", parent))
    }

    /// Gives the temporary directory its final name; the path of the replaced checkpoint, if there was one.
    fn rename(&self) -> Result<Option<PathBuf>, CheckpointError> {
        let failed = || CheckpointError::io("rename to its final name", &self.dir);
        match self.io.rename(&self.dir, &self.target) {
            Ok(()) => return Ok(None),
            Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {}
            Err(e) => return Err(failed()(e)),
        }
        match self.io.exchange(&self.dir, &self.target) {
            Ok(()) => Ok(Some(self.dir.clone())),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                // Without an exchange there is a moment in which this step is not there; the one before it is.
                let aside = self.target.with_file_name(format!("{}.tmp-{}", file_name(&self.target), unique_id()));
                self.io.rename(&self.target, &aside).map_err(failed())?;
                if let Err(e) = self.io.rename(&self.dir, &self.target) {
                    // If this fails as well, the first error still says why.
                    let _ = self.io.rename(&aside, &self.target);
                    return Err(failed()(e));
                }
                Ok(Some(aside))
            }
            Err(e) => Err(failed()(e)),
        }
    }

    /// Removes the temporary directory of a save that failed.
    pub fn abandon(&self) -> Result<(), CheckpointError> {
        if !self.dir.exists() {
            return Ok(());
        }
        remove_checkpoint_files(&*self.io, &self.dir)
    }
}

pub(super) fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

/// Removes a checkpoint's own files and its directory; any other file makes the last step fail and stays.
pub(super) fn remove_checkpoint_files(io: &dyn Io, dir: &Path) -> Result<(), CheckpointError> {
    let list = || CheckpointError::io("list", dir);
    for entry in std::fs::read_dir(dir).map_err(list())? {
        let path = entry.map_err(list())?.path();
        if is_own_file(&path) {
            io.remove_file(&path).map_err(CheckpointError::io("remove", &path))?;
        }
    }
    io.remove_dir(dir).map_err(CheckpointError::io("remove", dir))
}

/// Whether a checkpoint's directory would hold a file of this name.
pub(super) fn is_own_file(path: &Path) -> bool {
    let name = file_name(path);
    name == MANIFEST || (name.starts_with("shard-") && name.ends_with(".safetensors"))
}
