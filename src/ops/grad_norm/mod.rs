//! The L2 norm of all gradients, for clipping, and whether all of them are finite, for the optimiser to go by.
//!
//! Squares are summed in f64, where those of f32 neither overflow nor underflow: any finite gradients have a finite norm (at most the
//! largest f32). They are first summed over [blocks](BLOCK) of the flat buffer, whose sums are then added in the order of the blocks:
//! whoever sums which of the blocks, the bits are the same.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::device::{DType, Region};
use crate::tape::{Op, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Gradients that are summed first.
pub const BLOCK: usize = 4096;

/// Input: all gradients. Output: the sum of the squares of each [`BLOCK`] of them, f64.
#[derive(Clone, Debug)]
pub struct SquareSums {
    /// Number of parameters, gaps not counted.
    pub parameters: usize,
}

/// Input: those sums. Output: norm [2] = the L2 norm, and 1 if every gradient is finite, else 0.
#[derive(Clone, Debug)]
pub struct GradNorm;

/// Puts the norm of all gradients on the tape; `norm` is an f32 [2] that the host reads.
pub fn grad_norm(tape: &mut Tape, norm: Var) {
    let parameters = tape.params().iter().map(|p| p.shape.len()).sum();
    let gradients = tape.flat(Region::Gradients);
    let sums = tape.of_blocks(BLOCK, DType::F64);
    tape.push_into(Arc::new(SquareSums { parameters }), &[gradients], &[sums], 0);
    tape.push_into(Arc::new(GradNorm), &[sums], &[norm], 0);
}

impl Op for SquareSums {
    fn name(&self) -> &'static str {
        "square_sums"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::flat()], outputs: vec![Spec::of_blocks(BLOCK, DType::F64)] }
    }

    fn flops(&self) -> u64 {
        2 * self.parameters as u64
    }

    fn of_parameters(&self, parameters: usize) -> Option<Arc<dyn Op>> {
        Some(Arc::new(SquareSums { parameters }))
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::square_sums(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::square_sums(form.flat)])
    }
}

impl Op for GradNorm {
    fn name(&self) -> &'static str {
        "grad_norm"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::of_blocks(BLOCK, DType::F64)], outputs: vec![Spec::f32([2])] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::grad_norm(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::grad_norm(form.flat)])
    }
}
