//! Bytes of pixels in memory or in a mapped file, and their digest.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::progress::go_on;
use super::{DataError, Progress};

/// A SHA-256 digest.
pub(super) type Hash = [u8; 32];

/// Pixels that can be read from any thread.
pub(super) enum Bytes {
    Mapped(Mmap),
    Memory(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Memory(vec) => vec,
        }
    }
}

/// Maps a whole file for reading.
pub(super) fn map(path: &Path) -> Result<Mmap, DataError> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    map_file(&file).map_err(DataError::io("map into memory", path))
}

/// Maps a whole open file for reading.
pub(super) fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and its bytes are plain u8, for which every value is valid. Our own caches are written
    // under another name and never changed after their rename; files of the user are documented (`Dataset`) to stay as
    // they are while they are open: changed bytes would be changed pixels, a file cut short ends the process by SIGBUS.
    unsafe { Mmap::map(file) }
}

/// Blocks are hashed on their own, so that a digest can be computed by all threads.
const BLOCK: usize = 4 << 20;

/// SHA-256 of the SHA-256 digests of consecutive 4 MiB blocks; stops when `progress` says so.
pub(super) fn digest(bytes: &[u8], progress: &dyn Progress) -> Result<Hash, DataError> {
    let one = |block: &[u8]| go_on(progress).map(|()| Sha256::digest(block).into());
    let blocks: Result<Vec<Hash>, DataError> = bytes.par_chunks(BLOCK).map(one).collect();
    let mut outer = Sha256::new();
    blocks?.iter().for_each(|block| outer.update(block));
    Ok(outer.finalize().into())
}

/// The same as [`digest`] for bytes that arrive piece by piece.
#[derive(Default)]
pub(super) struct BlockHasher {
    outer: Sha256,
    block: Sha256,
    filled: usize,
}

impl BlockHasher {
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.block.update(now);
            self.filled += now.len();
            if self.filled == BLOCK {
                self.outer.update(self.block.finalize_reset());
                self.filled = 0;
            }
            bytes = rest;
        }
    }

    pub fn finish(mut self) -> Hash {
        if self.filled > 0 {
            self.outer.update(self.block.finalize());
        }
        self.outer.finalize().into()
    }
}

/// Hashes labelled fields so that no two lists of fields give the same bytes.
pub(super) struct FieldHasher(Sha256);

impl FieldHasher {
    /// `purpose` keeps digests of different things apart.
    pub fn new(purpose: &str) -> FieldHasher {
        FieldHasher(Sha256::new()).field(purpose.as_bytes())
    }

    pub fn field(mut self, bytes: &[u8]) -> FieldHasher {
        self.push(bytes);
        self
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    pub fn shape(mut self, shape: [usize; 3]) -> FieldHasher {
        shape.iter().for_each(|d| self.push(&(*d as u64).to_le_bytes()));
        self
    }

    pub fn finish(self) -> Hash {
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_hash_of_block_hashes_however_bytes_arrive() {
        let bytes: Vec<u8> = (0..2 * BLOCK + 12345).map(|i| (i * 31 % 251) as u8).collect();
        let mut outer = Sha256::new();
        for block in [&bytes[..BLOCK], &bytes[BLOCK..2 * BLOCK], &bytes[2 * BLOCK..]] {
            outer.update(Sha256::digest(block));
        }
        let expected: Hash = outer.finalize().into();
        assert_eq!(digest(&bytes, &()).unwrap(), expected);
        for piece in [BLOCK, 1_000_003, 77_777] {
            let mut hasher = BlockHasher::default();
            bytes.chunks(piece).for_each(|chunk| hasher.update(chunk));
            assert_eq!(hasher.finish(), expected, "pieces of {piece}");
        }
        assert_eq!(BlockHasher::default().finish(), digest(&[], &()).unwrap());
    }
}
