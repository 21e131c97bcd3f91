//! A data set that is open: any image by its number.

use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::OutOfRange;
use crate::files::{hex, user_cache_dir};

use super::array::{ArrayHeader, MAX_HEADER, Parse};
use super::cache::{self, Cached, Request, Sink};
use super::cifar10;
use super::compressed::Container;
use super::config::expand_home;
use super::folder::{Bad, Folder, Skipped};
use super::on_demand::OnDemand;
use super::picture::Target;
use super::pixels::{Bytes, FieldHasher, Hash, digest, map};
use super::source::{Source, detect};
use super::{DataConfig, DataError, Fault, ImageSize, Progress, idx, npy};

/// Where pixels come from while a data set is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// The data set's own file, mapped into memory.
    File,
    /// The cache of decoded pixels, mapped into memory.
    Cache,
    /// Decoded pixels in memory, where there is no place for a cache.
    Memory,
    /// Each picture is decoded when it is needed.
    OnDemand,
}

/// Images of equal shape as u8 pixels, in a fixed order.
///
/// Files of a data set must stay as they are while it is open: they are mapped into memory or read again.
pub struct Dataset {
    path: PathBuf,
    len: u64,
    /// [H, W, C].
    shape: [usize; 3],
    store: Store,
    fingerprint: Hash,
    skipped: Skipped,
    /// Threads that decode pictures, where they are decoded when they are needed.
    pool: Option<ThreadPool>,
}

enum Store {
    /// [N, H, W, C] from `offset` on.
    Array {
        bytes: Bytes,
        offset: usize,
        storage: Storage,
    },
    /// Batches with the numbers of their first images.
    Cifar10(Vec<(u64, Mmap)>),
    Pictures(OnDemand),
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Dataset { path, len, shape, .. } = self;
        write!(f, "Dataset({}, {len} × {shape:?}, {:?})", path.display(), self.storage())
    }
}

/// The fingerprint of an array of pixels, the same for every format that stores these pixels.
pub(super) fn array_fingerprint(count: u64, shape: [usize; 3], pixels: &Hash) -> Hash {
    FieldHasher::new("pixels 1").field(&count.to_le_bytes()).shape(shape).field(pixels).finish()
}

impl Dataset {
    /// Opens the data set that `config` names; `config_file` is where relative paths are also looked up
    /// ([`DataConfig::locate`]).
    ///
    /// Plain IDX, `.npy` and CIFAR-10 files are mapped as they are. Compressed files and pictures are decoded once into a
    /// cache, pictures above `data.cache_limit` when they are needed.
    ///
    /// # Errors
    /// A [`DataError`] that names the file, what was expected and found, and what to do.
    pub fn open(
        config: &DataConfig,
        config_file: Option<&Path>,
        progress: &dyn Progress,
    ) -> Result<Dataset, DataError> {
        config.validate()?;
        let path = config.locate(config_file)?;
        let source = detect(&path, config.format, progress)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.decode_threads)
            .thread_name(|i| format!("decode-{i}"))
            .build()
            .map_err(|e| DataError::Threads { threads: config.decode_threads, reason: e.to_string() })?;
        let opened = pool.install(|| match &source {
            Source::Idx(file) => Opened::mapped(file, idx::parse, config, progress),
            Source::Npy(file) => Opened::mapped(file, npy::parse, config, progress),
            Source::Compressed(file, container) => Opened::compressed(file, *container, config, progress),
            Source::Cifar10(files) => Opened::cifar10(&path, files, config, progress),
            Source::Images(folder) => Opened::images(folder, config, progress),
        })?;
        let Opened { len, shape, store, fingerprint, skipped } = opened;
        let pool = matches!(store, Store::Pictures(_)).then_some(pool);
        Ok(Dataset { path, len, shape, store, fingerprint, skipped, pool })
    }

    /// N, at least 1.
    #[allow(clippy::len_without_is_empty)] // an empty data set is an error of `open`
    pub fn len(&self) -> u64 {
        self.len
    }

    /// [H, W, C] with C = 1 (grey) or 3 (colour).
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// H·W·C, the bytes of one image.
    pub fn image_bytes(&self) -> usize {
        self.shape.iter().product()
    }

    /// Where the data set was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where pixels come from.
    pub fn storage(&self) -> Storage {
        match &self.store {
            Store::Array { storage, .. } => *storage,
            Store::Cifar10(_) => Storage::File,
            Store::Pictures(_) => Storage::OnDemand,
        }
    }

    /// 64 hexadecimal digits that are equal for equal images in equal order and, with overwhelming probability, only then: a resume
    /// compares them. They come from every byte of the pixels or (for pictures and CIFAR-10) of the files. Where and under which names the
    /// files lie does not matter, nor do their times.
    pub fn fingerprint(&self) -> String {
        hex(&self.fingerprint)
    }

    /// How many pictures were left out because of `data.on_bad_image = "skip"`.
    pub fn skipped(&self) -> u64 {
        self.skipped.count
    }

    /// The first few skipped pictures, each with what is wrong with it.
    pub fn skipped_names(&self) -> &[String] {
        &self.skipped.names
    }

    /// How many pictures turned out to be bad when they were needed, so that others stand in for them
    /// ([`OnBadImage::Skip`](super::OnBadImage::Skip)).
    pub fn replaced(&self) -> u64 {
        match &self.store {
            Store::Pictures(pictures) => pictures.replaced(),
            _ => 0,
        }
    }

    /// What a person should be told about such pictures since the last call: the first few one by one, then each doubling of their number.
    pub fn replacements(&self) -> Vec<String> {
        match &self.store {
            Store::Pictures(pictures) => pictures.news(),
            _ => Vec::new(),
        }
    }

    /// Writes image `i` to `out`, `[H, W, C]`. With `data.on_bad_image = "skip"`, a picture that is decoded when it is needed and cannot be
    /// is replaced by the next good one of the data set, the same one at every time.
    ///
    /// # Errors
    /// Only where pictures are decoded when they are needed: one that cannot be read, or cannot be decoded and is not to be skipped.
    ///
    /// # Panics
    /// If `i` is not below [`Dataset::len`] or `out` has not the bytes of an image.
    pub fn image(&self, i: u64, out: &mut [u8]) -> Result<(), DataError> {
        assert!(i < self.len, "image {i} of {}", self.len);
        let image = self.image_bytes();
        assert_eq!(out.len(), image, "the bytes of an image");
        match &self.store {
            // `i` is below N, and N images are in memory: the product fits.
            Store::Array { bytes, offset, .. } => out.copy_from_slice(&bytes[offset + i as usize * image..][..image]),
            Store::Cifar10(batches) => {
                let (first, map) = &batches[batches.partition_point(|(first, _)| *first <= i) - 1];
                cifar10::interleave(&map[(i - first) as usize * cifar10::RECORD..][..cifar10::RECORD], out);
            }
            Store::Pictures(pictures) => pictures.image(i as usize, out)?,
        }
        Ok(())
    }

    /// Writes the images `indices` to `out`, `[n, H, W, C]`; pictures are decoded in parallel.
    ///
    /// # Errors
    /// As [`Dataset::image`]; the first in the order of `indices`.
    ///
    /// # Panics
    /// As [`Dataset::image`].
    pub fn images(&self, indices: &[u64], out: &mut [u8]) -> Result<(), DataError> {
        let image = self.image_bytes();
        assert_eq!(out.len(), indices.len() * image, "the bytes of the images");
        if let Some(pool) = &self.pool {
            let decode = || {
                let one = |(i, out): (&u64, &mut [u8])| self.image(*i, out).err();
                indices.par_iter().zip(out.par_chunks_exact_mut(image)).map(one).find_first(Option::is_some).flatten()
            };
            return pool.install(decode).map_or(Ok(()), Err);
        }
        indices.iter().zip(out.chunks_exact_mut(image)).try_for_each(|(i, out)| self.image(*i, out))
    }
}

/// A data set without its threads.
struct Opened {
    len: u64,
    shape: [usize; 3],
    store: Store,
    fingerprint: Hash,
    skipped: Skipped,
}

impl Opened {
    /// A file that is one array of pixels.
    fn mapped(path: &Path, parse: Parse, config: &DataConfig, progress: &dyn Progress) -> Result<Opened, DataError> {
        let map = map(path)?;
        let check = |map: &[u8]| -> Result<ArrayHeader, Fault> {
            let header = parse(&map[..map.len().min(MAX_HEADER)])?;
            header.check_length(map.len() as u64)?;
            Ok(header)
        };
        let header = check(&map).map_err(DataError::malformed(path))?;
        require_shape(path, header.shape, config)?;
        let offset = header.offset as usize;
        let fingerprint = array_fingerprint(header.count, header.shape, &digest(&map[offset..], progress)?);
        let store = Store::Array { bytes: Bytes::Mapped(map), offset, storage: Storage::File };
        Ok(Opened { len: header.count, shape: header.shape, store, fingerprint, skipped: Skipped::default() })
    }

    /// A compressed array, through the cache.
    fn compressed(
        path: &Path,
        container: Container,
        config: &DataConfig,
        progress: &dyn Progress,
    ) -> Result<Opened, DataError> {
        let header = container.header(path, progress)?;
        require_shape(path, header.shape, config)?;
        let limit = config.cache_limit.0;
        if header.bytes > limit {
            return Err(DataError::TooLarge { path: path.to_path_buf(), bytes: header.bytes, limit });
        }
        let options = format!("{container:?}");
        let key = || -> Result<Hash, DataError> {
            Ok(FieldHasher::new("compressed cache 2")
                .field(options.as_bytes())
                .field(&digest(&map(path)?, progress)?)
                .finish())
        };
        let request = request(path, options.clone(), key()?, header.bytes, config, progress);
        let cached = cache::open_or_build(&request, &|sink| {
            let built = container.unpack(path, progress, sink)?;
            if key()? != request.key { Err(DataError::Changed { path: path.to_path_buf() }) } else { Ok(built) }
        })?;
        Opened::cached(cached, path, |_| Skipped::default())
    }

    fn cifar10(
        path: &Path,
        files: &[PathBuf],
        config: &DataConfig,
        progress: &dyn Progress,
    ) -> Result<Opened, DataError> {
        require_shape(path, cifar10::SHAPE, config)?;
        let mut len = 0;
        let mut batches = Vec::new();
        let mut fingerprint = FieldHasher::new("cifar10 1");
        for file in files {
            let map = map(file)?;
            let count = cifar10::check(&map).map_err(DataError::malformed(file))?;
            fingerprint.push(&digest(&map, progress)?);
            batches.push((len, map));
            len += count;
        }
        let (store, fingerprint) = (Store::Cifar10(batches), fingerprint.finish());
        Ok(Opened { len, shape: cifar10::SHAPE, store, fingerprint, skipped: Skipped::default() })
    }

    /// A folder of pictures, through the cache or decoded when needed.
    fn images(path: &Path, config: &DataConfig, progress: &dyn Progress) -> Result<Opened, DataError> {
        let size = config.size.ok_or_else(|| {
            OutOfRange::new(
                "data.size",
                "(not given)",
                "a number of pixels such as 64, or [height, width]",
                "pictures of a folder are scaled and cropped to one size",
            )
        })?;
        let target = Target { size, channels: config.channels.unwrap_or(3) };
        let index = cache_dir(config).map(|dir| dir.join(format!("{}.index", cache::place(path, ""))));
        let folder = Folder::open(path, config.on_bad_image, index.as_deref(), progress)?;
        let image = target.shape().iter().product::<usize>() as u64;
        let bytes = image.saturating_mul(folder.files.len() as u64);
        if bytes > config.cache_limit.0 {
            let (folder, fingerprint, skipped) = folder.check_all(target, config.on_bad_image, progress)?;
            let len = folder.files.len() as u64;
            let store = Store::Pictures(OnDemand::new(folder, target, config.on_bad_image));
            return Ok(Opened { len, shape: target.shape(), store, fingerprint, skipped });
        }
        let options = format!("{:?} {:?}", target.shape(), config.on_bad_image);
        let key = folder.key(&options);
        let request = request(path, options, key, bytes, config, progress);
        let decode = |sink: &mut Sink| folder.decode_all(target, config.on_bad_image, progress, sink);
        let cached = cache::open_or_build(&request, &decode)?;
        Opened::cached(cached, path, |bad| folder.broken.clone().and(folder.skipped(bad)))
    }

    fn cached(cached: Cached, path: &Path, skipped: impl Fn(&Bad) -> Skipped) -> Result<Opened, DataError> {
        let Cached { header, bytes, offset } = cached;
        let storage = if matches!(bytes, Bytes::Mapped(_)) { Storage::Cache } else { Storage::Memory };
        let fingerprint = unhex(&header.fingerprint).ok_or_else(|| DataError::Changed { path: path.to_path_buf() })?;
        let skipped = skipped(&header.bad);
        let store = Store::Array { bytes, offset, storage };
        Ok(Opened { len: header.count, shape: header.shape, store, fingerprint, skipped })
    }
}

fn cache_dir(config: &DataConfig) -> Option<PathBuf> {
    config.cache_dir.as_deref().map(expand_home).or_else(user_cache_dir)
}

fn request<'a>(
    source: &'a Path,
    options: String,
    key: Hash,
    bytes: u64,
    config: &DataConfig,
    progress: &'a dyn Progress,
) -> Request<'a> {
    let dir = cache_dir(config);
    Request { source, options, key, bytes, dir, required: config.cache_dir.is_some(), progress }
}

/// Formats with a shape of their own: `data.size` and `data.channels` must agree with it if they are given.
fn require_shape(path: &Path, shape: [usize; 3], config: &DataConfig) -> Result<(), DataError> {
    let [height, width, channels] = shape;
    let found = ImageSize { height, width };
    let mismatch = |key, value: String, help| {
        let found = format!("{found} with {channels} channel{}", if channels == 1 { "" } else { "s" });
        Err(DataError::Mismatch { path: path.to_path_buf(), key, value, found, help })
    };
    match (config.size, config.channels) {
        (Some(size), _) if size != found => mismatch(
            "data.size",
            size.to_string(),
            "leave it out (the format has a size of its own; only folders of pictures are scaled)",
        ),
        (_, Some(wanted)) if wanted != channels => mismatch(
            "data.channels",
            wanted.to_string(),
            "leave it out (only pictures of a folder are converted between grey and colour)",
        ),
        _ => Ok(()),
    }
}

fn unhex(text: &str) -> Option<Hash> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(hash)
}
