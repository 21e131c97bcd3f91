//! SiLU(x) = x·σ(x), for the timestep embedding; elsewhere GroupNorm folds it in.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Shape, Signature, Spec, Tape, Var};

/// y = x·σ(x); any shape.
#[derive(Clone, Debug)]
pub struct Silu {
    /// Shape of both.
    pub shape: Shape,
}

/// dx (+)= dy·SiLU′(x).
#[derive(Clone, Debug)]
pub struct SiluGradient {
    /// Shape of all three.
    pub shape: Shape,
}

/// Puts SiLU(x) on the tape.
pub fn silu(tape: &mut Tape, x: Var) -> Var {
    let shape = tape.shape(x).clone();
    tape.push1(Silu { shape }, &[x])
}

impl Op for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn signature(&self) -> Signature {
        Signature {
            inputs: vec![Spec::computed(self.shape.clone())],
            outputs: vec![Spec::computed(self.shape.clone())],
        }
    }

    fn flops(&self) -> u64 {
        4 * self.shape.len() as u64
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let (x, dy) = (gradient.input(0), gradient.of_output(0));
        gradient.emit(SiluGradient { shape: self.shape.clone() }, &[x, dy], &[Of::Input(0)]);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::silu(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision)])
    }
}

impl Op for SiluGradient {
    fn name(&self) -> &'static str {
        "silu_gradient"
    }

    fn signature(&self) -> Signature {
        let spec = Spec::computed(self.shape.clone());
        Signature { inputs: vec![spec.clone(), spec.clone()], outputs: vec![spec] }
    }

    fn flops(&self) -> u64 {
        7 * self.shape.len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::silu_gradient(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch_gradient(self, form.precision, form.updates(0))])
    }
}
