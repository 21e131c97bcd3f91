//! Reading a diffusers config key by key, with diffusers' defaults for those that are absent.

use super::error::DiffusersError;
use crate::checkpoint::CheckpointError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Configs are a few kilobytes; one with a thousand trained betas has 30.
const MAX_BYTES: u64 = 16 << 20;

/// The keys of one config file.
pub(super) struct Keys {
    pub path: PathBuf,
    map: Map<String, Value>,
    asked: RefCell<BTreeSet<&'static str>>,
}

impl Keys {
    pub fn read(path: &Path) -> Result<Keys, DiffusersError> {
        let file = crate::checkpoint::stream::open_regular(path)?;
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(CheckpointError::io("read", path))?;
        let invalid = |reason: String| DiffusersError::Json { path: path.to_path_buf(), reason };
        if text.len() as u64 > MAX_BYTES {
            return Err(invalid(format!("it is larger than {MAX_BYTES} bytes")));
        }
        let map = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
        Ok(Keys { path: path.to_path_buf(), map, asked: RefCell::default() })
    }

    /// The value of a key; `None` where it is absent.
    pub fn get(&self, key: &'static str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key);
        self.map.get(key)
    }

    /// The value of a key that need not be known.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    /// The value as text for messages, saying where it comes from.
    pub fn shown(&self, key: &str, default: &Value) -> String {
        match self.map.get(key) {
            Some(value) => value.to_string(),
            None => format!("absent, which means {default} to diffusers"),
        }
    }

    pub fn bad_value(&self, key: &'static str, expected: &str) -> DiffusersError {
        let found = self.map.get(key).map_or("absent".into(), Value::to_string);
        DiffusersError::BadValue { path: self.path.clone(), key: key.into(), found, expected: expected.into() }
    }

    pub fn unsupported(&self, key: &'static str, default: &Value, supported: &str, why: &str) -> DiffusersError {
        DiffusersError::Unsupported {
            path: self.path.clone(),
            key: key.into(),
            found: self.shown(key, default),
            supported: supported.into(),
            why: why.into(),
        }
    }

    pub fn number(&self, key: &'static str, default: f64) -> Result<f64, DiffusersError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.bad_value(key, "a number")),
        }
    }

    /// A whole number, or `None` for null.
    pub fn count_or_null(&self, key: &'static str, default: Option<usize>) -> Result<Option<usize>, DiffusersError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => Ok(Some(whole(value).ok_or_else(|| self.bad_value(key, "a whole number or null"))?)),
        }
    }

    pub fn count(&self, key: &'static str, default: usize) -> Result<usize, DiffusersError> {
        self.count_or_null(key, Some(default))?.ok_or_else(|| self.bad_value(key, "a whole number"))
    }

    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, DiffusersError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad_value(key, "true or false")),
        }
    }

    pub fn text(&self, key: &'static str, default: &str) -> Result<String, DiffusersError> {
        match self.get(key) {
            None => Ok(default.into()),
            Some(value) => value.as_str().map(Into::into).ok_or_else(|| self.bad_value(key, "a string")),
        }
    }

    pub fn list<T>(
        &self,
        key: &'static str,
        expected: &str,
        default: Vec<T>,
        item: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>, DiffusersError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                let items = value.as_array().and_then(|items| items.iter().map(item).collect());
                items.ok_or_else(|| self.bad_value(key, expected))
            }
        }
    }

    /// Demands one value (numbers are compared as numbers) of a key with the given default.
    pub fn only(&self, key: &'static str, default: Value, supported: Value, why: &str) -> Result<(), DiffusersError> {
        let value = self.get(key).unwrap_or(&default);
        let same = match (value.as_f64(), supported.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => *value == supported,
        };
        if same { Ok(()) } else { Err(self.unsupported(key, &default, &supported.to_string(), why)) }
    }

    /// Keys that were never asked for. diffusers, too, warns of these and goes on.
    pub fn ignored(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        self.map.keys().filter(|k| !k.starts_with('_') && !asked.contains(k.as_str())).cloned().collect()
    }
}

/// A whole number, also where Python wrote it as a float.
pub(super) fn whole(value: &Value) -> Option<usize> {
    if let Some(n) = value.as_u64() {
        return usize::try_from(n).ok();
    }
    let x = value.as_f64()?;
    (x >= 0.0 && x.fract() == 0.0 && x < 9e15).then_some(x as usize)
}
