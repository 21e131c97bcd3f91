//! The images of a training step and what is drawn for each of them.

use crate::multiversion;
use crate::rng::{Kind, Stream};
use crate::tape::{Shape, Spec};
use std::ops::Range;

/// The images that one run of a training program takes, and how they are drawn.
///
/// Which step it is and which images these are stands in the `clock`, a u32 [4] that the host writes before each run: clock[0] is the
/// step, clock[1] the place of the first image in the global batch (image j is at clock[1] + j); the rest is unused.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingBatch {
    /// N.
    pub images: usize,
    /// H.
    pub height: usize,
    /// W.
    pub width: usize,
    /// C.
    pub channels: usize,
    /// T: t is drawn from 0 … T−1.
    pub timesteps: usize,
    /// Whether every second image, by chance, is mirrored left to right.
    pub flip: bool,
    /// The run seed.
    pub seed: u64,
    /// Images of the data set, where the device holds all of it and the batch is given by their numbers; else the batch is given by its pixels.
    pub held: Option<usize>,
}

/// Elements that are drawn, then used, at a time: small enough for x_0, ε, input and output to stay in the first-level cache.
const BLOCK: usize = 2048;

impl TrainingBatch {
    /// [N, H, W, C].
    pub fn shape(&self) -> Shape {
        self.shape_with(self.channels)
    }

    /// What its images are taken from, u8: [N, H, W, C], or all that the device holds.
    pub fn pixels(&self) -> Spec {
        Spec::u8([self.held.unwrap_or(self.images), self.height, self.width, self.channels])
    }

    /// Where among these pixels those of image `j` stand, whose numbers are given where all images are held.
    pub(crate) fn place(&self, j: usize, numbers: Option<&[u32]>) -> Range<usize> {
        let image = numbers.map_or(j, |numbers| numbers[j] as usize);
        image * self.elements()..(image + 1) * self.elements()
    }

    /// [N, H, W, channels].
    pub fn shape_with(&self, channels: usize) -> Shape {
        Shape::from([self.images, self.height, self.width, channels])
    }

    /// H·W·C.
    pub fn elements(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Whole rows, at least one.
    fn block(&self) -> usize {
        let row = self.width * self.channels;
        (BLOCK / row).clamp(1, self.height) * row
    }

    /// Floats of workspace that [`Sample::visit`] needs.
    pub(crate) fn scratch(&self) -> usize {
        2 * self.block()
    }

    /// Image `j` of the run at `clock`.
    pub(crate) fn sample(&self, clock: &[u32], j: usize) -> Sample<'_> {
        Sample { batch: self, step: clock[0], sample: clock[1].wrapping_add(j as u32) }
    }
}

/// One image of a step.
pub(crate) struct Sample<'a> {
    batch: &'a TrainingBatch,
    step: u32,
    sample: u32,
}

impl Sample<'_> {
    fn stream(&self, kind: Kind) -> Stream {
        Stream { seed: self.batch.seed, kind, layer: 0, sample: self.sample, step: self.step }
    }

    /// t, uniform over 0 … T−1.
    pub fn timestep(&self) -> u32 {
        self.stream(Kind::Timestep).below(0, self.batch.timesteps as u32)
    }

    /// Whether the image is mirrored: the highest bit of one draw.
    pub fn mirrored(&self) -> bool {
        self.batch.flip && self.stream(Kind::Flip).bits(0) >> 31 == 1
    }

    /// Calls `visit` with one range of the image's elements after another, and x_0 and ε there.
    #[inline]
    pub fn visit(&self, pixels: &[u8], scratch: &mut [f32], mut visit: impl FnMut(Range<usize>, &[f32], &[f32])) {
        let noise = self.stream(Kind::Noise);
        let mirrored = self.mirrored();
        let block = self.batch.block();
        let (x_0, epsilon) = scratch[..2 * block].split_at_mut(block);
        let mut start = 0;
        for pixels in pixels.chunks(block) {
            let range = start..start + pixels.len();
            start = range.end;
            let (x_0, epsilon) = (&mut x_0[..pixels.len()], &mut epsilon[..pixels.len()]);
            if mirrored {
                mirror(x_0, pixels, self.batch.width, self.batch.channels);
            } else {
                widen(x_0, pixels);
            }
            centre(x_0);
            noise.fill_normal(range.start as u64, epsilon);
            visit(range, x_0, epsilon);
        }
    }
}

multiversion! {
    fn widen(values: &mut [f32], pixels: &[u8]) {
        for (value, &pixel) in values.iter_mut().zip(pixels) {
            *value = f32::from(pixel);
        }
    }
}

multiversion! {
    /// x/127.5 − 1, as (2x − 255)/255: the dividend is exact, so there is one rounding.
    fn centre(values: &mut [f32]) {
        for value in values {
            *value = (2.0 * *value - 255.0) / 255.0;
        }
    }
}

/// Rows of `width` pixels, each from right to left.
fn mirror(values: &mut [f32], pixels: &[u8], width: usize, channels: usize) {
    /// With the number of channels known, there is no loop over them.
    fn row<const CHANNELS: usize>(values: &mut [f32], pixels: &[u8]) {
        let (values, pixels) = (values.as_chunks_mut::<CHANNELS>().0, pixels.as_chunks::<CHANNELS>().0);
        for (value, pixel) in values.iter_mut().zip(pixels.iter().rev()) {
            *value = pixel.map(f32::from);
        }
    }
    let rows = width * channels;
    for (values, pixels) in values.chunks_exact_mut(rows).zip(pixels.chunks_exact(rows)) {
        match channels {
            1 => row::<1>(values, pixels),
            3 => row::<3>(values, pixels),
            _ => {
                for (value, pixel) in values.chunks_exact_mut(channels).zip(pixels.chunks_exact(channels).rev()) {
                    widen(value, pixel);
                }
            }
        }
    }
}
