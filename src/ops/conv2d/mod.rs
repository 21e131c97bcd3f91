//! 3×3 convolution: stride 1 with one pixel of padding all round, or stride 2 padded at the bottom and on the right only.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use super::copy::pass_gradient;
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Scratch, Shape, Signature, Spec, Tape, Var};

/// Height and width of the filter.
const KERNEL: usize = 3;
/// Number of filter taps.
const TAPS: usize = KERNEL * KERNEL;

/// Which pixels the filter meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stride {
    /// Every pixel; zeros outside the image.
    One,
    /// Every second pixel from the first on, with zeros below and on the right of the image only (as the paper's code pads); even
    /// sizes.
    Two,
}

/// y[n, i, j, o] = b[o] + Σ_{u,v,c} x[n, s·i + u − p, s·j + v − p, c]·W[o, u, v, c] (+ residual), p = 1 for stride 1 and 0 for stride 2.
///
/// Inputs: x `[N, H, W, C]`, W `[O, 3, 3, C]`, b `[O]`, and the residual `[N, H/s, W/s, O]` if there is one.
#[derive(Clone, Debug)]
pub struct Conv2d {
    images: usize,
    height: usize,
    width: usize,
    channels: usize,
    out: usize,
    stride: Stride,
    residual: bool,
}

/// dx (+)= the transposed convolution of dy. Inputs: dy, W.
#[derive(Clone, Debug)]
pub struct Conv2dInputGradient {
    of: Conv2d,
}

/// dW (+)= the correlation of x with dy; db (+)= the sum of dy over images and pixels. Inputs: dy, x. Outputs: dW, db.
#[derive(Clone, Debug)]
pub struct Conv2dWeightGradient {
    of: Conv2d,
}

/// Puts a 3×3 convolution on the tape: x `[N, H, W, C]`, `weight` `[O, 3, 3, C]`, `bias` `[O]`.
///
/// # Panics
/// If the sizes are odd with stride 2 (the UNet's config is checked for that).
pub fn conv2d(tape: &mut Tape, x: Var, weight: Var, bias: Var, stride: Stride) -> Var {
    let [images, height, width, channels] = tape.shape(x).nhwc();
    let out = tape.shape(weight).dims()[0];
    assert!(stride == Stride::One || (height % 2 == 0 && width % 2 == 0), "stride 2 needs even sizes");
    tape.push1(Conv2d { images, height, width, channels, out, stride, residual: false }, &[x, weight, bias])
}

impl Conv2d {
    fn step(&self) -> usize {
        match self.stride {
            Stride::One => 1,
            Stride::Two => 2,
        }
    }

    fn out_size(&self) -> (usize, usize) {
        (self.height / self.step(), self.width / self.step())
    }

    fn x_shape(&self) -> Shape {
        [self.images, self.height, self.width, self.channels].into()
    }

    fn y_shape(&self) -> Shape {
        let (height, width) = self.out_size();
        [self.images, height, width, self.out].into()
    }

    fn weight(&self) -> Shape {
        [self.out, KERNEL, KERNEL, self.channels].into()
    }

    fn multiply_adds(&self) -> u64 {
        let (height, width) = self.out_size();
        2 * (self.images * height * width * self.out * TAPS * self.channels) as u64
    }
}

impl Op for Conv2d {
    fn name(&self) -> &'static str {
        match (self.stride, self.residual) {
            (Stride::One, false) => "conv2d",
            (Stride::One, true) => "conv2d+residual",
            (Stride::Two, false) => "conv2d/2",
            (Stride::Two, true) => "conv2d/2+residual",
        }
    }

    fn signature(&self) -> Signature {
        let y = Spec::computed(self.y_shape());
        let mut inputs = [self.x_shape(), self.weight(), [self.out].into()].map(Spec::computed).to_vec();
        inputs.extend(self.residual.then(|| y.clone()));
        Signature { inputs, outputs: vec![y] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: cpu::forward_scratch(self), thread: 0 }
    }

    fn flops(&self) -> u64 {
        self.multiply_adds()
    }

    fn products(&self) -> u64 {
        self.multiply_adds()
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let (x, weight, dy) = (gradient.input(0), gradient.input(1), gradient.of_output(0));
        let of = Conv2d { residual: false, ..self.clone() };
        if gradient.wants(0) {
            gradient.emit(Conv2dInputGradient { of: of.clone() }, &[dy, weight], &[Of::Input(0)]);
        }
        gradient.emit(Conv2dWeightGradient { of }, &[dy, x], &[Of::Input(1), Of::Input(2)]);
        if self.residual {
            pass_gradient(gradient, 3, &self.y_shape());
        }
    }

    fn with_residual(&self) -> Option<Box<dyn Op>> {
        (!self.residual).then(|| Box::new(Conv2d { residual: true, ..self.clone() }) as Box<dyn Op>)
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::forward(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::forward(self, form)
    }
}

impl Op for Conv2dInputGradient {
    fn name(&self) -> &'static str {
        match self.of.stride {
            Stride::One => "conv2d_input_gradient",
            Stride::Two => "conv2d/2_input_gradient",
        }
    }

    fn signature(&self) -> Signature {
        let inputs = [self.of.y_shape(), self.of.weight()].map(Spec::computed).to_vec();
        Signature { inputs, outputs: vec![Spec::computed(self.of.x_shape())] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: cpu::input_gradient_scratch(&self.of), thread: 0 }
    }

    fn flops(&self) -> u64 {
        self.of.multiply_adds()
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::input_gradient(&self.of, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::input_gradient(&self.of, form)
    }
}

impl Op for Conv2dWeightGradient {
    fn name(&self) -> &'static str {
        match self.of.stride {
            Stride::One => "conv2d_weight_gradient",
            Stride::Two => "conv2d/2_weight_gradient",
        }
    }

    fn signature(&self) -> Signature {
        let inputs = [self.of.y_shape(), self.of.x_shape()].map(Spec::computed).to_vec();
        Signature { inputs, outputs: vec![Spec::f32(self.of.weight()), Spec::f32([self.of.out])] }
    }

    fn flops(&self) -> u64 {
        self.of.multiply_adds() + self.of.y_shape().len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::weight_gradient(&self.of, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::weight_gradient(&self.of, form)
    }
}
