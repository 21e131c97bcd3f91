//! Random numbers without a state: every draw is a pure function of what it is for.
//!
//! A [`Stream`] names a purpose (run seed, kind, layer, sample, step); its elements are drawn in any order, by any thread, on
//! any rank, and are always the same. Nothing about randomness is ever saved. The generator is Philox4x32-10; its key is the
//! run seed and its counter is (element/4, sample, step, kind·2²⁴ + layer).

mod fill;
mod normal;
mod permutation;
mod philox;
#[cfg(test)]
mod tests;

pub use normal::box_muller;
pub use permutation::permute;
pub use philox::philox4x32_10;

/// What random numbers are drawn for. The values are part of every run's trajectory: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// t of a training sample.
    Timestep = 0,
    /// ε of a training sample.
    Noise = 1,
    /// Whether a training image is mirrored.
    Flip = 2,
    /// The dropout mask of a layer.
    Dropout = 3,
    /// Initial values of a parameter.
    Init = 4,
    /// x_T of a sampled image.
    Sample = 5,
    /// z of the reverse steps of a sampled image.
    SampleNoise = 6,
    /// The order in which an epoch visits the images.
    Order = 7,
}

/// One stream of random numbers: 2³⁴ elements that belong to one purpose.
///
/// Elements are counted in unpadded NHWC order within one image (or one parameter), so the first element of each sample is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run seed (sampling: the seed of the command).
    pub seed: u64,
    /// What is drawn.
    pub kind: Kind,
    /// Which layer or parameter draws, below 2²⁴; 0 where there is only one.
    pub layer: u32,
    /// The sample's place in the **global** batch, or the index of a sampled image.
    pub sample: u32,
    /// The training step, or the timestep of a reverse step.
    pub step: u32,
}

impl Stream {
    /// Philox's key.
    pub const fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Words 1 to 3 of Philox's counter; word 0 is element/4.
    pub const fn counter_tail(&self) -> [u32; 3] {
        debug_assert!(self.layer < 1 << 24, "a layer index has 24 bits");
        [self.sample, self.step, (self.kind as u32) << 24 | self.layer]
    }

    /// The 32 random bits of one element.
    pub const fn bits(&self, element: u64) -> u32 {
        let [sample, step, purpose] = self.counter_tail();
        philox4x32_10([(element / 4) as u32, sample, step, purpose], self.key())[(element % 4) as usize]
    }

    /// Uniform in [0, 1): a multiple of 2⁻²⁴.
    pub const fn uniform(&self, element: u64) -> f32 {
        uniform(self.bits(element))
    }

    /// Uniform over 0 … n−1, by the high half of a 32×32-bit product.
    ///
    /// Some values are likelier than others by one part in ⌊2³²/n⌋: 2.3e-7 for n = 1000.
    pub const fn below(&self, element: u64, n: u32) -> u32 {
        ((self.bits(element) as u64 * n as u64) >> 32) as u32
    }

    /// Random bits of the elements `first_element ..`.
    pub fn fill_bits(&self, first_element: u64, out: &mut [u32]) {
        fill::bits(self.key(), self.counter_tail(), first_element, out);
    }

    /// Standard normals of the elements `first_element ..`: elements 4i and 4i+1, and 4i+2 and 4i+3, are the two results of one
    /// [`box_muller`].
    pub fn fill_normal(&self, first_element: u64, out: &mut [f32]) {
        fill::normal(self.key(), self.counter_tail(), first_element, out);
    }

    /// Uniform numbers in [0, 1), as [`Stream::uniform`], of the elements `first_element ..`.
    pub fn fill_uniform(&self, first_element: u64, out: &mut [f32]) {
        fill::uniform(self.key(), self.counter_tail(), first_element, out);
    }

    /// A dropout mask for the elements `first_element ..`: 1/`keep_probability` where an element is kept, else 0.
    ///
    /// See [`Keep`] for how an element is judged; a keep probability of 1 gives exactly 1 everywhere.
    pub fn fill_keep(&self, first_element: u64, keep_probability: f32, out: &mut [f32]) {
        fill::keep(self.key(), self.counter_tail(), first_element, Keep::new(keep_probability), out);
    }
}

/// How dropout judges an element: kept, with factor `scale`, exactly where its random bits are ≤ `limit`.
///
/// Integers are compared, so every device keeps the same elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep {
    /// keep_probability·2³² − 1, rounded.
    pub limit: u32,
    /// 1/keep_probability; 0 where nothing is kept.
    pub scale: f32,
}

impl Keep {
    /// The rule for a probability of keeping an element; values outside [0, 1] count as the nearer end.
    pub fn new(keep_probability: f32) -> Keep {
        if keep_probability <= 0.0 {
            return Keep { limit: 0, scale: 0.0 };
        }
        let p = keep_probability.min(1.0);
        // The cast saturates.
        Keep { limit: (p as f64 * 4_294_967_296.0 - 1.0).round() as u32, scale: 1.0 / p }
    }

    /// The factor of an element with these random bits.
    #[inline(always)]
    pub const fn factor(self, bits: u32) -> f32 {
        if bits <= self.limit { self.scale } else { 0.0 }
    }
}

#[inline(always)]
const fn uniform(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}
