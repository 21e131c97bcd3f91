//! A launch with addresses, as often as it is wanted.

use super::{Argument, Launch};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUfunction, CUstream};
use std::ffi::c_void;
use std::fmt;

/// A kernel with everything that its launch needs.
pub struct PreparedKernel {
    name: String,
    function: CUfunction,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared: u32,
    /// Arguments, each from a multiple of 8 bytes on; `pointers` lead into it.
    _values: Box<[u64]>,
    pointers: Box<[*mut c_void]>,
}

impl PreparedKernel {
    /// Of a launch, whose buffers stand at the addresses that `address` gives.
    pub(super) fn new(function: CUfunction, launch: &Launch, address: impl Fn(&Argument) -> u64) -> PreparedKernel {
        let bytes: Vec<Vec<u8>> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Value(bytes) => bytes.clone(),
                Argument::Null => vec![0; size_of::<u64>()],
                buffer => address(buffer).to_ne_bytes().into(),
            })
            .collect();
        let words = |bytes: &[u8]| bytes.len().div_ceil(size_of::<u64>());
        let mut values = vec![0u64; bytes.iter().map(|bytes| words(bytes)).sum()].into_boxed_slice();
        let mut left = &mut values[..];
        let mut pointers = Vec::new();
        for bytes in &bytes {
            let (value, rest) = left.split_at_mut(words(bytes));
            bytemuck::cast_slice_mut::<u64, u8>(value)[..bytes.len()].copy_from_slice(bytes);
            pointers.push(value.as_mut_ptr().cast());
            left = rest;
        }
        let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x as u32, y as u32, z as u32));
        let (name, shared) = (launch.kernel.clone(), launch.shared as u32);
        PreparedKernel { name, function, grid, block, shared, _values: values, pointers: pointers.into() }
    }

    /// Begins it on a stream.
    ///
    /// # Safety
    /// The addresses are those of memory that is there until the kernel has ended, and the arguments those that the kernel takes.
    pub(super) unsafe fn launch(&self, stream: CUstream) -> Result<(), DriverError> {
        let PreparedKernel { function, grid, block, shared, pointers, .. } = self;
        // SAFETY: the pointers lead to values that live, and that the driver only reads, though it does not say so; the caller vouches for
        // the rest.
        unsafe {
            sys::cuLaunchKernel(
                *function,
                grid.0,
                grid.1,
                grid.2,
                block.0,
                block.1,
                block.2,
                *shared,
                stream,
                pointers.as_ptr().cast_mut(),
                std::ptr::null_mut(),
            )
        }
        .result()
    }
}

impl fmt::Display for PreparedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with grid {:?} of {:?}", self.name, self.grid, self.block)
    }
}
