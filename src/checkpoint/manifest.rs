//! `manifest.json`: what a checkpoint holds, written last and read first.
//!
//! ```json
//! {
//! "format_version": 1,
//! "run": { "step": 12000, "images": 1536000, "seed": 0, "config_hash": "…", … },
//! "files": [
//! {"name":"shard-00000-of-00001.safetensors","begin":0,"end":35790336,"bytes":572657152,"sha256":"…"}
//! ],
//! "tensors": [
//! {"name":"conv_in.weight","shape":[128,3,3,3],"begin":0,"end":3456}
//! ],
//! "manifest_sha256": "…"
//! }
//! ```
//!
//! `begin` and `end` count elements of the flat buffers. A file holds, for each group in the order of
//! [`GROUPS`](super::GROUPS), the tensors inside its range under the names `params.conv_in.weight`, `adam_m.…`, `adam_v.…`
//! and `ema.…`; a tensor that a file's range cuts is stored there as one axis of the elements inside. Gaps are not stored.
//! `manifest_sha256` is the hash of the manifest's own bytes with that field's 64 digits replaced by zeros. It is the last
//! field, and means the same in every format version, so that damage and a newer format can be told apart.

use super::error::CheckpointError;
use super::layout::{Layout, TensorSpec};
use super::stream::hex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The format version this build writes and the only one it reads.
pub const FORMAT_VERSION: u64 = 1;

/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";

/// A manifest beyond this is refused unread; one of a thousand tensors has about 100 kB.
pub(super) const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// What a checkpoint records beside its tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Optimiser steps done.
    pub step: u64,
    /// Training images seen.
    pub images: u64,
    /// The run's seed, the key of all random draws; together with `step` it is all there is to save about randomness.
    pub seed: u64,
    /// Hash of the part of the config that determines the trajectory.
    pub config_hash: String,
    /// The resolved config, so that a checkpoint can be sampled without its run directory.
    #[serde(default)]
    pub config_toml: Option<String>,
    /// Hash of the data set's pixels and order.
    pub data_fingerprint: String,
    /// The build that wrote this: version and commit (`unknown` for a source without git, `…-changed` for one with changes of its own).
    pub build: String,
    /// The kind of CPU or GPU whose bits these are, with its instruction set.
    pub device_kind: String,
    /// What influences bits beside the source: on the CPU, where every product is this program's own, the compiler (`rustc`) and the
    /// instruction set chosen (`simd`); on a GPU also `cudnn` and `cublaslt`.
    #[serde(default)]
    pub libraries: BTreeMap<String, String>,
    /// Ranks that took part in the step.
    pub world_size: usize,
    /// Whatever else the writer wants to find again: a GPU's `plans` for convolutions.
    #[serde(default)]
    pub extra: BTreeMap<String, Value>,
}

/// One shard file and the element range of the flat buffers that it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// File name inside the checkpoint, [`ShardFile::file_name`].
    pub name: String,
    /// First element.
    pub begin: usize,
    /// One past the last element.
    pub end: usize,
    /// File size in bytes.
    pub bytes: u64,
    /// SHA-256 of the whole file, 64 hexadecimal digits.
    pub sha256: String,
}

impl ShardFile {
    /// `shard-00003-of-00008.safetensors`
    pub fn file_name(index: usize, count: usize) -> String {
        format!("shard-{index:05}-of-{count:05}.safetensors")
    }

    /// Whether this is the file of shard `index` of `count`, by its name and its range.
    pub(super) fn is_shard(&self, layout: &Layout, index: usize, count: usize) -> bool {
        self.name == ShardFile::file_name(index, count) && (self.begin..self.end) == layout.shard(index, count)
    }
}

/// A manifest that has been checked: names and ranges are sound, files partition the layout.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// What is recorded beside the tensors.
    pub meta: Meta,
    /// The flat buffers as they were when saved.
    pub layout: Arc<Layout>,
    /// The shards in ascending order of their ranges.
    pub files: Vec<ShardFile>,
}

#[derive(Serialize, Deserialize)]
struct TensorRow {
    name: String,
    shape: Vec<usize>,
    begin: usize,
    end: usize,
}

#[derive(Deserialize)]
struct Document {
    run: Meta,
    files: Vec<ShardFile>,
    tensors: Vec<TensorRow>,
}

#[derive(Deserialize)]
struct Versioned {
    format_version: u64,
}

const HASH_KEY: &str = "\"manifest_sha256\": \"";
const HASH_DIGITS: usize = 64;

impl Manifest {
    /// The file's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut text = format!("{{\n\"format_version\": {FORMAT_VERSION},\n\"run\": ");
        text += &serde_json::to_string_pretty(&self.meta)?;
        text += ",\n\"files\": [\n";
        push_rows(&mut text, self.files.iter())?;
        text += "],\n\"tensors\": [\n";
        let row = |t: &TensorSpec| TensorRow {
            name: t.name.clone(),
            shape: t.shape.clone(),
            begin: t.offset,
            end: t.offset + t.len,
        };
        push_rows(&mut text, self.layout.tensors().iter().map(row))?;
        text += "],\n";
        text += HASH_KEY;
        let at = text.len();
        text += &"0".repeat(HASH_DIGITS);
        text += "\"\n}\n";
        let hash = hex(&Sha256::digest(text.as_bytes()));
        text.replace_range(at..at + HASH_DIGITS, &hash);
        Ok(text.into_bytes())
    }

    /// Parses and checks the bytes of the manifest at `path` (the path is for messages only).
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Manifest, CheckpointError> {
        let invalid = |reason: String| CheckpointError::Manifest { path: path.to_path_buf(), reason };
        check_own_hash(bytes).map_err(invalid)?;
        let parse = |e: serde_json::Error| invalid(e.to_string());
        let found = serde_json::from_slice::<Versioned>(bytes).map_err(parse)?.format_version;
        if found != FORMAT_VERSION {
            return Err(CheckpointError::Version { path: path.to_path_buf(), found, supported: FORMAT_VERSION });
        }
        let document: Document = serde_json::from_slice(bytes).map_err(parse)?;
        let mut specs = Vec::with_capacity(document.tensors.len());
        for row in document.tensors {
            let len = row.end.checked_sub(row.begin).ok_or_else(|| {
                invalid(format!("tensor {:?} ends at {} before it begins at {}", row.name, row.end, row.begin))
            })?;
            specs.push(TensorSpec { name: row.name, shape: row.shape, offset: row.begin, len });
        }
        let layout = Layout::new(specs).map_err(|e| invalid(e.to_string()))?;
        check_files(&document.files, &layout).map_err(invalid)?;
        Ok(Manifest { meta: document.run, layout: Arc::new(layout), files: document.files })
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, f| sum.saturating_add(f.bytes))
    }
}

fn push_rows<T: Serialize>(text: &mut String, rows: impl ExactSizeIterator<Item = T>) -> Result<(), serde_json::Error> {
    let count = rows.len();
    for (i, row) in rows.enumerate() {
        *text += &serde_json::to_string(&row)?;
        *text += if i + 1 < count { ",\n" } else { "\n" };
    }
    Ok(())
}

fn check_own_hash(bytes: &[u8]) -> Result<(), String> {
    let key = HASH_KEY.as_bytes();
    let at = bytes.windows(key.len()).rposition(|w| w == key).map(|i| i + key.len());
    let Some((at, digits)) = at.and_then(|at| Some((at, bytes.get(at..at + HASH_DIGITS)?))) else {
        return Err("it has no manifest_sha256: it was truncated or not written by this program".into());
    };
    let mut hasher = Sha256::new();
    hasher.update(&bytes[..at]);
    hasher.update([b'0'; HASH_DIGITS]);
    hasher.update(&bytes[at + HASH_DIGITS..]);
    let found = hex(&hasher.finalize());
    if found.as_bytes() == digits {
        return Ok(());
    }
    Err(format!("its SHA-256 is {found}, but it says {}: it was damaged or edited", String::from_utf8_lossy(digits)))
}

/// The names leave no freedom, so that none can point outside the checkpoint; the ranges partition the layout.
fn check_files(files: &[ShardFile], layout: &Layout) -> Result<(), String> {
    let mut at = 0;
    for (i, file) in files.iter().enumerate() {
        let expected = ShardFile::file_name(i, files.len());
        if file.name != expected {
            return Err(format!("file {i} of {} is called {:?}, expected {expected:?}", files.len(), file.name));
        }
        if file.begin != at || file.end < file.begin {
            return Err(format!(
                "{} holds elements {}..{}, expected them to begin at {at}",
                file.name, file.begin, file.end
            ));
        }
        if file.sha256.len() != HASH_DIGITS || !file.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(format!("{} has {:?} as its SHA-256, expected 64 hexadecimal digits", file.name, file.sha256));
        }
        at = file.end;
    }
    if at != layout.elements() || files.is_empty() {
        return Err(format!("its files end at element {at}, its tensors at {}", layout.elements()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let layout = Layout::packed([("a.weight", vec![3, 70]), ("b", vec![1])]).unwrap();
        let meta = Meta { step: 7, seed: u64::MAX, config_toml: Some("a = \"b\"\n".into()), ..Meta::default() };
        let files = (0..2)
            .map(|i| ShardFile {
                name: ShardFile::file_name(i, 2),
                begin: layout.shard(i, 2).start,
                end: layout.shard(i, 2).end,
                bytes: 10,
                sha256: "0".repeat(64),
            })
            .collect();
        Manifest { meta, layout: Arc::new(layout), files }
    }

    /// Replaces text and makes the hash right again: what an attacker or a faulty writer could produce.
    fn forged(from: &str, to: &str) -> Result<Manifest, CheckpointError> {
        let text = String::from_utf8(manifest().encode().unwrap()).unwrap();
        assert!(text.contains(from), "{text}");
        let mut text = text.replacen(from, to, 1);
        let at = text.rfind(HASH_KEY).unwrap() + HASH_KEY.len();
        text.replace_range(at..at + HASH_DIGITS, &"0".repeat(HASH_DIGITS));
        let hash = hex(&Sha256::digest(text.as_bytes()));
        text.replace_range(at..at + HASH_DIGITS, &hash);
        Manifest::decode(Path::new("manifest.json"), text.as_bytes())
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let m = manifest();
        let back = Manifest::decode(Path::new("m"), &m.encode().unwrap()).unwrap();
        assert_eq!((&back.meta, &back.files, &*back.layout), (&m.meta, &m.files, &*m.layout));
    }

    #[test]
    fn any_flipped_bit_and_any_truncation_is_noticed() {
        let bytes = manifest().encode().unwrap();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[i] ^= 1 << bit;
                let e = Manifest::decode(Path::new("m"), &bad).expect_err("a flipped bit");
                assert!(matches!(e, CheckpointError::Manifest { .. }), "{i} {bit} {e}");
            }
            assert!(Manifest::decode(Path::new("m"), &bytes[..i]).is_err());
        }
    }

    #[test]
    fn another_version_is_refused_by_version() {
        let e = forged("\"format_version\": 1", "\"format_version\": 2").unwrap_err();
        assert!(matches!(e, CheckpointError::Version { found: 2, supported: 1, .. }), "{e}");
        assert!(!e.is_damage());
    }

    #[test]
    fn forged_manifests_are_refused() {
        for (from, to, says) in [
            (
                "shard-00000-of-00002.safetensors",
                "../../../etc/passwd",
                "expected \"shard-00000-of-00002.safetensors\"",
            ),
            ("shard-00001-of-00002.safetensors", "shard-00000-of-00002.safetensors", "expected \"shard-00001"),
            ("\"name\":\"b\"", "\"name\":\"a.weight\"", "occurs twice"),
            ("\"begin\":256,\"end\":257", "\"begin\":200,\"end\":201", "begins at element 200"),
            ("\"begin\":256", "\"begin\":18446744073709551615", "before it begins"),
            ("\"shape\":[3,70]", "\"shape\":[4294967296,4294967296]", "cannot have 210 elements"),
            ("\"shape\":[3,70]", "\"shape\":[-1]", "invalid value"),
            ("\"begin\":128,\"end\":320", "\"begin\":64,\"end\":320", "expected them to begin at 128"),
            ("\"end\":320", "\"end\":18446744073709551615", "its files end at element"),
            ("\"step\": 7", "\"step\": 1e400", "number"),
            ("\"sha256\":\"0", "\"sha256\":\"", "64 hexadecimal digits"),
            ("\"tensors\"", "\"tensor\"", "missing field"),
            ("\"files\": [", "\"files\": [], \"files\": [", "duplicate field"),
        ] {
            let e = forged(from, to).expect_err(to).to_string();
            assert!(e.contains(says), "{to}: {e}");
        }
        let deep = format!("\"run\": {}", "[".repeat(100_000));
        assert!(forged("\"run\": {", &deep).is_err());
    }
}
