//! What IDX and NumPy files have in common: a header that gives a shape, then one array of u8 pixels.

use std::io::{self, Read};
use std::path::Path;

use super::{DataError, Fault};

/// What a header says about the pixels behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ArrayHeader {
    /// N.
    pub count: u64,
    /// [H, W, C].
    pub shape: [usize; 3],
    /// Bytes before the first pixel.
    pub offset: u64,
    /// N·H·W·C, which fits 63 bits.
    pub bytes: u64,
}

/// Bytes from the start of a file that are enough for any header.
pub(super) const MAX_HEADER: usize = 64 * 1024 + 12;

/// Reads a header from the first [`MAX_HEADER`] bytes of a file (fewer if the file is shorter).
pub(super) type Parse = fn(&[u8]) -> Result<ArrayHeader, Fault>;

impl ArrayHeader {
    /// `dims` is [N, H, W] or [N, H, W, C] as the file gives it.
    pub fn new(dims: &[u64], offset: u64) -> Result<ArrayHeader, Fault> {
        const HELP: &str = "save the images as one array of that shape";
        let shape_fault = |found: String| Fault::Shape { expected: "[N, H, W] or [N, H, W, C]", found, help: HELP };
        let (n, [h, w, c]) = match *dims {
            [n, h, w] => (n, [h, w, 1]),
            [n, h, w, c] => (n, [h, w, c]),
            _ => return Err(shape_fault(format!("{dims:?}"))),
        };
        if n == 0 {
            return Err(Fault::Empty {
                found: format!("the shape {dims:?}"),
                help: "take the file that holds the images",
            });
        }
        if h == 0 || w == 0 {
            return Err(shape_fault(format!("{dims:?} (images without pixels)")));
        }
        if c != 1 && c != 3 {
            let help = if h == 1 || h == 3 {
                "this looks like [N, C, H, W]: save x.transpose(0, 2, 3, 1)"
            } else {
                "drop or convert the other channels"
            };
            let expected = "[N, H, W, C] with C = 1 (grey) or 3 (colour)";
            return Err(Fault::Shape { expected, found: format!("{dims:?}"), help });
        }
        let claim = || Fault::Claim { shape: format!("{dims:?}"), found: "more bytes than any file has".into() };
        let bytes = [h, w, c].iter().try_fold(n, |product, d| product.checked_mul(*d)).ok_or_else(claim)?;
        bytes.checked_add(offset).filter(|all| *all <= i64::MAX as u64).ok_or_else(claim)?;
        let side = |d: u64| usize::try_from(d).map_err(|_| claim());
        Ok(ArrayHeader { count: n, shape: [side(h)?, side(w)?, side(c)?], offset, bytes })
    }

    /// Compares with the length of a file that is there as it is.
    pub fn check_length(&self, found: u64) -> Result<(), Fault> {
        let expected = self.offset + self.bytes;
        if found == expected { Ok(()) } else { Err(Fault::Length { expected, found }) }
    }
}

/// Reads the first bytes of a stream, at most [`MAX_HEADER`].
pub(super) fn read_head(path: &Path, reader: &mut dyn Read) -> Result<Vec<u8>, DataError> {
    let mut head = Vec::new();
    reader.take(MAX_HEADER as u64).read_to_end(&mut head).map_err(|e| read_error(path, e))?;
    Ok(head)
}

/// Copies exactly the pixels of `header` from `reader`, whose first bytes are in `head`, to `sink`.
///
/// The header is not believed: memory grows with the bytes that are really there, never with those it claims.
pub(super) fn copy_pixels(
    path: &Path,
    header: &ArrayHeader,
    head: &[u8],
    reader: &mut dyn Read,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let length = |found| DataError::malformed(path)(Fault::Length { expected: header.offset + header.bytes, found });
    // Headers are parsed from `head`, so that `offset` lies within it.
    let start = usize::try_from(header.offset).unwrap_or(usize::MAX).min(head.len());
    let mut rest = (&head[start..]).chain(reader);
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < header.bytes {
        let want = (header.bytes - done).min(buffer.len() as u64) as usize;
        match rest.read(&mut buffer[..want]) {
            Ok(0) => return Err(length(header.offset + done)),
            Ok(n) => {
                sink(&buffer[..n])?;
                done += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(read_error(path, e)),
        }
    }
    // Reading to the end makes the decompressor compare its checksum, and finds bytes that should not be there.
    let extra = rest.take(1 << 20).read_to_end(&mut buffer).map_err(|e| read_error(path, e))?;
    if extra > 0 {
        return Err(length(header.offset + header.bytes + extra as u64));
    }
    Ok(())
}

/// A decompressor reports damage as an I/O error; this tells it from a disk that cannot be read.
fn read_error(path: &Path, error: io::Error) -> DataError {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
            DataError::malformed(path)(Fault::Undecodable {
                expected: "a whole compressed file",
                found: error.to_string(),
                help: "it is damaged or cut short; fetch it again",
            })
        }
        _ => DataError::io("read", path)(error),
    }
}
