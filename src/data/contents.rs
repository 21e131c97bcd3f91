//! What is in each picture of a folder: the SHA-256 of every file.
//!
//! Reading a large folder takes minutes, so an index in the cache directory remembers the digests with what `stat` says of the files. A
//! file of which `stat` says the same is not read again; after a copy, a touch, or on a file system whose inodes change, files are read and
//! found to be the same. The index is a shortcut and no more: where it is damaged or cannot be written, all files are read.
//!
//! ```text
//! 0   "DDPMIDX\0"               8 bytes
//! 8   version                   u32, little-endian
//! 12  SHA-256 of the rest       32 bytes
//! 44  for each file: length of its path (u32), path, stat (6 × u64), SHA-256
//! ```

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::pixels::Hash;
use super::progress::Meter;
use super::{DataError, Phase, Progress};
use crate::files::{AtomicFile, Durability};

const MAGIC: &[u8; 8] = b"DDPMIDX\0";
const VERSION: u32 = 1;
const PREFIX: usize = 44;
const STAT: usize = 48;
const HASH: usize = 32;
/// A file that changed more recently than this before it was read may change again without its times telling: clocks of file systems
/// tick in up to two seconds.
const SETTLED: Duration = Duration::from_secs(2);

/// Size, inode, time of modification and time of change: one of them differs when a file is replaced, also by one of the same size (its
/// times then differ), or by one with the times of the old (its change time then differs).
type Stat = [u64; 6];

fn stat(m: &fs::Metadata) -> Stat {
    [m.size(), m.ino(), m.mtime() as u64, m.mtime_nsec() as u64, m.ctime() as u64, m.ctime_nsec() as u64]
}

/// Digests of `files` below `root`, in order; `index` is where they are remembered.
pub(super) fn contents(
    root: &Path,
    files: &[PathBuf],
    index: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Vec<Hash>, DataError> {
    let known = index.and_then(load).unwrap_or_default();
    let unsettled = SystemTime::now().checked_sub(SETTLED).and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let unsettled = unsettled.unwrap_or_default().as_secs() as i64;
    let meter = Meter::new(progress, Phase::Read, files.len());
    let one = |file: &PathBuf| -> Result<(Stat, Hash, bool), DataError> {
        let path = root.join(file);
        let error = || DataError::io("read a picture", &path);
        let metadata = fs::metadata(&path).map_err(error())?;
        let stat = stat(&metadata);
        match known.get(file.as_path()) {
            Some((known, hash)) if *known == stat => Ok((stat, *hash, true)),
            _ => Ok((stat, hash(&path).map_err(error())?, metadata.ctime() < unsettled)),
        }
    };
    let found: Result<Vec<_>, DataError> = files.par_iter().map(|file| meter.count(|| one(file))).collect();
    let found = found?;
    let settled = || files.iter().zip(&found).filter(|(_, (_, _, settled))| *settled);
    let news = settled().count() != known.len()
        || settled().any(|(file, (stat, hash, _))| known.get(file.as_path()) != Some(&(*stat, *hash)));
    if let (Some(index), true) = (index, news) {
        // Without an index files are read again, which is slow and right.
        store(index, settled().map(|(file, (stat, hash, _))| (file.as_path(), stat, hash))).ok();
    }
    Ok(found.into_iter().map(|(_, hash, _)| hash).collect())
}

/// SHA-256 of a file, which need not fit memory.
fn hash(path: &Path) -> io::Result<Hash> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

type Known = HashMap<PathBuf, (Stat, Hash)>;

/// Nothing if the file is not there, or not as it was written.
fn load(path: &Path) -> Option<Known> {
    let bytes = fs::read(path).ok()?;
    let (prefix, mut body) = bytes.split_at_checked(PREFIX)?;
    let whole = prefix[..8] == MAGIC[..] && prefix[8..12] == VERSION.to_le_bytes();
    if !whole || prefix[12..] != Sha256::digest(body)[..] {
        return None;
    }
    let mut known = Known::new();
    while !body.is_empty() {
        let (length, rest) = body.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let (words, rest) = rest.split_first_chunk::<STAT>()?;
        let (hash, rest) = rest.split_first_chunk::<HASH>()?;
        let mut stat = [0; 6];
        stat.iter_mut().zip(words.as_chunks::<8>().0).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
        known.insert(PathBuf::from(std::ffi::OsStr::from_bytes(name)), (stat, *hash));
        body = rest;
    }
    Some(known)
}

fn store<'a>(path: &Path, entries: impl Iterator<Item = (&'a Path, &'a Stat, &'a Hash)>) -> io::Result<()> {
    let mut body = Vec::new();
    for (file, stat, hash) in entries {
        let name = file.as_os_str().as_bytes();
        body.extend((name.len() as u32).to_le_bytes());
        body.extend(name);
        stat.iter().for_each(|word| body.extend(word.to_le_bytes()));
        body.extend(hash);
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut file = AtomicFile::create(path)?;
    file.file().write_all(MAGIC)?;
    file.file().write_all(&VERSION.to_le_bytes())?;
    file.file().write_all(&Sha256::digest(&body))?;
    file.file().write_all(&body)?;
    file.commit(Durability::Kill)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let (root, index) = (dir.path().join("p"), dir.path().join("cache/x.index"));
        fs::create_dir(&root).unwrap();
        let files: Vec<PathBuf> = ["a", "b", "c"].map(PathBuf::from).to_vec();
        files.iter().for_each(|f| fs::write(root.join(f), f.as_os_str().as_bytes()).unwrap());
        let sha = |text: &str| -> Hash { Sha256::digest(text).into() };
        let read = |files: &[PathBuf]| contents(&root, files, Some(&index), &()).unwrap();
        assert_eq!(read(&files), [sha("a"), sha("b"), sha("c")]);
        // All of them too young to be trusted.
        assert!(load(&index).is_none_or(|known| known.is_empty()));
        std::thread::sleep(SETTLED + Duration::from_millis(1100));
        assert_eq!(read(&files), [sha("a"), sha("b"), sha("c")]);
        assert_eq!(load(&index).unwrap().len(), 3);

        // What the index says is believed: a wrong digest in it comes back, until `stat` says otherwise.
        let mut known = load(&index).unwrap();
        known.get_mut(Path::new("b")).unwrap().1 = sha("planted");
        store(&index, known.iter().map(|(file, (stat, hash))| (file.as_path(), stat, hash))).unwrap();
        assert_eq!(read(&files), [sha("a"), sha("planted"), sha("c")]);
        fs::write(root.join("b"), "B").unwrap();
        assert_eq!(read(&files), [sha("a"), sha("B"), sha("c")]);
        // `b` is young again, `c` is gone.
        assert_eq!(read(&files[..2]), [sha("a"), sha("B")]);
        assert_eq!(load(&index).unwrap().into_keys().collect::<Vec<_>>(), [PathBuf::from("a")]);

        let good = fs::read(&index).unwrap();
        for length in 0..good.len() {
            assert!(fs::write(&index, &good[..length]).is_ok() && load(&index).is_none(), "cut at {length}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(fs::write(&index, &bad).is_ok() && load(&index).is_none(), "flipped at {at}");
        }
        assert_eq!(read(&files), [sha("a"), sha("B"), sha("c")]);
        // No place for an index.
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(contents(&root, &files, Some(&dir.path().join("file/x")), &()).unwrap().len(), 3);
    }
}
