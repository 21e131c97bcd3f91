//! x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (eq. 4): Algorithm 1, lines 2 to 4, with t, ε and the horizontal flip drawn here.
//!
//! What is drawn is a function of the run seed, the step and the image's place in the global batch, so the loss draws it again
//! and nothing but t is stored.

mod batch;
mod cpu;
pub mod cuda;

#[cfg(test)]
pub(super) mod tests;

pub use batch::TrainingBatch;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Op, Scratch, Signature, Spec, Tape, Var};

/// Inputs: pixels u8 [N, H, W, C]; √ᾱ_t and √(1−ᾱ_t) as table [T, 2]; clock u32 [4] (see [`TrainingBatch`]); where the pixels are those of a
/// whole data set, the numbers of the batch's images, u32 [N].
/// Outputs: x_t [N, H, W, `padded`]; t u32 [N].
#[derive(Clone, Debug)]
pub struct QSample {
    /// The images.
    pub batch: TrainingBatch,
    /// Channels of x_t; those from C on are 0.
    pub padded: usize,
}

/// What the images of a batch are given by.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// u8 [N, H, W, C], or [M, H, W, C] of a data set of M images.
    pub pixels: Var,
    /// In the second case, which of them: u32 [N].
    pub numbers: Option<Var>,
}

impl From<Var> for Given {
    /// Pixels of the batch.
    fn from(pixels: Var) -> Given {
        Given { pixels, numbers: None }
    }
}

/// Puts x_t and t on the tape.
pub fn q_sample(tape: &mut Tape, batch: &TrainingBatch, images: Given, table: Var, clock: Var) -> (Var, Var) {
    let padded = tape.padded(batch.channels);
    let inputs: Vec<Var> = [images.pixels, table, clock].into_iter().chain(images.numbers).collect();
    let outputs = tape.push(QSample { batch: batch.clone(), padded }, &inputs);
    (outputs[0], outputs[1])
}

impl Op for QSample {
    fn name(&self) -> &'static str {
        "q_sample"
    }

    fn signature(&self) -> Signature {
        let batch = &self.batch;
        let numbers = batch.held.map(|_| Spec::u32([batch.images]));
        let inputs = [batch.pixels(), Spec::f32([batch.timesteps, 2]), Spec::u32([4])];
        Signature {
            inputs: inputs.into_iter().chain(numbers).collect(),
            outputs: vec![Spec::computed(batch.shape_with(self.padded)), Spec::u32([batch.images])],
        }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: self.batch.scratch() }
    }

    fn flops(&self) -> u64 {
        5 * self.batch.shape().len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        assert_eq!(self.padded, self.batch.channels, "on CPU cores images are as they are");
        cpu::q_sample(&self.batch, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(&self.batch, form.precision, self.padded)])
    }
}
