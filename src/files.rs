//! What every room does with files: write one whole or not at all, open one that is a file, name bytes in hexadecimal.

use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// What a file that is written must survive once [`AtomicFile::commit`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A kill at any moment: readers see the old file or the new one. For what can be made again.
    Kill,
    /// A power failure too: file and folder are synced.
    PowerFailure,
}

/// A file under a temporary name, which takes its own with [`AtomicFile::commit`] and vanishes if it is dropped before.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Begins a new file beside `path`, whose folder must exist: `NAME.tmp-` and 32 hexadecimal digits. A kill leaves it behind.
    ///
    /// # Errors
    /// `path` names no file, or the folder refuses one.
    pub fn create(path: &Path) -> io::Result<AtomicFile> {
        let no_name = || io::Error::new(ErrorKind::InvalidInput, "the path does not end in a file name");
        let mut name: OsString = path.file_name().ok_or_else(no_name)?.to_owned();
        name.push(format!(".tmp-{}", unique_id()));
        let temporary = path.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        Ok(AtomicFile { file, temporary, path: path.to_owned(), committed: false })
    }

    /// The file to write to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// The name it has until then.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Renames the file to its own name, over whatever has it.
    ///
    /// # Errors
    /// The system cannot sync or rename; before the rename, the temporary file is removed and `path` is as it was.
    pub fn commit(mut self, durability: Durability) -> io::Result<()> {
        if durability == Durability::PowerFailure {
            self.file.sync_all()?;
        }
        fs::rename(&self.temporary, &self.path)?;
        self.committed = true;
        if durability == Durability::PowerFailure {
            return sync_dir(parent(&self.path));
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // What led here is the error to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a small file, whole or not at all.
///
/// # Errors
/// Those of [`AtomicFile`], and of writing; `path` is then as it was.
pub fn write(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.file().write_all(bytes)?;
    file.commit(durability)
}

/// Writes a small file that survives what [`Durability::PowerFailure`] says.
///
/// # Errors
/// As [`write`].
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, Durability::PowerFailure)
}

/// Syncs a folder, so that a rename in it survives a power failure. A file system that cannot does not need it.
fn sync_dir(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

/// The folder of a file; `.` for a bare name.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where what can be made again is kept for this user, if nothing else is said: `$XDG_CACHE_HOME/ddpm-dist`, else `~/.cache/ddpm-dist`.
pub fn user_cache_dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    dir("XDG_CACHE_HOME").or_else(|| dir("HOME").map(|home| home.join(".cache"))).map(|dir| dir.join("ddpm-dist"))
}

/// 32 hexadecimal digits that no other call, process or machine draws again, for temporary names. Each `RandomState` has fresh keys from
/// the system's random source.
pub fn unique_id() -> String {
    let word = || std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", word(), word().rotate_left(17) ^ u64::from(std::process::id()))
}

/// Whether [`unique_id`] could have given this.
pub fn is_unique_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The first 8 hexadecimal digits of the SHA-256 of some bytes: enough to tell what differs by mistake.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..4])
}

/// Opens a regular file, or a link to one, for reading. Anything else is refused before it is opened: a pipe would wait for ever.
///
/// # Errors
/// The system refuses, or `path` is no regular file; the message then says what it is.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    match kind.is_file() {
        true => File::open(path),
        false => {
            let message = format!("it is {}, not a regular file", kind_name(kind));
            Err(io::Error::new(ErrorKind::InvalidInput, message))
        }
    }
}

/// What lies at a path, with its article: `a folder`, `a named pipe`.
pub fn kind_name(kind: fs::FileType) -> &'static str {
    match kind {
        kind if kind.is_file() => "a regular file",
        kind if kind.is_dir() => "a folder",
        kind if kind.is_fifo() => "a named pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "something that is neither file nor folder",
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_the_old_one_until_it_is_committed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for (durability, text) in [(Durability::Kill, "first, longer"), (Durability::PowerFailure, "second")] {
            let before = fs::read(&path).ok();
            let mut file = AtomicFile::create(&path).unwrap();
            file.file().write_all(text.as_bytes()).unwrap();
            assert_eq!(fs::read(&path).ok(), before);
            file.commit(durability).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let mut file = AtomicFile::create(&path).unwrap();
        file.file().write_all(b"third").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!((names(folder.path()), fs::read_to_string(&path).unwrap()), (vec!["x".to_owned()], "second".into()));
        write_synced(&path, b"fourth").unwrap();
        assert_eq!((names(folder.path()), fs::read_to_string(&path).unwrap()), (vec!["x".to_owned()], "fourth".into()));
    }

    #[test]
    fn what_cannot_be_renamed_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::create_dir_all(path.join("below")).unwrap();
        for durability in [Durability::Kill, Durability::PowerFailure] {
            AtomicFile::create(&path).unwrap().commit(durability).unwrap_err();
            assert_eq!(names(folder.path()), ["x"]);
        }
        assert_eq!(AtomicFile::create(Path::new("/")).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(AtomicFile::create(&folder.path().join("no/x")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn only_regular_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "x").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for good in ["file", "link"] {
            open_regular(&path(good)).unwrap();
        }
        let refused = |path: &Path| open_regular(path).unwrap_err().to_string();
        assert_eq!(refused(&path("pipe")), "it is a named pipe, not a regular file");
        assert_eq!(refused(folder.path()), "it is a folder, not a regular file");
        assert_eq!(refused(Path::new("/dev/null")), "it is a device, not a regular file");
        assert_eq!(open_regular(&path("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn names_are_never_the_same() {
        let mut ids: Vec<String> = (0..1000).map(|_| unique_id()).collect();
        assert!(ids.iter().all(|id| is_unique_id(id)));
        assert!(!is_unique_id(&ids[0][1..]) && !is_unique_id(&"g".repeat(32)));
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 1000);
        assert_eq!(hex(&[0, 0x0f, 0xa5, 255]), "000fa5ff");
    }
}
