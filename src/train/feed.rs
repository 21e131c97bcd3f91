//! Where a rank's images of each step come from: a thread that reads them ahead, or the device, which holds them all.

use super::{Images, Trainer};
use crate::data::{DataError, Dataset, Loader, LoaderConfig, Order, Storage};
use crate::device::{Device, DeviceError};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are read before they are copied to the device.
const PIECE: usize = 64 << 20;

/// The images of one step after another.
pub(super) enum Feed {
    /// Their pixels.
    Loaded(Loader),
    /// Their numbers.
    Held {
        order: Order,
        /// Images of a step, over all ranks.
        batch: u64,
        /// The rank's places among them.
        places: Range<usize>,
        /// The next step.
        step: u64,
        numbers: Vec<u32>,
    },
}

impl Feed {
    /// From step `start` on, for a rank with `places` in a batch, on a device that holds all images or none.
    ///
    /// # Errors
    /// The loader's.
    pub fn new(
        dataset: &Arc<Dataset>,
        order: Order,
        batch: usize,
        places: Range<usize>,
        start: u64,
        is_held: bool,
    ) -> Result<Feed, DataError> {
        if is_held {
            return Ok(Feed::Held { order, batch: batch as u64, places, step: start, numbers: Vec::new() });
        }
        let slice = LoaderConfig { batch, offset: places.start, count: places.len(), start, depth: 3 };
        Ok(Feed::Loaded(Loader::new(Arc::clone(dataset), order, slice)?))
    }

    /// Those of the next step.
    ///
    /// # Errors
    /// The loader's.
    pub fn next(&mut self) -> Result<Images<'_>, DataError> {
        match self {
            Feed::Loaded(loader) => Ok(Images::Pixels(loader.next()?.pixels)),
            Feed::Held { order, batch, places, step, numbers } => {
                let first = step.wrapping_mul(*batch);
                numbers.clear();
                // As many images as u32 can count are held at most.
                numbers.extend(places.clone().map(|place| order.index(first.wrapping_add(place as u64)) as u32));
                *step += 1;
                Ok(Images::Numbers(numbers))
            }
        }
    }
}

/// Whether a device holds images of so many bytes where so much memory is left: other programs, and what libraries take, find some too.
pub(super) fn fits(bytes: u64, room: u64) -> bool {
    bytes <= room / 2
}

/// How many images a device holds of a data set: all that fit, if their pixels take no decoding.
pub(super) fn held(dataset: &Dataset, room: u64) -> Option<usize> {
    let bytes = dataset.len().checked_mul(dataset.image_bytes() as u64);
    let is_at_hand = dataset.storage() != Storage::OnDemand;
    (bytes.is_some_and(|bytes| fits(bytes, room)) && is_at_hand && u32::try_from(dataset.len()).is_ok())
        .then_some(dataset.len() as usize)
}

/// Why the device does not get its images.
#[derive(Debug, thiserror::Error)]
pub(super) enum HoldError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Copies all images to a device that holds them.
///
/// # Errors
/// Images that cannot be read, or the device's.
pub(super) fn hold(trainer: &Trainer, device: &mut Device, dataset: &Dataset) -> Result<(), HoldError> {
    let Some(buffer) = trainer.images() else { return Ok(()) };
    let image = dataset.image_bytes();
    let together = (PIECE / image).max(1) as u64;
    let mut pixels = Vec::new();
    for first in (0..dataset.len()).step_by(together as usize) {
        let numbers: Vec<u64> = (first..(first + together).min(dataset.len())).collect();
        pixels.resize(numbers.len() * image, 0);
        dataset.images(&numbers, &mut pixels)?;
        device.upload(buffer, first as usize * image, &pixels)?;
    }
    Ok(())
}
