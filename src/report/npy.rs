//! NumPy arrays: `.npy` f32 in and out, `.npz` u8 as FID tools read it.
//!
//! Format: numpy.lib.format, version 1.0 written, versions 1 to 3 read.

use std::io::{self, Read, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::grid::to_u8;
use super::{Images, ReportError, write_atomically};
use crate::data::npy_header;
use crate::files::Durability;

const MAGIC: &[u8] = b"\x93NUMPY";

/// Writes f32 [N, H, W, C] (any shape, in fact) as a little-endian `.npy` file, atomically; missing folders are created.
///
/// # Errors
/// `shape` does not fit `values`, or the file cannot be written.
pub fn write_npy(path: &Path, values: &[f32], shape: &[usize]) -> Result<(), ReportError> {
    if shape.iter().product::<usize>() != values.len() {
        let message = format!("{} values are not an array of shape {shape:?}", values.len());
        return Err(ReportError::Encode { path: path.to_owned(), message });
    }
    write_atomically(path, Durability::Kill, |file| {
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(ReportError::io("write", path));
        write(&header("<f4", shape))?;
        values.iter().try_for_each(|value| write(&value.to_le_bytes()))
    })
}

/// Writes images as u8 under the name `arr_0` in a compressed `.npz` archive, atomically; missing folders are created.
///
/// # Errors
/// The file cannot be written.
pub fn write_npz(path: &Path, images: &Images) -> Result<(), ReportError> {
    let bytes: Vec<u8> = images.pixels().iter().map(|&x| to_u8(x)).collect();
    write_archive(path, &images.shape(), &mut &bytes[..])
}

/// Writes an archive of u8 `arr_0` whose elements are read from `elements`.
pub(super) fn write_archive(path: &Path, shape: &[usize], elements: &mut dyn Read) -> Result<(), ReportError> {
    let encode = |error: zip::result::ZipError| match error {
        zip::result::ZipError::Io(source) => ReportError::io("write", path)(source),
        other => ReportError::Encode { path: path.to_owned(), message: other.to_string() },
    };
    let header = header("|u1", shape);
    // 4 GiB is where a zip entry needs its large form.
    let size = shape.iter().fold(1, |size: usize, &n| size.saturating_mul(n)).saturating_add(header.len());
    let large = size >= u32::MAX as usize;
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).large_file(large);
    write_atomically(path, Durability::Kill, |file| {
        let mut archive = ZipWriter::new(file);
        archive.start_file("arr_0.npy", options).map_err(encode)?;
        archive.write_all(&header).map_err(ReportError::io("write", path))?;
        io::copy(elements, &mut archive).map_err(ReportError::io("write", path))?;
        archive.finish().map_err(encode)?;
        Ok(())
    })
}

/// Reads a `.npy` file of f32 (or f64, rounded) in C order: the values and their shape.
///
/// # Errors
/// The file cannot be read or is no file (a pipe would be waited on for ever), is not such an array, or is shorter or longer than its
/// header says.
pub fn read_npy(path: &Path) -> Result<(Vec<f32>, Vec<usize>), ReportError> {
    let mut bytes = Vec::new();
    let read = crate::files::open_regular(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(ReportError::io("read", path))?;
    parse_npy(path, &bytes)
}

fn parse_npy(path: &Path, bytes: &[u8]) -> Result<(Vec<f32>, Vec<usize>), ReportError> {
    let bad = |expected, found| ReportError::BadNpy { path: path.to_owned(), expected, found };
    let header = npy_header(bytes).map_err(|fault| ReportError::NpyHeader { path: path.to_owned(), fault })?;
    if header.fortran_order {
        let expected = "an array in C order (save numpy.ascontiguousarray(x))";
        return Err(bad(expected, "Fortran order".to_owned()));
    }
    let width = match header.descr.as_str() {
        "<f4" => 4,
        "<f8" => 8,
        other => return Err(bad("an array of float32 (save x.astype('<f4'))", format!("dtype '{other}'"))),
    };
    // The header ends within `bytes`.
    let data = &bytes[header.offset as usize..];
    let size = header.shape.iter().try_fold(width, |product: u64, &n| product.checked_mul(n));
    if size != Some(data.len() as u64) {
        let found = format!("{} bytes for shape {:?}", data.len(), header.shape);
        return Err(bad("as much data as the header says", found));
    }
    let mut values = Vec::new();
    let no_memory = |_| bad("an array that fits in memory", format!("{} bytes", data.len()));
    values.try_reserve_exact(data.len() / width as usize).map_err(no_memory)?;
    match width {
        4 => values.extend(data.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value))),
        _ => values.extend(data.as_chunks::<8>().0.iter().map(|&value| f64::from_le_bytes(value) as f32)),
    }
    let side = |n: &u64| usize::try_from(*n).map_err(|_| bad("sides that fit memory", n.to_string()));
    Ok((values, header.shape.iter().map(side).collect::<Result<_, _>>()?))
}

/// Magic, version 1.0 and the dictionary, padded with spaces so that the data starts at a multiple of 64 bytes.
pub(super) fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    header_of_length(descr, shape, 0)
}

/// [`header`] with so many spaces that it has `length` bytes, a multiple of 64, if it is shorter by itself.
pub(super) fn header_of_length(descr: &str, shape: &[usize], length: usize) -> Vec<u8> {
    let mut dimensions = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if shape.len() == 1 {
        dimensions.push(',');
    }
    let mut dictionary = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dimensions}), }}");
    let before = MAGIC.len() + 4;
    let total = (before + dictionary.len() + 1).next_multiple_of(64).max(length);
    dictionary.extend(std::iter::repeat_n(' ', total - before - dictionary.len() - 1));
    dictionary.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((dictionary.len() as u16).to_le_bytes());
    bytes.extend(dictionary.as_bytes());
    bytes
}

#[cfg(test)]
#[path = "npy_tests.rs"]
mod tests;
