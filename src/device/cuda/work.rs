//! What an op asks of a GPU: kernels of this program, convolutions of cuDNN and matrix products of cuBLASLt, one after another.

use super::{Argument, Launch, Precision};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is known of an op's operands beside what the op knows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Of activations, and of the weights that they are multiplied by.
    pub precision: Precision,
    /// Bit i: output i is added to or changed in place.
    pub updates: u32,
    /// Elements of the operands that are flat buffers.
    pub flat: usize,
}

impl Form {
    /// Whether output `i` is added to or changed in place.
    pub fn updates(&self, i: usize) -> bool {
        self.updates >> i & 1 != 0
    }
}

/// How an op is computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// In this order.
    pub steps: Vec<Step>,
    /// Bytes of workspace in the arena.
    pub scratch: usize,
    /// What the kernels read beside the op's inputs, byte for byte; their places follow those of the inputs.
    pub constants: Vec<Vec<u8>>,
}

impl Work {
    /// Kernels without a workspace.
    pub fn kernels(launches: impl IntoIterator<Item = Launch>) -> Work {
        Work { steps: launches.into_iter().map(Step::Kernel).collect(), ..Work::default() }
    }

    /// The same with so many bytes of workspace.
    pub fn with_scratch(self, scratch: usize) -> Work {
        Work { scratch, ..self }
    }
}

/// A part of an op's work.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A kernel of this program.
    Kernel(Launch),
    /// Of cuDNN.
    Convolution(Box<Convolution>),
    /// Of cuBLASLt.
    Product(Product),
}

/// What a convolution gives; the other two tensors are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// y.
    Forward,
    /// x's gradient, from y's.
    InputGradient,
    /// The weights' gradient, from y's; f32.
    WeightGradient,
}

/// Sizes of a convolution (a cross-correlation, as all networks have it) of x `[N, H, W, C]` with weights `[O, F, F, C]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConvolutionShape {
    /// What it gives.
    pub pass: Pass,
    /// N.
    pub images: usize,
    /// H and W of x.
    pub size: [usize; 2],
    /// C.
    pub channels: usize,
    /// O, channels of y.
    pub out: usize,
    /// F, rows and columns of the filter.
    pub filter: usize,
    /// Pixels from one place of the filter to the next.
    pub stride: usize,
    /// Zeros before the first and after the last row and column of x.
    pub padding: [usize; 2],
    /// Of x, y and the weights; sums are f32 in either case.
    pub precision: Precision,
    /// Whether a bias `[O]` of that precision is added to y.
    pub has_bias: bool,
    /// Whether a tensor of y's shape is added to y.
    pub has_residual: bool,
    /// Whether a gradient is added to what is there.
    pub adds: bool,
}

impl ConvolutionShape {
    /// H and W of y.
    pub fn out_size(&self) -> [usize; 2] {
        self.size.map(|size| (size + self.padding[0] + self.padding[1] - self.filter) / self.stride + 1)
    }
}

/// A convolution and its operands.
#[derive(Clone, Debug, PartialEq)]
pub struct Convolution {
    /// Its sizes.
    pub shape: ConvolutionShape,
    /// x or its gradient.
    pub x: Argument,
    /// The weights or their gradient.
    pub weight: Argument,
    /// y or its gradient.
    pub y: Argument,
    /// The bias where there is one, else [`Argument::Null`].
    pub bias: Argument,
    /// The residual, likewise.
    pub residual: Argument,
    /// Adds bias and residual to y, where the library has no engine that does.
    pub bias_kernel: Option<Launch>,
    /// Adds a gradient of the output's type, which stands in the library's workspace ([`Argument::Scratch`]), to what is there, likewise.
    pub add_kernel: Option<Launch>,
    /// Makes the weights' f32 gradient from a bf16 one in that workspace, or adds that to it, likewise.
    pub cast_kernel: Option<Launch>,
}

/// How a matrix stands in memory, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixShape {
    /// Whether the product takes its transpose.
    pub is_transposed: bool,
    /// Elements from one of its rows (not those of its transpose) to the next.
    pub stride: usize,
    /// Type of its elements.
    pub precision: Precision,
}

/// Sizes of a product c `[M, N]` = a `[M, K]` · b `[K, N]` (+ bias) (+ addend); sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductShape {
    /// M.
    pub rows: usize,
    /// N.
    pub columns: usize,
    /// K.
    pub depth: usize,
    /// The first factor, as it is or transposed.
    pub a: MatrixShape,
    /// The second.
    pub b: MatrixShape,
    /// The result, never transposed; an addend stands in memory as it does.
    pub c: MatrixShape,
    /// Whether a bias `[N]` of c's precision is added to each row.
    pub has_bias: bool,
    /// Whether a matrix is added, which may be c itself.
    pub has_addend: bool,
}

impl fmt::Display for ProductShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProductShape { rows, columns, depth, a, c, .. } = self;
        write!(
            f,
            "product of {rows}×{depth} and {depth}×{columns} in {}, result in {}",
            a.precision.name(),
            c.precision.name()
        )
    }
}

/// A place in memory: so many elements after the beginning of an operand.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The operand.
    pub operand: Argument,
    /// Elements before it.
    pub offset: usize,
}

/// A product and its operands.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Its sizes.
    pub shape: ProductShape,
    /// The first factor.
    pub a: Place,
    /// The second.
    pub b: Place,
    /// The result.
    pub c: Place,
    /// The bias where there is one, else [`Argument::Null`].
    pub bias: Argument,
    /// The addend, likewise.
    pub addend: Argument,
}

impl Product {
    /// The addresses of its operands, where those of the op are known; 0 where there is none.
    pub fn addresses(&self, of: impl Fn(&Argument) -> u64) -> ProductAddresses {
        let Product { shape, a, b, c, bias, addend } = self;
        let place = |operand: &Argument, offset: usize, precision: Precision| match operand {
            Argument::Null => 0,
            operand => of(operand) + (offset * precision.bytes()) as u64,
        };
        ProductAddresses {
            a: place(&a.operand, a.offset, shape.a.precision),
            b: place(&b.operand, b.offset, shape.b.precision),
            c: place(&c.operand, c.offset, shape.c.precision),
            bias: place(bias, 0, shape.c.precision),
            addend: place(addend, c.offset, shape.c.precision),
        }
    }

    /// What a library is asked for, where its operands stand at these addresses.
    pub fn aligned(&self, at: &ProductAddresses) -> AlignedProduct {
        let addend = if self.shape.has_addend { at.addend } else { at.c };
        // As far as it matters.
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        AlignedProduct { shape: self.shape, alignments: [at.a, at.b, addend, at.c].map(alignment) }
    }
}

/// The addresses of a product's operands; 0 where there is none.
#[derive(Clone, Copy, Debug)]
pub struct ProductAddresses {
    /// Of the first factor.
    pub a: u64,
    /// Of the second.
    pub b: u64,
    /// Of the result.
    pub c: u64,
    /// Of the bias.
    pub bias: u64,
    /// Of the addend.
    pub addend: u64,
}

/// A product as a library is asked for it: which algorithms it has depends on where operands stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AlignedProduct {
    /// Its sizes.
    pub shape: ProductShape,
    /// What divides the addresses of a, b, the addend and c, in bytes; 256 at most.
    pub alignments: [u32; 4],
}
