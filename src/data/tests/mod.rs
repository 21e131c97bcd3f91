//! Tests of the room as a whole, on real files that each test writes.

mod arrays;
mod caching;
mod loading;
mod malformed;
mod pictures;
mod replacing;
mod stopping;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

use super::*;

/// A folder for one test's files, with its cache beside them.
pub(super) struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    pub fn config(&self, name: &str) -> DataConfig {
        DataConfig {
            path: self.path(name),
            cache_dir: Some(self.path("cache")),
            decode_threads: 2,
            ..Default::default()
        }
    }

    pub fn open(&self, name: &str) -> Result<Dataset, DataError> {
        Dataset::open(&self.config(name), None, &())
    }

    /// The message of the error that opening gives.
    pub fn error(&self, name: &str) -> String {
        self.open(name).unwrap_err().to_string()
    }
}

/// Remembers notices and checks that progress counts up to its total.
#[derive(Default)]
pub(super) struct Log {
    pub notices: Mutex<Vec<String>>,
    pub updates: Mutex<Vec<(Phase, u64, u64)>>,
}

impl Log {
    pub fn text(&self) -> String {
        self.notices.lock().unwrap().join("\n")
    }

    pub fn decoded(&self) -> bool {
        self.updates.lock().unwrap().iter().any(|(phase, ..)| *phase == Phase::Decode)
    }
}

impl Progress for Log {
    fn update(&self, phase: Phase, done: u64, total: u64) {
        assert!(done <= total);
        self.updates.lock().unwrap().push((phase, done, total));
    }
    fn notice(&self, message: &str) {
        self.notices.lock().unwrap().push(message.to_string());
    }
}

/// All pixels of a data set.
pub(super) fn all(dataset: &Dataset) -> Vec<u8> {
    let mut out = vec![0xee; dataset.len() as usize * dataset.image_bytes()];
    for (i, image) in out.chunks_mut(dataset.image_bytes()).enumerate() {
        dataset.image(i as u64, image).unwrap();
    }
    out
}

/// Bytes without a pattern that a mistake could share.
pub(super) fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2654435761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 11) as u8
    };
    (0..n).map(|_| next()).collect()
}

pub(super) fn idx(dims: [u32; 3], pixels: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3];
    dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend(pixels);
    bytes
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn npy(descr: &str, shape: &str, elements: &[u8]) -> Vec<u8> {
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while !(10 + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.extend(elements);
    bytes
}

pub(super) fn npz(members: &[(&str, Vec<u8>)], deflate: bool) -> Vec<u8> {
    let method = if deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    let options = SimpleFileOptions::default().compression_method(method);
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A CIFAR-10 record: the label, then the planes of `pixels`, [32, 32, 3].
pub(super) fn cifar_record(label: u8, pixels: &[u8]) -> Vec<u8> {
    let mut record = vec![label];
    for channel in 0..3 {
        record.extend(pixels.iter().skip(channel).step_by(3));
    }
    record
}

/// A named pipe.
pub(super) fn pipe(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

/// Saves [H, W, 1 or 3] as the format of the name's extension.
pub(super) fn save_picture(path: &Path, pixels: &[u8], height: u32, width: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let color = if pixels.len() as u32 == height * width { image::ColorType::L8 } else { image::ColorType::Rgb8 };
    image::save_buffer(path, pixels, width, height, color).unwrap();
}
