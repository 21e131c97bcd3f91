//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::ReportError;

/// Writes `path` through a temporary file beside it that is renamed at the end; missing parent folders are created.
///
/// A reader, or a kill at any moment, sees the old file or the new one. (Nothing is synced: a picture lost to a power
/// failure can be drawn again.)
///
/// # Errors
/// The folder or file cannot be written, or `write` fails; then there is no temporary file left and `path` is as it was.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), ReportError>,
) -> Result<(), ReportError> {
    create_parent(path)?;
    let temporary = beside(path);
    let outcome = (|| {
        let file = File::create(&temporary).map_err(ReportError::io("create", path))?;
        let mut writer = BufWriter::new(file);
        write(&mut writer)?;
        writer.flush().map_err(ReportError::io("write", path))?;
        fs::rename(&temporary, path).map_err(ReportError::io("write", path))
    })();
    if outcome.is_err() {
        // The first error is the one to tell; the file may not even exist.
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

/// Creates the folders in which `path` is to lie.
pub(super) fn create_parent(path: &Path) -> Result<(), ReportError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            fs::create_dir_all(parent).map_err(ReportError::io("create folder", parent))
        }
        _ => Ok(()),
    }
}

/// A hidden name in the same folder, of this process alone.
pub(super) fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn parents_are_created_and_the_file_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/c.txt");
        for text in ["first, longer", "second"] {
            write_atomically(&path, |file| file.write_all(text.as_bytes()).map_err(ReportError::io("write", &path)))
                .unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(path.parent().unwrap()), ["c.txt"]);
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.txt");
        fs::write(&path, "old").unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"half").map_err(ReportError::io("write", &path))?;
            Err(ReportError::Encode { path: path.clone(), message: "no".to_owned() })
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(folder.path()), ["c.txt"]);
    }

    #[test]
    fn a_parent_that_is_a_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        let error = write_atomically(&folder.path().join("file/c.txt"), |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot create folder `{}/file`: ", folder.path().display())), "{error}");
    }
}
