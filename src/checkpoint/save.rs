//! One save: what rank 0 does, what the other ranks do.

use super::error::CheckpointError;
use super::io::{Disk, Io};
use super::layout::Layout;
use super::manifest::ShardFile;
use super::newest::clean_stale;
use super::snapshot::{GROUPS, Snapshot};
use super::team::{Meeting, TeamFailure};
use super::write::Staging;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Where a save writes to, and whether it is still wanted.
pub(super) struct Job<'a> {
    pub io: &'a Arc<dyn Io>,
    pub checkpoints: &'a Path,
    pub called_off: &'a Arc<AtomicBool>,
}

impl Job<'_> {
    /// Writes a snapshot: all of it, or this rank's share of it. Gives the checkpoint's path and the bytes of its shards, on all ranks,
    /// or removes what was begun.
    pub fn save(
        &self,
        snapshot: &Snapshot,
        meeting: Option<&mut Meeting<'_>>,
    ) -> Result<(PathBuf, u64), CheckpointError> {
        match meeting {
            None => self.lead(snapshot, None),
            Some(meeting) if meeting.rank() == 0 => {
                let saved = self.lead(snapshot, Some(meeting));
                meeting.publish(saved, |(_, bytes)| *bytes)
            }
            Some(meeting) => self.follow(snapshot, meeting),
        }
    }

    /// Rank 0, which may be the only one: makes the directory, writes shard 0, and commits when all shards are there.
    fn lead(
        &self,
        snapshot: &Snapshot,
        mut meeting: Option<&mut Meeting<'_>>,
    ) -> Result<(PathBuf, u64), CheckpointError> {
        let (layout, count) = (&snapshot.layout, meeting.as_ref().map_or(1, |meeting| meeting.size()));
        snapshot.check(0, count)?;
        // A rank that was late for an earlier save may have left its shard behind; what cannot be removed is in nobody's way.
        let _ = clean_stale(self.checkpoints);
        let Room { needed, free } = room(&**self.io, self.checkpoints, layout, count)?;
        if free < needed {
            return Err(CheckpointError::NoSpace { path: self.checkpoints.to_path_buf(), needed, free });
        }
        let (staging, uuid) = Staging::create(self.io.clone(), self.checkpoints, snapshot.meta.step)?;
        let staging = staging.until(self.called_off);
        let written = self.all_shards(snapshot, &staging, &uuid, &mut meeting).and_then(|shards| {
            let bytes = shards.iter().map(|shard| shard.bytes).sum();
            Ok((staging.commit(&snapshot.meta, layout, shards)?, bytes))
        });
        if written.is_err() {
            // The write's own error is the one to report; a directory that cannot be removed now is removed later.
            let _ = staging.abandon();
        }
        written
    }

    fn all_shards(
        &self,
        snapshot: &Snapshot,
        staging: &Staging,
        uuid: &str,
        meeting: &mut Option<&mut Meeting<'_>>,
    ) -> Result<Vec<ShardFile>, CheckpointError> {
        let Some(meeting) = meeting else { return Ok(vec![shard(staging, snapshot, 0, 1)?]) };
        meeting.announce(uuid)?;
        let own = shard(staging, snapshot, 0, meeting.size());
        // Also where the own shard has failed: the others are writing into a directory that is to be removed.
        let others = meeting.gather(&snapshot.layout);
        let mut shards = vec![own?];
        shards.extend(others?);
        for (rank, file) in shards.iter().enumerate().skip(1) {
            let path = staging.path_of(file);
            let found = std::fs::metadata(&path).map(|metadata| metadata.len());
            if !matches!(found, Ok(bytes) if bytes == file.bytes) {
                let found = found.map_or_else(|e| e.to_string(), |bytes| format!("{bytes} bytes"));
                let reason = format!(
                    "it wrote {} with {} bytes, and rank 0 finds there: {found}; is that directory shared by all nodes?",
                    path.display(),
                    file.bytes
                );
                return Err(TeamFailure::Rank { rank, host: None, reason }.into());
            }
        }
        Ok(shards)
    }

    /// Any other rank: writes its shard where rank 0 says.
    fn follow(&self, snapshot: &Snapshot, meeting: &mut Meeting<'_>) -> Result<(PathBuf, u64), CheckpointError> {
        let uuid = meeting.plan()?;
        let staging = Staging::at(self.io.clone(), self.checkpoints, snapshot.meta.step, &uuid).until(self.called_off);
        let (rank, size) = (meeting.rank(), meeting.size());
        let written = snapshot.check(rank, size).and_then(|()| {
            let file = shard(&staging, snapshot, rank, size)?;
            // On a file system of several nodes it is this one that must hand over the name of the file.
            staging.sync()?;
            Ok(file)
        });
        meeting.report(written)?;
        let bytes = meeting.outcome()?;
        Ok((staging.target().to_path_buf(), bytes))
    }
}

fn shard(staging: &Staging, snapshot: &Snapshot, rank: usize, size: usize) -> Result<ShardFile, CheckpointError> {
    staging.write_shard(&snapshot.layout, rank, size, GROUPS.map(|group| snapshot.group(group)))
}

struct Room {
    needed: u64,
    free: u64,
}

/// Bytes that a checkpoint of `shards` files takes, and those that may still be written where it would be.
fn room(io: &dyn Io, checkpoints: &Path, layout: &Layout, shards: usize) -> Result<Room, CheckpointError> {
    let data = layout.parameters() as u64 * 4 * GROUPS.len() as u64;
    // Headers and manifest: some 150 bytes a tensor and place, and a MiB for blocks and directories.
    let needed = data + (layout.tensors().len() + shards) as u64 * 1024 + (1 << 20);
    let free = io.free_bytes(checkpoints).map_err(CheckpointError::io("measure the free space of", checkpoints))?;
    Ok(Room { needed, free })
}

/// Refuses a directory, which must be there, without room for one more checkpoint once so many bytes of it are freed. A run that is about
/// to train asks this first: at the first save it would be late.
///
/// # Errors
/// [`CheckpointError::NoRoom`], or a disk that does not say how much is free.
pub fn check_room(dir: &Path, layout: &Layout, freed: u64) -> Result<(), CheckpointError> {
    check_room_for(dir, layout, 1, freed)
}

/// As [`check_room`], for a checkpoint of so many shards.
pub(super) fn check_room_for(dir: &Path, layout: &Layout, shards: usize, freed: u64) -> Result<(), CheckpointError> {
    match room(&Disk, dir, layout, shards)? {
        Room { needed, free } if free.saturating_add(freed) < needed => {
            Err(CheckpointError::NoRoom { path: dir.to_path_buf(), needed, free: free.saturating_add(freed) })
        }
        _ => Ok(()),
    }
}
