//! What can be wrong with a diffusion or sampler config.

/// A value that no process can be built from; the message says which key, what was found, what is allowed and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value} is out of range: expected {expected}, because {why}")]
pub struct OutOfRange {
    /// The config key, with its section, or the element of an array.
    pub key: String,
    /// The value found.
    pub value: String,
    /// The values allowed.
    pub expected: String,
    /// The reason for the range.
    pub why: &'static str,
}

impl OutOfRange {
    /// `Ok` if `allowed`, else the error.
    pub(super) fn unless(
        allowed: bool,
        key: impl Into<String>,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
        why: &'static str,
    ) -> Result<(), OutOfRange> {
        if allowed {
            return Ok(());
        }
        Err(OutOfRange { key: key.into(), value: value.to_string(), expected: expected.into(), why })
    }
}
