//! Reading a diffusers directory.

use super::error::{DiffusersError, TensorProblem};
use super::json::Keys;
use super::names::{expected_tensors, fits, our_shape, present_name, to_ours};
use super::{MODEL_INDEX, SCHEDULER, SCHEDULER_CONFIG, UNET, UNET_CONFIG, WEIGHTS, half, scheduler, unet};
use crate::checkpoint::error::zeros;
use crate::checkpoint::stream::Reader;
use crate::checkpoint::{CheckpointError, Layout};
use crate::diffusion::{DiffusionConfig, SamplerConfig};
use crate::unet::UnetConfig;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A tensor in our memory order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Our shape: OHWI for convolutions.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f32>,
}

/// What a diffusers directory holds.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The architecture.
    pub unet: UnetConfig,
    /// [height, width] of the images, if the config says so.
    pub image_size: Option<[usize; 2]>,
    /// The process and the sampler; `None` for a directory of weights alone, which can be trained from but not sampled.
    pub scheduler: Option<(DiffusionConfig, SamplerConfig)>,
    /// All weights by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The directory.
    pub path: PathBuf,
    /// Keys of the configs that nobody knows, as `file: key`. diffusers ignores them too; they are worth a warning.
    pub ignored: Vec<String>,
}

impl Imported {
    /// The weights as the flat buffer of a layout whose names and shapes are those of this model.
    pub fn flat(&self, layout: &Layout) -> Result<Vec<f32>, DiffusersError> {
        let wrong = |what: String| DiffusersError::Model(format!("it is not the configured one: {what}"));
        let mut values = zeros(layout.elements(), &self.path)?;
        for spec in layout.tensors() {
            let tensor = self.tensors.get(&spec.name).ok_or_else(|| wrong(format!("it lacks {}", spec.name)))?;
            if tensor.shape != spec.shape {
                let what = format!("{} has shape {:?}, configured is {:?}", spec.name, tensor.shape, spec.shape);
                return Err(wrong(what));
            }
            values[spec.range()].copy_from_slice(&tensor.data);
        }
        match self.tensors.keys().find(|name| layout.get(name).is_none()) {
            Some(name) => Err(wrong(format!("it also has {name}"))),
            None => Ok(values),
        }
    }
}

/// Whether a path looks like what [`import`] reads.
pub fn is_diffusers_dir(dir: &Path) -> bool {
    dir.join(MODEL_INDEX).is_file()
        || Keys::read(&dir.join(UNET_CONFIG)).is_ok_and(|keys| keys.get("_class_name").is_some())
}

/// Reads a pipeline directory, or the directory of a UNet2DModel alone. Weights may be f32, f16 or bf16, and attention may have
/// its old names and shapes.
pub fn import(dir: &Path) -> Result<Imported, DiffusersError> {
    if !is_diffusers_dir(dir) {
        let reason = format!("it has neither {MODEL_INDEX} nor a {UNET_CONFIG} of a UNet2DModel");
        return Err(DiffusersError::NotDiffusers { path: dir.to_path_buf(), reason });
    }
    let is_pipeline = dir.join(MODEL_INDEX).is_file();
    if is_pipeline {
        check_index(&Keys::read(&dir.join(MODEL_INDEX))?)?;
    }
    // A pipeline's part may also lie in its root, as in the first published ones.
    let part = |name: &str| Some(dir.join(name)).filter(|p| p.is_dir()).unwrap_or(dir.to_path_buf());
    let unet_keys = Keys::read(&part(UNET).join(UNET_CONFIG))?;
    let (config, image_size) = unet::from_json(&unet_keys)?;
    let mut ignored =
        unet_keys.ignored().iter().map(|k| format!("{}: {k}", unet_keys.path.display())).collect::<Vec<_>>();
    let scheduler_path = part(SCHEDULER).join(SCHEDULER_CONFIG);
    let scheduler = if is_pipeline || scheduler_path.is_file() {
        let keys = Keys::read(&scheduler_path)?;
        let found = scheduler::from_json(&keys)?;
        ignored.extend(keys.ignored().iter().map(|k| format!("{}: {k}", scheduler_path.display())));
        Some(found)
    } else {
        None
    };
    let tensors = read_weights(&weights_path(&part(UNET))?, &config)?;
    Ok(Imported { path: dir.to_path_buf(), unet: config, image_size, scheduler, tensors, ignored })
}

/// The pipeline's parts must be a UNet2DModel and a scheduler; a VQ-VAE or a text encoder would be needed to make its images.
fn check_index(keys: &Keys) -> Result<(), DiffusersError> {
    keys.get(UNET);
    keys.get(SCHEDULER);
    let others = keys.ignored();
    match others
        .iter()
        .find(|key| keys.value(key).is_some_and(|v| v.as_array().is_some_and(|a| a.iter().any(|v| !v.is_null()))))
    {
        None => Ok(()),
        Some(key) => Err(DiffusersError::Unsupported {
            path: keys.path.clone(),
            key: key.clone(),
            found: keys.shown(key, &serde_json::Value::Null),
            supported: "a pipeline of unet and scheduler".into(),
            why: "this pipeline's images do not come from its UNet alone".into(),
        }),
    }
}

fn weights_path(dir: &Path) -> Result<PathBuf, DiffusersError> {
    let path = dir.join(WEIGHTS);
    if path.is_file() {
        return Ok(path);
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let other = names.filter_map(|n| n.into_string().ok()).find(|n| n.starts_with("diffusion_pytorch_model"));
    let reason = match other {
        Some(other) => format!(
            "its weights are in {other}, expected {WEIGHTS}: load it in Python and call save_pretrained(dir, safe_serialization=True)"
        ),
        None => format!("{} is missing", path.display()),
    };
    Err(DiffusersError::NotDiffusers { path: dir.to_path_buf(), reason })
}

fn read_weights(path: &Path, config: &UnetConfig) -> Result<BTreeMap<String, Tensor>, DiffusersError> {
    let mut reader = Reader::open(path)?;
    let mut expected: HashMap<_, _> = expected_tensors(config).into_iter().collect();
    let mut order = Vec::new();
    let mut problems = Vec::new();
    for stored in reader.header.offset_keys() {
        let Some(info) = reader.header.info(&stored) else { continue };
        let (name, found) = (present_name(&stored), info.shape.clone());
        match expected.remove(&name) {
            None => problems.push(TensorProblem::Unexpected { name: stored, found }),
            Some(shape) if !fits(&name, &shape, &found) => {
                problems.push(TensorProblem::WrongShape { name: stored, expected: shape, found });
            }
            Some(_) if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                problems.push(TensorProblem::WrongType { name: stored, found: format!("{:?}", info.dtype) });
            }
            Some(shape) => order.push((name, shape, info.dtype)),
        }
    }
    let mut missing: Vec<_> = expected.into_iter().collect();
    missing.sort();
    problems.extend(missing.into_iter().map(|(name, expected)| TensorProblem::Missing { name, expected }));
    if !problems.is_empty() {
        return Err(DiffusersError::Weights { path: path.to_path_buf(), problems });
    }
    let mut tensors = BTreeMap::new();
    for (name, shape, dtype) in order {
        let mut data = zeros(shape.iter().product(), path)?;
        read_values(&mut reader, &mut data, dtype)?;
        tensors.insert(name, Tensor { shape: our_shape(&shape), data: to_ours(&shape, data) });
    }
    Ok(tensors)
}

fn read_values(reader: &mut Reader, values: &mut [f32], dtype: Dtype) -> Result<(), CheckpointError> {
    if dtype == Dtype::F32 {
        return reader.read_f32(values);
    }
    let widen = if dtype == Dtype::F16 { half::from_f16 } else { half::from_bf16 };
    let mut rest = values.iter_mut();
    reader.read_bytes(2 * rest.len(), |part| {
        for (bytes, value) in part.chunks_exact(2).zip(&mut rest) {
            *value = widen(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
    })
}
