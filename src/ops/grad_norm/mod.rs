//! The L2 norm of all gradients, for clipping, and whether all of them are finite, for the optimiser to go by.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::Region;
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Op, Scratch, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Input: all gradients. Output: norm [2] = the L2 norm, and 1 if every gradient is finite, else 0.
///
/// Squares are summed in f64, where those of f32 neither overflow nor underflow: any finite gradients have a finite norm (at most the
/// largest f32). The order of the sum depends on the number of gradients alone.
#[derive(Clone, Debug)]
pub struct GradNorm {
    /// Number of parameters, gaps not counted.
    pub parameters: usize,
}

/// Puts the norm of all gradients on the tape; `norm` is an f32 [2] that the host reads.
pub fn grad_norm(tape: &mut Tape, norm: Var) {
    let parameters = tape.params().iter().map(|p| p.shape.len()).sum();
    let gradients = tape.flat(Region::Gradients);
    tape.push_into(Arc::new(GradNorm { parameters }), &[gradients], &[norm], 0);
}

impl Op for GradNorm {
    fn name(&self) -> &'static str {
        "grad_norm"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::flat()], outputs: vec![Spec::f32([2])] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 2 * cpu::CHUNKS, thread: 0 }
    }

    fn flops(&self) -> u64 {
        2 * self.parameters as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::grad_norm(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels(cuda::launches(form.flat)).with_scratch(size_of::<f64>() * cuda::partials(form.flat))
    }
}
