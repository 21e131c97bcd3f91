//! 3×3 convolutions of stride 1 by Winograd's minimal filtering F(2×2, 3×3) (Lavin & Gray 2016, *Fast Algorithms for Convolutional
//! Neural Networks*, §4.1): 16 products for every 2×2 outputs and pair of channels, where the definition has 36.
//!
//! The result is cut into tiles of 2×2 pixels; each sees a patch d of 4×4 pixels of the input. With the filter g (3×3)
//!
//! y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A
//!
//! and the elementwise product, summed over channels, is a matrix product (tiles × channels)·(channels × out) for each of the 16
//! places. The gradients are of the same kind: dx is the convolution of dy with the filter turned by 180° and its channels swapped, and
//! dg the adjoint of y in g:
//!
//! dg = Gᵀ[Σ (A dy Aᵀ) ⊙ (Bᵀ d B)]G, summed over tiles.
//!
//! ```text
//!      ⎡1  0 -1  0⎤       ⎡ 1    0    0 ⎤
//! Bᵀ = ⎢0  1  1  0⎥   G = ⎢1/2  1/2  1/2⎥   Aᵀ = ⎡1  1  1  0⎤
//!      ⎢0 -1  1  0⎥       ⎢1/2 -1/2  1/2⎥        ⎣0  1 -1 -1⎦
//!      ⎣0  1  0 -1⎦       ⎣ 0    0    1 ⎦
//! ```
//!
//! A task transforms a few tiles into its scratch, multiplies them there and transforms back, so that only the filters are ever stored
//! in transformed form. Factors of 0, ±1 and ½ round nothing; only the additions do.

mod convolve;
mod transform;
mod weight_gradient;

use std::ops::Range;
use transform::{Patch, PatchTransform};

pub use convolve::{Filter, convolve, filters_len, transform_filters};
pub use weight_gradient::weight_gradient;

// For tests, which run every instruction set.
#[cfg(test)]
pub(in super::super) use {
    convolve::{convolve_at, transform_filters_at},
    weight_gradient::weight_gradient_at,
};

/// Elements of a transformed patch.
const PLACES: usize = 16;
/// Sides of the patches of input and output that belong to a tile.
const INPUT: usize = 4;
const OUTPUT: usize = 2;
/// Floats that keep the places of a transformed tile from falling into one set of the cache.
const SKEW: usize = 16;

/// A convolution of pictures `[images, height, width, channels]` to `[images, height, width, out]`, with zeros around them.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    pub images: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub out: usize,
}

/// Four outputs: the pixels (y, x) to (y + 1, x + 1) of an image, some of which may lie outside it.
struct Tile {
    image: usize,
    y: usize,
    x: usize,
}

/// Some channels of all pixels: `channels` floats from `first` on of the `ld` that a pixel has.
#[derive(Clone, Copy)]
struct Pixels<'a> {
    data: &'a [f32],
    ld: usize,
    first: usize,
    channels: usize,
}

impl Convolution {
    /// Whether this is the faster way: the channels fill vectors, and the tiles of a usual batch (16 images of at least 4×4 pixels) make
    /// up for transforming the filters. Decided by the shape of one image, as it shows in the bits: an image is the same in any batch.
    pub fn pays(&self) -> bool {
        let is_wide = [self.channels, self.out].iter().all(|channels| (16..=4096).contains(channels));
        is_wide && Convolution { images: 1, ..*self }.tiles() >= 4
    }

    /// The same pictures the other way: the convolution that makes dx of dy.
    pub fn backward(&self) -> Self {
        Convolution { channels: self.out, out: self.channels, ..*self }
    }

    fn pixels(&self) -> usize {
        self.images * self.height * self.width
    }

    fn tiles(&self) -> usize {
        self.images * self.height.div_ceil(OUTPUT) * self.width.div_ceil(OUTPUT)
    }

    fn tile(&self, i: usize) -> Tile {
        let (down, across) = (self.height.div_ceil(OUTPUT), self.width.div_ceil(OUTPUT));
        let (line, column) = (i / across, i % across);
        Tile { image: line / down, y: OUTPUT * (line % down), x: OUTPUT * column }
    }

    /// Place of a pixel in memory.
    fn pixel(&self, image: usize, y: usize, x: usize) -> usize {
        (image * self.height + y) * self.width + x
    }

    /// Transforms the patches of `tiles`, `SIDE` pixels square, to `out`: `[place][tile][channel]` with places `step` apart. `patch` is
    /// scratch for one of them.
    fn transform_patches<const SIDE: usize>(
        &self,
        transform: PatchTransform,
        pixels: Pixels<'_>,
        tiles: Range<usize>,
        patch: &mut [f32],
        out: &mut [f32],
        step: usize,
    ) {
        let Pixels { data, ld, first, channels } = pixels;
        // Tiles of the input begin one line and one column before those of the output.
        let before = (SIDE - OUTPUT) / 2;
        assert!(
            data.len() == self.pixels() * ld && first + channels <= ld && patch.len() >= SIDE * SIDE * channels,
            "{self:?}: {channels} channels from {first} of {ld}, {} floats, a patch of {}",
            data.len(),
            patch.len()
        );
        assert!(tiles.len() * channels <= step && PLACES * step <= out.len(), "{} floats for {tiles:?}", out.len());
        for (i, tile) in tiles.map(|i| self.tile(i)).enumerate() {
            // Wrapping makes what lies before the picture a huge number.
            let (y, x) = (tile.y.wrapping_sub(before), tile.x.wrapping_sub(before));
            let inside = |from: usize, size: usize| from < size && size - from >= SIDE;
            let patch = if inside(y, self.height) && inside(x, self.width) {
                let start = self.pixel(tile.image, y, x) * ld + first;
                Patch { data: data[start..].as_ptr(), line: self.width * ld, pixel: ld }
            } else {
                for (j, out) in patch.chunks_exact_mut(channels).take(SIDE * SIDE).enumerate() {
                    let (y, x) = (y.wrapping_add(j / SIDE), x.wrapping_add(j % SIDE));
                    if y < self.height && x < self.width {
                        let start = self.pixel(tile.image, y, x) * ld + first;
                        out.copy_from_slice(&data[start..start + channels]);
                    } else {
                        out.fill(0.0);
                    }
                }
                Patch { data: patch.as_ptr(), line: SIDE * channels, pixel: channels }
            };
            // SAFETY: the patch lies inside the picture, whose length was asserted, or in scratch of that size; the places of this
            // tile end before `tiles.len() * channels`, and 16 steps of that fit in `out`.
            unsafe { transform(&patch, channels, out[i * channels..].as_mut_ptr(), step) };
        }
    }
}
