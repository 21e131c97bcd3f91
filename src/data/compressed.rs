//! Arrays inside a compressed file: gzip-compressed IDX, and `.npz` archives of `.npy` members.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use zip::ZipArchive;

use super::array::{ArrayHeader, copy_pixels, read_head};
use super::cache::{Built, Sink};
use super::dataset::array_fingerprint;
use super::folder::Bad;
use super::progress::go_on;
use super::{DataError, Fault, Phase, Progress, idx, npy};

/// What is around the array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Container {
    /// gzip around one IDX file.
    Gzip,
    /// A zip archive with `.npy` members.
    Npz,
}

/// Members of an archive that are the training images, by the names people give them; else the first array is taken.
const MEMBERS: [&str; 4] = ["arr_0.npy", "images.npy", "x_train.npy", "train_images.npy"];

/// Deflate cannot make more than 1032 bytes out of one.
const MAX_RATIO: u64 = 1032;

impl Container {
    /// Reads the header of the array and checks that a file of this size can hold it.
    pub fn header(self, path: &Path, progress: &dyn Progress) -> Result<ArrayHeader, DataError> {
        let packed = std::fs::metadata(path).map_err(DataError::io("look at the data set", path))?.len();
        let header = self.open(path, Some(progress), &mut |reader| {
            let head = read_head(path, reader)?;
            self.parse(path, &head)
        })?;
        if header.bytes / MAX_RATIO > packed {
            let found = format!("which {packed} compressed bytes cannot hold");
            let [h, w, c] = header.shape;
            let shape = format!("[{}, {h}, {w}, {c}]", header.count);
            return Err(DataError::malformed(path)(Fault::Claim { shape, found }));
        }
        Ok(header)
    }

    /// Unpacks all pixels into the cache.
    pub fn unpack(self, path: &Path, progress: &dyn Progress, sink: &mut Sink) -> Result<Built, DataError> {
        self.open(path, None, &mut |reader| {
            let head = read_head(path, reader)?;
            let header = self.parse(path, &head)?;
            let image = header.shape.iter().product::<usize>() as u64;
            let mut bytes = 0;
            copy_pixels(path, &header, &head, reader, &mut |pixels| {
                go_on(progress)?;
                sink.append(pixels)?;
                bytes += pixels.len() as u64;
                progress.update(Phase::Decode, bytes / image, header.count);
                Ok(())
            })?;
            let (count, shape) = (header.count, header.shape);
            let fingerprint = Box::new(move |pixels: &_| array_fingerprint(count, shape, pixels));
            Ok(Built { count, shape, fingerprint, bad: Bad::default() })
        })
    }

    fn parse(self, path: &Path, head: &[u8]) -> Result<ArrayHeader, DataError> {
        let parse = match self {
            Container::Gzip => idx::parse,
            Container::Npz => npy::parse,
        };
        parse(head).map_err(DataError::malformed(path))
    }

    /// Calls `f` with a reader of the unpacked array. `progress` is told which member was chosen.
    fn open<T>(
        self,
        path: &Path,
        progress: Option<&dyn Progress>,
        f: &mut dyn FnMut(&mut dyn Read) -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        let file = BufReader::new(File::open(path).map_err(DataError::io("open", path))?);
        if self == Container::Gzip {
            return f(&mut MultiGzDecoder::new(file));
        }
        let damaged = |e: zip::result::ZipError| match e {
            zip::result::ZipError::Io(e) if e.raw_os_error().is_some() => DataError::io("read", path)(e),
            e => DataError::malformed(path)(Fault::Undecodable {
                expected: "a zip archive written by numpy.savez or savez_compressed",
                found: e.to_string(),
                help: "it is damaged or cut short; fetch or write it again",
            }),
        };
        let mut archive = ZipArchive::new(file).map_err(damaged)?;
        let mut arrays = Vec::new();
        for name in archive.file_names() {
            let name = name.map_err(damaged)?;
            if name.ends_with(".npy") {
                arrays.push(name.into_owned());
            }
        }
        let chosen = MEMBERS.iter().map(|m| m.to_string()).find(|m| arrays.contains(m));
        let Some(chosen) = chosen.or_else(|| arrays.first().cloned()) else {
            let found = format!("an archive of {} members, none of them an array (.npy)", archive.len());
            return Err(DataError::malformed(path)(Fault::Empty { found, help: "write it with numpy.savez(path, x)" }));
        };
        if let (Some(progress), true) = (progress, arrays.len() > 1) {
            let text =
                format!("{}: the images are taken from the array {chosen} of {}", path.display(), arrays.join(", "));
            progress.notice(&text);
        }
        let mut member = archive.by_name(&chosen).map_err(damaged)?;
        f(&mut member)
    }
}
