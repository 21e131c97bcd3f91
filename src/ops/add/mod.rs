//! y = a + b: the residual connection. Most are taken over by the convolution or linear layer before them
//! ([`Tape::fuse_residuals`](crate::tape::Tape::fuse_residuals)).

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use super::copy::{Copy, pass_gradient};
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Shape, Signature, Spec, Tape, Var};

/// y = a + b; any shape.
#[derive(Clone, Debug)]
pub struct Add {
    /// Shape of all three.
    pub shape: Shape,
}

/// Puts a + b on the tape.
pub fn add(tape: &mut Tape, a: Var, b: Var) -> Var {
    let shape = tape.shape(a).clone();
    tape.push1(Add { shape }, &[a, b])
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn signature(&self) -> Signature {
        let spec = Spec::computed(self.shape.clone());
        Signature { inputs: vec![spec.clone(), spec.clone()], outputs: vec![spec] }
    }

    fn flops(&self) -> u64 {
        self.shape.len() as u64
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        if gradient.wants(0) {
            let dy = gradient.of_output(0);
            gradient.emit(Copy { shape: self.shape.clone() }, &[dy], &[Of::Input(0)]);
        }
        pass_gradient(gradient, 1, &self.shape);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::add(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision)])
    }
}
