//! What can go wrong while reporting.

use std::path::{Path, PathBuf};

use crate::tape::human_bytes;
use thiserror::Error;

/// Why something could not be reported.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The system refused a file.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was being done: `create`, `write`, `read`, …
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An encoder refused the data.
    #[error("cannot encode `{}`: {message}", path.display())]
    Encode {
        /// The file that was to be written.
        path: PathBuf,
        /// What the encoder said.
        message: String,
    },
    /// Data that is not a batch of pictures.
    #[error("cannot make pictures of shape {shape:?} out of {found} numbers: {expected}")]
    Shape {
        /// [N, H, W, C].
        shape: [usize; 4],
        /// How many numbers there are.
        found: usize,
        /// What would be right.
        expected: String,
    },
    /// A path that does not say in which form pictures are wanted.
    #[error(
        "cannot tell what to write to `{}`: end it with .png (one grid), .gif (an animation), .npy (f32 in [-1, 1]), \
         .npz (u8, as FID tools read it) or / (a folder of PNGs)",
        path.display()
    )]
    UnknownOutput {
        /// The path that was given.
        path: PathBuf,
    },
    /// More images than one picture can show.
    #[error("`{}` can show {most} images at most, {count} are asked for: end it with / (a folder of PNGs), .npy or .npz", path.display())]
    TooMany {
        /// The path that was given.
        path: PathBuf,
        /// How many there would be.
        count: usize,
        /// How many there can be.
        most: usize,
    },
    /// A disk with less room than the images need.
    #[error("not enough space for `{}`: it needs {}, free are {}: free some, or ask for fewer images",
        path.display(), human_bytes(*needed), human_bytes(*free))]
    NoSpace {
        /// The file that was to be written.
        path: PathBuf,
        /// Bytes it would have.
        needed: u64,
        /// Bytes that may still be written there.
        free: u64,
    },
    /// A folder with numbered pictures that would stay among the new ones.
    #[error(
        "folder `{}` holds `{stale}`, which {count} new images would not replace: empty it or name another folder",
        path.display()
    )]
    StaleImages {
        /// The folder.
        path: PathBuf,
        /// One of the files that would stay.
        stale: String,
        /// How many images were to be written.
        count: usize,
    },
    /// Pictures too large for the file format.
    #[error("a {width}×{height} picture is too large for `{}`: {limit}", path.display())]
    TooLarge {
        /// The file that was to be written.
        path: PathBuf,
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// The limit, and what to do.
        limit: &'static str,
    },
    /// A file that is not the `.npy` array it should be.
    #[error("`{}` cannot be used: expected {expected}, found {found}", path.display())]
    BadNpy {
        /// The file.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A file whose header is not that of a `.npy` file.
    #[error("`{}` cannot be used: {fault}", path.display())]
    NpyHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: crate::data::Fault,
    },
    /// What could not be written earlier has grown too large to be kept.
    #[error("`{}` could not be written for so long that new entries are dropped", path.display())]
    Backlog {
        /// The file.
        path: PathBuf,
    },
}

impl ReportError {
    /// For `map_err` on file operations.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ReportError {
        let path = path.to_owned();
        move |source| ReportError::Io { action, path, source }
    }
}
