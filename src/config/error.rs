//! What can be wrong with a config, in words that say where and what to write instead.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

/// Where a config value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line and column (both from 1) of the config file.
    File {
        /// The file, as the user named it.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// Column in characters, counted from 1.
        column: usize,
    },
    /// An override, as it was given: `section.key=value`.
    Set(String),
    /// Neither the file nor an override names the key, so the value is the default.
    Default {
        /// The file that leaves the key out.
        file: String,
    },
}

impl Place {
    /// A position in a file; `line` and `column` count from 1.
    pub fn file(file: &str, line: usize, column: usize) -> Place {
        Place::File { file: file.to_owned(), line, column }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Place::Set(set) => write!(f, "--set {set}"),
            Place::Default { file } => write!(f, "{file} (default value)"),
        }
    }
}

/// A value of the right type that makes no sense: what a section's `validate()` returns.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{key}` = {value} is out of range: {range} ({why})")]
pub struct OutOfRange {
    /// The full key: `optim.lr`.
    pub key: String,
    /// The value that was found.
    pub value: String,
    /// The condition that does not hold, readable as it stands: `0 < lr ≤ 1`.
    pub range: String,
    /// Why the condition must hold, or what to do.
    pub why: String,
}

impl OutOfRange {
    /// The error for `key`.
    pub fn new(
        key: impl Into<String>,
        value: impl fmt::Display,
        range: impl Into<String>,
        why: impl Into<String>,
    ) -> OutOfRange {
        OutOfRange { key: key.into(), value: value.to_string(), range: range.into(), why: why.into() }
    }

    /// `Ok` if the condition `holds`, the error otherwise.
    ///
    /// # Errors
    /// The condition does not hold.
    pub fn check(
        holds: bool,
        key: &str,
        value: impl fmt::Display,
        range: impl Into<String>,
        why: impl Into<String>,
    ) -> Result<(), OutOfRange> {
        if holds { Ok(()) } else { Err(OutOfRange::new(key, value, range, why)) }
    }
}

/// The names that are possible where an unknown one was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// The one that was probably meant; for a key, in full.
    pub nearest: Option<String>,
    /// All of them.
    pub known: Vec<String>,
}

/// Why a config cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("config file `{}` does not exist: give the path of a TOML file", path.display())]
    Missing {
        /// The path that was given.
        path: PathBuf,
    },
    /// The file is there but cannot be read as text.
    #[error("cannot read config file `{}`: {source}", path.display())]
    Read {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// Where the text stops making sense.
        place: Place,
        /// What the parser expected.
        message: String,
    },
    /// A key that no section has.
    #[error("{place}: {}", unknown_key(key, choices))]
    UnknownKey {
        /// Where the key stands.
        place: Place,
        /// The full key.
        key: String,
        /// The keys that exist.
        choices: Box<Choices>,
    },
    /// A value of the wrong type.
    #[error("{place}: `{key}` must be {expected}, found {found}")]
    WrongType {
        /// Where the value stands.
        place: Place,
        /// The full key.
        key: String,
        /// What kind of value belongs there.
        expected: String,
        /// What was found instead.
        found: String,
    },
    /// A name that is not among those the key can take.
    #[error("{place}: `{key}` cannot be \"{found}\"{}", possible(choices))]
    UnknownValue {
        /// Where the value stands.
        place: Place,
        /// The full key.
        key: String,
        /// The name that was found.
        found: String,
        /// The names the key can take.
        choices: Box<Choices>,
    },
    /// A key without which its table means nothing.
    #[error("{place}: the key `{key}` is missing")]
    MissingKey {
        /// The table that lacks it.
        place: Place,
        /// The full key.
        key: String,
    },
    /// A value refused by the type of its key.
    #[error("{place}: `{key}`: {message}, found {found}")]
    Invalid {
        /// Where the value stands.
        place: Place,
        /// The full key.
        key: String,
        /// What the type says.
        message: String,
        /// The value, as it is written.
        found: String,
    },
    /// An override that is not of the form `section.key=value`.
    #[error("--set {set}: {message}; write --set section.key=value")]
    MalformedSet {
        /// The override, as it was given.
        set: String,
        /// What is wrong with it.
        message: String,
    },
    /// A value that a section refuses.
    #[error("{place}: {refused}")]
    OutOfRange {
        /// Where the value comes from.
        place: Place,
        /// Key, value, range and reason.
        refused: Box<OutOfRange>,
    },
    /// A resolved config that TOML cannot hold.
    #[error("cannot write the config as TOML: {message}")]
    Encode {
        /// What the encoder said.
        message: String,
    },
}

fn unknown_key(key: &str, choices: &Choices) -> String {
    let mut text = format!("unknown key `{key}`");
    if let Some(nearest) = &choices.nearest {
        text.push_str(&format!(": did you mean `{nearest}`?"));
    }
    let known = choices.known.join(", ");
    match key.rsplit_once('.') {
        _ if known.is_empty() => {}
        Some((section, _)) => text.push_str(&format!(" (keys of `{section}`: {known})")),
        None => text.push_str(&format!(" (sections and keys at the top: {known})")),
    }
    text
}

fn possible(choices: &Choices) -> String {
    let known: Vec<String> = choices.known.iter().map(|name| format!("\"{name}\"")).collect();
    let nearest = choices.nearest.as_ref().map(|nearest| format!(": did you mean \"{nearest}\"?")).unwrap_or_default();
    format!("{nearest} (possible: {})", known.join(", "))
}
