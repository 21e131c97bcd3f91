//! What is measured: kernels, their operands, and what they must move and compute.

mod activations;
mod attentions;
mod norms;
mod parameters;
mod pictures;

use ddpm_dist::device::cuda::{Launch, Precision};

/// What a buffer holds.
pub enum Content {
    /// So many normal numbers.
    F32(usize),
    /// The same.
    Bf16(usize),
    /// So many squares of them, f32.
    Squares(usize),
    /// So many random bytes.
    Bytes(usize),
    /// These.
    Exactly(Vec<u8>),
}

impl Content {
    fn of(precision: Precision, len: usize) -> Content {
        match precision {
            Precision::F32 => Content::F32(len),
            Precision::Bf16 => Content::Bf16(len),
        }
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        match self {
            Content::F32(len) | Content::Squares(len) => 4 * len,
            Content::Bf16(len) => 2 * len,
            Content::Bytes(len) => *len,
            Content::Exactly(bytes) => bytes.len(),
        }
    }
}

/// Launches that belong together, on buffers of their own.
pub struct Case {
    /// Of the kernel that does the work.
    pub name: String,
    pub shape: String,
    pub launches: Vec<Launch>,
    pub inputs: Vec<Content>,
    pub outputs: Vec<Content>,
    /// Bytes of the workspace.
    pub scratch: usize,
    /// Bytes that must be moved.
    pub bytes: usize,
    /// FLOPs of matrix products.
    pub products: u64,
}

impl Case {
    /// By the name of the first kernel; each operand is moved once, and there are no matrix products.
    fn new(shape: String, launches: impl Into<Vec<Launch>>, inputs: Vec<Content>, outputs: Vec<Content>) -> Case {
        let launches = launches.into();
        let bytes = inputs.iter().chain(&outputs).map(Content::bytes).sum();
        Case { name: launches[0].kernel.clone(), shape, launches, inputs, outputs, scratch: 0, bytes, products: 0 }
    }
}

const BOTH: [Precision; 2] = [Precision::Bf16, Precision::F32];

/// Every kernel of kernels/ is in one of them.
pub fn all() -> Vec<Case> {
    [activations::cases(), norms::cases(), attentions::cases(), pictures::cases(), parameters::cases()]
        .into_iter()
        .flatten()
        .collect()
}

fn named<const N: usize>(shape: [usize; N]) -> String {
    shape.map(|size| size.to_string()).join("×")
}

fn words(values: impl IntoIterator<Item = u32>) -> Content {
    Content::Exactly(values.into_iter().flat_map(u32::to_ne_bytes).collect())
}

fn floats(values: &[f32]) -> Content {
    Content::Exactly(values.iter().flat_map(|value| value.to_ne_bytes()).collect())
}
