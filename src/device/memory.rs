//! What a program knows of memory: element types, regions, slots.

use thiserror::Error;

/// Every buffer, tensor and arena slot starts at a multiple of this many bytes.
pub const ALIGNMENT: usize = 256;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// Unsigned integer: timesteps, counters.
    U32,
    /// Pixels.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::U8 => 1,
        }
    }

    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::U32 => "u32",
            DType::U8 => "u8",
        }
    }
}

/// A Rust type that can stand in device memory: any bit pattern is a value, there is no padding.
///
/// # Safety
/// Implemented only for plain numbers, for which that holds.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The matching element type.
    const DTYPE: DType;
}

// SAFETY: plain numbers without padding, valid for every bit pattern.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;
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
    /// Adam's first moment, at the same offsets.
    Moment1,
    /// Adam's second moment, at the same offsets.
    Moment2,
    /// Moving average of the parameters, at the same offsets.
    Ema,
    /// Temporaries, whose slots are reused within a program.
    Arena,
    /// Inputs written and results read by the host between runs.
    Io,
}

impl Region {
    /// Number of regions.
    pub const COUNT: usize = 7;

    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Region::Weights => "weights",
            Region::Gradients => "gradients",
            Region::Moment1 => "moment1",
            Region::Moment2 => "moment2",
            Region::Ema => "ema",
            Region::Arena => "arena",
            Region::Io => "io",
        }
    }
}

/// A tensor's place: `len` elements from byte `offset` of a region on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The area of memory.
    pub region: Region,
    /// First byte, a multiple of [`ALIGNMENT`] except for tensors inside a fused parameter.
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
}
