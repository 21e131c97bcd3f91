//! `--set section.key=value`: values from the command line over those of the file.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};
use toml_edit::Key;

use super::{ConfigError, Place, blame};

/// The config of `merged` (a file that is right by itself) with `sets` over it.
pub(super) fn apply<T>(mut merged: Table, sets: &[String]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    // Two overrides may only make sense together (a table with two keys that have no default), so the first refusal is
    // kept until all of them are in place.
    let mut refusal = None;
    for set in sets {
        let (path, raw) = split(set)?;
        let mut tried: Vec<(Table, Option<ConfigError>)> = Vec::new();
        for value in readings(raw) {
            let mut table = merged.clone();
            insert(&mut table, &path, value);
            let error = resolve::<T>(&table, set).err();
            tried.push((table, error));
        }
        let chosen = tried.iter().position(|(_, error)| error.is_none()).unwrap_or(0);
        let (table, error) = tried.swap_remove(chosen);
        merged = table;
        refusal = refusal.or(error);
    }
    let last = sets.last().map_or("", String::as_str);
    resolve(&merged, last).map_err(|error| refusal.unwrap_or(error))
}

/// The last override that decides `key`, if one does.
pub(super) fn which<'a>(sets: &'a [String], key: &str) -> Option<&'a str> {
    let decides = |set: &str| {
        split(set).is_ok_and(|(path, _)| {
            let path = path.join(".");
            key == path || key.strip_prefix(&path).is_some_and(|rest| rest.starts_with(['.', '[']))
        })
    };
    sets.iter().rev().map(String::as_str).find(|set| decides(set))
}

/// `a.b=value` into the path and the raw value.
fn split(set: &str) -> Result<(Vec<String>, &str), ConfigError> {
    let malformed = |message: &str| ConfigError::MalformedSet { set: set.to_owned(), message: message.to_owned() };
    let (path, raw) = set.split_once('=').ok_or_else(|| malformed("there is no `=`"))?;
    let path = Key::parse(path.trim()).map_err(|_| malformed("what stands before `=` is not a key"))?;
    Ok((path.iter().map(|key| key.get().to_owned()).collect(), raw.trim()))
}

/// What a raw value may mean (one or two readings), likeliest first: a TOML value, or a string without its quotes.
fn readings(raw: &str) -> impl Iterator<Item = Value> {
    let toml = raw.parse::<Value>().ok();
    let bare = match toml {
        Some(Value::String(_)) => None,
        _ => Some(Value::String(raw.to_owned())),
    };
    toml.into_iter().chain(bare)
}

fn insert(table: &mut Table, path: &[String], value: Value) {
    let Some((name, rest)) = path.split_first() else { return };
    if rest.is_empty() {
        table.insert(name.clone(), value);
        return;
    }
    // A path through something that is no table replaces it; its type then refuses the table, by name.
    let child = table.entry(name.clone()).or_insert_with(|| Value::Table(Table::new()));
    if !child.is_table() {
        *child = Value::Table(Table::new());
    }
    if let Value::Table(child) = child {
        insert(child, rest, value);
    }
}

/// Reads `table` as a `T`; what goes wrong is the fault of `set`. It goes by way of text, since only text has positions.
fn resolve<T>(table: &Table, set: &str) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let text = super::to_toml(table)?;
    toml::from_str(&text).map_err(|error| blame::explain::<T>(&text, &error, |_| Place::Set(set.to_owned())))
}
