//! Where weights come from: a run directory, one of its checkpoints, or a diffusers directory.

use super::exit::{Code, Failure, OrFail};
use crate::checkpoint::diffusers::{DiffusersError, Imported, import, is_diffusers_dir};
use crate::checkpoint::manifest::MANIFEST;
use crate::checkpoint::rundir::{checkpoints_of, is_run_dir};
use crate::checkpoint::{CheckpointError, Layout, Snapshot, Want, load, load_newest};
use crate::device::{DeviceKind, Precision};
use crate::diffusion::{DiffusionConfig, SamplerConfig};
use crate::report::Console;
use crate::sample::room_for;
use crate::train::Config;
use crate::unet::UnetConfig;
use std::path::{Path, PathBuf};

/// A trained model: what it is, and its weights by name.
pub(super) struct Source {
    pub model: UnetConfig,
    /// Height and width of the images, where the source says.
    size: Option<[usize; 2]>,
    /// Images to sample at a time.
    pub batch: usize,
    /// What it was trained in.
    precision: Precision,
    /// Process and sampler; `None` where the source does not say.
    process: Option<(DiffusionConfig, SamplerConfig)>,
    path: PathBuf,
    weights: Weights,
}

/// Images to sample at a time from a diffusers directory, which does not say: little memory, and most of the speed.
const DIFFUSERS_BATCH: usize = 16;

enum Weights {
    /// With one of its flat buffers.
    Checkpoint(Box<Snapshot>, Want),
    Diffusers(Box<Imported>),
}

impl Source {
    /// What a device of that kind samples in: as the weights were trained, if it can.
    pub fn precision_on(&self, device: DeviceKind) -> Precision {
        match device {
            DeviceKind::Cpu => Precision::F32,
            DeviceKind::Cuda => self.precision,
        }
    }

    /// After how many steps of training, where the weights come from a checkpoint.
    pub fn step(&self) -> Option<u64> {
        match &self.weights {
            Weights::Checkpoint(snapshot, _) => Some(snapshot.meta.step),
            Weights::Diffusers(_) => None,
        }
    }

    /// Opens `path`; of a run or a checkpoint the weights that `want` names are read.
    pub fn open(path: &Path, want: Want, console: &Console) -> Result<Source, Failure> {
        if path.join(MANIFEST).is_file() {
            let snapshot = load(path, None, want).map_err(unreadable)?;
            return Source::of_snapshot(snapshot, want, path);
        }
        if is_run_dir(path) {
            let newest = load_newest(&checkpoints_of(path), None, want).map_err(unreadable)?;
            let Some(newest) = newest else {
                let message = format!("{} has no checkpoint yet: train until the first one is saved", path.display());
                return Err(Failure::new(Code::State, message));
            };
            for skipped in &newest.skipped {
                console.alarm(format!("skipping {}: {}", skipped.path.display(), skipped.reason));
            }
            console.detail(format!("weights of {}", newest.path.display()));
            return Source::of_snapshot(newest.snapshot, want, &newest.path);
        }
        if is_diffusers_dir(path) {
            return Source::of_diffusers(path, console);
        }
        Err(Failure::new(
            Code::State,
            format!(
                "{} is neither a run directory (`ddpm-dist train --run-dir`), nor a checkpoint in one (step-…), nor a diffusers directory",
                path.display()
            ),
        ))
    }

    fn of_snapshot(snapshot: Snapshot, want: Want, path: &Path) -> Result<Source, Failure> {
        let Some(text) = &snapshot.meta.config_toml else {
            return Err(Failure::new(
                Code::State,
                format!("{} does not hold the config it was trained with", path.display()),
            ));
        };
        let config: Config = crate::config::parse(text, &path.display().to_string(), &[]).or_fail(Code::State)?;
        let sampler = config.sample.sampler(&config.diffusion);
        let size = config.data.size.map(|s| [s.height, s.width]);
        let weights = Weights::Checkpoint(Box::new(snapshot), want);
        let (path, batch, process) = (path.to_path_buf(), config.sample.batch, Some((config.diffusion, sampler)));
        let precision = config.train.precision;
        Ok(Source { model: config.model, size, batch, precision, process, path, weights })
    }

    fn of_diffusers(path: &Path, console: &Console) -> Result<Source, Failure> {
        let mut imported = import(path).map_err(not_imported)?;
        for key in &imported.ignored {
            console.alarm(format!("{}: {key} is unknown and ignored, as diffusers does", path.display()));
        }
        let (path, process) = (path.to_path_buf(), imported.scheduler.take());
        let (model, size) = (imported.unet.clone(), imported.image_size);
        let weights = Weights::Diffusers(Box::new(imported));
        Ok(Source { model, size, batch: DIFFUSERS_BATCH, precision: Precision::F32, process, path, weights })
    }

    /// The diffusion process and how the source samples from it. A diffusers directory of a network alone, which is enough to begin
    /// training with, does not know.
    pub fn process(&self) -> Result<&(DiffusionConfig, SamplerConfig), Failure> {
        self.process.as_ref().ok_or_else(|| {
            let path = self.path.display();
            Failure::new(
                Code::State,
                format!("{path} has no scheduler/scheduler_config.json, so its process is unknown: it cannot be sampled from, only trained from (train --init)"),
            )
        })
    }

    /// Height and width of the images.
    pub fn size(&self) -> Result<[usize; 2], Failure> {
        self.size
            .ok_or_else(|| Failure::new(Code::State, "its config does not say how large its images are (sample_size)"))
    }

    /// The weights as one flat buffer in the order of `layout`.
    pub fn flat(&self, layout: &Layout) -> Result<Vec<f32>, Failure> {
        match &self.weights {
            Weights::Diffusers(imported) => imported.flat(layout).map_err(not_imported),
            Weights::Checkpoint(snapshot, want) => {
                let group = match want {
                    Want::Params => crate::checkpoint::Group::Params,
                    _ => crate::checkpoint::Group::Ema,
                };
                let mut flat = room_for(layout.elements(), "the weights")?;
                flat.resize(layout.elements(), 0.0);
                for tensor in layout.tensors() {
                    match snapshot.tensor(group, &tensor.name) {
                        Some(values) if values.len() == tensor.len => flat[tensor.range()].copy_from_slice(values),
                        _ => {
                            let message = format!("the checkpoint has no {} of shape {:?}", tensor.name, tensor.shape);
                            return Err(Failure::new(Code::State, message));
                        }
                    }
                }
                Ok(flat)
            }
        }
    }
}

fn unreadable(error: CheckpointError) -> Failure {
    let code = match &error {
        CheckpointError::OutOfMemory { .. } => Code::Device,
        _ => Code::State,
    };
    Failure::new(code, error)
}

fn not_imported(error: DiffusersError) -> Failure {
    match error {
        DiffusersError::File(error) => unreadable(error),
        error => Failure::new(Code::State, error),
    }
}
