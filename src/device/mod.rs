//! Devices: memory, threads and libraries, with no idea of what is computed on them.
//!
//! A program addresses memory through [`Slot`]s: a range of one [`Region`]. Which buffer stands behind a region is decided when
//! the program runs ([`Binding`]), so the same sampling program reads the trained weights or their moving average.

pub mod cpu;
pub mod cuda;
mod memory;

pub use memory::{
    ALIGNMENT, Binding, BufferId, DType, DeviceError, Element, Precision, Region, Shortage, Slot, StagingId,
};

use std::ops::Range;
use std::time::{Duration, Instant};

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

    /// How many images of `count`, which so many ranks share, go through the network together, at most `batch`. On CPU cores any number
    /// gives the same images, so that there are no more than are wanted; a GPU's libraries choose how they compute by the number.
    pub fn sampling_batch(self, batch: usize, count: usize, ranks: usize) -> usize {
        match self {
            DeviceKind::Cpu => batch.min(count.div_ceil(ranks)),
            DeviceKind::Cuda => batch,
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

/// A moment between two instructions of a program.
#[derive(Debug)]
pub enum Tick {
    /// By the host's clock.
    Cpu(Instant),
    /// By a GPU's, once it comes there.
    Cuda(cuda::Tick),
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

    /// The moment when all that was begun has ended.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn tick(&self) -> Result<Tick, DeviceError> {
        match self {
            Device::Cpu(_) => Ok(Tick::Cpu(Instant::now())),
            Device::Cuda(cuda) => Ok(Tick::Cuda(cuda.gpu().tick()?)),
        }
    }

    /// Time from one moment of this device to a later one, which is waited for.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// If they are not of one kind of device.
    pub fn time_between(&self, from: &Tick, to: &Tick) -> Result<Duration, DeviceError> {
        match (from, to) {
            (Tick::Cpu(from), Tick::Cpu(to)) => Ok(to.duration_since(*from)),
            (Tick::Cuda(from), Tick::Cuda(to)) => Ok(from.until(to)?),
            _ => panic!("moments of different devices"),
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

    /// How many steps of a loop may be under way when the results of one are wanted. A GPU then has something to do while the host looks at
    /// them; CPU cores do what they are told at once.
    pub fn steps_ahead(&self) -> usize {
        match self {
            Device::Cpu(_) => 0,
            Device::Cuda(_) => 1,
        }
    }

    /// Makes `words` words of host memory, zeroed, through which inputs and results of programs pass: copies from and to it are begun in the
    /// order of the programs, and nobody waits for them.
    ///
    /// # Errors
    /// Too little memory.
    pub fn stage(&mut self, words: usize) -> Result<StagingId, DeviceError> {
        match self {
            Device::Cpu(cpu) => Ok(cpu.stage(words)?),
            Device::Cuda(cuda) => Ok(cuda.stage(words)?),
        }
    }

    /// Their content, when the copies that were begun have ended.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn staged(&mut self, id: StagingId) -> Result<&mut [u32], DeviceError> {
        match self {
            Device::Cpu(cpu) => Ok(cpu.staged(id)),
            Device::Cuda(cuda) => Ok(cuda.staged(id)?),
        }
    }

    /// Begins to copy words from `first` on to a slot of a buffer.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// If words or slot end before.
    pub fn begin_upload(
        &mut self,
        id: StagingId,
        first: usize,
        buffer: BufferId,
        slot: Slot,
    ) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.copy_from_staging(id, first, buffer, slot),
            Device::Cuda(cuda) => cuda.begin_upload(id, first, buffer, slot)?,
        }
        Ok(())
    }

    /// Begins to copy a slot of a buffer to words from `first` on.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// If words or slot end before.
    pub fn begin_download(
        &mut self,
        buffer: BufferId,
        slot: Slot,
        id: StagingId,
        first: usize,
    ) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.copy_to_staging(buffer, slot, id, first),
            Device::Cuda(cuda) => cuda.begin_download(buffer, slot, id, first)?,
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

    /// FLOP/s of the fastest large matrix product of a GPU in that precision, measured now.
    ///
    /// # Errors
    /// Too little memory, or what keeps the GPU from working.
    pub fn product_peak(&mut self, precision: Precision) -> Result<Option<f64>, DeviceError> {
        match self {
            Device::Cpu(_) => Ok(None),
            Device::Cuda(cuda) => Ok(Some(cuda.product_peak(precision)?)),
        }
    }

    /// Bytes of memory that are taken on a GPU.
    pub fn gpu_memory(&self) -> Option<u64> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.memory()),
        }
    }

    /// Bytes of memory that are free, and all that there are, where the device has memory of its own.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn free_memory(&self) -> Result<Option<[u64; 2]>, DeviceError> {
        match self {
            Device::Cpu(_) => Ok(None),
            Device::Cuda(cuda) => Ok(Some(cuda.gpu().free_memory()?)),
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
