//! Which format a data set has and which of its files are read.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::compressed::Container;
use super::{DataError, Format, Progress, npy};
use crate::files::{kind_name, open_regular};

/// A data set whose format is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An IDX file as it is.
    Idx(PathBuf),
    /// A `.npy` file as it is.
    Npy(PathBuf),
    /// An IDX file or a `.npy` array in a compressed file.
    Compressed(PathBuf, Container),
    /// CIFAR-10 batches in order.
    Cifar10(Vec<PathBuf>),
    /// A folder of pictures.
    Images(PathBuf),
}

const BATCHES: usize = 5;

/// Tells what lies at `path`, which exists.
pub(super) fn detect(path: &Path, format: Format, progress: &dyn Progress) -> Result<Source, DataError> {
    let metadata = fs::metadata(path).map_err(DataError::io("look at the data set", path))?;
    let source = if metadata.is_dir() { detect_in_folder(path, format)? } else { detect_file(path, format)? };
    match &source {
        Source::Idx(file) | Source::Npy(file) | Source::Compressed(file, _) if file != path => {
            let hint = if format == Format::Auto {
                " (data.format = \"images\" takes the folder's pictures instead)"
            } else {
                ""
            };
            progress.notice(&format!("{}: the images are read from {}{hint}", path.display(), file.display()));
        }
        _ => {}
    }
    Ok(source)
}

fn detect_in_folder(path: &Path, format: Format) -> Result<Source, DataError> {
    let names = names(path)?;
    let has = |name: &str| names.iter().any(|n| n == name);
    let nested = path.join("cifar-10-batches-bin");
    let is_array = |name: &String| name.ends_with(".npy") || name.ends_with(".npz");
    let is_picture = |name: &String| {
        let name = name.to_lowercase();
        !name.starts_with('.') && [".png", ".jpg", ".jpeg"].iter().any(|extension| name.ends_with(extension))
    };
    match format {
        Format::Cifar10 if !has("data_batch_1.bin") && nested.is_dir() => cifar10_batches(&nested),
        Format::Cifar10 => cifar10_batches(path),
        Format::Auto if has("data_batch_1.bin") => cifar10_batches(path),
        Format::Auto if has("cifar-10-batches-bin") => cifar10_batches(&nested),
        Format::Auto if has("data_batch_1") => Err(DataError::Unrecognised {
            path: path.to_path_buf(),
            expected: "data_batch_1.bin to data_batch_5.bin",
            found: "CIFAR-10's Python version (data_batch_1)".into(),
            help: "download the binary version, cifar-10-binary.tar.gz".into(),
        }),
        Format::Idx => idx_file(path, &names),
        Format::Auto if names.iter().any(|name| name.contains("idx3-ubyte")) => idx_file(path, &names),
        Format::Npy => numpy_file(path, &names),
        Format::Auto if names.iter().filter(|name| is_array(name)).count() == 1 => {
            let pictures = names.iter().filter(|name| is_picture(name)).count();
            if pictures == 0 {
                return numpy_file(path, &names);
            }
            let array = names.iter().find(|name| is_array(name)).map(String::as_str).unwrap_or_default();
            Err(DataError::Unrecognised {
                path: path.to_path_buf(),
                expected: "either pictures or an array of images",
                found: format!("pictures ({pictures}) and the array {array}"),
                help: "set data.format = \"images\" or \"npy\", or move one of them away".into(),
            })
        }
        Format::Auto | Format::Images => Ok(Source::Images(path.to_path_buf())),
    }
}

fn detect_file(path: &Path, format: Format) -> Result<Source, DataError> {
    let kind = fs::metadata(path).map_err(DataError::io("look at the data set", path))?.file_type();
    if !kind.is_file() {
        return Err(DataError::Unrecognised {
            path: path.to_path_buf(),
            expected: "a regular file or a folder",
            found: kind_name(kind).into(),
            help: "it is mapped into memory or read more than once: save what it gives as a file, and name that".into(),
        });
    }
    let mut head = Vec::new();
    let file = open_regular(path).map_err(DataError::io("open", path))?;
    file.take(8).read_to_end(&mut head).map_err(DataError::io("read", path))?;
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let gzip = head.starts_with(&[0x1f, 0x8b]);
    let zip = head.starts_with(b"PK");
    let file = path.to_path_buf();
    let unrecognised = |expected, help: &str| {
        let found =
            if head.is_empty() { "an empty file".into() } else { format!("a file that starts with {head:02x?}") };
        Err(DataError::Unrecognised { path: path.to_path_buf(), expected, found, help: help.into() })
    };
    match format {
        Format::Idx if gzip => Ok(Source::Compressed(file, Container::Gzip)),
        Format::Idx => Ok(Source::Idx(file)),
        Format::Npy if zip => Ok(Source::Compressed(file, Container::Npz)),
        Format::Npy => Ok(Source::Npy(file)),
        Format::Cifar10 => Ok(Source::Cifar10(vec![file])),
        Format::Images => unrecognised("a folder of PNG or JPEG pictures", "let data.path name the folder"),
        // The name goes before the first bytes: a file that is cut short or empty is then reported as what it should be.
        Format::Auto if name.ends_with(".npz") || zip => Ok(Source::Compressed(file, Container::Npz)),
        Format::Auto if name.ends_with(".npy") || head.starts_with(npy::MAGIC) => Ok(Source::Npy(file)),
        Format::Auto if name.ends_with(".bin") => Ok(Source::Cifar10(vec![file])),
        Format::Auto if gzip || name.ends_with(".gz") => Ok(Source::Compressed(file, Container::Gzip)),
        Format::Auto if name.contains("-ubyte") || name.ends_with(".idx") || head.starts_with(&[0, 0, 8]) => {
            Ok(Source::Idx(file))
        }
        Format::Auto => unrecognised(
            "an IDX file, a .npy or .npz file, a CIFAR-10 batch (.bin) or a folder of pictures",
            "name such a file or folder in data.path, or its kind in data.format",
        ),
    }
}

/// Names in a folder, sorted.
fn names(path: &Path) -> Result<Vec<String>, DataError> {
    let read = || -> std::io::Result<Vec<String>> {
        fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = read().map_err(DataError::io("list the folder", path))?;
    names.sort_unstable();
    Ok(names)
}

/// The training images of a folder of IDX files: `train-images-idx3-ubyte` if it is there, else the only file that has
/// "train" in its name, else the only file; the unpacked one where a file is there both ways.
fn idx_file(path: &Path, names: &[String]) -> Result<Source, DataError> {
    let mut candidates: Vec<&String> = names.iter().filter(|name| name.contains("idx3-ubyte")).collect();
    candidates.retain(|name| !name.strip_suffix(".gz").is_some_and(|plain| names.iter().any(|n| n == plain)));
    if candidates.iter().any(|name| name.contains("train")) {
        candidates.retain(|name| name.contains("train"));
    }
    let usual = |name: &&&String| {
        let name = name.strip_suffix(".gz").unwrap_or(name);
        name == "train-images-idx3-ubyte" || name == "train-images.idx3-ubyte"
    };
    match (candidates.iter().find(usual), candidates.as_slice()) {
        (Some(name), _) | (None, [name]) => detect_file(&path.join(name), Format::Idx),
        (None, []) => Err(DataError::Unrecognised {
            path: path.to_path_buf(),
            expected: "train-images-idx3-ubyte or train-images-idx3-ubyte.gz",
            found: format!("a folder of {} other files", names.len()),
            help: "let data.path name the file or the folder that holds it".into(),
        }),
        (None, several) => Err(DataError::Ambiguous {
            path: path.to_path_buf(),
            candidates: several.iter().map(|name| name.to_string()).collect(),
        }),
    }
}

fn numpy_file(path: &Path, names: &[String]) -> Result<Source, DataError> {
    let candidates: Vec<String> =
        names.iter().filter(|name| name.ends_with(".npy") || name.ends_with(".npz")).cloned().collect();
    match candidates.as_slice() {
        [name] => detect_file(&path.join(name), Format::Npy),
        [] => Err(DataError::Unrecognised {
            path: path.to_path_buf(),
            expected: "a .npy or .npz file",
            found: format!("a folder of {} other files", names.len()),
            help: "let data.path name the file or the folder that holds it".into(),
        }),
        _ => Err(DataError::Ambiguous { path: path.to_path_buf(), candidates }),
    }
}

fn cifar10_batches(path: &Path) -> Result<Source, DataError> {
    let batches: Vec<PathBuf> = (1..=BATCHES).map(|i| path.join(format!("data_batch_{i}.bin"))).collect();
    let missing: Vec<&Path> = batches.iter().map(PathBuf::as_path).filter(|batch| !batch.is_file()).collect();
    if missing.is_empty() {
        return Ok(Source::Cifar10(batches));
    }
    let missing: Vec<_> = missing.iter().filter_map(|b| b.file_name()).map(|name| name.to_string_lossy()).collect();
    Err(DataError::Unrecognised {
        path: path.to_path_buf(),
        expected: "data_batch_1.bin to data_batch_5.bin",
        found: format!("a folder without {}", missing.join(", ")),
        help: "unpack cifar-10-binary.tar.gz again, or name a single batch in data.path".into(),
    })
}
