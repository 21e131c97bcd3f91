//! What can be wrong with a data set, its files or its cache.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::ImageSize;
use crate::config::OutOfRange;

/// What is wrong inside a file, without the file's name (see [`DataError::Malformed`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first bytes are not those of the format.
    #[error("not {format}: expected {expected}, found {found}; {help}")]
    Magic { format: &'static str, expected: String, found: String, help: &'static str },
    /// Elements of another type.
    #[error("elements of type {found}, expected {expected}; {help}")]
    Dtype { found: String, expected: &'static str, help: &'static str },
    /// The header cannot be read.
    #[error("unreadable header: expected {expected}, found {found}; {help}")]
    Header { expected: &'static str, found: String, help: &'static str },
    /// An array in column-major order.
    #[error("fortran_order is True, expected False (C order); save it again with numpy.ascontiguousarray(x)")]
    FortranOrder,
    /// A shape that is not one of images.
    #[error("shape {found}, expected {expected}; {help}")]
    Shape { expected: &'static str, found: String, help: &'static str },
    /// A shape whose number of bytes does not fit 63 bits, or which no file of this size can hold.
    #[error("the header claims a shape of {shape}, {found}: the header is damaged; fetch or write the file again")]
    Claim { shape: String, found: String },
    /// The file is shorter or longer than its header says.
    #[error("{}", length_message(*.expected, *.found))]
    Length { expected: u64, found: u64 },
    /// A whole number of records was expected.
    #[error(
        "{found} bytes, expected a multiple of {record} (one record: a label and 3072 pixels); the file is cut short or \
         not a CIFAR-10 binary batch; fetch it again"
    )]
    Records { record: usize, found: u64 },
    /// A CIFAR-10 label above 9.
    #[error(
        "record {record} has label {found}, expected 0 to 9; not a CIFAR-10 binary batch (CIFAR-100 is not supported)"
    )]
    Label { record: u64, found: u8 },
    /// No images at all.
    #[error("no images: expected at least one, found {found}; {help}")]
    Empty { found: String, help: &'static str },
    /// A picture smaller than the size trained at.
    #[error(
        "a picture of {found}, expected at least {need} (data.size); lower data.size, remove the picture, or set \
         data.on_bad_image = \"skip\""
    )]
    TooSmall { need: ImageSize, found: ImageSize },
    /// A picture or an archive that its decoder refuses.
    #[error("cannot be decoded: {found}; expected {expected}; {help}")]
    Undecodable { expected: &'static str, found: String, help: &'static str },
}

impl Fault {
    /// What is wrong with a picture that is left out, without the advice to leave it out.
    pub(super) fn reason(&self) -> String {
        match self {
            Fault::Undecodable { found, .. } => format!("cannot be decoded: {found}"),
            Fault::TooSmall { need, found } => format!("a picture of {found}, expected at least {need} (data.size)"),
            fault => fault.to_string(),
        }
    }
}

fn length_message(expected: u64, found: u64) -> String {
    let how = if found < expected { "is cut short" } else { "has bytes after its end" };
    format!("{found} bytes, expected {expected} from its header: the file {how}; fetch or write it again")
}

/// Everything the data room can report.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A value of `[data]` is outside its range.
    #[error(transparent)]
    Config(#[from] OutOfRange),
    /// `data.path` does not exist.
    #[error("no data set at {}{}; {hint}", .path.display(), Also(.tried))]
    NotFound { path: PathBuf, tried: Vec<PathBuf>, hint: String },
    /// The format of `data.path` cannot be told, or is not the one that `data.format` names.
    #[error("{}: {found}, expected {expected}; {help}", .path.display())]
    Unrecognised { path: PathBuf, expected: &'static str, found: String, help: String },
    /// More than one file of a folder could be meant.
    #[error(
        "{}: found {}, expected one training file; name one of them in data.path",
        .path.display(), .candidates.join(", ")
    )]
    Ambiguous { path: PathBuf, candidates: Vec<String> },
    /// The content of a file is wrong.
    #[error("{}: {fault}", .path.display())]
    Malformed { path: PathBuf, fault: Fault },
    /// The data set and the config disagree.
    #[error("{}: images of {found}, but {key} = {value}; {help}", .path.display())]
    Mismatch { path: PathBuf, key: &'static str, value: String, found: String, help: &'static str },
    /// A compressed file whose pixels are above `data.cache_limit`.
    #[error(
        "{}: {bytes} bytes of pixels, more than data.cache_limit = {limit}; a compressed file cannot be read in random \
         order: raise data.cache_limit, or unpack the file and name the unpacked one",
        .path.display()
    )]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    /// The system refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    /// The directory in `data.cache_dir` cannot be used.
    #[error(
        "data.cache_dir = {}: cannot {action}: {source}; name a writable directory with {bytes} bytes free, or leave \
         data.cache_dir out",
        .dir.display()
    )]
    CacheDir { dir: PathBuf, action: &'static str, bytes: u64, source: io::Error },
    /// A file changed while it was being read.
    #[error("{}: changed while it was being read; start again when nothing writes to it", .path.display())]
    Changed { path: PathBuf },
    /// The decoding threads cannot be started.
    #[error("data.decode_threads = {threads}: cannot start the decoding threads: {reason}")]
    Threads { threads: usize, reason: String },
    /// A loader was asked for a slice that its batch does not have.
    #[error("images {offset} to {} of a batch of {batch}: expected a part of the batch that is not empty", .offset + .count)]
    Slice { batch: usize, offset: usize, count: usize },
    /// The loader's thread ended; its first error was returned before.
    #[error("the data loader has stopped after an earlier error")]
    LoaderEnded,
    /// [`Progress::stopped`](super::Progress::stopped) said so.
    #[error("stopped while the data set was being opened; the same command begins again")]
    Stopped,
}

impl DataError {
    pub(super) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DataError + 'a {
        move |source| DataError::Io { path: path.to_path_buf(), action, source }
    }

    pub(super) fn malformed(path: &Path) -> impl FnOnce(Fault) -> DataError + '_ {
        move |fault| DataError::Malformed { path: path.to_path_buf(), fault }
    }
}

/// The other places that were looked at.
struct Also<'a>(&'a [PathBuf]);

impl fmt::Display for Also<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, path) in self.0.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { ", nor at " } else { ", " }, path.display())?;
        }
        Ok(())
    }
}
