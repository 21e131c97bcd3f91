//! Convolutions of cuDNN, whose bias gradients are those of [`linear`](crate::ops::linear::cuda), and `kernels/layout.cu`.

use super::{Conv2d, KERNEL, Stride};
use crate::device::cuda::{Argument, Convolution, ConvolutionShape, Form, Launch, Pass, Precision, Step, Work};
use crate::ops::copy::{self, Copy};
use crate::ops::linear::cuda::{bias, bias_gradient_work};

/// Threads of a block.
const THREADS: usize = 256;
/// Sides of the square that a block transposes.
const TILE: usize = 32;

/// `[images, a, b]` to `[images, b, a]`, f32: weights from OIHW to OHWI with a = I and b = H·W, and back with a = H·W and b = I.
pub fn transposed([images, a, b]: [usize; 3]) -> Launch {
    let arguments = vec![Argument::Input(0), Argument::Output(0), Argument::u32(a), Argument::u32(b)];
    let grid = [b.div_ceil(TILE), a.div_ceil(TILE), images];
    Launch { kernel: "transposed".into(), grid, block: [THREADS, 1, 1], shared: 0, arguments }
}

/// The compute copy `[with_rows, with_columns]` of f32 `[rows, columns]`, with zeros where that has nothing.
///
/// # Panics
/// If it were smaller.
pub fn padded([rows, columns]: [usize; 2], [with_rows, with_columns]: [usize; 2], precision: Precision) -> Launch {
    assert!(rows <= with_rows && columns <= with_columns, "{rows} × {columns} in {with_rows} × {with_columns}");
    let sizes = [rows, columns, with_rows, with_columns].map(Argument::u32);
    let arguments = [Argument::Input(0), Argument::Output(0)].into_iter().chain(sizes).collect();
    Launch::new("padded", precision, [(with_rows * with_columns).div_ceil(THREADS), 1, 1], THREADS, arguments)
}

/// f32 `[rows, columns]` = or += what the compute copy with `with_columns` has there: gradients on their way back.
///
/// # Panics
/// If that had fewer columns.
pub fn unpadded([rows, columns]: [usize; 2], with_columns: usize, precision: Precision, adds: bool) -> Launch {
    assert!(columns <= with_columns, "{columns} columns of {with_columns}");
    let sizes = [rows, columns, with_columns].map(Argument::u32).into_iter().chain([Argument::flag(adds)]);
    let arguments = [Argument::Input(0), Argument::Output(0)].into_iter().chain(sizes).collect();
    Launch::new("unpadded", precision, [(rows * columns).div_ceil(THREADS), 1, 1], THREADS, arguments)
}

fn shape(op: &Conv2d, pass: Pass, form: &Form) -> ConvolutionShape {
    ConvolutionShape {
        pass,
        images: op.images,
        size: [op.height, op.width],
        channels: op.channels,
        out: op.out,
        filter: KERNEL,
        stride: op.step(),
        padding: match op.stride {
            Stride::One => [1, 1],
            Stride::Two => [0, 1],
        },
        precision: form.precision,
        has_bias: pass == Pass::Forward,
        has_residual: pass == Pass::Forward && op.residual,
        adds: pass != Pass::Forward && form.updates(0),
    }
}

/// y as a matrix of pixels and channels.
fn rows(op: &Conv2d) -> [usize; 2] {
    let (height, width) = op.out_size();
    [op.images * height * width, op.out]
}

/// A kernel whose input is the library's workspace.
fn from_workspace(launch: Launch) -> Launch {
    launch.with(|operand| if operand == Argument::Input(0) { Argument::Scratch } else { operand })
}

/// y, with bias and residual.
pub(super) fn forward(op: &Conv2d, form: &Form) -> Work {
    let convolution = Convolution {
        shape: shape(op, Pass::Forward, form),
        x: Argument::Input(0),
        weight: Argument::Input(1),
        y: Argument::Output(0),
        bias: Argument::Input(2),
        residual: if op.residual { Argument::Input(3) } else { Argument::Null },
        bias_kernel: Some(bias(rows(op), form.precision, op.residual).with(|operand| match operand {
            Argument::Input(place) => Argument::Input(2 + place),
            other => other,
        })),
        add_kernel: None,
        cast_kernel: None,
    };
    Work { steps: vec![Step::Convolution(Box::new(convolution))], ..Work::default() }
}

/// dx.
pub(super) fn input_gradient(op: &Conv2d, form: &Form) -> Work {
    let convolution = Convolution {
        shape: shape(op, Pass::InputGradient, form),
        x: Argument::Output(0),
        weight: Argument::Input(1),
        y: Argument::Input(0),
        bias: Argument::Null,
        residual: Argument::Null,
        bias_kernel: None,
        add_kernel: Some(from_workspace(copy::cuda::launch(&Copy { shape: op.x_shape() }, form.precision, true))),
        cast_kernel: None,
    };
    Work { steps: vec![Step::Convolution(Box::new(convolution))], ..Work::default() }
}

/// dW and db.
pub(super) fn weight_gradient(op: &Conv2d, form: &Form) -> Work {
    let from_bf16 = match form.updates(0) {
        true => unpadded([1, op.weight().len()], op.weight().len(), Precision::Bf16, true),
        false => Launch::cast(op.weight().len(), Precision::F32),
    };
    let convolution = Convolution {
        shape: shape(op, Pass::WeightGradient, form),
        x: Argument::Input(1),
        weight: Argument::Output(0),
        y: Argument::Input(0),
        bias: Argument::Null,
        residual: Argument::Null,
        bias_kernel: None,
        add_kernel: Some(from_workspace(copy::cuda::launch(&Copy { shape: op.weight() }, Precision::F32, true))),
        cast_kernel: Some(from_workspace(from_bf16)),
    };
    let mut work = bias_gradient_work(rows(op), form);
    work.steps.push(Step::Convolution(Box::new(convolution)));
    work
}
