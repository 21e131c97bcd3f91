//! A folder of pictures: finding them, checking them, decoding them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{Built, Sink};
use super::contents::contents;
use super::picture::{self, Target};
use super::pixels::{FieldHasher, Hash};
use super::progress::{Meter, go_on};
use super::{DataError, Fault, OnBadImage, Phase, Progress};

/// Pictures of a folder in the order of their paths.
#[derive(Debug)]
pub(super) struct Folder {
    pub root: PathBuf,
    /// Relative to `root`, sorted.
    pub files: Vec<PathBuf>,
    /// SHA-256 of each file.
    contents: Vec<Hash>,
    /// Links to nothing.
    pub broken: Skipped,
}

/// Pictures that were left out, and what a person is told about the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    pub count: u64,
    pub names: Vec<String>,
}

/// The same without the folder's path, as a cache keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bad {
    pub count: u64,
    /// Places in the sorted list of files, and what is wrong there; cut so that they fit a cache's header.
    pub first: Vec<(usize, String)>,
}

/// As many skipped pictures are named.
pub(super) const NAMED: usize = 5;
const REASON_LENGTH: usize = 1000;
/// Enough of a picture for its header, EXIF thumbnails and colour profiles included, in all but rare files.
const HEAD: u64 = 256 * 1024;
/// Decoded pixels that wait for the ones before them.
const CHUNK_BYTES: usize = 32 << 20;

impl Skipped {
    fn add(&mut self, name: impl FnOnce() -> String) {
        self.count += 1;
        if self.names.len() < NAMED {
            self.names.push(name());
        }
    }

    /// Both, these first.
    pub fn and(mut self, more: Skipped) -> Skipped {
        self.count += more.count;
        self.names.extend(more.names);
        self.names.truncate(NAMED);
        self
    }
}

impl Folder {
    /// Finds every `.png`, `.jpg` and `.jpeg` under `root`, and reads them to know their content (see [`contents`] for `index`). Links
    /// are followed; names that start with a dot are not.
    pub fn open(
        root: &Path,
        on_bad_image: OnBadImage,
        index: Option<&Path>,
        progress: &dyn Progress,
    ) -> Result<Folder, DataError> {
        let mut scan = Scan {
            root,
            on_bad_image,
            progress,
            ancestors: vec![],
            files: vec![],
            others: 0,
            broken: Skipped::default(),
        };
        scan.folder(Path::new(""))?;
        let Scan { mut files, others, broken, .. } = scan;
        // By bytes, so that the order is the same whatever the locale and the file system's own order.
        files.sort_unstable_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
        if files.is_empty() {
            let found = format!("a folder of {others} other files");
            let help = "let data.path name a folder that holds .png, .jpg or .jpeg files (at any depth)";
            return Err(DataError::malformed(root)(Fault::Empty { found, help }));
        }
        let contents = contents(root, &files, index, progress)?;
        Ok(Folder { root: root.to_path_buf(), files, contents, broken })
    }

    /// Digest of what all pictures hold, in order. Where they lie, under which names and since when does not matter.
    pub fn key(&self, options: &str) -> Hash {
        let mut hasher = FieldHasher::new("folder cache 2").field(options.as_bytes());
        self.contents.iter().for_each(|hash| hasher.push(hash));
        hasher.finish()
    }

    /// Decodes picture `i` into `out`.
    pub fn decode(&self, i: usize, target: Target, out: &mut [u8]) -> Result<(), DataError> {
        let path = self.root.join(&self.files[i]);
        let bytes = fs::read(&path).map_err(DataError::io("read a picture", &path))?;
        picture::decode(&bytes, target, out).map_err(DataError::malformed(&path))
    }

    /// The same for the cache, whose key says which bytes these are.
    fn decode_known(&self, i: usize, target: Target, out: &mut [u8]) -> Result<(), DataError> {
        let path = self.root.join(&self.files[i]);
        let bytes = fs::read(&path).map_err(DataError::io("read a picture", &path))?;
        if Sha256::digest(&bytes)[..] != self.contents[i] {
            return Err(DataError::Changed { path });
        }
        picture::decode(&bytes, target, out).map_err(DataError::malformed(&path))
    }

    /// Decodes all pictures into the cache.
    pub fn decode_all(
        &self,
        target: Target,
        on_bad_image: OnBadImage,
        progress: &dyn Progress,
        sink: &mut Sink,
    ) -> Result<Built, DataError> {
        let shape = target.shape();
        let image = shape.iter().product::<usize>();
        let per_chunk = (CHUNK_BYTES / image).max(rayon::current_num_threads());
        let mut buffer = vec![0; image * per_chunk.min(self.files.len())];
        let mut fingerprint = fingerprint(shape);
        let (mut bad, mut count) = (Bad::default(), 0);
        let indices: Vec<usize> = (0..self.files.len()).collect();
        let meter = Meter::new(progress, Phase::Decode, self.files.len());
        for chunk in indices.chunks(per_chunk) {
            let results: Vec<Result<(), DataError>> = chunk
                .par_iter()
                .zip(buffer.par_chunks_mut(image))
                .map(|(i, out)| meter.count(|| self.decode_known(*i, target, out)))
                .collect();
            for ((i, result), pixels) in chunk.iter().zip(results).zip(buffer.chunks(image)) {
                if keep(*i, result, on_bad_image, &mut bad)? {
                    fingerprint.push(&self.contents[*i]);
                    sink.append(pixels)?;
                    count += 1;
                }
            }
        }
        self.require_some(count, &bad)?;
        let fingerprint = fingerprint.finish();
        Ok(Built { count, shape, fingerprint: Box::new(move |_| fingerprint), bad })
    }

    /// Checks the header of every picture; returns the folder without skipped pictures, the fingerprint, and what was skipped.
    pub fn check_all(
        mut self,
        target: Target,
        on_bad_image: OnBadImage,
        progress: &dyn Progress,
    ) -> Result<(Folder, Hash, Skipped), DataError> {
        let meter = Meter::new(progress, Phase::Check, self.files.len());
        let check = |file: &PathBuf| meter.count(|| inspect(&self.root.join(file), target));
        let results: Vec<Result<(), DataError>> = self.files.par_iter().map(check).collect();
        let mut fingerprint = fingerprint(target.shape());
        let mut bad = Bad::default();
        let mut good = Vec::new();
        for (i, result) in results.into_iter().enumerate() {
            if keep(i, result, on_bad_image, &mut bad)? {
                fingerprint.push(&self.contents[i]);
                good.push(i);
            }
        }
        self.require_some(good.len() as u64, &bad)?;
        let skipped = self.broken.clone().and(self.skipped(&bad));
        self.files = good.iter().map(|i| std::mem::take(&mut self.files[*i])).collect();
        self.contents = good.iter().map(|i| self.contents[*i]).collect();
        Ok((self, fingerprint.finish(), skipped))
    }

    /// Names and reasons of bad pictures.
    pub fn skipped(&self, bad: &Bad) -> Skipped {
        let name = |(i, reason): &(usize, String)| {
            let file = self.files.get(*i).map(|file| self.root.join(file)).unwrap_or_default();
            format!("{}: {reason}", file.display())
        };
        Skipped { count: bad.count, names: bad.first.iter().map(name).collect() }
    }

    fn require_some(&self, count: u64, bad: &Bad) -> Result<(), DataError> {
        if count > 0 {
            return Ok(());
        }
        Err(none_usable(&self.root, &self.skipped(bad)))
    }
}

/// No picture is left.
pub(super) fn none_usable(root: &Path, skipped: &Skipped) -> DataError {
    let found = format!("{} pictures, none of them usable: {}", skipped.count, skipped.names.join("; "));
    DataError::malformed(root)(Fault::Empty { found, help: "replace them or lower data.size" })
}

/// The fingerprint of a folder: the shape and, for each picture in order, the digest of its file. Names and times are left out, so that a
/// copied or renamed data set is the same one. It is the same whether pictures are cached or decoded when needed, unless some are bad
/// (then they are left out of a cache, and replaced when needed: other images are seen).
fn fingerprint(shape: [usize; 3]) -> FieldHasher {
    FieldHasher::new("pictures 2").shape(shape)
}

/// Reads the header of one picture.
fn inspect(path: &Path, target: Target) -> Result<(), DataError> {
    let error = || DataError::io("read a picture", path);
    let mut file = File::open(path).map_err(error())?;
    let length = file.metadata().map_err(error())?.len();
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head).map_err(error())?;
    let size = match picture::probe(&head) {
        // The header may be longer than what was read.
        Err(_) if length > HEAD => picture::probe(&fs::read(path).map_err(error())?),
        result => result,
    };
    size.and_then(|size| picture::require(size, target.size)).map_err(DataError::malformed(path))
}

/// Decides about picture `i`: a bad one stops or is counted, a file that the system cannot read always stops.
fn keep(i: usize, result: Result<(), DataError>, on_bad_image: OnBadImage, bad: &mut Bad) -> Result<bool, DataError> {
    match result {
        Ok(()) => Ok(true),
        Err(DataError::Malformed { fault, .. }) if on_bad_image == OnBadImage::Skip => {
            bad.count += 1;
            if bad.first.len() < NAMED {
                bad.first.push((i, fault.reason().chars().take(REASON_LENGTH).collect()));
            }
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// A walk through a folder.
struct Scan<'a> {
    root: &'a Path,
    on_bad_image: OnBadImage,
    progress: &'a dyn Progress,
    /// Device and inode of the folders on the way down.
    ancestors: Vec<(u64, u64)>,
    files: Vec<PathBuf>,
    others: u64,
    broken: Skipped,
}

impl Scan<'_> {
    fn folder(&mut self, relative: &Path) -> Result<(), DataError> {
        go_on(self.progress)?;
        let folder = self.root.join(relative);
        let error = || DataError::io("list the folder", &folder);
        let metadata = fs::metadata(&folder).map_err(error())?;
        let id = (metadata.dev(), metadata.ino());
        if self.ancestors.contains(&id) {
            return Ok(()); // a link to a folder above itself
        }
        self.ancestors.push(id);
        let entries: io::Result<Vec<fs::DirEntry>> = fs::read_dir(&folder).map_err(error())?.collect();
        for entry in entries.map_err(error())? {
            let name = entry.file_name();
            // Hidden files are not the user's pictures (macOS leaves ._x.jpg beside x.jpg, editors and tools their caches).
            if name.as_bytes().starts_with(b".") {
                continue;
            }
            let path = relative.join(&name);
            let mut kind = entry.file_type().map_err(error())?;
            if kind.is_symlink() {
                let target = self.root.join(&path);
                kind = match fs::metadata(&target) {
                    Ok(metadata) => metadata.file_type(),
                    // It may have been a picture or a whole folder of them.
                    Err(e) if e.kind() == io::ErrorKind::NotFound && self.on_bad_image == OnBadImage::Skip => {
                        self.broken.add(|| format!("{}: a link to nothing", target.display()));
                        continue;
                    }
                    Err(e) => return Err(DataError::io("follow the link", &target)(e)),
                };
            }
            let extension = path.extension().map(|e| e.to_ascii_lowercase()).unwrap_or_default();
            if kind.is_dir() {
                self.folder(&path)?;
            } else if kind.is_file() && (extension == "png" || extension == "jpg" || extension == "jpeg") {
                self.files.push(path);
            } else {
                self.others += 1;
            }
        }
        self.ancestors.pop();
        Ok(())
    }
}
