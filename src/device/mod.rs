//! Devices: memory, threads and libraries, with no idea of what is computed on them.
//!
//! A program addresses memory through [`Slot`]s: a range of one [`Region`]. Which buffer stands behind a region is decided when
//! the program runs ([`Binding`]), so the same sampling program reads the trained weights or their moving average.

pub mod cpu;
pub mod cuda;
mod memory;

pub use memory::{ALIGNMENT, Binding, BufferId, DType, DeviceError, Element, Region, Slot};

use std::ops::Range;

/// A place where programs run.
pub enum Device {
    /// CPU cores of this machine.
    Cpu(cpu::Cpu),
}

impl Device {
    /// `cpu` or, later, the name of an accelerator, for manifests and logs.
    pub fn kind(&self) -> String {
        match self {
            Device::Cpu(_) => format!("cpu ({})", crate::simd::level().name()),
        }
    }

    /// Allocates a zeroed buffer aligned to [`ALIGNMENT`] bytes.
    pub fn allocate(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.allocate(bytes),
        }
    }

    /// Copies `data` into `buffer` from element `offset` on.
    ///
    /// # Panics
    /// If the range lies outside the buffer: offsets come from the planner, not from a user.
    pub fn upload<T: Element>(&mut self, buffer: BufferId, offset: usize, data: &[T]) {
        match self {
            Device::Cpu(cpu) => cpu.elements_mut(buffer)[offset..offset + data.len()].copy_from_slice(data),
        }
    }

    /// Lets `fill` write the elements of `range` of `buffer`: for what does not lie in one piece, or where no reference to it may be had.
    ///
    /// # Panics
    /// As [`Device::upload`].
    pub fn upload_with<T: Element>(&mut self, buffer: BufferId, range: Range<usize>, fill: impl FnOnce(&mut [T])) {
        match self {
            Device::Cpu(cpu) => fill(&mut cpu.elements_mut(buffer)[range]),
        }
    }

    /// Copies elements from `offset` on out of `buffer`.
    ///
    /// # Panics
    /// As [`Device::upload`].
    pub fn download<T: Element>(&self, buffer: BufferId, offset: usize, out: &mut [T]) {
        match self {
            Device::Cpu(cpu) => cpu.download(buffer, offset, out),
        }
    }
}
