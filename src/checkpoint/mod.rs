//! Run state on disk: the run directory, checkpoints that either verify or do not exist, and diffusers directories.
//!
//! A checkpoint `checkpoints/step-00012000/` holds `shard-00000-of-00001.safetensors` … and `manifest.json`. The parameters,
//! both Adam moments and the EMA are four flat f32 buffers of one [`Layout`]; shard i of n is a contiguous element range of
//! all four, so that n ranks can write it and any other number can read it. What the manifest says (sizes, SHA-256, names,
//! shapes, ranges) is all there is to check; see [`manifest`] for the format and [`write`] for the order of the file operations.

pub mod config;
pub mod diffusers;
mod error;
mod io;
mod layout;
pub mod manifest;
mod newest;
mod read;
mod reshard;
pub mod rundir;
mod save;
mod saver;
mod snapshot;
mod stream;
mod team;
pub mod write;

#[cfg(test)]
mod tests;

pub use config::CheckpointConfig;
pub use error::{CheckpointError, Skipped};
pub use layout::{ALIGN, Layout, LayoutError, Piece, TensorSpec};
pub use manifest::{FORMAT_VERSION, Manifest, Meta, ShardFile};
pub use newest::{Newest, clean_stale, list, load_newest};
pub use read::{Want, inspect, load, verify};
pub use reshard::{MAX_SHARDS, reshard};
pub use rundir::{RunDir, RunDirError, Start};
pub use save::check_room;
pub use saver::{SaveRefused, SaveReport, Saved, Saver};
pub use snapshot::{Buffers, GROUPS, Group, Snapshot};
pub use team::{Team, TeamFailure};
