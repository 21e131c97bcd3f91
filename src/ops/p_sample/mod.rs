//! One step of the reverse process: Algorithm 2, line 4, and DDIM (eq. 12 of Song et al. 2020), as one affine rule.
//!
//! x̂_0 = clip(a·x + b·out) (eq. 15 for a network that predicts ε), ε̂ = c·x + d·out, and then
//! x ← c_x0·x̂_0 + c_xt·x + c_eps·ε̂ + σ·z (eq. 11). The coefficients come from the host, one row per step.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::diffusion::SamplerStep;
use crate::tape::{Op, Scratch, Shape, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Inputs: the network's output [N, H, W, `padded`]; for each of S steps a row of the table [S, 9] = x0_from_xt, x0_from_out, eps_from_xt,
/// eps_from_out, c_x0, c_xt, c_eps, sigma, clip (x̂_0 is clipped to [−clip, clip]; 0 or +∞ means not at all), and its timestep u32 [S];
/// clock u32 [4] (clock[0] which of the steps this is, clock[1] the index of the first image, then the seed, low word and high word).
/// Outputs: x f32 [N, H, W, C], changed in place, and the same as the network's next input.
///
/// The noise of an image is a function of seed, image index and timestep. None is drawn where sigma is 0.
#[derive(Clone, Debug)]
pub struct PSample {
    /// Shape of x: images first.
    pub shape: Shape,
    /// S, not less than the steps that are taken.
    pub steps: usize,
    /// Channels of the network's output, of which those from C on are not read, and of its input, where they are 0.
    pub padded: usize,
}

/// Counts the clock of [`PSample`] on and gives the next step's timestep to each image; after the last one, that one's.
///
/// Input: timesteps u32 [S]. Outputs: clock u32 [4], changed in place; t u32 [N].
#[derive(Clone, Debug)]
pub struct NextStep {
    /// N.
    pub images: usize,
    /// S.
    pub steps: usize,
}

/// What goes from step to step.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// f32 [N, H, W, C].
    pub x: Var,
    /// The same for the network, in the precision that it computes in.
    pub input: Var,
    /// u32 [N].
    pub t: Var,
    /// u32 [4].
    pub clock: Var,
}

/// What a reverse step reads.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs {
    /// The network's output, of x's shape.
    pub out: Var,
    /// f32 [S, 9].
    pub table: Var,
    /// u32 [S].
    pub timesteps: Var,
}

/// The row of a step of [`SamplerTable`](crate::diffusion::SamplerTable): its coefficients and the table's `clip`, +∞ where that is off.
pub fn row(step: &SamplerStep, clip: f64) -> [f32; 9] {
    let mut row = [clip as f32; 9];
    row[..8].copy_from_slice(&step.row());
    row
}

/// Puts the step from x_t to x_{t−1} on the tape, in place, and what the next one begins with.
pub fn p_sample(tape: &mut Tape, state: State, inputs: StepInputs) {
    let State { x, input, t, clock } = state;
    let StepInputs { out, table, timesteps } = inputs;
    let (shape, steps, images) = (tape.shape(x).clone(), tape.shape(timesteps).len(), tape.shape(t).len());
    let padded = tape.padded(shape.nhwc()[3]);
    tape.push_into(Arc::new(PSample { shape, steps, padded }), &[out, table, timesteps, clock], &[x, input], 1);
    tape.push_into(Arc::new(NextStep { images, steps }), &[timesteps], &[clock, t], 1);
}

impl Op for PSample {
    fn name(&self) -> &'static str {
        "p_sample"
    }

    fn signature(&self) -> Signature {
        let [n, h, w, _] = self.shape.nhwc();
        let (x, computed) = (Spec::f32(self.shape.clone()), Spec::computed([n, h, w, self.padded]));
        let steps = self.steps;
        let inputs = vec![computed.clone(), Spec::f32([steps, 9]), Spec::u32([steps]), Spec::u32([4])];
        Signature { inputs, outputs: vec![x, computed] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: cpu::BLOCK }
    }

    fn flops(&self) -> u64 {
        14 * self.shape.len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        assert_eq!(self.padded, self.shape.nhwc()[3], "on CPU cores images are as they are");
        cpu::p_sample(&self.shape, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision)])
    }
}

impl Op for NextStep {
    fn name(&self) -> &'static str {
        "next_step"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::u32([self.steps])], outputs: vec![Spec::u32([4]), Spec::u32([self.images])] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::next_step(launch);
    }

    fn cuda(&self, _: &Form) -> Work {
        Work::kernels([cuda::advance(self)])
    }
}
