//! Which keys of a config make up the trajectory of a run, so that a resumed run is the run that never stopped.

use super::Config;
use crate::config::{ConfigError, to_toml};
use crate::files::hex;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Keys that may change between two parts of a run: how long it is, what it reports and keeps, where its data lies (the pixels
/// themselves are compared), and how images are sampled from it.
const FREE: &[&str] = &[
    "train.steps",
    "checkpoint.",
    "sample.",
    "log.",
    "data.path",
    "data.format",
    "data.cache_dir",
    "data.cache_limit",
    "data.on_bad_image",
    "data.decode_threads",
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

/// All keys of `config` that determine its trajectory, with their values in TOML.
fn trajectory(config: &Config) -> Result<BTreeMap<String, String>, ConfigError> {
    let text = to_toml(config)?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| ConfigError::Encode { message: e.to_string() })?;
    let mut keys = BTreeMap::new();
    for (section, value) in &table {
        if let toml::Value::Table(entries) = value {
            for (name, value) in entries {
                let key = format!("{section}.{name}");
                if !FREE.iter().any(|free| key == *free || (free.ends_with('.') && key.starts_with(free))) {
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
    let (saved, now) = (trajectory(saved)?, trajectory(now)?);
    let absent = || "(not set)".to_string();
    let keys: std::collections::BTreeSet<&String> = saved.keys().chain(now.keys()).collect();
    Ok(keys
        .into_iter()
        .filter(|key| saved.get(*key) != now.get(*key))
        .map(|key| Difference {
            key: key.clone(),
            saved: saved.get(key).cloned().unwrap_or_else(absent),
            now: now.get(key).cloned().unwrap_or_else(absent),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_reports_may_change_and_nothing_else() {
        let saved = Config::default();
        let mut now = saved.clone();
        now.train.steps += 1;
        now.checkpoint.every += 1;
        now.sample.every += 1;
        now.log.every += 1;
        now.data.path = "elsewhere".into();
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
