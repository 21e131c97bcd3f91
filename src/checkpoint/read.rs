//! Verifying and loading one checkpoint, whatever number of shards it was written in.

use super::error::{CheckpointError, zeros};
use super::layout::{Layout, Piece};
use super::manifest::{MANIFEST, MAX_MANIFEST_BYTES, Manifest, ShardFile};
use super::snapshot::{Buffers, GROUPS, Group, Snapshot};
use super::stream::{Reader, hex, open_regular};
use super::write::stored_name;
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Which groups are loaded; every byte is verified in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// All four, to train on.
    All,
    /// The EMA weights, to sample and evaluate.
    Ema,
    /// The raw weights.
    Params,
}

impl Want {
    fn includes(self, group: Group) -> bool {
        match self {
            Want::All => true,
            Want::Ema => group == Group::Ema,
            Want::Params => group == Group::Params,
        }
    }
}

/// Reads the manifest and compares the sizes of the shards with it, without reading them.
pub fn inspect(dir: &Path) -> Result<Manifest, CheckpointError> {
    let path = dir.join(MANIFEST);
    let file = open_regular(&path)?;
    let mut bytes = Vec::new();
    let read = CheckpointError::io("read", &path);
    file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        let reason = format!("it is larger than {MAX_MANIFEST_BYTES} bytes");
        return Err(CheckpointError::Manifest { path, reason });
    }
    let manifest = Manifest::decode(&path, &bytes)?;
    for shard in &manifest.files {
        let path = dir.join(&shard.name);
        let found = open_regular(&path)?.metadata().map_err(CheckpointError::io("read", &path))?.len();
        if found != shard.bytes {
            return Err(CheckpointError::WrongSize { path, expected: shard.bytes, found });
        }
    }
    Ok(manifest)
}

/// Reads every byte of a checkpoint and compares sizes, headers and hashes with its manifest.
pub fn verify(dir: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = inspect(dir)?;
    for shard in &manifest.files {
        read_shard(dir, &manifest, shard, |_, piece, reader| skip(piece, reader))?;
    }
    Ok(manifest)
}

/// Verifies a checkpoint, and hashes the values of each group in the order of the flat buffer: however many shards they stand in, equal
/// tensors give equal hashes. Ends early once `called_off` is set.
pub(super) fn digests(dir: &Path, called_off: &AtomicBool) -> Result<(Manifest, [String; 4]), CheckpointError> {
    let manifest = inspect(dir)?;
    let mut hashers = GROUPS.map(|_| Sha256::new());
    for shard in &manifest.files {
        read_shard(dir, &manifest, shard, |group, piece, reader| {
            if called_off.load(Ordering::Relaxed) {
                return Err(CheckpointError::CalledOff);
            }
            let hasher = &mut hashers[group as usize];
            reader.read_bytes(piece.elements.len() * 4, |bytes| hasher.update(bytes))
        })?;
    }
    Ok((manifest, hashers.map(|hasher| hex(&hasher.finalize()))))
}

/// Verifies and loads a checkpoint into the flat buffers of `layout`, or of its own layout where that is `None`. Names and
/// shapes must agree; offsets and the number of shards need not. Gaps are zero; buffers that are not wanted are empty.
pub fn load(dir: &Path, layout: Option<&Arc<Layout>>, want: Want) -> Result<Snapshot, CheckpointError> {
    let manifest = inspect(dir)?;
    if let Some(layout) = layout {
        compare(&manifest.layout, layout)
            .map_err(|reason| CheckpointError::OtherModel { path: dir.to_path_buf(), reason })?;
    }
    let layout = layout.unwrap_or(&manifest.layout).clone();
    let buffers = Buffers { range: 0..layout.elements(), ..Buffers::default() };
    let mut snapshot = Snapshot::new(manifest.meta.clone(), layout.clone(), buffers);
    // The sizes of the files vouch for the tensors before memory is taken for them; gaps add less than 64 elements each.
    let stored = manifest.layout.parameters() as u64 * 4 * GROUPS.len() as u64;
    if manifest.bytes() < stored {
        let reason = format!("its files have {} bytes, its tensors {stored}", manifest.bytes());
        return Err(CheckpointError::Manifest { path: dir.join(MANIFEST), reason });
    }
    for group in GROUPS.into_iter().filter(|&g| want.includes(g)) {
        *snapshot.group_mut(group) = zeros(layout.elements(), dir)?;
    }
    for shard in &manifest.files {
        read_shard(dir, &manifest, shard, |group, piece, reader| {
            // The same tensor may stand elsewhere in the present layout.
            let start = layout.get(&piece.tensor.name).map(|t| t.offset + piece.elements.start - piece.tensor.offset);
            let out = start.and_then(|s| snapshot.group_mut(group).get_mut(s..s + piece.elements.len()));
            match out.filter(|_| want.includes(group)) {
                Some(out) => reader.read_f32(out),
                None => skip(piece, reader),
            }
        })?;
    }
    Ok(snapshot)
}

/// Hashes a piece that is not wanted.
fn skip(piece: &Piece, reader: &mut Reader) -> Result<(), CheckpointError> {
    reader.read_bytes(piece.elements.len() * 4, |_| ())
}

/// Reads one shard whole. `take` is called for each piece in file order and must read all of its values.
fn read_shard(
    dir: &Path,
    manifest: &Manifest,
    shard: &ShardFile,
    mut take: impl FnMut(Group, &Piece, &mut Reader) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let path = dir.join(&shard.name);
    let bad = |reason: String| CheckpointError::Shard { path: path.clone(), reason };
    let mut reader = Reader::open(&path)?;
    let mut expected = HashMap::new();
    for group in GROUPS {
        for piece in manifest.layout.pieces(shard.begin..shard.end) {
            expected.insert(stored_name(group, piece.tensor), (group, piece));
        }
    }
    let mut order = Vec::with_capacity(expected.len());
    for name in reader.header.offset_keys() {
        let Some((group, piece)) = expected.remove(&name) else {
            return Err(bad(format!("it holds a tensor {name:?} that the manifest does not place here")));
        };
        let shape = piece.shape();
        match reader.header.info(&name) {
            Some(info) if info.dtype == Dtype::F32 && info.shape == shape => order.push((group, piece)),
            found => {
                let found = found.map(|i| format!("{:?} {:?}", i.dtype, i.shape)).unwrap_or_default();
                return Err(bad(format!("tensor {name:?} is {found}, expected F32 {shape:?}")));
            }
        }
    }
    if let Some(name) = expected.keys().min() {
        return Err(bad(format!("{} of its tensors are missing, {name:?} among them", expected.len())));
    }
    for (group, piece) in &order {
        take(*group, piece, &mut reader)?;
    }
    let found = reader.finish();
    if found != shard.sha256 {
        return Err(CheckpointError::WrongHash { path, expected: shard.sha256.clone(), found });
    }
    Ok(())
}

/// Names and shapes must be the same; says which are not, the first few by name.
fn compare(stored: &Layout, wanted: &Layout) -> Result<(), String> {
    let mut problems = Vec::new();
    for t in wanted.tensors() {
        match stored.get(&t.name) {
            None => problems.push(format!("it lacks {} {:?}", t.name, t.shape)),
            Some(s) if s.shape != t.shape => {
                problems.push(format!("{} is {:?}, configured is {:?}", t.name, s.shape, t.shape));
            }
            Some(_) => {}
        }
    }
    problems.extend(
        stored
            .tensors()
            .iter()
            .filter(|s| wanted.get(&s.name).is_none())
            .map(|s| format!("it also has {} {:?}", s.name, s.shape)),
    );
    let count = problems.len();
    problems.truncate(5);
    match count {
        0 => Ok(()),
        1..=5 => Err(problems.join("; ")),
        _ => Err(format!("{} and {} more", problems.join("; "), count - 5)),
    }
}
