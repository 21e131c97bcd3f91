//! Variables of a process, read as numbers and addresses.

use super::WorldError;
use super::ancestry::nearest_without;
use std::collections::BTreeMap;

/// What PMI launchers tell each of their ranks.
pub(super) const PMI_RANK: &str = "PMI_RANK";

/// The environment of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    /// The process that started it and the other ranks on its machine, where that is to be known and can be seen.
    launcher: Option<i32>,
}

impl Environment {
    /// That of this process. Names and values that are not UTF-8 are left out: no launcher sets such.
    pub fn of_this_process() -> Environment {
        let utf8 = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let mut environment: Environment = std::env::vars_os().filter_map(utf8).collect();
        environment.launcher = environment.has(PMI_RANK).then(|| nearest_without(PMI_RANK)).flatten();
        environment
    }

    /// All variables.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The same of a rank that this process started.
    #[cfg(test)]
    pub(super) fn started_by(self, process: i32) -> Environment {
        Environment { launcher: Some(process), ..self }
    }

    /// The process that started all ranks of this machine, if a launcher of PMI ranks did and it can be seen.
    pub(super) fn launcher(&self) -> Option<i32> {
        self.launcher
    }

    /// The value of a variable; nothing if it is empty, as unset variables of scripts and manifests are.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
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
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Environment { variables, launcher: None }
    }
}
