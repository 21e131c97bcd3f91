//! What can be wrong with a diffusers directory.

use crate::checkpoint::CheckpointError;
use std::fmt;
use std::path::PathBuf;

/// An error of importing or exporting a diffusers directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffusersError {
    /// A file is missing, unreadable or damaged.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// The path is no diffusers directory.
    #[error("{} is not a diffusers directory: {reason}", path.display())]
    NotDiffusers {
        /// The directory.
        path: PathBuf,
        /// What was looked for, and what to do.
        reason: String,
    },
    /// A config is not a JSON object.
    #[error("{} is not valid JSON: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// A key has a value that diffusers would not take either.
    #[error("{}: {key} is {found}, expected {expected}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A key asks for something that this program cannot do.
    #[error("{}: {key} is {found}, but only {supported} is supported here: {why}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key that is the reason.
        key: String,
        /// Its value, or that of diffusers' default.
        found: String,
        /// What can be loaded.
        supported: String,
        /// What the other value would change.
        why: String,
    },
    /// The weights are not those of the config.
    #[error("{} does not fit its config, {} of its tensors are wrong:{}", path.display(), problems.len(), lines(problems))]
    Weights {
        /// The weights.
        path: PathBuf,
        /// Every tensor that is wrong.
        problems: Vec<TensorProblem>,
    },
    /// The model cannot be exported.
    #[error("this model cannot be written as a diffusers directory: {0}")]
    Model(String),
    /// The target of an export has content.
    #[error("{} already exists and is not empty: choose a new directory or remove it", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
}

/// One tensor that is not as the config demands; shapes as diffusers has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorProblem {
    /// It is not there.
    Missing {
        /// Its name.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// It has another shape.
    WrongShape {
        /// Its name.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// Its elements are not f32, f16 or bf16.
    WrongType {
        /// Its name.
        name: String,
        /// Its type.
        found: String,
    },
    /// The model has no such tensor.
    Unexpected {
        /// Its name in the file.
        name: String,
        /// Its shape.
        found: Vec<usize>,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name, expected } => write!(f, "{name} is missing, expected shape {expected:?}"),
            Self::WrongShape { name, expected, found } => {
                write!(f, "{name} has shape {found:?}, expected {expected:?}")
            }
            Self::WrongType { name, found } => write!(f, "{name} is {found}, expected F32, F16 or BF16"),
            Self::Unexpected { name, found } => write!(f, "{name} of shape {found:?} is not a tensor of this model"),
        }
    }
}

/// The first few problems, one a line.
fn lines(problems: &[TensorProblem]) -> String {
    const SHOWN: usize = 8;
    let mut text: String = problems.iter().take(SHOWN).map(|p| format!("\n  {p}")).collect();
    if problems.len() > SHOWN {
        text += &format!("\n  and {} more", problems.len() - SHOWN);
    }
    text
}
