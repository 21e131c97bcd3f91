//! How a config file becomes a value: TOML, `--set` overrides, and errors that say where and what instead.
//!
//! The mechanism knows no section. Any `T: DeserializeOwned + Serialize + Default` whose structs carry
//! `#[serde(deny_unknown_fields, default)]` can be read; each room keeps the type of its own section.
//!
//! The file must be right by itself; the overrides are then laid over it, in the order given, the last one winning.

mod blame;
mod error;
mod overrides;
mod position;

#[cfg(test)]
mod tests;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::open_regular;

pub use error::{Choices, ConfigError, OutOfRange, Place};
pub use position::locate;

/// Reads the config file at `path`, with the overrides `sets` (each `section.key=value`) laid over it.
///
/// # Errors
/// A file that is missing or unreadable, and everything [`parse`] refuses.
pub fn load<T>(path: &Path, sets: &[String]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    load_with(path, sets, |_| Ok(()))
}

/// [`load`], then `validate`; a value it refuses is reported with the line or the override it came from.
///
/// # Errors
/// Those of [`load`], and [`ConfigError::OutOfRange`].
pub fn load_with<T>(
    path: &Path,
    sets: &[String],
    validate: impl FnOnce(&T) -> Result<(), OutOfRange>,
) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let text = open_regular(path).and_then(std::io::read_to_string).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ConfigError::Missing { path: path.to_owned() },
        _ => ConfigError::Read { path: path.to_owned(), source },
    })?;
    parse_with(&text, &path.display().to_string(), sets, validate)
}

/// Parses a config from `text`, with the overrides `sets`; `origin` is what messages call the text (its file name).
///
/// # Errors
/// Text that is not TOML, a key that does not exist, a value of the wrong type, a malformed override.
pub fn parse<T>(text: &str, origin: &str, sets: &[String]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    parse_with(text, origin, sets, |_| Ok(()))
}

/// [`parse`], then `validate`; a value it refuses is reported with the line or the override it came from.
///
/// # Errors
/// Those of [`parse`], and [`ConfigError::OutOfRange`].
pub fn parse_with<T>(
    text: &str,
    origin: &str,
    sets: &[String],
    validate: impl FnOnce(&T) -> Result<(), OutOfRange>,
) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let place = |span| position::place(origin, text, span);
    let table: toml::Table = toml::from_str(text).map_err(|error| {
        let place = place(error.span().unwrap_or(0..0));
        ConfigError::Syntax { place, message: syntax_words(&error) }
    })?;
    let from_file: T = toml::from_str(text).map_err(|error| blame::explain::<T>(text, &error, place))?;
    let config = if sets.is_empty() { from_file } else { overrides::apply(table, sets)? };
    validate(&config).map_err(|refused| {
        let place = overrides::which(sets, &refused.key)
            .map(|set| Place::Set(set.to_owned()))
            .or_else(|| locate(text, &refused.key).map(|(line, column)| Place::file(origin, line, column)))
            .unwrap_or_else(|| Place::Default { file: origin.to_owned() });
        ConfigError::OutOfRange { place, refused: Box::new(refused) }
    })?;
    Ok(config)
}

/// The TOML text of a resolved config: every key with its value, options that are `None` left out.
///
/// # Errors
/// A value TOML cannot hold (an integer above 2⁶³ − 1, a `None` inside a list).
pub fn to_toml<T: Serialize>(config: &T) -> Result<String, ConfigError> {
    let encode = |message| ConfigError::Encode { message };
    let text = toml::to_string(config).map_err(|error| encode(error.to_string()))?;
    // The encoder writes integers that no TOML file may hold; what is written must read back.
    text.parse::<toml::Table>().map_err(|error| encode(syntax_words(&error)))?;
    Ok(text)
}

fn syntax_words(error: &toml::de::Error) -> String {
    match error.message() {
        "u64 value was too large" | "u128 value was too large" | "i128 value was too large" => {
            "integers go from -2^63 to 2^63 - 1".to_owned()
        }
        message => message.to_owned(),
    }
}
