//! A checkpoint written anew in another number of shards, with the same bits.

use super::error::CheckpointError;
use super::io::Disk;
use super::layout::Piece;
use super::manifest::{Manifest, ShardFile};
use super::read::digests;
use super::save::check_room_for;
use super::snapshot::Group;
use super::stream::{Reader, Writer};
use super::write::{Staging, file_name, remove_checkpoint_files, stored_name};
use crate::files::{is_unique_id, parent};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Most shards that file names of five digits can be sorted by, rounded down.
pub const MAX_SHARDS: usize = 65_536;

/// Shards of the source that are open at a time.
const OPEN: usize = 64;

/// Writes the checkpoint `source` as `target` in `count` shards (1 to [`MAX_SHARDS`]). The source is verified first and the copy before it
/// gets its name; the hashes of both are over the values in the order of the flat buffers, so that equal means bit-equal. What is in
/// memory at a time is one MiB of values and the headers of [`OPEN`] shards, whatever the size of the model. Gives the manifest of the copy.
///
/// # Errors
/// A source that does not verify, a target that exists or for which there is no room, a flag that was set, and whatever the disk says;
/// nothing is left of the copy then.
pub fn reshard(
    source: &Path,
    target: &Path,
    count: usize,
    called_off: &Arc<AtomicBool>,
) -> Result<Manifest, CheckpointError> {
    if target.symlink_metadata().is_ok() {
        return Err(CheckpointError::Exists { path: target.to_path_buf() });
    }
    let (manifest, expected) = digests(source, called_off)?;
    remove_abandoned(target)?;
    check_room_for(parent(target), &manifest.layout, count, 0)?;
    let staging = Staging::toward(target)?.until(called_off);
    let _held = hold(staging.dir()).map_err(CheckpointError::io("lock", staging.dir()))?;
    let written = copy(source, &manifest, &staging, count).and_then(|()| {
        let (copied, found) = digests(staging.dir(), called_off)?;
        if found != expected || copied.layout != manifest.layout || copied.meta != manifest.meta {
            return Err(CheckpointError::Differs { path: target.to_path_buf(), of: source.to_path_buf() });
        }
        staging.commit_new()?;
        Ok(copied)
    });
    if written.is_err() {
        // Its own error is the one to report.
        let _ = staging.abandon();
    }
    written
}

/// Holds a directory as long as this process lives and keeps the file; refused while another process does.
fn hold(dir: &Path) -> std::io::Result<File> {
    let file = File::open(dir)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Removes what a killed process has left of the same copy.
fn remove_abandoned(target: &Path) -> Result<(), CheckpointError> {
    let prefix = format!("{}.tmp-", file_name(target));
    let list = || CheckpointError::io("list", parent(target));
    for entry in std::fs::read_dir(parent(target)).map_err(list())? {
        let path = entry.map_err(list())?.path();
        if file_name(&path).strip_prefix(&prefix).is_some_and(is_unique_id) && hold(&path).is_ok() {
            remove_checkpoint_files(&Disk, &path)?;
        }
    }
    Ok(())
}

fn copy(source: &Path, manifest: &Manifest, staging: &Staging, count: usize) -> Result<(), CheckpointError> {
    let mut shards = Shards { dir: source, manifest, open: BTreeMap::new() };
    let write = |index| {
        staging.write_shard_of(&manifest.layout, index, count, |group, piece, file| shards.copy(group, piece, file))
    };
    let files = (0..count).map(write).collect::<Result<Vec<ShardFile>, _>>()?;
    staging.seal(&manifest.meta, &manifest.layout, files)
}

/// The shards of a source, read from anywhere.
struct Shards<'a> {
    dir: &'a Path,
    manifest: &'a Manifest,
    /// By place among the files.
    open: BTreeMap<usize, Reader>,
}

impl Shards<'_> {
    /// Writes the values of a piece of one group, from as many shards as they stand in.
    fn copy(&mut self, group: Group, piece: &Piece, to: &mut Writer) -> Result<(), CheckpointError> {
        let Piece { tensor, elements } = piece;
        let name = stored_name(group, tensor);
        let first = self.manifest.files.partition_point(|file| file.end <= elements.start);
        let files = self.manifest.files.iter().enumerate().skip(first);
        for (index, file) in files.take_while(|(_, file)| file.begin < elements.end) {
            let part = elements.start.max(file.begin)..elements.end.min(file.end);
            if part.is_empty() {
                continue;
            }
            if !self.open.contains_key(&index) && self.open.len() == OPEN {
                self.open.clear();
            }
            let reader = match self.open.entry(index) {
                std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(Reader::open(&self.dir.join(&file.name))?)
                }
            };
            // A shard that begins inside a tensor holds its values from there on.
            let stored_from = tensor.offset.max(file.begin);
            reader.read_at(&name, part.start - stored_from, part.len(), |bytes| to.write(bytes))?;
        }
        Ok(())
    }
}
