//! safetensors files written and read in one pass, hashed on the way, without a second copy of the data in memory.

use super::error::CheckpointError;
use super::io::Io;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes per write and read call.
const CHUNK: usize = 1 << 20;

/// What memory and file offsets are multiples of where a disk is written directly.
const BLOCK: usize = 4096;

/// The largest header the safetensors format allows.
const MAX_HEADER: u64 = 100_000_000;

pub(crate) use crate::files::hex;

/// The header of a file of f32 tensors that follow in the given order, padded so that the data begins at a multiple of 64 bytes.
pub(super) fn header(tensors: &[(String, Vec<usize>)], format: &str) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    use safetensors::SafeTensorError::ValidationOverflow;
    let mut at = 0usize;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, shape) in tensors {
        let bytes = shape.iter().try_fold(4usize, |p, &d| p.checked_mul(d)).ok_or(ValidationOverflow)?;
        let end = at.checked_add(bytes).ok_or(ValidationOverflow)?;
        infos.push((name.clone(), TensorInfo { dtype: Dtype::F32, shape: shape.clone(), data_offsets: (at, end) }));
        at = end;
    }
    let metadata = HashMap::from([("format".to_string(), format.to_string())]);
    let json = serde_json::to_vec(&Metadata::new(Some(metadata), infos)?)?;
    let padded = (json.len() + 8).next_multiple_of(64) - 8;
    let mut bytes = Vec::with_capacity(padded + 8);
    bytes.extend((padded as u64).to_le_bytes());
    bytes.extend(json);
    bytes.resize(padded + 8, b' ');
    Ok(bytes)
}

/// A file being written through [`Io`], hashed and counted.
///
/// Whole chunks go past the page cache where the file system can do that: a copy of everything into the cache, by a thread that takes turns
/// with those that compute, costs training more than all else of a save.
pub(super) struct Writer<'a> {
    io: &'a dyn Io,
    path: PathBuf,
    file: File,
    is_direct: bool,
    hasher: Sha256,
    bytes: u64,
    /// A chunk that begins at a multiple of [`BLOCK`] in memory, and how much of it is used.
    memory: Vec<u8>,
    used: usize,
}

impl<'a> Writer<'a> {
    pub fn create(io: &'a dyn Io, path: &Path) -> Result<Self, CheckpointError> {
        let file = io.create_file(path).map_err(CheckpointError::io("create", path))?;
        let is_direct = set_direct(&file, true).is_ok();
        let (path, memory) = (path.to_path_buf(), vec![0; CHUNK + BLOCK]);
        Ok(Writer { io, path, file, is_direct, hasher: Sha256::new(), bytes: 0, memory, used: 0 })
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.used));
            let at = self.first() + self.used;
            self.memory[at..at + now.len()].copy_from_slice(now);
            self.used += now.len();
            if self.used == CHUNK {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    pub fn write_f32(&mut self, values: &[f32]) -> Result<(), CheckpointError> {
        if cfg!(target_endian = "little") {
            return self.write(bytemuck::cast_slice(values));
        }
        values.iter().try_for_each(|value| self.write(&value.to_le_bytes()))
    }

    /// Where in the memory the chunk begins.
    fn first(&self) -> usize {
        self.memory.as_ptr().align_offset(BLOCK)
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        let chunk = &self.memory[self.first()..][..self.used];
        self.hasher.update(chunk);
        let failed = |e| CheckpointError::io("write", &self.path)(e);
        // The end of a file is no whole block.
        if self.is_direct && !self.used.is_multiple_of(BLOCK) {
            set_direct(&self.file, false).map_err(failed)?;
            self.is_direct = false;
        }
        let written = match self.io.write(&mut self.file, &self.path, chunk) {
            // A file system that wants larger blocks, or found out only now that it cannot.
            Err(e) if self.is_direct && e.kind() == ErrorKind::InvalidInput => {
                self.is_direct = false;
                set_direct(&self.file, false)
                    .and_then(|()| self.file.seek(SeekFrom::Start(self.bytes)))
                    .and_then(|_| self.io.write(&mut self.file, &self.path, chunk))
            }
            written => written,
        };
        written.map_err(failed)?;
        self.bytes += chunk.len() as u64;
        self.used = 0;
        Ok(())
    }

    /// Writes what is buffered and waits until the disk has it. Gives size and SHA-256.
    pub fn finish(mut self) -> Result<(u64, String), CheckpointError> {
        if self.used > 0 {
            self.flush()?;
        }
        self.io.sync_file(&self.file, &self.path).map_err(CheckpointError::io("flush to disk", &self.path))?;
        Ok((self.bytes, hex(&self.hasher.finalize())))
    }
}

/// Lets writes to a file go past the page cache, or not.
///
/// # Errors
/// A file system or an operating system without such writes.
pub(super) fn set_direct(file: &File, is_direct: bool) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
        let mut flags = fcntl_getfl(file)?;
        flags.set(OFlags::DIRECT, is_direct);
        Ok(fcntl_setfl(file, flags)?)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, is_direct);
        Err(ErrorKind::Unsupported.into())
    }
}

/// A safetensors file being read from front to back, hashed.
pub(super) struct Reader {
    path: PathBuf,
    file: File,
    hasher: Sha256,
    /// The header, checked against the file's length: tensors are contiguous and fill the file.
    pub header: Metadata,
    /// Where the data begins.
    data: u64,
    buffer: Vec<u8>,
}

impl Reader {
    /// Opens the file and reads its header. Nothing is allocated that the file's length does not vouch for.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let bad = |reason: String| CheckpointError::Shard { path: path.to_path_buf(), reason };
        let read = CheckpointError::io("read", path);
        let mut file = open_regular(path)?;
        let length = file.metadata().map_err(CheckpointError::io("read", path))?.len();
        let mut size = [0; 8];
        if length < 8 {
            return Err(bad(format!("{length} bytes are too few for a safetensors file")));
        }
        file.read_exact(&mut size).map_err(read)?;
        let n = u64::from_le_bytes(size);
        if n > MAX_HEADER || n > length - 8 {
            return Err(bad(format!("its header claims {n} bytes in a file of {length}")));
        }
        let mut json = vec![0; n as usize];
        file.read_exact(&mut json).map_err(CheckpointError::io("read", path))?;
        let mut hasher = Sha256::new();
        hasher.update(size);
        hasher.update(&json);
        let header: Metadata = serde_json::from_slice(&json).map_err(|e| bad(format!("garbled header: {e}")))?;
        if header.data_len() as u64 != length - 8 - n {
            let held = length - 8 - n;
            return Err(bad(format!("its header describes {} bytes of data, it holds {held}", header.data_len())));
        }
        Ok(Reader { path: path.to_path_buf(), file, hasher, header, data: 8 + n, buffer: Vec::new() })
    }

    /// The next `bytes` bytes in parts of whole 8-byte words (the last one excepted).
    pub fn read_bytes(&mut self, mut bytes: usize, mut part: impl FnMut(&[u8])) -> Result<(), CheckpointError> {
        self.buffer.resize(CHUNK, 0);
        while bytes > 0 {
            let n = bytes.min(CHUNK);
            let buffer = &mut self.buffer[..n];
            self.file.read_exact(buffer).map_err(CheckpointError::io("read", &self.path))?;
            self.hasher.update(&*buffer);
            part(buffer);
            bytes -= n;
        }
        Ok(())
    }

    /// The next `out.len()` f32 values.
    pub fn read_f32(&mut self, out: &mut [f32]) -> Result<(), CheckpointError> {
        let bytes = size_of_val(out);
        let mut rest = out;
        self.read_bytes(bytes, |part| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(part.len() / 4);
            for (o, b) in now.iter_mut().zip(part.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
            rest = later;
        })
    }

    /// Values of one tensor from value `first` on as bytes, from wherever they stand: not part of the reading from front to back, and not
    /// hashed. Asking for what the header does not hold is an error.
    pub fn read_at(
        &mut self,
        name: &str,
        first: usize,
        values: usize,
        mut part: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let bad = |reason: String| CheckpointError::Shard { path: self.path.clone(), reason };
        let (begin, end) = self.header.info(name).ok_or_else(|| bad(format!("{name:?} is missing")))?.data_offsets;
        let mut at = self.data + (begin + first * 4) as u64;
        let mut left = values * 4;
        if begin + first * 4 + left > end {
            return Err(bad(format!("{name:?} ends before value {}", first + values)));
        }
        self.buffer.resize(CHUNK, 0);
        while left > 0 {
            let buffer = &mut self.buffer[..left.min(CHUNK)];
            self.file.read_exact_at(buffer, at).map_err(CheckpointError::io("read", &self.path))?;
            part(buffer)?;
            at += buffer.len() as u64;
            left -= buffer.len();
        }
        Ok(())
    }

    /// The SHA-256 of everything read, which must be the whole file by now.
    pub fn finish(self) -> String {
        hex(&self.hasher.finalize())
    }
}

/// Opens a regular file for reading; anything else (absent, a directory, a pipe that would block) is missing.
pub(super) fn open_regular(path: &Path) -> Result<File, CheckpointError> {
    match std::fs::metadata(path) {
        Ok(m) if m.is_file() => File::open(path).map_err(CheckpointError::io("open", path)),
        Ok(_) => Err(CheckpointError::Missing { path: path.to_path_buf() }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(CheckpointError::Missing { path: path.to_path_buf() })
        }
        Err(e) => Err(CheckpointError::io("open", path)(e)),
    }
}
