//! Which image stands at which place of the endless sequence that training reads.

use crate::rng::permute;

/// The order of a run: epoch e visits the images in a permutation keyed by (seed, e).
///
/// Positions are counted from the start of the run over all ranks: image j of the global batch of step s stands at
/// position s·batch + j. Batches run across the ends of epochs, so that no image is dropped, and a resume at any world
/// size continues with exactly the images that were next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The run seed.
    pub seed: u64,
    /// Number of images, at least 1.
    pub len: u64,
}

impl Order {
    /// The image at `position`.
    pub fn index(&self, position: u64) -> u64 {
        permute(self.seed, self.epoch(position), self.len, position % self.len)
    }

    /// How many times all images have been visited before `position`.
    pub fn epoch(&self, position: u64) -> u64 {
        position / self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_image_once_and_in_its_own_order() {
        for len in [1, 2, 7, 100, 257] {
            let order = Order { seed: 3, len };
            let epoch = |e: u64| (e * len..(e + 1) * len).map(|p| order.index(p)).collect::<Vec<_>>();
            for e in 0..3 {
                let mut seen = epoch(e);
                seen.sort_unstable();
                assert_eq!(seen, (0..len).collect::<Vec<_>>());
            }
            if len >= 100 {
                assert_ne!(epoch(0), epoch(1));
                assert_ne!(epoch(0), (0..len).collect::<Vec<_>>());
                assert_ne!(epoch(0), (0..len).map(|p| Order { seed: 4, len }.index(p)).collect::<Vec<_>>());
            }
        }
    }
}
