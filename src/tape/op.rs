use super::{Gradient, Shape};
use crate::device::{DType, cpu};
use std::fmt::Debug;

/// What an op takes or gives: a shape (none for a flat buffer of any length) and an element type.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The shape, or nothing where any will do.
    pub shape: Option<Shape>,
    /// Type of the elements.
    pub dtype: DType,
}

impl Spec {
    /// A tensor of f32.
    pub fn f32(shape: impl Into<Shape>) -> Spec {
        Spec { shape: Some(shape.into()), dtype: DType::F32 }
    }

    /// A tensor of u32.
    pub fn u32(shape: impl Into<Shape>) -> Spec {
        Spec { shape: Some(shape.into()), dtype: DType::U32 }
    }

    /// A tensor of u8.
    pub fn u8(shape: impl Into<Shape>) -> Spec {
        Spec { shape: Some(shape.into()), dtype: DType::U8 }
    }

    /// All of a flat f32 buffer.
    pub fn flat() -> Spec {
        Spec { shape: None, dtype: DType::F32 }
    }
}

/// The operands of an op, in order.
#[derive(Clone, Debug, Default)]
pub struct Signature {
    /// What it reads.
    pub inputs: Vec<Spec>,
    /// What it writes.
    pub outputs: Vec<Spec>,
}

/// Workspace of an op, in f32 elements. Its content is undefined before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// In the arena, shared by all threads.
    pub arena: usize,
    /// For each thread of its own (CPU).
    pub thread: usize,
}

/// One operation: its operands, its gradient, its cost, and its code on every device.
///
/// An op knows its own dimensions, so nothing is looked up or checked while a program runs. It lives in a folder of its own under
/// `src/ops/` and is put on a [`Tape`](super::Tape) by the function there that bears its name.
pub trait Op: Debug + Send + Sync + 'static {
    /// Name in listings and profiles.
    fn name(&self) -> &'static str;

    /// Shapes and element types of inputs and outputs.
    fn signature(&self) -> Signature;

    /// Workspace.
    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    /// Multiply-adds and other arithmetic, counted twice and once.
    fn flops(&self) -> u64;

    /// The part of [`Op::flops`] that is matrix products (convolutions, linear layers, attention): what papers and PyTorch's
    /// `FlopCounterMode` call the FLOPs of a network. By the definition of the op, however it is computed.
    fn products(&self) -> u64 {
        0
    }

    /// Puts the ops on the tape that compute the gradients of the inputs from those of the outputs.
    ///
    /// # Panics
    /// By default: ops that only appear after the loss (gradients, the optimiser) have no gradient.
    fn gradient(&self, _gradient: &mut Gradient<'_>) {
        panic!("{} has no gradient", self.name())
    }

    /// The same op with one more input, of its output's shape, that is added to the output.
    fn with_residual(&self) -> Option<Box<dyn Op>> {
        None
    }

    /// Computes the outputs on CPU cores.
    fn cpu(&self, launch: &cpu::Launch<'_>);
}
