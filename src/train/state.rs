//! Between the device and the disk: a run's state as a snapshot.

use super::{Config, Trainer};
use crate::checkpoint::{Buffers, Layout, LayoutError, Meta, Snapshot, TensorSpec};
use crate::collective::Collective;
use crate::config::{ConfigError, to_toml};
use crate::device::cuda::{Card, PlanTable};
use crate::device::{Device, Region};
use crate::tape::{ParamLayout, RunError};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is the same in all snapshots of a run.
pub(super) struct Identity {
    pub config_hash: String,
    pub config_toml: String,
    pub data_fingerprint: String,
    pub device_kind: String,
    pub libraries: BTreeMap<String, String>,
    pub world_size: usize,
    /// How convolutions are computed, on a GPU.
    pub plans: Option<PlanTable>,
}

/// The name under which a manifest has a GPU's plans …
const PLANS: &str = "plans";
/// … and those of the libraries that its bits depend on.
const LIBRARIES: [(&str, &str); 2] = [("cudnn", "cuDNN"), ("cublaslt", "cuBLASLt")];

/// The plans that a checkpoint pins, if it was saved on a GPU.
///
/// # Errors
/// They are there and cannot be read.
pub(super) fn pinned(saved: &Meta) -> serde_json::Result<Option<PlanTable>> {
    saved.extra.get(PLANS).map(PlanTable::deserialize).transpose()
}

impl Identity {
    pub fn new(
        config: &Config,
        data_fingerprint: String,
        device: &Device,
        world_size: usize,
    ) -> Result<Identity, ConfigError> {
        // On the CPU all that bits depend on is compiled in: the compiler, and the instruction set it chose from.
        let compiled = [("rustc", env!("DDPM_DIST_RUSTC")), ("simd", crate::simd::level().name())];
        let mut libraries: Vec<(&str, &str)> = compiled.into();
        if let Some(Card { cudnn, cublaslt, .. }) = device.card() {
            libraries.extend(std::iter::zip(LIBRARIES.map(|(key, _)| key), [cudnn.as_str(), cublaslt.as_str()]));
        }
        let owned = |(name, version): (&str, &str)| (name.to_string(), version.to_string());
        Ok(Identity {
            config_hash: super::trajectory_hash(config)?,
            config_toml: to_toml(config)?,
            data_fingerprint,
            device_kind: device.name(),
            libraries: libraries.into_iter().map(owned).collect(),
            world_size,
            plans: None,
        })
    }

    /// What computes otherwise than when a checkpoint was saved, so that bits do.
    pub fn change_since(&self, saved: &Meta) -> Option<String> {
        if saved.device_kind != self.device_kind {
            return Some(format!("saved on {}, going on with {}", saved.device_kind, self.device_kind));
        }
        let (then, now) = (gpu_libraries(&saved.libraries), gpu_libraries(&self.libraries));
        (then != now).then(|| format!("saved with {then}, going on with {now}"))
    }

    pub fn meta(&self, config: &Config, step: u64) -> Meta {
        Meta {
            step,
            images: step * config.train.batch as u64,
            seed: config.train.seed,
            config_hash: self.config_hash.clone(),
            config_toml: Some(self.config_toml.clone()),
            data_fingerprint: self.data_fingerprint.clone(),
            build: crate::machine::build(),
            device_kind: self.device_kind.clone(),
            libraries: self.libraries.clone(),
            world_size: self.world_size,
            extra: self.plans.iter().filter_map(as_extra).collect(),
        }
    }
}

/// None for what JSON cannot hold, which plans have not.
fn as_extra(plans: &PlanTable) -> Option<(String, Value)> {
    Some((PLANS.to_string(), serde_json::to_value(plans).ok()?))
}

/// `cuDNN 9.10.2 and cuBLASLt 13.0.1`
fn gpu_libraries(versions: &BTreeMap<String, String>) -> String {
    let version = |key: &str| versions.get(key).map_or("of an unknown version", String::as_str);
    LIBRARIES.map(|(key, name)| format!("{name} {}", version(key))).join(" and ")
}

/// The places of parameters as checkpoints record them.
///
/// # Errors
/// A layout that checkpoints cannot hold.
pub fn layout_for_checkpoints(layout: &ParamLayout) -> Result<Arc<Layout>, LayoutError> {
    let spec = |p: &crate::tape::Placed| TensorSpec {
        name: p.name.clone(),
        shape: p.shape.dims().to_vec(),
        offset: p.range.start,
        len: p.range.len(),
    };
    Layout::new(layout.iter().map(spec).collect()).map(Arc::new)
}

/// Copies the state off the device, as much of it as goes into `buffers`: a contiguous part of all, as checkpoints have it. Ranks that have
/// only their slices gather them for it, so that all do this together.
pub(super) fn copy_state(
    trainer: &Trainer,
    device: &mut Device,
    collective: &mut dyn Collective,
    buffers: &mut Buffers,
) -> Result<(), RunError> {
    let Buffers { range, params, adam_m, adam_v, ema } = buffers;
    let flats = [(Region::Weights, params), (Region::Moment1, adam_m), (Region::Moment2, adam_v), (Region::Ema, ema)];
    for (region, flat) in flats {
        let whole = trainer.whole(device, collective, region)?;
        device.download(whole, range.start, flat)?;
    }
    Ok(())
}

/// Copies a snapshot onto the device.
pub(super) fn restore(trainer: &Trainer, device: &mut Device, snapshot: &Snapshot) -> Result<(), RunError> {
    let Snapshot { params, adam_m, adam_v, ema, .. } = snapshot;
    let flats = [(Region::Weights, params), (Region::Moment1, adam_m), (Region::Moment2, adam_v), (Region::Ema, ema)];
    for (region, flat) in flats {
        trainer.put(device, region, flat)?;
    }
    trainer.weights_changed(device)
}
