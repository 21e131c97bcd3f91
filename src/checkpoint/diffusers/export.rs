//! Writing a diffusers directory.

use super::error::DiffusersError;
use super::names::{expected_tensors, our_shape, to_theirs};
use super::{DIFFUSERS_VERSION, MODEL_INDEX, SCHEDULER, SCHEDULER_CONFIG, UNET, UNET_CONFIG, WEIGHTS, scheduler, unet};
use crate::checkpoint::io::{Disk, Io, unique_id};
use crate::checkpoint::stream::{Writer, header};
use crate::checkpoint::{CheckpointError, Layout};
use crate::diffusion::{DiffusionConfig, SamplerConfig};
use crate::files::parent;
use crate::unet::UnetConfig;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Writes a directory that `DDPMPipeline.from_pretrained(dir)` loads. `sample_size` is [height, width]; `values` is the flat
/// buffer of `layout`, EMA or raw. The directory must not exist, or be empty; it appears whole or not at all.
///
/// The scheduler is a DDPMScheduler, as that pipeline wants it, with the timestep spacing of `sampler`; the rest of a sampler (DDIM, its
/// number of steps, η) is said to a pipeline when it is called, not stored in it.
///
/// A DDPMPipeline takes 1000 steps unless told otherwise, so a process with T < 1000 needs `num_inference_steps` there.
pub fn export(
    dir: &Path,
    config: &UnetConfig,
    sample_size: [usize; 2],
    (diffusion, sampler): (&DiffusionConfig, &SamplerConfig),
    layout: &Layout,
    values: &[f32],
) -> Result<(), DiffusersError> {
    let [height, width] = sample_size;
    config.validate(height, width).map_err(|refused| DiffusersError::Model(refused.to_string()))?;
    if values.len() != layout.elements() {
        let (expected, found) = (layout.elements(), values.len());
        return Err(CheckpointError::Snapshot { group: "exported", expected, found }.into());
    }
    let scheduler = scheduler::to_json(diffusion, sampler)?;
    let name = dir.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
        let source = std::io::Error::other("the path has no last component to name the directory by");
        CheckpointError::Io { action: "create", path: dir.to_path_buf(), source }
    })?;
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(DiffusersError::Exists { path: dir.to_path_buf() });
    }
    let parent = parent(dir);
    fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
    let temporary = parent.join(format!("{name}.tmp-{}", unique_id()));
    let written = write_all(&temporary, config, sample_size, &scheduler, layout, values).and_then(|()| {
        fs::rename(&temporary, dir).map_err(CheckpointError::io("create", dir))?;
        Ok(Disk.sync_dir(parent).map_err(CheckpointError::io("flush to disk", parent))?)
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

fn write_all(
    dir: &Path,
    config: &UnetConfig,
    sample_size: [usize; 2],
    scheduler: &Value,
    layout: &Layout,
    values: &[f32],
) -> Result<(), DiffusersError> {
    for path in [dir.to_path_buf(), dir.join(UNET), dir.join(SCHEDULER)] {
        fs::create_dir(&path).map_err(CheckpointError::io("create", &path))?;
    }
    let index = json!({
        "_class_name": "DDPMPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    write_json(&dir.join(MODEL_INDEX), &index)?;
    write_json(&dir.join(SCHEDULER).join(SCHEDULER_CONFIG), scheduler)?;
    write_json(&dir.join(UNET).join(UNET_CONFIG), &unet::to_json(config, sample_size))?;
    write_weights(&dir.join(UNET).join(WEIGHTS), config, layout, values)?;
    for path in [dir.join(UNET), dir.join(SCHEDULER), dir.to_path_buf()] {
        Disk.sync_dir(&path).map_err(CheckpointError::io("flush to disk", &path))?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), DiffusersError> {
    let json = |e: serde_json::Error| DiffusersError::Json { path: path.to_path_buf(), reason: e.to_string() };
    let mut text = serde_json::to_vec_pretty(value).map_err(json)?;
    text.push(b'\n');
    let mut file = Writer::create(&Disk, path)?;
    file.write(&text)?;
    file.finish()?;
    Ok(())
}

fn write_weights(path: &Path, config: &UnetConfig, layout: &Layout, values: &[f32]) -> Result<(), DiffusersError> {
    let mut tensors = expected_tensors(config);
    tensors.sort();
    let mut parts = Vec::with_capacity(tensors.len());
    for (name, theirs) in &tensors {
        let ours = our_shape(theirs);
        let spec =
            layout.get(name).ok_or_else(|| DiffusersError::Model(format!("it has no tensor {name} {ours:?}")))?;
        if spec.shape != ours {
            let reason = format!("its tensor {name} has shape {:?}, expected {ours:?}", spec.shape);
            return Err(DiffusersError::Model(reason));
        }
        parts.push(&values[spec.range()]);
    }
    if layout.tensors().len() != tensors.len() {
        let known = |name: &str| tensors.iter().any(|(n, _)| n == name);
        let names: Vec<_> = layout.tensors().iter().map(|t| &t.name).filter(|n| !known(n)).collect();
        return Err(DiffusersError::Model(format!("it has tensors that UNet2DModel lacks: {names:?}")));
    }
    let damaged =
        |e: safetensors::SafeTensorError| CheckpointError::Shard { path: path.to_path_buf(), reason: e.to_string() };
    let mut file = Writer::create(&Disk, path)?;
    file.write(&header(&tensors, "pt").map_err(damaged)?)?;
    for ((_, shape), part) in tensors.iter().zip(parts) {
        file.write_f32(&to_theirs(shape, part))?;
    }
    file.finish()?;
    Ok(())
}
