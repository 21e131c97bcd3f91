//! Devices: memory, threads and libraries, with no idea of what is computed on them.
//!
//! A program addresses memory through [`Slot`]s: a range of one [`Region`]. Which buffer stands behind a region is decided when
//! the program runs ([`Binding`]), so the same sampling program reads the trained weights or their moving average.

pub mod cpu;
pub mod cuda;
mod memory;

pub use memory::{ALIGNMENT, Binding, BufferId, DType, DeviceError, Element, Precision, Region, Slot};

use std::ops::Range;

/// Kinds of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// CPU cores.
    #[default]
    Cpu,
    /// A GPU of NVIDIA.
    Cuda,
}

impl DeviceKind {
    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        }
    }
}

/// What a program is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Where it runs.
    pub kind: DeviceKind,
    /// What it computes in.
    pub precision: Precision,
}

/// A place where programs run.
pub enum Device {
    /// CPU cores of this machine.
    Cpu(cpu::Cpu),
    /// A GPU.
    Cuda(Box<cuda::Cuda>),
}

impl Device {
    /// Its kind.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Device::Cpu(_) => DeviceKind::Cpu,
            Device::Cuda(_) => DeviceKind::Cuda,
        }
    }

    /// What a program for this device and a precision is made for.
    pub fn target(&self, precision: Precision) -> Target {
        Target { kind: self.kind(), precision }
    }

    /// `cpu (avx512)` or `cuda (NVIDIA H200)`, for manifests and logs.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(_) => format!("cpu ({})", crate::simd::level().name()),
            Device::Cuda(cuda) => format!("cuda ({})", cuda.name()),
        }
    }

    /// Allocates a zeroed buffer aligned to [`ALIGNMENT`] bytes.
    ///
    /// # Errors
    /// Too little memory.
    pub fn allocate(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.allocate(bytes),
            Device::Cuda(cuda) => cuda.allocate(bytes),
        }
    }

    /// Copies `data` into `buffer` from element `offset` on.
    ///
    /// # Errors
    /// What went wrong on a GPU, now or before.
    ///
    /// # Panics
    /// If the range lies outside the buffer: offsets come from the planner, not from a user.
    pub fn upload<T: Element>(&mut self, buffer: BufferId, offset: usize, data: &[T]) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.elements_mut(buffer)[offset..offset + data.len()].copy_from_slice(data),
            Device::Cuda(cuda) => cuda.upload(buffer, offset, data)?,
        }
        Ok(())
    }

    /// Lets `fill` change the elements of `range` of `buffer`: for what does not lie in one piece, or where no reference to it may be had.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// As [`Device::upload`].
    pub fn upload_with<T: Element>(
        &mut self,
        buffer: BufferId,
        range: Range<usize>,
        fill: impl FnOnce(&mut [T]),
    ) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(cpu) => fill(&mut cpu.elements_mut(buffer)[range]),
            Device::Cuda(cuda) => {
                let mut elements = vec![T::default(); range.len()];
                cuda.download(buffer, range.start, &mut elements)?;
                fill(&mut elements);
                cuda.upload(buffer, range.start, &elements)?;
            }
        }
        Ok(())
    }

    /// Returns when all that was begun has ended.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(cuda) => Ok(cuda.synchronize()?),
        }
    }

    /// Copies elements from `offset` on out of `buffer`.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// As [`Device::upload`].
    pub fn download<T: Element>(&self, buffer: BufferId, offset: usize, out: &mut [T]) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.download(buffer, offset, out),
            Device::Cuda(cuda) => cuda.download(buffer, offset, out)?,
        }
        Ok(())
    }

    /// `NVIDIA H200`, if it is a GPU.
    pub fn gpu(&self) -> Option<&str> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.name()),
        }
    }

    /// Bytes of memory that are taken on a GPU.
    pub fn gpu_memory(&self) -> Option<u64> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.memory()),
        }
    }

    /// How many images of `count`, which so many ranks share, go through the network together, at most `batch`. On CPU cores any number
    /// gives the same images, so that there are no more than are wanted; a GPU's libraries choose how they compute by the number.
    pub fn sampling_batch(&self, batch: usize, count: usize, ranks: usize) -> usize {
        match self {
            Device::Cpu(_) => batch.min(count.div_ceil(ranks)),
            Device::Cuda(_) => batch,
        }
    }

    /// What it is as far as plans hold for it, if it is a GPU.
    pub fn card(&self) -> Option<&cuda::Card> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.card()),
        }
    }

    /// How convolutions and products are computed, where libraries do.
    pub fn plans(&self) -> Option<cuda::PlanTable> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.plans()),
        }
    }

    /// What the user should know of it and has not been told.
    pub fn take_notice(&mut self) -> Option<String> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => cuda.take_notice(),
        }
    }

    /// Threads that compute; one begins all work on a GPU.
    pub fn threads(&self) -> usize {
        match self {
            Device::Cpu(cpu) => cpu.pool().threads(),
            Device::Cuda(_) => 1,
        }
    }
}
