//! y = x, or y += x where y has a value already: gradients that a residual connection passes on.

mod cpu;
pub mod cuda;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Shape, Signature, Spec};

/// y = x (y += x as an update); any shape.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Shape of both.
    pub shape: Shape,
}

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn signature(&self) -> Signature {
        Signature {
            inputs: vec![Spec::computed(self.shape.clone())],
            outputs: vec![Spec::computed(self.shape.clone())],
        }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        pass_gradient(gradient, 0, &self.shape);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::copy(launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision, form.updates(0))])
    }
}

/// Gradient of an input that is added to output 0 as it is. To be the last thing a gradient rule does.
pub fn pass_gradient(gradient: &mut Gradient<'_>, input: usize, shape: &Shape) {
    if gradient.wants(input) && !gradient.pass_through(input) {
        let dy = gradient.of_output(0);
        gradient.emit(Copy { shape: shape.clone() }, &[dy], &[Of::Input(input)]);
    }
}
