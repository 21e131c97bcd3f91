//! A folder of pictures: finding them, checking them, decoding them.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::cache::{Built, Sink};
use super::picture::{self, Target};
use super::pixels::{FieldHasher, Hash};
use super::{DataError, Fault, OnBadImage, Phase, Progress};

/// Pictures of a folder in the order of their paths.
#[derive(Debug)]
pub(super) struct Folder {
    pub root: PathBuf,
    /// Relative to `root`, sorted.
    pub files: Vec<PathBuf>,
}

/// Pictures that were left out, and what a person is told about the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    pub count: u64,
    pub names: Vec<String>,
}

/// As many skipped pictures are named; names are cut so that they fit a cache's header.
const NAMED: usize = 5;
const NAME_LENGTH: usize = 1000;
/// Enough of a picture for its header, EXIF thumbnails and colour profiles included, in all but rare files.
const HEAD: u64 = 256 * 1024;
/// Bytes at either end of a picture that go into the fingerprint.
const SAMPLE: usize = 4096;
/// Decoded pixels that wait for the ones before them.
const CHUNK_BYTES: usize = 32 << 20;

impl Skipped {
    fn add(&mut self, error: &DataError) {
        self.count += 1;
        if self.names.len() < NAMED {
            self.names.push(error.to_string().chars().take(NAME_LENGTH).collect());
        }
    }
}

impl Folder {
    /// Finds every `.png`, `.jpg` and `.jpeg` under `root`. Links are followed; names that start with a dot are not.
    pub fn scan(root: &Path) -> Result<Folder, DataError> {
        let mut files = Vec::new();
        let mut others = 0;
        let mut ancestors = Vec::new();
        scan_into(root, Path::new(""), &mut ancestors, &mut files, &mut others)?;
        // By bytes, so that the order is the same whatever the locale and the file system's own order.
        files.sort_unstable_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
        if files.is_empty() {
            let found = format!("a folder of {others} other files");
            let help = "let data.path name a folder that holds .png, .jpg or .jpeg files (at any depth)";
            return Err(DataError::malformed(root)(Fault::Empty { found, help }));
        }
        Ok(Folder { root: root.to_path_buf(), files })
    }

    /// Digest of names, sizes, times and inodes: any of them differs when a picture is replaced, also by one of the same
    /// size (its times then differ), or by one with the times of the old (its change time then differs).
    pub fn key(&self, options: &str) -> Result<Hash, DataError> {
        let stats: Result<Vec<[u64; 6]>, DataError> = self
            .files
            .par_iter()
            .map(|file| {
                let path = self.root.join(file);
                let m = fs::metadata(&path).map_err(DataError::io("look at a picture", &path))?;
                let times = [m.mtime() as u64, m.mtime_nsec() as u64, m.ctime() as u64, m.ctime_nsec() as u64];
                Ok([m.size(), m.ino(), times[0], times[1], times[2], times[3]])
            })
            .collect();
        let mut hasher = FieldHasher::new("folder cache 1").field(options.as_bytes());
        for (file, stat) in self.files.iter().zip(stats?) {
            hasher.push(file.as_os_str().as_bytes());
            stat.iter().for_each(|number| hasher.push(&number.to_le_bytes()));
        }
        Ok(hasher.finish())
    }

    /// Decodes picture `i` into `out`.
    pub fn decode(&self, i: usize, target: Target, out: &mut [u8]) -> Result<(), DataError> {
        self.decode_sampled(i, target, out).map(|_| ())
    }

    fn decode_sampled(&self, i: usize, target: Target, out: &mut [u8]) -> Result<Hash, DataError> {
        let path = self.root.join(&self.files[i]);
        let bytes = fs::read(&path).map_err(DataError::io("read a picture", &path))?;
        picture::decode(&bytes, target, out).map_err(DataError::malformed(&path))?;
        let ends = bytes.len().min(SAMPLE);
        Ok(sample(bytes.len() as u64, &bytes[..ends], &bytes[bytes.len() - ends..]))
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
        let (mut skipped, mut count) = (Skipped::default(), 0);
        let indices: Vec<usize> = (0..self.files.len()).collect();
        let meter = Meter::new(progress, Phase::Decode, self.files.len());
        for chunk in indices.chunks(per_chunk) {
            let results: Vec<Result<Hash, DataError>> = chunk
                .par_iter()
                .zip(buffer.par_chunks_mut(image))
                .map(|(i, out)| meter.count(self.decode_sampled(*i, target, out)))
                .collect();
            for (result, pixels) in results.into_iter().zip(buffer.chunks(image)) {
                if let Some(hash) = keep(result, on_bad_image, &mut skipped)? {
                    fingerprint.push(&hash);
                    sink.append(pixels)?;
                    count += 1;
                }
            }
        }
        self.require_some(count, &skipped)?;
        let fingerprint = fingerprint.finish();
        let (skipped, skipped_names) = (skipped.count, skipped.names);
        Ok(Built { count, shape, fingerprint: Box::new(move |_| fingerprint), skipped, skipped_names })
    }

    /// Checks the header of every picture; returns the folder without skipped pictures, and the fingerprint.
    pub fn check_all(
        mut self,
        target: Target,
        on_bad_image: OnBadImage,
        progress: &dyn Progress,
    ) -> Result<(Folder, Hash, Skipped), DataError> {
        let meter = Meter::new(progress, Phase::Check, self.files.len());
        let results: Vec<Result<Hash, DataError>> =
            self.files.par_iter().map(|file| meter.count(inspect(&self.root.join(file), target))).collect();
        let mut fingerprint = fingerprint(target.shape());
        let mut skipped = Skipped::default();
        let mut good = Vec::new();
        for (file, result) in std::mem::take(&mut self.files).into_iter().zip(results) {
            if let Some(hash) = keep(result, on_bad_image, &mut skipped)? {
                fingerprint.push(&hash);
                good.push(file);
            }
        }
        self.files = good;
        self.require_some(self.files.len() as u64, &skipped)?;
        Ok((self, fingerprint.finish(), skipped))
    }

    fn require_some(&self, count: u64, skipped: &Skipped) -> Result<(), DataError> {
        if count > 0 {
            return Ok(());
        }
        let found = format!("{} pictures, none of them usable: {}", skipped.count, skipped.names.join("; "));
        Err(DataError::malformed(&self.root)(Fault::Empty { found, help: "replace them or lower data.size" }))
    }
}

/// The fingerprint of a folder: the shape and, for each picture in order, its size and the bytes at both ends. Those hold
/// the header and, in a PNG, checksums of all pixels; names and times are left out, so that a copied or renamed data set
/// is the same one. It is the same whether pictures are cached or decoded when needed.
fn fingerprint(shape: [usize; 3]) -> FieldHasher {
    FieldHasher::new("pictures 1").shape(shape)
}

fn sample(length: u64, head: &[u8], tail: &[u8]) -> Hash {
    FieldHasher::new("picture 1").field(&length.to_le_bytes()).field(head).field(tail).finish()
}

/// Reads the header of one picture.
fn inspect(path: &Path, target: Target) -> Result<Hash, DataError> {
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
    size.and_then(|size| picture::require(size, target.size)).map_err(DataError::malformed(path))?;
    let ends = head.len().min(SAMPLE);
    let mut tail = vec![0; ends];
    file.seek(SeekFrom::Start(length.saturating_sub(ends as u64))).map_err(error())?;
    file.read_exact(&mut tail).map_err(error())?;
    Ok(sample(length, &head[..ends], &tail))
}

/// Decides about one picture: a bad one stops or is counted, a file that the system cannot read always stops.
fn keep(
    result: Result<Hash, DataError>,
    on_bad_image: OnBadImage,
    skipped: &mut Skipped,
) -> Result<Option<Hash>, DataError> {
    match result {
        Ok(hash) => Ok(Some(hash)),
        Err(error @ DataError::Malformed { .. }) if on_bad_image == OnBadImage::Skip => {
            skipped.add(&error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Counts finished pictures of all threads and reports about a hundred times.
struct Meter<'a> {
    progress: &'a dyn Progress,
    phase: Phase,
    done: std::sync::atomic::AtomicU64,
    total: u64,
}

impl Meter<'_> {
    fn new(progress: &dyn Progress, phase: Phase, total: usize) -> Meter<'_> {
        Meter { progress, phase, done: 0.into(), total: total as u64 }
    }

    fn count<T>(&self, result: T) -> T {
        let done = 1 + self.done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if done == self.total || done.is_multiple_of(self.total.div_ceil(100)) {
            self.progress.update(self.phase, done, self.total);
        }
        result
    }
}

fn scan_into(
    root: &Path,
    relative: &Path,
    ancestors: &mut Vec<(u64, u64)>,
    files: &mut Vec<PathBuf>,
    others: &mut u64,
) -> Result<(), DataError> {
    let folder = root.join(relative);
    let error = || DataError::io("list the folder", &folder);
    let metadata = fs::metadata(&folder).map_err(error())?;
    let id = (metadata.dev(), metadata.ino());
    if ancestors.contains(&id) {
        return Ok(()); // a link to a folder above itself
    }
    ancestors.push(id);
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
            let target = root.join(&path);
            kind = fs::metadata(&target).map_err(DataError::io("follow the link", &target))?.file_type();
        }
        let extension = path.extension().map(|e| e.to_ascii_lowercase()).unwrap_or_default();
        if kind.is_dir() {
            scan_into(root, &path, ancestors, files, others)?;
        } else if kind.is_file() && (extension == "png" || extension == "jpg" || extension == "jpeg") {
            files.push(path);
        } else {
            *others += 1;
        }
    }
    ancestors.pop();
    Ok(())
}
