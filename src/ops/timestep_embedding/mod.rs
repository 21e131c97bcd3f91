//! The timestep as sines and cosines of falling frequencies (Vaswani et al. 2017; Ho et al. 2020, section 4).

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Op, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Input: t u32 [N]. Output: [N, dim], row n = sin(t_n·f_i) for all i, then cos(t_n·f_i), with
/// f_i = exp(−ln(10000)·i/(half − freq_shift)), half = ⌊dim/2⌋. An odd dim ends in a column of zeros.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    images: usize,
    dim: usize,
    cosines_first: bool,
    /// f_i, built and multiplied in f64: at t = 999 an f32 angle would be off by 3e-5.
    frequencies: Arc<[f64]>,
}

impl TimestepEmbedding {
    /// `freq_shift` is 1 in the paper's code; `flip_sin_to_cos` puts the cosines first (the names are diffusers').
    pub fn new(images: usize, dim: usize, freq_shift: f64, flip_sin_to_cos: bool) -> TimestepEmbedding {
        let half = dim / 2;
        // f_0 is 1 even where half = freq_shift makes the formula 0/0.
        let frequency = |i| if i == 0 { 1.0 } else { (-10000f64.ln() * i as f64 / (half as f64 - freq_shift)).exp() };
        TimestepEmbedding {
            images,
            dim,
            cosines_first: flip_sin_to_cos,
            frequencies: (0..half).map(frequency).collect(),
        }
    }

    /// f_i.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }
}

/// Puts the embedding [N, dim] of `t` u32 [N] on the tape.
pub fn timestep_embedding(tape: &mut Tape, t: Var, dim: usize, freq_shift: f64, flip_sin_to_cos: bool) -> Var {
    let images = tape.shape(t).len();
    tape.push1(TimestepEmbedding::new(images, dim, freq_shift, flip_sin_to_cos), &[t])
}

impl Op for TimestepEmbedding {
    fn name(&self) -> &'static str {
        "timestep_embedding"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::u32([self.images])], outputs: vec![Spec::computed([self.images, self.dim])] }
    }

    fn flops(&self) -> u64 {
        2 * (self.images * self.dim) as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::timestep_embedding(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        let frequencies = self.frequencies.iter().flat_map(|frequency| frequency.to_ne_bytes()).collect();
        Work { constants: vec![frequencies], ..Work::kernels([cuda::launch(self, form.precision)]) }
    }
}
