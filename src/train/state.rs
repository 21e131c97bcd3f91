//! Between the device and the disk: a run's state as a snapshot.

use super::{Config, Trainer};
use crate::checkpoint::{Buffers, Layout, LayoutError, Meta, Saver, Snapshot, TensorSpec};
use crate::config::{ConfigError, to_toml};
use crate::device::{Device, DeviceError, Region};
use crate::tape::{ParamLayout, RunError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is the same in all snapshots of a run.
pub(super) struct Identity {
    pub config_hash: String,
    pub config_toml: String,
    pub data_fingerprint: String,
    pub device_kind: String,
    pub world_size: usize,
}

impl Identity {
    pub fn new(
        config: &Config,
        data_fingerprint: String,
        device: &Device,
        world_size: usize,
    ) -> Result<Identity, ConfigError> {
        Ok(Identity {
            config_hash: super::trajectory_hash(config)?,
            config_toml: to_toml(config)?,
            data_fingerprint,
            device_kind: device.name(),
            world_size,
        })
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
            // On the CPU all that bits depend on is compiled in: the compiler, and the instruction set it chose from.
            libraries: BTreeMap::from([
                ("rustc".to_string(), env!("DDPM_DIST_RUSTC").to_string()),
                ("simd".to_string(), crate::simd::level().name().to_string()),
            ]),
            world_size: self.world_size,
            extra: BTreeMap::new(),
        }
    }
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

/// Copies the state after `step` steps off the device.
pub(super) fn snapshot(
    trainer: &Trainer,
    device: &Device,
    saver: &mut Saver,
    layout: &Arc<Layout>,
    identity: &Identity,
    config: &Config,
    step: u64,
) -> Result<Snapshot, DeviceError> {
    let mut buffers = saver.buffers(layout);
    let Buffers { range, params, adam_m, adam_v, ema } = &mut buffers;
    let flats = [(Region::Weights, params), (Region::Moment1, adam_m), (Region::Moment2, adam_v), (Region::Ema, ema)];
    for (region, flat) in flats {
        device.download(trainer.buffer(region), range.start, flat)?;
    }
    Ok(Snapshot::new(identity.meta(config, step), Arc::clone(layout), buffers))
}

/// Copies a snapshot onto the device.
pub(super) fn restore(trainer: &Trainer, device: &mut Device, snapshot: &Snapshot) -> Result<(), RunError> {
    let Snapshot { params, adam_m, adam_v, ema, .. } = snapshot;
    let flats = [(Region::Weights, params), (Region::Moment1, adam_m), (Region::Moment2, adam_v), (Region::Ema, ema)];
    for (region, flat) in flats {
        device.upload(trainer.buffer(region), 0, flat)?;
    }
    trainer.weights_changed(device)
}
