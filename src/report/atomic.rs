//! Files that are there whole or not at all, with the errors of this room.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::ReportError;
use crate::files::{AtomicFile, Durability};

/// Writes `path` through a temporary file beside it that is renamed at the end; missing parent folders are created.
///
/// A reader, or a kill at any moment, sees the old file or the new one. `durability` says whether a power failure counts too: a picture
/// can be drawn again, a log cannot.
///
/// # Errors
/// The folder or file cannot be written, or `write` fails; then there is no temporary file left and `path` is as it was.
pub fn write_atomically(
    path: &Path,
    durability: Durability,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> Result<(), ReportError>,
) -> Result<(), ReportError> {
    create_parent(path)?;
    let mut file = AtomicFile::create(path).map_err(ReportError::io("create", path))?;
    let mut writer = BufWriter::new(file.file());
    write(&mut writer)?;
    writer.flush().map_err(ReportError::io("write", path))?;
    drop(writer);
    file.commit(durability).map_err(ReportError::io("write", path))
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
        for (durability, text) in [(Durability::Kill, "first, longer"), (Durability::PowerFailure, "second")] {
            let write = |file: &mut BufWriter<&mut File>| {
                file.write_all(text.as_bytes()).map_err(ReportError::io("write", &path))
            };
            write_atomically(&path, durability, write).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(path.parent().unwrap()), ["c.txt"]);
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.txt");
        fs::write(&path, "old").unwrap();
        let failed = write_atomically(&path, Durability::Kill, |file| {
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
        let path = folder.path().join("file/c.txt");
        let error = write_atomically(&path, Durability::Kill, |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot create folder `{}/file`: ", folder.path().display())), "{error}");
    }
}
