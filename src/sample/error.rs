//! Why there are no images.

use crate::collective::CollectiveError;
use crate::device::DeviceError;
use crate::tape::RunError;
use thiserror::Error;

/// Why images could not be made.
#[derive(Debug, Error)]
pub enum SampleError {
    /// No memory for the network's activations, or for the images.
    #[error(
        "{device} has no {bytes} bytes of memory left for {what}; lower `sample.batch` (`ddpm-dist sample --batch`) or ask for fewer \
         images at a time"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        bytes: usize,
        /// What they were to hold.
        what: &'static str,
    },
    /// The program stopped.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The images are not numbers: the weights are not, or the network overflows.
    #[error(
        "image {image} has pixels that are not finite after timestep {timestep}; the weights are damaged or training diverged: \
         sample from an earlier checkpoint"
    )]
    NotFinite {
        /// Index of the image.
        image: usize,
        /// The reverse step that gave it.
        timestep: u32,
    },
    /// `--init-noise` has other sizes than the images.
    #[error(
        "initial noise has {found} numbers, expected {expected}: {count} images of [{height}, {width}, {channels}]"
    )]
    InitialNoise {
        /// Numbers found.
        found: usize,
        /// Numbers expected.
        expected: usize,
        /// Images asked for.
        count: usize,
        /// Height of an image.
        height: usize,
        /// Width of an image.
        width: usize,
        /// Channels of an image.
        channels: usize,
    },
}

impl SampleError {
    /// What went wrong between ranks, if that is what it is.
    pub fn collective(&self) -> Option<&CollectiveError> {
        match self {
            SampleError::Run(error) => error.collective(),
            _ => None,
        }
    }
}

impl From<DeviceError> for SampleError {
    /// The device's error with the advice that helps here: it is not the training batch that is too large.
    fn from(error: DeviceError) -> SampleError {
        match error {
            DeviceError::OutOfMemory { device, bytes } => {
                SampleError::OutOfMemory { device, bytes, what: "the network" }
            }
            other => SampleError::Run(other.into()),
        }
    }
}

/// An empty vector with room for `len` elements.
///
/// # Errors
/// There is no memory for `what`.
pub fn room_for<T>(len: usize, what: &'static str) -> Result<Vec<T>, SampleError> {
    let mut room = Vec::new();
    match room.try_reserve_exact(len) {
        Ok(()) => Ok(room),
        Err(_) => {
            let bytes = len.saturating_mul(size_of::<T>());
            Err(SampleError::OutOfMemory { device: "this machine".into(), bytes, what })
        }
    }
}

impl From<CollectiveError> for SampleError {
    fn from(error: CollectiveError) -> SampleError {
        SampleError::Run(RunError::Collective(error))
    }
}
