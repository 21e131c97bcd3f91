//! Variables of a process, read as numbers and addresses.

use super::WorldError;
use std::collections::BTreeMap;

/// The environment of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// That of this process. Names and values that are not UTF-8 are left out: no launcher sets such.
    pub fn of_this_process() -> Environment {
        let utf8 = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment(std::env::vars_os().filter_map(utf8).collect())
    }

    /// The value of a variable; nothing if it is empty, as unset variables of scripts and manifests are.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A variable that `because` needs.
    pub(super) fn need(&self, name: &'static str, because: &'static str) -> Result<&str, WorldError> {
        self.get(name).ok_or(WorldError::Missing { name, because })
    }

    /// A variable as a number, if it is set.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<Option<T>, WorldError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(WorldError::NotANumber { name, value: value.to_string() }),
            },
        }
    }

    /// A variable that `because` needs, as a number.
    pub(super) fn need_number<T: std::str::FromStr>(
        &self,
        name: &'static str,
        because: &'static str,
    ) -> Result<T, WorldError> {
        self.number(name)?.ok_or(WorldError::Missing { name, because })
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Environment {
        Environment(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}
