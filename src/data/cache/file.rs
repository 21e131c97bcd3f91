//! The file of a cache: its header, and whether it is whole.
//!
//! ```text
//! 0      "DDPMPIX\0"                                  8 bytes
//! 8      version                                      u32, little-endian
//! 12     length of the header                         u32, little-endian
//! 16     SHA-256 of the header                        32 bytes
//! 48     header, JSON (`Header`), then zeros
//! 65536  pixels [N, H, W, C], u8
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::Progress;
use super::super::folder::Bad;
use super::super::pixels::{Bytes, Hash, digest, map_file};
use super::Cached;
use crate::files::hex;

const MAGIC: &[u8; 8] = b"DDPMPIX\0";
/// Grows when the layout changes or when a decoder gives other pixels for the same file.
const VERSION: u32 = 2;
const PREFIX: usize = 48;
/// Where pixels start: a multiple of every page size.
pub(in crate::data) const PAYLOAD: usize = 65536;

/// What the header says about the pixels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::data) struct Header {
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
    /// Pictures left out.
    pub bad: Bad,
}

/// Everything before the pixels but the zeros.
pub(super) fn encode(header: &Header) -> io::Result<Vec<u8>> {
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
pub(super) enum Miss {
    Absent,
    /// Completes the sentence "the data cache …".
    Other(String),
    /// The caller has had enough.
    Stopped,
}

/// Opens the cache at `path` if it is whole and has this key.
pub(super) fn open(path: &Path, key: &Hash, progress: &dyn Progress) -> Result<Cached, Miss> {
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
    if header.key != hex(key) {
        return Err(other("was made from other content"));
    }
    let bytes = header.shape.iter().try_fold(header.count, |product, d| product.checked_mul(*d as u64));
    let expected = bytes.and_then(|bytes| bytes.checked_add(PAYLOAD as u64));
    let found = file.metadata().map_err(unreadable)?.len();
    if header.count == 0 || expected != Some(found) {
        return Err(Miss::Other(format!("is damaged ({found} bytes, expected {})", expected.unwrap_or(0))));
    }
    let map = map_file(&file).map_err(unreadable)?;
    let found = digest(&map[PAYLOAD..], progress).map_err(|_| Miss::Stopped)?;
    if hex(&found) != header.pixels {
        return Err(other("is damaged (digest of the pixels)"));
    }
    Ok(Cached { header, bytes: Bytes::Mapped(map), offset: PAYLOAD })
}
