//! The `[data]` section of a config.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::OutOfRange;

use super::{ByteSize, DataError, ImageSize};

/// How a data set is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Told from the name and the first bytes.
    Auto,
    /// MNIST's IDX, plain or gzip-compressed; a file or a folder that holds one.
    Idx,
    /// CIFAR-10 binary batches: a folder with `data_batch_1.bin` … `data_batch_5.bin`, or one such file.
    Cifar10,
    /// A folder of PNG and JPEG pictures, searched recursively.
    Images,
    /// NumPy's `.npy` or `.npz`: u8 `[N, H, W, C]` or `[N, H, W]`.
    Npy,
}

/// What happens when a picture of a folder cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadImage {
    /// Stop and name it.
    Error,
    /// Leave it out; skipped pictures are counted and reported. Above `data.cache_limit` only headers are read before the first step: a
    /// picture that turns out to be bad later is replaced, wherever its turn comes, by the next good one in the order of paths. A link
    /// to nothing counts as a picture.
    Skip,
}

/// Where images come from and how they become u8 pixels `[N, H, W, C]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A file or a folder. `~/` is the home folder. A relative path is looked up in the current directory, then beside
    /// the config file, then in the folder above the config file's.
    pub path: PathBuf,
    /// How the data set is stored.
    pub format: Format,
    /// Size of the images: `28` or `[height, width]`. Required for a folder of pictures, whose pictures are scaled to
    /// cover it and cropped at the centre; other formats have a size of their own, which this must equal if given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<ImageSize>,
    /// 1 (grey) or 3 (colour). Pictures of a folder are converted (3 if not given); other formats have a number of
    /// their own, which this must equal if given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<usize>,
    /// Each image is mirrored left to right with probability ½ whenever it is used.
    pub flip: bool,
    /// Where decoded pixels are cached, and what pictures hold is noted (`~/` is the home folder); if not given, `ddpm-dist` in the user's cache folder (`$XDG_CACHE_HOME`, else
    /// `~/.cache`), and where that cannot be written pixels are kept in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// Decoded pixels above this are not cached: pictures are then decoded when they are needed, ahead of the step.
    pub cache_limit: ByteSize,
    /// What happens when a picture of a folder cannot be used.
    pub on_bad_image: OnBadImage,
    /// Threads that decode pictures; 0 means as many as the process may use.
    pub decode_threads: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            path: PathBuf::new(),
            format: Format::Auto,
            size: None,
            channels: None,
            flip: false,
            cache_dir: None,
            cache_limit: ByteSize(8 << 30),
            on_bad_image: OnBadImage::Error,
            decode_threads: 0,
        }
    }
}

/// Largest height or width. One image of this size is 192 MiB in colour; more is a slip of the keyboard.
const MAX_SIDE: usize = 8192;
/// Most decoding threads; above this a machine runs out of something else first.
const MAX_THREADS: usize = 1024;

impl DataConfig {
    /// Checks every value that can be checked without looking at the disk.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self) -> Result<(), OutOfRange> {
        let config = |key, value: String, expected: &str, reason| Err(OutOfRange::new(key, value, expected, reason));
        if self.path.as_os_str().is_empty() {
            return config("data.path", "\"\"".into(), "a file or a folder", "there is nothing to train on otherwise");
        }
        if let Some(size) = self.size
            && !((1..=MAX_SIDE).contains(&size.height) && (1..=MAX_SIDE).contains(&size.width))
        {
            let expected = format!("1 to {MAX_SIDE} in height and width");
            return config("data.size", size.to_string(), &expected, "images are whole in memory");
        }
        if let Some(channels) = self.channels
            && channels != 1
            && channels != 3
        {
            return config("data.channels", channels.to_string(), "1 or 3", "images are grey or colour");
        }
        if self.decode_threads > MAX_THREADS {
            let expected = format!("0 to {MAX_THREADS}");
            return config("data.decode_threads", self.decode_threads.to_string(), &expected, "0 uses every core");
        }
        if self.cache_dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
            return config("data.cache_dir", "\"\"".into(), "a directory", "leave it out for the user's cache folder");
        }
        Ok(())
    }

    /// Finds `data.path`: as it is, and if it is relative also beside `config_file` and in the folder above that.
    ///
    /// # Errors
    /// [`DataError::NotFound`], which says where the data set can be had.
    pub fn locate(&self, config_file: Option<&Path>) -> Result<PathBuf, DataError> {
        let path = expand_home(&self.path);
        let mut places = vec![path.clone()];
        if path.is_relative()
            && let Some(dir) = config_file.and_then(Path::parent)
        {
            places.push(dir.join(&path));
            // `dir` may be "" or "configs": the folder above is found from the absolute path.
            if let Some(above) = std::path::absolute(dir).ok().as_deref().and_then(Path::parent) {
                places.push(above.join(&path));
            }
        }
        for place in &places {
            match place.try_exists() {
                Ok(true) => return Ok(place.clone()),
                Ok(false) => {}
                Err(source) => return Err(DataError::io("look at the data set", place)(source)),
            }
        }
        let tried = places.split_off(1).into_iter().filter(|place| *place != path).collect();
        Err(DataError::NotFound { hint: self.hint(), path, tried })
    }

    /// How to get the data set that `path` seems to mean.
    fn hint(&self) -> String {
        let name = self.path.to_string_lossy().to_lowercase();
        if name.contains("fashion") {
            "Fashion-MNIST is Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist, then data.path = \
             \"/usr/share/datasets/fashion-mnist\"); elsewhere put train-images-idx3-ubyte.gz into this place"
        } else if name.contains("cifar") || self.format == Format::Cifar10 {
            "download CIFAR-10's binary version (cifar-10-binary.tar.gz, www.cs.toronto.edu/~kriz/cifar.html), unpack it \
             and let data.path name the folder cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin"
        } else if name.contains("mnist") || self.format == Format::Idx {
            "download train-images-idx3-ubyte.gz (MNIST, Fashion-MNIST, KMNIST and EMNIST are all published in this \
             form) and let data.path name the file or its folder"
        } else {
            "let data.path name a folder of PNG or JPEG pictures (with data.size), an IDX, .npy or .npz file, or a folder \
             of CIFAR-10 binary batches; relative paths start at the current directory"
        }
        .to_string()
    }
}

/// `~/x` → `$HOME/x`; anything else, or no `$HOME`, as it is.
pub(super) fn expand_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) if !home.is_empty() => PathBuf::from(home).join(rest),
        _ => path.to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_goes_both_ways() {
        let text = r#"
            path = "pictures"
            format = "images"
            size = [32, 48]
            channels = 1
            flip = true
            cache_dir = "/scratch/cache"
            cache_limit = "2GiB"
            on_bad_image = "skip"
            decode_threads = 4
        "#;
        let config: DataConfig = toml::from_str(text).unwrap();
        assert_eq!(config.size, Some(ImageSize { height: 32, width: 48 }));
        assert_eq!(config.cache_limit, ByteSize(2 << 30));
        assert_eq!(toml::from_str::<DataConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        let square: DataConfig = toml::from_str("size = 28\ncache_limit = 1000").unwrap();
        assert_eq!((square.size, square.cache_limit), (Some(ImageSize::square(28)), ByteSize(1000)));
        assert_eq!(toml::from_str::<DataConfig>(&toml::to_string(&square).unwrap()).unwrap(), square);
        let default = DataConfig::default();
        assert_eq!(toml::from_str::<DataConfig>(&toml::to_string(&default).unwrap()).unwrap(), default);
    }

    #[test]
    fn wrong_types_say_what_is_expected() {
        for (text, expected) in [
            ("size = \"big\"", "[height, width]"),
            ("size = [1, 2, 3]", "[height, width]"),
            ("size = [1]", "[height, width]"),
            ("size = -3", "[height, width]"),
            ("cache_limit = \"lots\"", "\"8GiB\""),
            ("cache_limit = -1", "\"8GiB\""),
            ("format = \"tiff\"", "cifar10"),
            ("colour = true", "channels"),
        ] {
            let error = toml::from_str::<DataConfig>(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let good = DataConfig { path: "x".into(), ..Default::default() };
        good.validate().unwrap();
        let bad = [
            ("data.path", DataConfig::default()),
            (
                "`data.size` = 0×8 is out of range",
                DataConfig { size: Some(ImageSize { height: 0, width: 8 }), ..good.clone() },
            ),
            ("`data.size` = 9000×9000", DataConfig { size: Some(ImageSize::square(9000)), ..good.clone() }),
            ("`data.channels` = 4 is out of range: 1 or 3", DataConfig { channels: Some(4), ..good.clone() }),
            ("`data.decode_threads` = 5000", DataConfig { decode_threads: 5000, ..good.clone() }),
            ("data.cache_dir", DataConfig { cache_dir: Some(PathBuf::new()), ..good.clone() }),
        ];
        for (expected, config) in bad {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn relative_paths_are_found_near_the_config_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("configs")).unwrap();
        std::fs::create_dir_all(dir.path().join("data-of-this-test")).unwrap();
        std::fs::create_dir_all(dir.path().join("configs/beside-of-this-test")).unwrap();
        let file = dir.path().join("configs/a.toml");
        let find = |path: &str| DataConfig { path: path.into(), ..Default::default() }.locate(Some(&file));
        assert_eq!(find("data-of-this-test").unwrap(), dir.path().join("data-of-this-test"));
        assert_eq!(find("beside-of-this-test").unwrap(), dir.path().join("configs/beside-of-this-test"));
        let error = find("cifar-of-nobody").unwrap_err().to_string();
        assert!(error.contains("nor at") && error.contains("cifar-10-binary.tar.gz"), "{error}");
        let error = find("data/fashion-of-nobody").unwrap_err().to_string();
        assert!(error.contains("dataset-fashion-mnist"), "{error}");
    }
}
