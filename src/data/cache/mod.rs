//! The cache: decoded pixels of a data set as one file that is mapped into memory.
//!
//! A cache is found by its key, which comes from the content of the data set and the decoding options: where the data set lies and when its
//! files were touched does not matter. Its name also holds a digest of the data set's path and the options, so that a data set whose
//! content changes has one cache and not one per change. It is written under another name, synced and renamed: a cache is either whole or
//! not there. Every opening compares the pixels with their digest. Processes that want the same cache at once wait for the first (an
//! advisory lock); where the file system has no locks each builds its own and the last rename wins, which is as good.

mod file;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::folder::Bad;
use super::pixels::{BlockHasher, Bytes, Hash};
use super::progress::go_on;
use super::{DataError, Progress};
use crate::files::{AtomicFile, Durability, hex, is_unique_id};
use file::{Header, Miss, PAYLOAD, encode, open};

/// A temporary file older than this was left by a process that is gone.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// How often a process that waits for another looks whether it should stop.
const POLL: Duration = Duration::from_millis(100);

/// Pixels, whether cached or kept in memory.
pub(super) struct Cached {
    pub header: Header,
    pub bytes: Bytes,
    /// Of the first pixel in `bytes`.
    pub offset: usize,
}

/// What is to be cached and where.
pub(super) struct Request<'a> {
    /// The data set.
    pub source: &'a Path,
    /// Names the cache file together with `source`: decoding options.
    pub options: String,
    /// Digest of the content and the decoding options.
    pub key: Hash,
    /// Bytes that will be needed at most.
    pub bytes: u64,
    /// Where the cache goes; `None` keeps pixels in memory.
    pub dir: Option<PathBuf>,
    /// `dir` is what the user asked for: not being able to write there is an error.
    pub required: bool,
    pub progress: &'a dyn Progress,
}

/// Decodes everything into a sink; called again if the first place for the pixels turns out to be unusable.
pub(super) type Build<'a> = &'a dyn Fn(&mut Sink) -> Result<Built, DataError>;

/// Takes pixels in order while they are decoded.
pub(super) struct Sink<'a> {
    output: Output<'a>,
    hasher: BlockHasher,
}

enum Output<'a> {
    File { file: &'a mut File, dir: &'a Path, bytes: u64 },
    Memory(&'a mut Vec<u8>),
}

impl<'a> Sink<'a> {
    fn new(output: Output<'a>) -> Sink<'a> {
        Sink { output, hasher: BlockHasher::default() }
    }

    pub fn append(&mut self, pixels: &[u8]) -> Result<(), DataError> {
        match &mut self.output {
            Output::File { file, dir, bytes } => {
                file.write_all(pixels).map_err(cache_error(dir, "write the cache", *bytes))?
            }
            Output::Memory(vec) => vec.extend_from_slice(pixels),
        }
        self.hasher.update(pixels);
        Ok(())
    }

    fn finish(self, request: &Request, built: Built) -> Header {
        let Built { count, shape, fingerprint, bad } = built;
        let pixels = self.hasher.finish();
        let fingerprint = hex(&fingerprint(&pixels));
        let source = request.source.display().to_string();
        Header { key: hex(&request.key), source, count, shape, pixels: hex(&pixels), fingerprint, bad }
    }
}

/// What a decoder returns after the last pixel; the cache adds key, source and digest. The fingerprint is made from the
/// pixels' digest where the decoder has none of its own.
pub(super) struct Built {
    pub count: u64,
    pub shape: [usize; 3],
    pub fingerprint: Box<dyn FnOnce(&Hash) -> Hash>,
    pub bad: Bad,
}

fn cache_error<'a>(dir: &'a Path, action: &'static str, bytes: u64) -> impl FnOnce(io::Error) -> DataError + 'a {
    move |source| DataError::CacheDir { dir: dir.to_path_buf(), action, bytes, source }
}

/// Opens the cache, or builds it with `build` if it is absent, of other content or damaged.
///
/// # Errors
/// Those of `build`; [`DataError::CacheDir`] if the required directory cannot be written (one that is not required is then
/// done without: pixels stay in memory, with a notice).
pub(super) fn open_or_build(request: &Request, build: Build) -> Result<Cached, DataError> {
    let Some(dir) = &request.dir else {
        return in_memory(request, build, "neither XDG_CACHE_HOME nor HOME is set");
    };
    match in_dir(dir, request, build) {
        Err(DataError::CacheDir { dir, action, source, .. }) if !request.required => {
            in_memory(request, build, &format!("{}: cannot {action}: {source}", dir.display()))
        }
        result => result,
    }
}

fn in_memory(request: &Request, build: Build, why: &str) -> Result<Cached, DataError> {
    request.progress.notice(&format!(
        "no data cache ({why}): pixels are kept in memory; set data.cache_dir to a writable directory to decode only once"
    ));
    let mut pixels = Vec::new();
    let mut sink = Sink::new(Output::Memory(&mut pixels));
    let built = build(&mut sink)?;
    let header = sink.finish(request, built);
    Ok(Cached { header, bytes: Bytes::Memory(pixels), offset: 0 })
}

fn in_dir(dir: &Path, request: &Request, build: Build) -> Result<Cached, DataError> {
    let Names { own, place, .. } = Names::of(request);
    let path = dir.join(&own);
    // A valid cache is used wherever it lies, even where nothing can be written.
    if let Ok(cached) = find(dir, request)? {
        return Ok(cached);
    }
    let error = |action| cache_error(dir, action, request.bytes);
    fs::create_dir_all(dir).map_err(error("create the directory"))?;
    let _lock = lock(&path.with_extension("lock"), dir, request)?;
    let before = earlier(dir, &place, &own);
    match find(dir, request)? {
        Ok(cached) => return Ok(cached),
        Err(Some(why)) => request.progress.notice(&format!("the data cache {why}: it is built again")),
        Err(None) if !before.is_empty() => {
            let name = dir.join(&before[0]);
            let text = format!("the data cache {} was made from other content: it is built again", name.display());
            request.progress.notice(&text);
        }
        Err(None) => {}
    }
    remove_abandoned(dir);
    write(&path, dir, request, build)?;
    let cached = open(&path, &request.key, request.progress).map_err(|miss| match miss {
        Miss::Stopped => DataError::Stopped,
        Miss::Absent => error("read back the cache")(io::ErrorKind::NotFound.into()),
        Miss::Other(why) => error("read back the cache")(io::Error::other(why)),
    })?;
    // What the data set held before is not needed any more. A process that has it mapped keeps it.
    for name in before {
        fs::remove_file(dir.join(&name)).ok();
        fs::remove_file(dir.join(&name).with_extension("lock")).ok();
    }
    Ok(cached)
}

/// What the files of a cache are called: `STEM-PLACE-KEY.pixels`.
struct Names {
    own: String,
    /// The beginning of the names of all caches of this data set with these options.
    place: String,
    /// The end of the names of all caches of this content.
    content: String,
}

impl Names {
    fn of(request: &Request) -> Names {
        let place = format!("{}-", place(request.source, &request.options));
        let content = format!("-{}.pixels", hex(&request.key[..8]));
        Names { own: format!("{place}{}", &content[1..]), place, content }
    }
}

/// A name for what concerns the data set at `source`: readable at the front, a digest of path and `options` at the end.
pub(super) fn place(source: &Path, options: &str) -> String {
    let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_path_buf());
    let hash = Sha256::new().chain_update(source.as_os_str().as_bytes()).chain_update([0]).chain_update(options);
    let stem: String =
        source.file_name().map(|name| name.to_string_lossy()).unwrap_or_default().chars().take(40).collect();
    let stem = stem.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "_");
    format!("{stem}-{}", hex(&hash.finalize()[..8]))
}

/// A whole cache of this content, whichever data set it was made from; or what is wrong with the one there is.
fn find(dir: &Path, request: &Request) -> Result<Result<Cached, Option<String>>, DataError> {
    let Names { own, content, .. } = Names::of(request);
    let mut names = names(dir, |name| name.ends_with(&content) && *name != own);
    names.insert(0, own);
    let mut why = None;
    for name in names {
        let path = dir.join(name);
        match open(&path, &request.key, request.progress) {
            Ok(cached) => return Ok(Ok(cached)),
            Err(Miss::Absent) => {}
            Err(Miss::Other(fault)) => why = why.or_else(|| Some(format!("{} {fault}", path.display()))),
            Err(Miss::Stopped) => return Err(DataError::Stopped),
        }
    }
    Ok(Err(why))
}

/// Caches of this data set from the time when it held something else.
fn earlier(dir: &Path, place: &str, own: &str) -> Vec<String> {
    names(dir, |name| name.starts_with(place) && name.ends_with(".pixels") && name != own)
}

/// Names in the directory, sorted; none if it cannot be listed.
fn names(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| wanted(n)).collect();
    names.sort_unstable();
    names
}

/// Waits until no other process builds this cache. `None`: this file system has no locks.
fn lock(path: &Path, dir: &Path, request: &Request) -> Result<Option<File>, DataError> {
    let options = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = options.map_err(cache_error(dir, "create the lock file of the cache", request.bytes))?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => {
                if !told {
                    request.progress.notice("another process is building this data cache: waiting for it");
                    told = true;
                }
                go_on(request.progress)?;
                std::thread::sleep(POLL);
            }
            Err(fs::TryLockError::Error(_)) => return Ok(None),
        }
    }
}

/// Deletes temporary files that a killed process left behind.
fn remove_abandoned(dir: &Path) {
    let is_ours = |name: &str| {
        let parts = name.rsplit_once(".tmp-");
        parts.is_some_and(|(name, id)| (name.ends_with(".pixels") || name.ends_with(".index")) && is_unique_id(id))
    };
    for name in names(dir, is_ours) {
        let path = dir.join(name);
        let age = fs::metadata(&path).and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > ABANDONED) {
            fs::remove_file(path).ok();
        }
    }
}

fn write(path: &Path, dir: &Path, request: &Request, build: Build) -> Result<(), DataError> {
    let error = |action| cache_error(dir, action, request.bytes);
    let mut atomic = AtomicFile::create(path).map_err(error("create the cache"))?;
    let file = atomic.file();
    // A disk that is too full is found out now and not after an hour of decoding. Not every file system can reserve.
    let reserved = rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, PAYLOAD as u64 + request.bytes);
    if let Err(full @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) = reserved {
        return Err(error("reserve space for the cache")(full.into()));
    }
    file.seek(SeekFrom::Start(PAYLOAD as u64)).map_err(error("write the cache"))?;
    let mut sink = Sink::new(Output::File { file, dir, bytes: request.bytes });
    let built = build(&mut sink)?;
    let start = encode(&sink.finish(request, built)).map_err(error("write the header of the cache"))?;
    let file = atomic.file();
    // Skipped pictures leave reserved space over.
    let end = file.stream_position().map_err(error("write the cache"))?;
    file.set_len(end).map_err(error("write the cache"))?;
    file.seek(SeekFrom::Start(0)).map_err(error("write the cache"))?;
    file.write_all(&start).map_err(error("write the cache"))?;
    atomic.commit(Durability::PowerFailure).map_err(error("sync and rename the cache"))
}
