//! Which keys of a config make up the trajectory of a run, so that a resumed run is the run that never stopped.

use super::state::Identity;
use super::{Config, TrainError};
use crate::checkpoint::{Meta, RunDir, inspect, list};
use crate::config::{ConfigError, to_toml};
use crate::data::Dataset;
use crate::files::hex;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// Keys that may change between two parts of a run: how long it is, what it reports and keeps, where its data lies (the pixels
/// themselves are compared), how images are sampled from it, and which rank keeps what.
const FREE: &[&str] = &[
    "train.steps",
    "checkpoint.",
    "sample.",
    "log.",
    "cluster.",
    "data.path",
    "data.format",
    "data.cache_dir",
    "data.cache_limit",
    "data.on_bad_image",
    "data.decode_threads",
    "optim.sharded",
    "diffusion.variance",
    "diffusion.clip",
];

/// A key whose value differs from that of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The key: `optim.lr`.
    pub key: String,
    /// The checkpoint's value.
    pub saved: String,
    /// The config's value.
    pub now: String,
}

/// Keys that may differ between ranks: where each finds the data.
const OWN: &[&str] = &["data.path", "data.cache_dir", "data.cache_limit", "data.decode_threads"];

/// All keys of `config` that determine its trajectory, with their values in TOML.
fn trajectory(config: &Config) -> Result<BTreeMap<String, String>, ConfigError> {
    keys_but(FREE, config)
}

/// All keys of `config` but those of a list, with their values in TOML.
fn keys_but(free: &[&str], config: &Config) -> Result<BTreeMap<String, String>, ConfigError> {
    let text = to_toml(config)?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| ConfigError::Encode { message: e.to_string() })?;
    let mut keys = BTreeMap::new();
    for (section, value) in &table {
        if let toml::Value::Table(entries) = value {
            for (name, value) in entries {
                let key = format!("{section}.{name}");
                if !free.iter().any(|free| key == *free || (free.ends_with('.') && key.starts_with(free))) {
                    keys.insert(key, value.to_string());
                }
            }
        }
    }
    Ok(keys)
}

/// Hash of the keys that determine the trajectory, in hexadecimal.
///
/// # Errors
/// A config that TOML cannot hold.
pub fn trajectory_hash(config: &Config) -> Result<String, ConfigError> {
    let mut hash = Sha256::new();
    for (key, value) in trajectory(config)? {
        hash.update(format!("{key} = {value}\n"));
    }
    Ok(hex(&hash.finalize()))
}

/// The keys in which `now` would leave the trajectory of `saved`.
///
/// # Errors
/// A config that TOML cannot hold.
pub fn differences(saved: &Config, now: &Config) -> Result<Vec<Difference>, ConfigError> {
    Ok(different(&trajectory(saved)?, &trajectory(now)?))
}

/// The keys in which two ranks differ that must not.
pub(super) fn differences_of_ranks(zero: &Config, other: &Config) -> Result<Vec<Difference>, ConfigError> {
    Ok(different(&keys_but(OWN, zero)?, &keys_but(OWN, other)?))
}

fn different(saved: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<Difference> {
    let absent = || "(not set)".to_string();
    let keys: std::collections::BTreeSet<&String> = saved.keys().chain(now.keys()).collect();
    keys.into_iter()
        .filter(|key| saved.get(*key) != now.get(*key))
        .map(|key| Difference {
            key: key.clone(),
            saved: saved.get(key).cloned().unwrap_or_else(absent),
            now: now.get(key).cloned().unwrap_or_else(absent),
        })
        .collect()
}

/// Compares the config with that of the newest checkpoint whose manifest can be read, if there is one.
pub(super) fn check_newest_config(config: &Config, run_dir: &RunDir, identity: &Identity) -> Result<(), TrainError> {
    for (_, path) in list(&run_dir.checkpoints())?.into_iter().rev() {
        if let Ok(manifest) = inspect(&path) {
            return check_config(config, &path, &manifest.meta, identity);
        }
    }
    Ok(())
}

/// Refuses a config that would leave the trajectory of a checkpoint.
fn check_config(config: &Config, checkpoint: &Path, meta: &Meta, identity: &Identity) -> Result<(), TrainError> {
    if meta.config_hash == identity.config_hash {
        return Ok(());
    }
    let differences = match &meta.config_toml {
        // A key that this version has and that one had not stands there with its default.
        Some(toml) => differences(&crate::config::parse(toml, &checkpoint.display().to_string(), &[])?, config)?,
        None => return Err(TrainError::UnknownConfig { checkpoint: checkpoint.to_path_buf() }),
    };
    match differences.is_empty() {
        true => Ok(()),
        false => Err(TrainError::Contradiction { checkpoint: checkpoint.to_path_buf(), differences }),
    }
}

/// Refuses to go on where the result would be neither the old trajectory nor a new run.
pub(super) fn check_same_run(
    config: &Config,
    checkpoint: &Path,
    meta: &Meta,
    identity: &Identity,
    dataset: &Dataset,
) -> Result<(), TrainError> {
    check_config(config, checkpoint, meta, identity)?;
    if meta.data_fingerprint != identity.data_fingerprint {
        return Err(TrainError::OtherData { checkpoint: checkpoint.to_path_buf(), data: dataset.path().to_path_buf() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, cpu::Cpu};

    fn identity(config: &Config) -> Identity {
        Identity::new(config, "pixels".into(), &Device::Cpu(Cpu::new(1)), 1).unwrap()
    }

    #[test]
    fn a_checkpoint_of_a_version_with_fewer_keys_goes_on() {
        let config = Config::default();
        let identity = identity(&config);
        let mut meta = identity.meta(&config, 10);
        let path = Path::new("checkpoints/step-00000010");
        check_config(&config, path, &meta, &identity).unwrap();
        // What it holds says the same without the key, though its hash is another.
        let toml = to_toml(&config).unwrap();
        for key in ["flip = ", "timestep = "] {
            let line = toml.lines().find(|line| line.starts_with(key)).unwrap();
            meta.config_toml = Some(toml.replace(line, ""));
            meta.config_hash = "of fewer keys".into();
            check_config(&config, path, &meta, &identity).unwrap();
        }

        let mut other = config.clone();
        other.optim.lr *= 2.0;
        let refused = check_config(&other, path, &meta, &identity).unwrap_err().to_string();
        assert!(refused.contains("optim.lr"), "{refused}");
        meta.config_toml = None;
        assert!(matches!(check_config(&config, path, &meta, &identity), Err(TrainError::UnknownConfig { .. })));
    }

    #[test]
    fn lengths_and_reports_may_change_and_nothing_else() {
        let saved = Config::default();
        let mut now = saved.clone();
        now.train.steps += 1;
        now.checkpoint.every += 1;
        now.sample.every += 1;
        now.log.every += 1;
        now.data.path = "elsewhere".into();
        now.optim.sharded = true;
        assert_eq!(differences(&saved, &now).unwrap(), []);
        assert_eq!(trajectory_hash(&saved).unwrap(), trajectory_hash(&now).unwrap());

        now.optim.lr *= 2.0;
        now.data.flip = !now.data.flip;
        let found: Vec<String> = differences(&saved, &now).unwrap().into_iter().map(|d| d.key).collect();
        assert_eq!(found, ["data.flip", "optim.lr"]);
        assert_ne!(trajectory_hash(&saved).unwrap(), trajectory_hash(&now).unwrap());
    }

    #[test]
    fn a_value_that_appears_is_a_difference() {
        let saved = Config::default();
        let mut now = saved.clone();
        now.model.mid_attention_groups = Some(8);
        let found = differences(&saved, &now).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].saved.as_str(), found[0].now.as_str()), ("(not set)", "8"));
    }
}
