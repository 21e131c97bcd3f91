//! Pictures that are decoded when they are needed, and what stands in for one that turns out to be bad.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::folder::{Folder, NAMED, Skipped, none_usable};
use super::picture::Target;
use super::{DataError, OnBadImage};

/// A folder whose pictures had good headers when it was opened.
pub(super) struct OnDemand {
    folder: Folder,
    target: Target,
    on_bad_image: OnBadImage,
    replaced: Mutex<Replaced>,
}

/// Pictures that could not be decoded.
#[derive(Default)]
struct Replaced {
    places: BTreeSet<usize>,
    /// What nobody has been told yet.
    news: Vec<String>,
}

impl OnDemand {
    pub fn new(folder: Folder, target: Target, on_bad_image: OnBadImage) -> OnDemand {
        OnDemand { folder, target, on_bad_image, replaced: Mutex::default() }
    }

    /// Writes picture `i`, or with `data.on_bad_image = "skip"` the first good one from there on (after the last comes the first): which
    /// one that is depends on the pictures alone.
    pub fn image(&self, i: usize, out: &mut [u8]) -> Result<(), DataError> {
        let count = self.folder.files.len();
        for at in (i..count).chain(0..i) {
            if self.lock().places.contains(&at) {
                continue;
            }
            match self.folder.decode(at, self.target, out) {
                Err(DataError::Malformed { fault, .. }) if self.on_bad_image == OnBadImage::Skip => {
                    self.note(at, &fault.reason());
                }
                result => return result,
            }
        }
        Err(none_usable(&self.folder.root, &Skipped { count: count as u64, names: Vec::new() }))
    }

    fn note(&self, at: usize, reason: &str) {
        let mut replaced = self.lock();
        if !replaced.places.insert(at) {
            return; // another thread was quicker
        }
        let count = replaced.places.len();
        let picture = self.folder.root.join(&self.folder.files[at]);
        if count <= NAMED {
            let text = format!("{}: {reason}; the next good picture stands in for it", picture.display());
            replaced.news.push(text);
        } else if count.is_power_of_two() {
            let text = format!("{count} pictures could not be decoded so far, the last is {}", picture.display());
            replaced.news.push(text);
        }
    }

    /// How many pictures others stand in for.
    pub fn replaced(&self) -> u64 {
        self.lock().places.len() as u64
    }

    /// What happened since the last call.
    pub fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().news)
    }

    /// A set of numbers is fit for use whatever happened to the thread that held it.
    fn lock(&self) -> MutexGuard<'_, Replaced> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
