//! A kernel's launch, as an op describes it: a real driver runs it, and so does the machine made of software that tests use.

use crate::device::Precision;

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// The address of an input, by its place in the op's signature.
    Input(usize),
    /// The address of an output, likewise.
    Output(usize),
    /// The address of the op's workspace.
    Scratch,
    /// No address.
    Null,
    /// A value, byte for byte as the kernel has it.
    Value(Vec<u8>),
}

impl Argument {
    /// A 32-bit number.
    pub fn u32(value: usize) -> Argument {
        debug_assert!(u32::try_from(value).is_ok());
        Argument::Value((value as u32).to_ne_bytes().into())
    }

    /// A 64-bit number.
    pub fn u64(value: u64) -> Argument {
        Argument::Value(value.to_ne_bytes().into())
    }

    /// A number.
    pub fn f32(value: f32) -> Argument {
        Argument::Value(value.to_ne_bytes().into())
    }

    /// A yes or no.
    pub fn flag(value: bool) -> Argument {
        Argument::u32(value.into())
    }

    /// A struct of 32-bit numbers.
    pub fn struct_of<const N: usize>(values: [usize; N]) -> Argument {
        Argument::Value(values.iter().flat_map(|&value| (value as u32).to_ne_bytes()).collect())
    }
}

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel; `_f32` or `_bf16` at its end says the type of the activations.
    pub kernel: String,
    /// Blocks, along x, y, z.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: [usize; 3],
    /// Bytes of shared memory that a block has beside the kernel's own arrays.
    pub shared: usize,
    /// In the order in which the kernel takes them.
    pub arguments: Vec<Argument>,
}

impl Launch {
    /// A kernel `name` for activations of a type.
    pub fn new(name: &str, precision: Precision, grid: [usize; 3], threads: usize, arguments: Vec<Argument>) -> Launch {
        let suffix = match precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        };
        Launch { kernel: format!("{name}_{suffix}"), grid, block: [threads, 1, 1], shared: 0, arguments }
    }

    /// The same with other operands in place of its own.
    pub fn with(self, operand: impl Fn(Argument) -> Argument) -> Launch {
        Launch { arguments: self.arguments.into_iter().map(operand).collect(), ..self }
    }

    /// A kernel of `kernels/elementwise.cuh` on `len` elements: a thread for each 16 bytes. It takes the buffers, their length, and what
    /// else there is.
    pub fn elementwise(
        name: &str,
        precision: Precision,
        len: usize,
        buffers: &[Argument],
        more: &[Argument],
    ) -> Launch {
        const THREADS: usize = 256;
        let blocks = (len * precision.bytes()).div_ceil(16 * THREADS);
        let arguments = [buffers, &[Argument::u64(len as u64)], more].concat();
        Launch::new(name, precision, [blocks, 1, 1], THREADS, arguments)
    }
    /// `kernels/cast.cu`: y = x of `len` elements, from the other precision to `to`.
    pub fn cast(len: usize, to: Precision) -> Launch {
        /// Threads of a block, which have eight elements each.
        const THREADS: usize = 256;
        let arguments = vec![Argument::Input(0), Argument::Output(0), Argument::u64(len as u64)];
        Launch::new("cast_to", to, [len.div_ceil(8 * THREADS), 1, 1], THREADS, arguments)
    }
}
