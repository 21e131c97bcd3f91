//! The cache: decoded pixels of a data set as one file that is mapped into memory.
//!
//! ```text
//! 0      "DDPMPIX\0"                                  8 bytes
//! 8      version                                      u32, little-endian
//! 12     length of the header                         u32, little-endian
//! 16     SHA-256 of the header                        32 bytes
//! 48     header, JSON (`Header`), then zeros
//! 65536  pixels [N, H, W, C], u8
//! ```
//!
//! The file's name comes from the data set's path and the decoding options, so that a data set has one cache and not one
//! per change; whether it fits is decided by the key inside, which comes from the data set's content. It is written under
//! another name, synced and renamed: a cache is either whole or not there. Every opening compares the pixels with their
//! digest. Processes that want the same cache at once wait for the first (an advisory lock); where the file system has no
//! locks each builds its own and the last rename wins, which is as good.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pixels::{BlockHasher, Bytes, Hash, digest, hex, map_file};
use super::{DataError, Progress};

const MAGIC: &[u8; 8] = b"DDPMPIX\0";
/// Grows when the layout changes or when a decoder gives other pixels for the same file.
const VERSION: u32 = 1;
const PREFIX: usize = 48;
/// Where pixels start: a multiple of every page size.
pub(super) const PAYLOAD: usize = 65536;
/// A temporary file older than this was left by a process that is gone.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// What the header says about the pixels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Digest of the content and the decoding options (hex).
    pub key: String,
    /// Where the pixels came from, for a person.
    pub source: String,
    pub count: u64,
    /// [H, W, C].
    pub shape: [usize; 3],
    /// [`digest`] of the pixels (hex).
    pub pixels: String,
    /// The data set's fingerprint (hex).
    pub fingerprint: String,
    /// Pictures left out, and the names of the first few.
    pub skipped: u64,
    pub skipped_names: Vec<String>,
}

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
    File { file: &'a File, path: &'a Path, bytes: u64 },
    Memory(&'a mut Vec<u8>),
}

impl<'a> Sink<'a> {
    fn new(output: Output<'a>) -> Sink<'a> {
        Sink { output, hasher: BlockHasher::default() }
    }

    pub fn append(&mut self, pixels: &[u8]) -> Result<(), DataError> {
        match &mut self.output {
            Output::File { file, path, bytes } => {
                file.write_all(pixels).map_err(cache_error(path, "write the cache", *bytes))?
            }
            Output::Memory(vec) => vec.extend_from_slice(pixels),
        }
        self.hasher.update(pixels);
        Ok(())
    }

    fn finish(self, request: &Request, built: Built) -> Header {
        let Built { count, shape, fingerprint, skipped, skipped_names } = built;
        let pixels = self.hasher.finish();
        let fingerprint = hex(&fingerprint(&pixels));
        let source = request.source.display().to_string();
        Header {
            key: hex(&request.key),
            source,
            count,
            shape,
            pixels: hex(&pixels),
            fingerprint,
            skipped,
            skipped_names,
        }
    }
}

/// What a decoder returns after the last pixel; the cache adds key, source and digest. The fingerprint is made from the
/// pixels' digest where the decoder has none of its own.
pub(super) struct Built {
    pub count: u64,
    pub shape: [usize; 3],
    pub fingerprint: Box<dyn FnOnce(&Hash) -> Hash>,
    pub skipped: u64,
    pub skipped_names: Vec<String>,
}

fn cache_error<'a>(path: &'a Path, action: &'static str, bytes: u64) -> impl FnOnce(io::Error) -> DataError + 'a {
    move |source| DataError::CacheDir { path: path.to_path_buf(), action, bytes, source }
}

/// `$XDG_CACHE_HOME/ddpm-dist`, else `~/.cache/ddpm-dist`.
pub(super) fn user_cache_dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    dir("XDG_CACHE_HOME").or_else(|| dir("HOME").map(|home| home.join(".cache"))).map(|dir| dir.join("ddpm-dist"))
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
        Err(DataError::CacheDir { path, action, source, .. }) if !request.required => {
            in_memory(request, build, &format!("cannot {action} at {}: {source}", path.display()))
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
    let path = dir.join(file_name(request));
    // A valid cache is used wherever it lies, even where nothing can be written.
    if let Ok(cached) = open(&path, request) {
        return Ok(cached);
    }
    fs::create_dir_all(dir).map_err(cache_error(dir, "create the directory", request.bytes))?;
    let _lock = lock(&path.with_extension("lock"), request)?;
    match open(&path, request) {
        Ok(cached) => return Ok(cached),
        Err(Miss::Absent) => {}
        Err(Miss::Other(why)) => {
            request.progress.notice(&format!("the data cache {} {why}: it is built again", path.display()));
        }
    }
    remove_abandoned(dir, &path);
    let temporary = dir.join(format!("{}.{}.tmp", file_name(request), unique()));
    let result = write(&temporary, request, build).and_then(|()| {
        fs::rename(&temporary, &path).map_err(cache_error(&path, "rename the cache", request.bytes))?;
        // The rename itself must survive a power cut; some file systems cannot sync a directory, and need not.
        File::open(dir).and_then(|dir| dir.sync_all()).ok();
        open(&path, request).map_err(|miss| {
            let why = match miss {
                Miss::Absent => "it is gone".to_string(),
                Miss::Other(why) => why,
            };
            cache_error(&path, "read back the cache", request.bytes)(io::Error::other(why))
        })
    });
    if result.is_err() {
        fs::remove_file(&temporary).ok();
    }
    result
}

/// A part of a temporary file's name that no other process or thread of this or another machine uses.
fn unique() -> String {
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    format!("{}-{nanos:x}-{count}", std::process::id())
}

fn file_name(request: &Request) -> String {
    use std::os::unix::ffi::OsStrExt;
    let source = fs::canonicalize(request.source).unwrap_or_else(|_| request.source.to_path_buf());
    let hash =
        Sha256::new().chain_update(source.as_os_str().as_bytes()).chain_update([0]).chain_update(&request.options);
    let stem: String =
        source.file_name().map(|name| name.to_string_lossy()).unwrap_or_default().chars().take(40).collect();
    let stem = stem.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "_");
    format!("{stem}-{}.pixels", hex(&hash.finalize()[..8]))
}

/// Waits until no other process builds this cache. `None`: this file system has no locks.
fn lock(path: &Path, request: &Request) -> Result<Option<File>, DataError> {
    let options = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = options.map_err(cache_error(path, "create the lock file", request.bytes))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => {
            request.progress.notice("another process is building this data cache: waiting for it");
            Ok(file.lock().ok().map(|()| file))
        }
        Err(fs::TryLockError::Error(_)) => Ok(None),
    }
}

/// Deletes temporary files of this cache that a killed process left behind.
fn remove_abandoned(dir: &Path, path: &Path) {
    let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { return };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let found = entry.file_name().to_string_lossy().into_owned();
        let old = || entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if found.starts_with(&name) && found.ends_with(".tmp") && old().is_some_and(|age| age > ABANDONED) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

fn write(path: &Path, request: &Request, build: Build) -> Result<(), DataError> {
    let error = |action| cache_error(path, action, request.bytes);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(error("create the cache"))?;
    // A disk that is too full is found out now and not after an hour of decoding. Not every file system can reserve.
    let reserved = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, PAYLOAD as u64 + request.bytes);
    if let Err(full @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) = reserved {
        return Err(error("reserve space for the cache")(full.into()));
    }
    file.seek(SeekFrom::Start(PAYLOAD as u64)).map_err(error("write the cache"))?;
    let mut sink = Sink::new(Output::File { file: &file, path, bytes: request.bytes });
    let built = build(&mut sink)?;
    let start = encode(&sink.finish(request, built)).map_err(error("write the header of the cache"))?;
    // Skipped pictures leave reserved space over.
    let end = file.stream_position().map_err(error("write the cache"))?;
    file.set_len(end).map_err(error("write the cache"))?;
    file.seek(SeekFrom::Start(0)).map_err(error("write the cache"))?;
    file.write_all(&start).map_err(error("write the cache"))?;
    file.sync_all().map_err(error("sync the cache"))
}

/// Everything before the pixels but the zeros.
fn encode(header: &Header) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(header)?;
    if PREFIX + json.len() > PAYLOAD {
        return Err(io::Error::other(format!("{} bytes, at most {}", json.len(), PAYLOAD - PREFIX)));
    }
    let mut start = MAGIC.to_vec();
    start.extend(VERSION.to_le_bytes());
    start.extend((json.len() as u32).to_le_bytes());
    start.extend(Sha256::digest(&json));
    start.extend(json);
    Ok(start)
}

/// Why a cache cannot be used.
#[derive(Debug)]
enum Miss {
    Absent,
    /// Completes the sentence "the data cache …".
    Other(String),
}

fn open(path: &Path, request: &Request) -> Result<Cached, Miss> {
    let other = |why: &str| Miss::Other(why.to_string());
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Miss::Absent),
        Err(e) => return Err(Miss::Other(format!("cannot be opened ({e})"))),
    };
    let unreadable = |e: io::Error| Miss::Other(format!("cannot be read ({e})"));
    let mut start = [0; PREFIX];
    file.read_exact(&mut start).map_err(unreadable)?;
    if start[..8] != MAGIC[..] {
        return Err(other("is not a data cache"));
    }
    let number = |at: usize| u32::from_le_bytes([start[at], start[at + 1], start[at + 2], start[at + 3]]);
    if number(8) != VERSION {
        return Err(Miss::Other(format!("has version {}, not {VERSION}", number(8))));
    }
    let length = number(12) as usize;
    if PREFIX + length > PAYLOAD {
        return Err(other("is damaged (length of the header)"));
    }
    let mut json = vec![0; length];
    file.read_exact(&mut json).map_err(unreadable)?;
    if Sha256::digest(&json)[..] != start[16..PREFIX] {
        return Err(other("is damaged (digest of the header)"));
    }
    let header: Header = serde_json::from_slice(&json).map_err(|e| Miss::Other(format!("is damaged ({e})")))?;
    if header.key != hex(&request.key) {
        return Err(other("was made from other content"));
    }
    let bytes = header.shape.iter().try_fold(header.count, |product, d| product.checked_mul(*d as u64));
    let expected = bytes.and_then(|bytes| bytes.checked_add(PAYLOAD as u64));
    let found = file.metadata().map_err(unreadable)?.len();
    if header.count == 0 || expected != Some(found) {
        return Err(Miss::Other(format!("is damaged ({found} bytes, expected {})", expected.unwrap_or(0))));
    }
    let map = map_file(&file).map_err(unreadable)?;
    if hex(&digest(&map[PAYLOAD..])) != header.pixels {
        return Err(other("is damaged (digest of the pixels)"));
    }
    Ok(Cached { header, bytes: Bytes::Mapped(map), offset: PAYLOAD })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::data::Phase;

    #[derive(Default)]
    struct Notices(Mutex<Vec<String>>);

    impl Progress for Notices {
        fn update(&self, _: Phase, _: u64, _: u64) {}
        fn notice(&self, message: &str) {
            self.0.lock().unwrap().push(message.to_string());
        }
    }

    /// Two images of [1, 2, 1].
    fn build(sink: &mut Sink) -> Result<Built, DataError> {
        sink.append(&[1, 2])?;
        sink.append(&[3, 4])?;
        let fingerprint = Box::new(|pixels: &Hash| *pixels);
        Ok(Built { count: 2, shape: [1, 2, 1], fingerprint, skipped: 0, skipped_names: Vec::new() })
    }

    #[test]
    fn without_a_writable_directory_of_its_own_choice_pixels_stay_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"").unwrap();
        for cache in [None, Some(dir.path().join("file/cache"))] {
            let notices = Notices::default();
            let source = dir.path();
            let key = [7; 32];
            let request = Request {
                source,
                options: String::new(),
                key,
                bytes: 4,
                dir: cache,
                required: false,
                progress: &notices,
            };
            let cached = open_or_build(&request, &build).unwrap();
            assert!(matches!(cached.bytes, Bytes::Memory(_)));
            assert_eq!((&cached.bytes[cached.offset..], cached.header.count), (&[1, 2, 3, 4][..], 2));
            assert!(notices.0.lock().unwrap()[0].contains("kept in memory"));
            let required = Request { required: true, ..request };
            if required.dir.is_some() {
                assert!(matches!(open_or_build(&required, &build), Err(DataError::CacheDir { .. })));
            }
        }
    }

    #[test]
    fn a_temporary_file_is_removed_only_when_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let request = Request {
            source: dir.path(),
            options: String::new(),
            key: [7; 32],
            bytes: 4,
            dir: Some(dir.path().join("cache")),
            required: true,
            progress: &(),
        };
        let name = file_name(&request);
        std::fs::create_dir(dir.path().join("cache")).unwrap();
        let [old, young, other] = [format!("{name}.1-2-3.tmp"), format!("{name}.4-5-6.tmp"), "other.1.tmp".to_string()]
            .map(|name| dir.path().join("cache").join(name));
        for path in [&old, &young, &other] {
            let file = File::create(path).unwrap();
            if path != &young {
                file.set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
            }
        }
        open_or_build(&request, &build).unwrap();
        assert_eq!((old.exists(), young.exists(), other.exists()), (false, true, true));
    }
}
