//! Mean squared error to ε (eq. 14, L_simple) or to another mixture of x_0 and ε: x_0 itself, or v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0.
//!
//! Loss and gradient come from one pass. The target is not stored: x_0, the flip and ε are drawn again, as `q_sample` drew them.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use super::q_sample::{Given, TrainingBatch};
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Op, Scratch, Signature, Spec, Tape, Var};

/// Inputs: the network's output [N, H, W, `padded`]; pixels u8 [N, H, W, C]; t u32 [N]; the target's coefficients of x_0 and of ε as table
/// [T, 2]; clock u32 [4]; where the pixels are those of a whole data set, the numbers of the batch's images, u32 [N].
/// Outputs: gradient [N, H, W, `padded`] of the mean over `global_batch` images; each image's own mean squared error [N].
///
/// An image whose error is past f32 has a gradient of NaN, so that whoever adds up gradients, over shards and ranks too, learns of it.
#[derive(Clone, Debug)]
pub struct MseLoss {
    /// The images, drawn as for `q_sample`.
    pub batch: TrainingBatch,
    /// Images of the whole step, over all shards and ranks.
    pub global_batch: usize,
    /// Channels of the network's output and of its gradient; those from C on are not read, and 0.
    pub padded: usize,
}

/// What the loss reads.
#[derive(Clone, Copy, Debug)]
pub struct LossInputs {
    /// The network's output [N, H, W, C].
    pub out: Var,
    /// As `q_sample` got them.
    pub images: Given,
    /// u32 [N].
    pub t: Var,
    /// [T, 2].
    pub table: Var,
    /// u32 [4].
    pub clock: Var,
}

/// Puts the gradient of the loss with respect to `out`, for [`Tape::backward`], and each image's loss on the tape.
pub fn mse_loss(tape: &mut Tape, batch: &TrainingBatch, global_batch: usize, inputs: LossInputs) -> (Var, Var) {
    let LossInputs { out, images, t, table, clock } = inputs;
    let padded = tape.padded(batch.channels);
    let op = MseLoss { batch: batch.clone(), global_batch, padded };
    let inputs: Vec<Var> = [out, images.pixels, t, table, clock].into_iter().chain(images.numbers).collect();
    let outputs = tape.push(op, &inputs);
    (outputs[0], outputs[1])
}

impl MseLoss {
    /// 2/(B·H·W·C): what a difference counts in the gradient of the mean over the B images of the whole step.
    fn scale(&self) -> f32 {
        (2.0 / (self.global_batch as f64 * self.batch.elements() as f64)) as f32
    }
}

impl Op for MseLoss {
    fn name(&self) -> &'static str {
        "mse_loss"
    }

    fn signature(&self) -> Signature {
        let TrainingBatch { images, timesteps, .. } = self.batch;
        let (pixels, padded) = (self.batch.pixels(), self.batch.shape_with(self.padded));
        let inputs =
            [Spec::computed(padded.clone()), pixels, Spec::u32([images]), Spec::f32([timesteps, 2]), Spec::u32([4])];
        let numbers = self.batch.held.map(|_| Spec::u32([images]));
        Signature {
            inputs: inputs.into_iter().chain(numbers).collect(),
            outputs: vec![Spec::computed(padded), Spec::f32([images])],
        }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: self.batch.scratch() }
    }

    fn flops(&self) -> u64 {
        9 * self.batch.shape().len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        assert_eq!(self.padded, self.batch.channels, "on CPU cores images are as they are");
        cpu::mse_loss(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        let partials = self.batch.images * cuda::partials(&self.batch);
        let launches = cuda::launches(self, form.precision, self.padded);
        Work::kernels(launches).with_scratch(size_of::<f64>() * partials)
    }
}
