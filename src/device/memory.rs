//! What a program knows of memory: element types, regions, slots.

use super::cuda::CudaError;
use half::bf16;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Every buffer, tensor and arena slot starts at a multiple of this many bytes.
pub const ALIGNMENT: usize = 256;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 64-bit float: sums on the way.
    F64,
    /// 32-bit float.
    F32,
    /// Its upper 16 bits.
    Bf16,
    /// Unsigned integer: timesteps, counters.
    U32,
    /// Pixels.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::U32 => 4,
            DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }

    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
            DType::U8 => "u8",
        }
    }
}

/// Type of activations and of the weights that they meet; statistics, master weights, gradients and sums are f32 in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// The upper 16 bits of an f32.
    Bf16,
}

impl Precision {
    /// The matching element type.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        self.dtype().size()
    }

    /// As configs name it.
    pub fn name(self) -> &'static str {
        self.dtype().name()
    }
}

/// A Rust type that can stand in device memory: any bit pattern is a value, there is no padding.
///
/// # Safety
/// Implemented only for plain numbers, for which that holds.
pub unsafe trait Element: Copy + Default + Send + Sync + 'static {
    /// The matching element type.
    const DTYPE: DType;
}

// SAFETY: plain numbers without padding, valid for every bit pattern.
unsafe impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
// SAFETY: as above.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
// SAFETY: as above.
unsafe impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
// SAFETY: as above.
unsafe impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
// SAFETY: as above.
unsafe impl Element for u8 {
    const DTYPE: DType = DType::U8;
}

/// The areas of memory that a program can refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// All parameters, one flat f32 buffer.
    Weights,
    /// Their gradients, at the same offsets.
    Gradients,
    /// Adam's first moment, at the same offsets; or of it, as of the next two, a rank's slices, one after another.
    Moment1,
    /// Adam's second moment, likewise.
    Moment2,
    /// Moving average of the parameters, likewise.
    Ema,
    /// Copy of the parameters for products in bf16: the same elements at half the offsets.
    Compute,
    /// Temporaries, whose slots are reused within a program.
    Arena,
    /// Inputs written and results read by the host between runs.
    Io,
    /// All images of a data set, u8.
    Images,
}

impl Region {
    /// Number of regions.
    pub const COUNT: usize = 9;

    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Region::Weights => "weights",
            Region::Gradients => "gradients",
            Region::Moment1 => "moment1",
            Region::Moment2 => "moment2",
            Region::Ema => "ema",
            Region::Compute => "compute",
            Region::Arena => "arena",
            Region::Io => "io",
            Region::Images => "images",
        }
    }
}

/// A tensor's place: `len` elements from byte `offset` of a region on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The area of memory.
    pub region: Region,
    /// First byte, a multiple of [`ALIGNMENT`] except for tensors inside a fused parameter, and parts of what there is one of for each block.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Type of the elements.
    pub dtype: DType,
}

impl Slot {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Whether two slots share a byte.
    pub fn overlaps(&self, other: &Slot) -> bool {
        self.region == other.region
            && self.offset < other.offset + other.bytes()
            && other.offset < self.offset + self.bytes()
    }
}

/// A buffer of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub(in crate::device) usize);

/// Words of host memory through which inputs and results of programs pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingId(pub(in crate::device) usize);

/// Which buffer stands behind each region of a program during a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Binding([Option<BufferId>; Region::COUNT]);

impl Binding {
    /// Puts `buffer` behind `region`.
    pub fn with(mut self, region: Region, buffer: BufferId) -> Self {
        self.0[region as usize] = Some(buffer);
        self
    }

    /// The buffer behind `region`.
    pub fn get(&self, region: Region) -> Option<BufferId> {
        self.0[region as usize]
    }
}

/// A run that needs more memory than there is. Sizes are for people.
#[derive(Debug, Error)]
#[error(
    "training needs {needed} more of the memory of {device}, which has {free} of {total} free: {advice}, or share the batch among more GPUs"
)]
pub struct Shortage {
    /// The device.
    pub device: String,
    /// What is not there yet of what it needs.
    pub needed: String,
    /// What is free.
    pub free: String,
    /// All there is.
    pub total: String,
    /// What would fit.
    pub advice: String,
}

/// What can go wrong on a device.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The device has less free memory than a buffer needs.
    #[error(
        "{device} has no {bytes} bytes of memory left; reduce `train.batch` or the model (`ddpm-dist plan` shows what is needed)"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// The device has less free memory than a run is known to need.
    #[error(transparent)]
    TooLarge(Box<Shortage>),
    /// A type of numbers that the device does not compute in.
    #[error("CPU cores compute in f32 only, and the program is for {precision}: set `train.precision` to \"f32\"", precision = .0.name())]
    Precision(Precision),
    /// What keeps a GPU from working.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}
