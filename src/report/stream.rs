//! Images written batch by batch, so that neither memory nor a signal decides how many there can be.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::atomic::create_parent;
use super::grid::to_u8;
use super::npy::{header, header_of_length, write_archive};
use super::output::write_folder;
use super::{Images, OutputFormat, ReportError};
use crate::files::{AtomicFile, Durability};

/// Images on their way to a folder, a `.npy` or a `.npz` file.
///
/// A folder shows each batch at once. An array is complete under another name first and takes its own at the end; a value that is dropped
/// before leaves nothing behind.
#[derive(Debug)]
pub struct ImageStream {
    path: PathBuf,
    /// [N, H, W, C] if all of them come.
    shape: [usize; 4],
    /// Images written.
    written: usize,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Folder,
    /// The file as it will be; its header has room for any N up to the one announced.
    Npy(Spool),
    /// The array's bytes, to be packed when their number is known.
    Npz(Spool),
}

/// A file that is removed again unless it is given its name.
#[derive(Debug)]
struct Spool(BufWriter<AtomicFile>);

impl ImageStream {
    /// Begins to write images of `shape` = [N, H, W, C] to `path`, whose folders are created. `None` for the forms that need all images at
    /// once, a grid or an animation; then it is known that the file can be written.
    ///
    /// # Errors
    /// The place cannot be written, or the disk has less room than an array needs.
    pub fn create(path: &Path, format: OutputFormat, shape: [usize; 4]) -> Result<Option<ImageStream>, ReportError> {
        let form = match format {
            OutputFormat::GridPng | OutputFormat::Gif => {
                create_parent(path)?;
                drop(Spool::create(path)?);
                return Ok(None);
            }
            OutputFormat::Folder => {
                fs::create_dir_all(path).map_err(ReportError::io("create folder", path))?;
                // Whether files can be made in it; the folder, not this one, is what the user knows.
                drop(Spool::create(&path.join("probe")).map_err(|error| match error {
                    ReportError::Io { source, .. } => ReportError::io("write to folder", path)(source),
                    error => error,
                })?);
                Form::Folder
            }
            OutputFormat::Npy => {
                create_parent(path)?;
                let mut spool = Spool::create(path)?;
                spool.needs(path, bytes_of(shape, size_of::<f32>()))?;
                spool.0.write_all(&header("<f4", &shape)).map_err(ReportError::io("write", path))?;
                Form::Npy(spool)
            }
            OutputFormat::Npz => {
                create_parent(path)?;
                let spool = Spool::create(path)?;
                // The bytes, and the archive made of them, which is no larger but for its names.
                spool.needs(path, bytes_of(shape, 2))?;
                Form::Npz(spool)
            }
        };
        Ok(Some(ImageStream { path: path.to_owned(), shape, written: 0, form }))
    }

    /// Writes the next images, `[n, H, W, C]`.
    ///
    /// # Errors
    /// They are no images of this shape, or cannot be written.
    pub fn append(&mut self, pixels: &[f32]) -> Result<(), ReportError> {
        let [total, h, w, c] = self.shape;
        let count = pixels.len() / (h * w * c).max(1);
        let images = Images::new(pixels, [count, h, w, c])?;
        let failed = || ReportError::io("write", &self.path);
        match &mut self.form {
            Form::Folder => write_folder(&self.path, &images, self.written, total)?,
            Form::Npy(spool) => {
                pixels.iter().try_for_each(|x| spool.0.write_all(&x.to_le_bytes())).map_err(failed())?;
            }
            Form::Npz(spool) => pixels.iter().try_for_each(|&x| spool.0.write_all(&[to_u8(x)])).map_err(failed())?,
        }
        self.written += count;
        Ok(())
    }

    /// Gives an array its name. If there are fewer images than announced, its shape says so; if there are none, nothing is written.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<(), ReportError> {
        let ImageStream { path, shape: [total, h, w, c], written, form } = self;
        let shape = [written, h, w, c];
        let failed = || ReportError::io("write", &path);
        match form {
            _ if written == 0 => Ok(()),
            Form::Folder => Ok(()),
            Form::Npy(mut spool) => {
                if written < total {
                    let length = header("<f4", &[total, h, w, c]).len();
                    let shorter = header_of_length("<f4", &shape, length);
                    spool.0.seek(SeekFrom::Start(0)).map_err(failed())?;
                    spool.0.write_all(&shorter).map_err(failed())?;
                }
                let file = spool.0.into_inner().map_err(|error| failed()(error.into_error()))?;
                file.commit(Durability::Kill).map_err(failed())
            }
            Form::Npz(mut spool) => {
                spool.0.flush().map_err(failed())?;
                let mut bytes = File::open(spool.0.get_ref().temporary()).map_err(failed())?;
                write_archive(&path, &shape, &mut bytes)
            }
        }
    }
}

impl Spool {
    /// A file beside `path`, to which it is renamed in the end.
    fn create(path: &Path) -> Result<Spool, ReportError> {
        AtomicFile::create(path).map(|file| Spool(BufWriter::new(file))).map_err(ReportError::io("create", path))
    }

    /// Refuses where `bytes` are more than the disk has.
    fn needs(&self, path: &Path, needed: u64) -> Result<(), ReportError> {
        // Where the system does not say how much is free, writing will tell.
        let Ok(disk) = rustix::fs::statvfs(self.0.get_ref().temporary()) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if needed <= free { Ok(()) } else { Err(ReportError::NoSpace { path: path.to_owned(), needed, free }) }
    }
}

fn bytes_of(shape: [usize; 4], width: usize) -> u64 {
    shape.iter().fold(width as u64, |product, &n| product.saturating_mul(n as u64))
}

#[cfg(test)]
mod tests {
    use super::super::{read_npy, write_npz};
    use super::*;
    use std::io::Read;

    const SIZE: usize = 2 * 3;

    fn pixels(count: usize) -> Vec<f32> {
        (0..count * SIZE).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    fn stream(path: &Path, announced: usize) -> ImageStream {
        let format = OutputFormat::of(path).unwrap();
        ImageStream::create(path, format, [announced, 2, 3, 1]).unwrap().expect("it takes batches")
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The array in an archive, header and all.
    fn array(path: &Path) -> Vec<u8> {
        let mut archive = zip::ZipArchive::new(File::open(path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        archive.by_name("arr_0.npy").unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn batches_make_the_file_that_is_written_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let all = pixels(12);
        // As many as announced, or fewer: also where their number has fewer digits.
        for (announced, written) in [(12, 12), (12, 7), (1_000_000, 12)] {
            for name in ["new/x.npy", "new/x.npz"] {
                let mut stream = stream(&at(name), announced);
                all[..written * SIZE].chunks(5 * SIZE).for_each(|batch| stream.append(batch).unwrap());
                assert!(!at(name).exists(), "no one sees a part of it");
                stream.finish().unwrap();
            }
            let expected = all[..written * SIZE].to_vec();
            assert_eq!(read_npy(&at("new/x.npy")).unwrap(), (expected.clone(), vec![written, 2, 3, 1]));
            write_npz(&at("new/whole.npz"), &Images::new(&expected, [written, 2, 3, 1]).unwrap()).unwrap();
            assert_eq!(array(&at("new/x.npz")), array(&at("new/whole.npz")));
            assert_eq!(names(&at("new")), ["whole.npz", "x.npy", "x.npz"]);
            fs::remove_dir_all(at("new")).unwrap();
        }
    }

    #[test]
    fn a_folder_shows_each_batch_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set/");
        let mut stream = stream(&path, 5);
        assert!(names(&path).is_empty());
        stream.append(&pixels(2)).unwrap();
        assert_eq!(names(&path), ["00000.png", "00001.png"]);
        stream.append(&pixels(1)).unwrap();
        stream.finish().unwrap();
        assert_eq!(names(&path), ["00000.png", "00001.png", "00002.png"]);
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x.npy", "x.npz"] {
            let path = folder.path().join(name);
            fs::write(&path, "old").unwrap();
            let mut dropped = stream(&path, 3);
            dropped.append(&pixels(1)).unwrap();
            drop(dropped);
            stream(&path, 3).finish().unwrap(); // with no image at all
            assert_eq!(fs::read(&path).unwrap(), b"old");
        }
        assert_eq!(names(folder.path()), ["x.npy", "x.npz"]);
    }

    #[test]
    fn what_cannot_be_written_is_known_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        for name in ["file/x.png", "file/x.gif", "file/x.npy", "file/x.npz", "file/x/"] {
            let path = folder.path().join(name);
            let error = ImageStream::create(&path, OutputFormat::of(&path).unwrap(), [1, 2, 3, 1]).unwrap_err();
            assert!(matches!(error, ReportError::Io { .. }) && error.to_string().contains("file"), "{name}: {error}");
        }
        for name in ["x.npy", "x.npz"] {
            // An exabyte.
            let path = folder.path().join(name);
            let error = ImageStream::create(&path, OutputFormat::of(&path).unwrap(), [1 << 40, 1 << 10, 1 << 10, 1]);
            let error = error.unwrap_err();
            assert!(matches!(error, ReportError::NoSpace { .. }), "{name}: {error}");
        }
        assert_eq!(names(folder.path()), ["file"]);
    }
}
