use super::{Gradient, Shape};
use crate::device::{DType, Precision, cpu, cuda};
use std::fmt::Debug;
use std::sync::Arc;

/// Type of an operand's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elements {
    /// This one, always.
    Of(DType),
    /// What the program computes in: activations, their gradients, and weights that they are multiplied by.
    Computed,
}

impl Elements {
    /// The type in a program that computes in `precision`.
    pub fn dtype(self, precision: Precision) -> DType {
        match self {
            Elements::Of(dtype) => dtype,
            Elements::Computed => precision.dtype(),
        }
    }
}

/// What an op takes or gives: a shape (none for a flat buffer of any length) and an element type.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The shape, or nothing where any will do.
    pub shape: Option<Shape>,
    /// Where there is no shape: for how many elements of a flat buffer it has one.
    pub block: usize,
    /// Type of the elements.
    pub elements: Elements,
}

impl Spec {
    fn of(dtype: DType, shape: Option<Shape>) -> Spec {
        Spec { shape, block: 1, elements: Elements::Of(dtype) }
    }

    /// A tensor of f32 whatever the program computes in.
    pub fn f32(shape: impl Into<Shape>) -> Spec {
        Spec::of(DType::F32, Some(shape.into()))
    }

    /// A tensor of u32.
    pub fn u32(shape: impl Into<Shape>) -> Spec {
        Spec::of(DType::U32, Some(shape.into()))
    }

    /// A tensor of u8.
    pub fn u8(shape: impl Into<Shape>) -> Spec {
        Spec::of(DType::U8, Some(shape.into()))
    }

    /// A tensor of the type that the program computes in.
    pub fn computed(shape: impl Into<Shape>) -> Spec {
        Spec { shape: Some(shape.into()), block: 1, elements: Elements::Computed }
    }

    /// All of a flat f32 buffer.
    pub fn flat() -> Spec {
        Spec::of(DType::F32, None)
    }

    /// All of the flat bf16 copy of the weights.
    pub fn flat_bf16() -> Spec {
        Spec::of(DType::Bf16, None)
    }

    /// What there is one of for each `block` elements of a flat buffer, the last of which may be fewer.
    pub fn of_blocks(block: usize, dtype: DType) -> Spec {
        Spec { block, ..Spec::of(dtype, None) }
    }

    /// Type of the elements in a program that computes in `precision`.
    pub fn dtype(&self, precision: Precision) -> DType {
        self.elements.dtype(precision)
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

/// Workspace of an op on CPU cores, in f32 elements. Its content is undefined before and after.
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

    /// Workspace on CPU cores.
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

    /// The same op on a part of the flat buffers with so many parameters; none where it does not know their number.
    fn of_parameters(&self, _parameters: usize) -> Option<Arc<dyn Op>> {
        None
    }

    /// Computes the outputs on CPU cores, in f32.
    fn cpu(&self, launch: &cpu::Launch<'_>);

    /// How a GPU computes the outputs.
    fn cuda(&self, form: &cuda::Form) -> cuda::Work;
}
