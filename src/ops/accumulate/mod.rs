//! The sum of gradients over a rank's shards, along a binary tree over their numbers.
//!
//! A rank computes shards 0, 1, …, 2^L − 1 one after another. Where the number of a shard ends in t ones (in binary), the shard completes
//! the subtrees of 2, 4, …, 2^t shards that end with it, whose left halves are sums p_0, …, p_{t−1} of 1, 2, …, 2^{t−1} shards. With its
//! own gradient g, the sum is p_{t−1} + (… + (p_1 + (p_0 + g))): the next p_t, or the sum over all shards where t = L. So L sums are kept
//! beside the gradient that is being computed.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::Region;
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Op, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Inputs: p_0, p_1, …, flat f32 of one length. Output, changed in place: g ← … + (p_1 + (p_0 + g)).
#[derive(Clone, Debug)]
pub struct Accumulate {
    /// Number of sums that are added.
    pub sums: usize,
    /// Length of each.
    pub elements: usize,
}

/// Adds p_0, …, p_{t−1} to the gradients that the tape has computed. Flat buffer 1 + l of the gradients holds p_l; the tape must write its
/// own to buffer 1 + t, where the sum is p_t.
pub fn accumulate(tape: &mut Tape, t: usize) {
    let elements = tape.params().iter().map(|p| p.shape.len()).sum();
    let sums: Vec<Var> = (1..=t).map(|number| tape.flat_number(Region::Gradients, number)).collect();
    let own = tape.flat_number(Region::Gradients, 1 + t);
    tape.push_into(Arc::new(Accumulate { sums: t, elements }), &sums, &[own], 1);
}

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::flat(); self.sums], outputs: vec![Spec::flat()] }
    }

    fn flops(&self) -> u64 {
        (self.sums * self.elements) as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::accumulate(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels(cuda::launches(self, form.flat))
    }
}
