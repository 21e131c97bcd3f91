//! The compute copies of the first and the last convolution's weights, with zeros where the images' channels are filled up
//! ([`Tape::padded`]): their parameters have none.

mod cpu;
mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Shape, Signature, Spec, Tape, Var};

/// y = x with zeros after its last channels, or after its last rows. Input: x, f32 `[R, …, C]`. Output: `[R', …, C']`.
#[derive(Clone, Debug)]
pub struct Pad {
    from: Shape,
    to: Shape,
}

/// dx (+)= dy without what is beyond x. Input: dy, f32. Output: dx, f32.
#[derive(Clone, Debug)]
pub struct PadGradient {
    of: Pad,
}

/// Puts `x` with `first` entries in its first dimension and `last` in its last on the tape.
///
/// # Panics
/// If it had fewer, or dimensions between them made it impossible: only one of the two may grow.
pub fn pad(tape: &mut Tape, x: Var, [first, last]: [usize; 2]) -> Var {
    let from = tape.shape(x).clone();
    let mut dims = from.dims().to_vec();
    let end = dims.len() - 1;
    (dims[0], dims[end]) = if end == 0 { (last, last) } else { (first, last) };
    let to = Shape::from(&dims[..]);
    if to == from {
        return x;
    }
    let grows = |i: usize| to.dims()[i] > from.dims()[i];
    assert!(end == 0 || !(grows(0) && grows(end)), "pad: {from} to {to}");
    tape.push1(Pad { from, to }, &[x])
}

impl Pad {
    /// Rows and columns of x and of y, where what is between the dimension that grows and the end is one row.
    fn matrices(&self) -> [[usize; 2]; 2] {
        let (from, to) = (self.from.dims(), self.to.dims());
        let is_by_rows = from.len() > 1 && from[0] < to[0];
        [&self.from, &self.to].map(|shape| match is_by_rows {
            true => [shape.dims()[0], shape.len() / shape.dims()[0]],
            false => {
                let (rows, columns) = shape.rows_and_columns();
                [rows, columns]
            }
        })
    }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::f32(self.from.clone())], outputs: vec![Spec::computed(self.to.clone())] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let dy = gradient.of_output(0);
        gradient.emit(PadGradient { of: self.clone() }, &[dy], &[Of::Input(0)]);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::pad(self.matrices(), launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::pad(self, form)
    }
}

impl Op for PadGradient {
    fn name(&self) -> &'static str {
        "pad_gradient"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::f32(self.of.to.clone())], outputs: vec![Spec::f32(self.of.from.clone())] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::pad_gradient(self.of.matrices(), launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::pad_gradient(&self.of, form)
    }
}
