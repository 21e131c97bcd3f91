//! From what serde says to what a user can act on.
//!
//! serde's derive lists the names it knows ("unknown field `x`, expected one of `a`, `b`"), options included, so its
//! message is the one complete source of valid names; the position of the error in the text gives the full key.

use std::ops::Range;

use serde::Serialize;

use super::{Choices, ConfigError, Place, position};

/// How alike (Jaro–Winkler, 0 to 1) two names must be for one to be offered in place of the other.
const ALIKE: f64 = 0.8;

/// The error of reading `text` as a `T`, its place given by `place` for a span of bytes.
pub(super) fn explain<T: Serialize + Default>(
    text: &str,
    error: &toml::de::Error,
    place: impl Fn(Range<usize>) -> Place,
) -> ConfigError {
    let span = error.span().unwrap_or(0..0);
    let message = error.message();
    let place = place(span.clone());
    let key = position::key_at(text, &span);
    if let Some((name, known)) = unknown(message, "unknown field `") {
        let section = section_of(&key, &name);
        let nearest = nearest(&name, &known)
            .map(|found| join(section, found))
            .or_else(|| elsewhere(&toml::Table::try_from(T::default()).ok()?, &name));
        return ConfigError::UnknownKey {
            place,
            key: join(section, &name),
            choices: Box::new(Choices { nearest, known }),
        };
    }
    if let Some((found, known)) = unknown(message, "unknown variant `") {
        let nearest = nearest(&found, &known).map(str::to_owned);
        return ConfigError::UnknownValue { place, key, found, choices: Box::new(Choices { nearest, known }) };
    }
    if let Some(name) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        return ConfigError::MissingKey { place, key: join(&key, name) };
    }
    let refused = ["invalid type: ", "invalid value: ", "invalid length "].iter().find_map(|prefix| {
        let (found, expected) = message.strip_prefix(prefix)?.rsplit_once(", expected ")?;
        let found = if *prefix == "invalid length " { format!("{found} values") } else { found_words(found) };
        Some((found, expected_words(expected)))
    });
    match refused {
        Some((found, expected)) => ConfigError::WrongType { place, key, expected, found },
        None => {
            let found = text.get(span).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
            ConfigError::Invalid { place, key, message: message.to_owned(), found }
        }
    }
}

/// The name and the valid names of "unknown … `name`, expected one of `a`, `b`".
fn unknown(message: &str, prefix: &str) -> Option<(String, Vec<String>)> {
    let (name, rest) = message.strip_prefix(prefix)?.split_once("`, ")?;
    let known = rest.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    Some((name.to_owned(), known))
}

/// The section of an unknown key `name` found at `key`, which is the key itself or the table that holds it.
fn section_of<'a>(key: &'a str, name: &str) -> &'a str {
    if key == name {
        return "";
    }
    key.strip_suffix(name).and_then(|section| section.strip_suffix('.')).unwrap_or(key)
}

fn join(section: &str, name: &str) -> String {
    if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") }
}

/// The most similar of the known names, if one is similar at all.
fn nearest<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    let likeness = |other: &str| strsim::jaro_winkler(&name.to_lowercase(), &other.to_lowercase());
    let best = known.iter().map(|other| (likeness(other), other.as_str())).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

/// The full key of the same name in another section.
fn elsewhere(table: &toml::Table, name: &str) -> Option<String> {
    let children = || table.iter().filter_map(|(section, value)| Some((section, value.as_table()?)));
    children()
        .find(|(_, child)| child.contains_key(name))
        .map(|(section, _)| join(section, name))
        .or_else(|| children().find_map(|(section, child)| Some(join(section, &elsewhere(child, name)?))))
}

/// serde's name for what is wanted, in words.
fn expected_words(expected: &str) -> String {
    match expected {
        "f32" | "f64" => "a number".to_owned(),
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => "a whole number from 0 to 4294967295".to_owned(),
        "u64" | "u128" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a table of keys".to_owned(),
        "path string" => "a path".to_owned(),
        other => {
            let counted = |prefix| other.strip_prefix(prefix).map(|n| format!("a list of {n} values"));
            let table = other.strip_prefix("struct ").map(|_| "a table of keys".to_owned());
            table
                .or_else(|| counted("an array of length "))
                .or_else(|| counted("a tuple of size "))
                .unwrap_or_else(|| other.to_owned())
        }
    }
}

/// serde's name for what was found, in words.
fn found_words(found: &str) -> String {
    match found {
        "sequence" => "a list".to_owned(),
        "map" => "a table of keys".to_owned(),
        other => match other.split_once(' ') {
            Some(("string", text)) => format!("the string {text}"),
            Some(("integer" | "boolean", _)) | Some(("floating", _)) => {
                other.split('`').nth(1).unwrap_or(other).to_owned()
            }
            _ => other.to_owned(),
        },
    }
}
