//! Nearest-neighbour upsampling by 2: [N, H, W, C] → [N, 2H, 2W, C].

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Shape, Signature, Spec, Tape, Var};

/// y[n, h, w, c] = x[n, ⌊h/2⌋, ⌊w/2⌋, c].
#[derive(Clone, Debug)]
pub struct Upsample {
    /// [N, H, W, C] of x.
    pub shape: Shape,
}

/// dx (+)= the sum of the four dy that came from an element.
#[derive(Clone, Debug)]
pub struct UpsampleGradient {
    /// [N, H, W, C] of dx.
    pub shape: Shape,
}

/// Puts x at twice its height and width on the tape.
pub fn upsample(tape: &mut Tape, x: Var) -> Var {
    let shape = tape.shape(x).clone();
    tape.push1(Upsample { shape }, &[x])
}

fn doubled(shape: &Shape) -> Shape {
    let [n, h, w, c] = shape.nhwc();
    Shape::from([n, 2 * h, 2 * w, c])
}

impl Op for Upsample {
    fn name(&self) -> &'static str {
        "upsample"
    }

    fn signature(&self) -> Signature {
        Signature {
            inputs: vec![Spec::computed(self.shape.clone())],
            outputs: vec![Spec::computed(doubled(&self.shape))],
        }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let dy = gradient.of_output(0);
        gradient.emit(UpsampleGradient { shape: self.shape.clone() }, &[dy], &[Of::Input(0)]);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::upsample(&self.shape, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision)])
    }
}

impl Op for UpsampleGradient {
    fn name(&self) -> &'static str {
        "upsample_gradient"
    }

    fn signature(&self) -> Signature {
        Signature {
            inputs: vec![Spec::computed(doubled(&self.shape))],
            outputs: vec![Spec::computed(self.shape.clone())],
        }
    }

    fn flops(&self) -> u64 {
        3 * self.shape.len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::upsample_gradient(&self.shape, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch_gradient(self, form.precision, form.updates(0))])
    }
}
