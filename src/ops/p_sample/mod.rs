//! One step of the reverse process: Algorithm 2, line 4, and DDIM (eq. 12 of Song et al. 2020), as one affine rule.
//!
//! x̂_0 = clip(a·x + b·out) (eq. 15 for a network that predicts ε), ε̂ = c·x + d·out, and then
//! x ← c_x0·x̂_0 + c_xt·x + c_eps·ε̂ + σ·z (eq. 11). The coefficients come from the host, one row per step.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::diffusion::SamplerStep;
use crate::tape::{Op, Scratch, Shape, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Inputs: the network's output [N, …]; the row [9] = x0_from_xt, x0_from_out, eps_from_xt, eps_from_out, c_x0, c_xt, c_eps, sigma,
/// clip (x̂_0 is clipped to [−clip, clip]; 0 or +∞ means not at all); clock u32 [4] (clock[0] the timestep, so that each step has noise of
/// its own; clock[1] the index of the first image); seed u32 [2] (low word, high word).
/// Output, changed in place: x [N, …].
///
/// The noise of an image is a function of seed, image index and timestep. None is drawn where sigma is 0.
#[derive(Clone, Debug)]
pub struct PSample {
    /// Shape of x: images first.
    pub shape: Shape,
}

/// What a reverse step reads.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs {
    /// The network's output, of x's shape.
    pub out: Var,
    /// f32 [9].
    pub row: Var,
    /// u32 [4].
    pub clock: Var,
    /// u32 [2].
    pub seed: Var,
}

/// The row of a step of [`SamplerTable`](crate::diffusion::SamplerTable): its coefficients and the table's `clip`, +∞ where that is off.
pub fn row(step: &SamplerStep, clip: f64) -> [f32; 9] {
    let mut row = [clip as f32; 9];
    row[..8].copy_from_slice(&step.row());
    row
}

/// Puts the step from x_t to x_{t−1} on the tape, in place.
pub fn p_sample(tape: &mut Tape, x: Var, inputs: StepInputs) {
    let shape = tape.shape(x).clone();
    let StepInputs { out, row, clock, seed } = inputs;
    tape.push_into(Arc::new(PSample { shape }), &[out, row, clock, seed], &[x], 1);
}

impl Op for PSample {
    fn name(&self) -> &'static str {
        "p_sample"
    }

    fn signature(&self) -> Signature {
        let x = Spec::f32(self.shape.clone());
        Signature { inputs: vec![x.clone(), Spec::f32([9]), Spec::u32([4]), Spec::u32([2])], outputs: vec![x] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: cpu::BLOCK }
    }

    fn flops(&self) -> u64 {
        14 * self.shape.len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::p_sample(&self.shape, launch);
    }
}
