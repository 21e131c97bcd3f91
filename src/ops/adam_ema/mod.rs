//! One pass over all parameters: clipping, Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019), and the moving average of the
//! weights. Nothing changes where a gradient is not finite.

mod cpu;
pub mod cuda;
mod hyper;

#[cfg(test)]
mod tests;

pub use hyper::{Hyper, bias_correction};

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::device::{Precision, Region};
use crate::tape::{Op, Signature, Spec, Tape, Var};
use std::sync::Arc;

/// Inputs: all gradients; norm [2] of [`grad_norm`](super::grad_norm::grad_norm); scalars [16] of [`Hyper::to_array`].
/// Outputs, changed in place: weights, first moments m, second moments v, averages, each a flat buffer; and the weights in bf16, where the
/// program computes in that.
///
/// With g the gradient times min(1, max_grad_norm/(norm + 1e-6)), as `clip_grad_norm_` of PyTorch:
/// m ← m + (1−β1)(g − m), v ← v + (1−β2)(g² − v), w ← w − lr/bc1·m/(√v/√bc2 + eps), average ← average + (1−decay)(w − average).
/// Weight decay adds weight_decay·w to g (Adam) or lr·weight_decay·w to what is taken from w (AdamW).
///
/// If norm[1] is 0, nothing is written. Where all five buffers are 0, as in the gaps between parameters, they stay 0.
#[derive(Clone, Debug)]
pub struct AdamEma {
    /// Whether weight decay is AdamW's.
    pub decoupled: bool,
    /// Whether there is a copy in bf16.
    pub has_copy: bool,
    /// Number of parameters, gaps not counted.
    pub parameters: usize,
}

/// Puts the update of all weights, moments and averages on the tape; `norm` [2] comes from `grad_norm`, `scalars` [16] from the host.
pub fn adam_ema(tape: &mut Tape, decoupled: bool, norm: Var, scalars: Var) {
    let parameters = tape.params().iter().map(|p| p.shape.len()).sum();
    let gradients = tape.flat(Region::Gradients);
    let state = [Region::Weights, Region::Moment1, Region::Moment2, Region::Ema];
    let has_copy = tape.precision() == Precision::Bf16;
    let outputs: Vec<Var> =
        state.into_iter().chain(has_copy.then_some(Region::Compute)).map(|region| tape.flat(region)).collect();
    let op = AdamEma { decoupled, has_copy, parameters };
    tape.push_into(Arc::new(op), &[gradients, norm, scalars], &outputs, (1 << outputs.len()) - 1);
}

impl Op for AdamEma {
    fn name(&self) -> &'static str {
        "adam_ema"
    }

    fn signature(&self) -> Signature {
        let mut outputs = vec![Spec::flat(); 4];
        outputs.extend(self.has_copy.then(Spec::flat_bf16));
        Signature { inputs: vec![Spec::flat(), Spec::f32([2]), Spec::f32([Hyper::LEN])], outputs }
    }

    fn flops(&self) -> u64 {
        20 * self.parameters as u64
    }

    fn of_parameters(&self, parameters: usize) -> Option<Arc<dyn Op>> {
        Some(Arc::new(AdamEma { parameters, ..self.clone() }))
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::adam_ema(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(form.flat, self.decoupled, self.has_copy)])
    }
}
