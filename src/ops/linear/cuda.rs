//! Products of cuBLASLt; `kernels/bias.cu` and `kernels/bias_gradient.cu`.

use super::Linear;
use crate::device::cuda::{Argument, Form, Launch, MatrixShape, Place, Precision, Product, ProductShape, Step, Work};

/// Threads of a block: 32 along the channels, 8 along the rows.
const THREADS: usize = 256;
/// Rows of a piece, unless there are too many pieces: so many that partial sums are little beside them.
const ROWS: usize = 256;
/// Most pieces: some blocks for each multiprocessor of a large GPU.
const PIECES: usize = 512;

/// Partial sums of each channel, f32, that the workspace holds for `rows` rows.
pub fn pieces(rows: usize) -> usize {
    rows.div_ceil(ROWS).clamp(1, PIECES)
}

/// y `[rows, channels]` += b `[channels]` (+ a residual of y's shape), in place: Input 0 is b, Input 1 the residual, Output 0 is y.
pub fn bias([rows, channels]: [usize; 2], precision: Precision, has_residual: bool) -> Launch {
    let residual = if has_residual { Argument::Input(1) } else { Argument::Null };
    let buffers = [Argument::Input(0), residual, Argument::Output(0)];
    Launch::elementwise("bias", precision, rows * channels, &buffers, &[Argument::u32(channels)])
}

/// db (+)= the sum over the rows of dy `[rows, channels]`: partial sums, then their total.
pub fn bias_gradient([rows, channels]: [usize; 2], precision: Precision, adds: bool) -> [Launch; 2] {
    let pack = 16 / precision.bytes();
    let wide = 32 * if channels.is_multiple_of(pack) { pack } else { 1 };
    let pieces = pieces(rows);
    let first = vec![Argument::Input(0), Argument::Scratch, Argument::u32(rows), Argument::u32(channels)];
    let sizes = [Argument::u32(pieces), Argument::u32(channels), Argument::flag(adds)];
    let arguments = [Argument::Scratch, Argument::Output(0)].into_iter().chain(sizes).collect();
    let total = Launch {
        kernel: "bias_gradient_total".into(),
        grid: [channels.div_ceil(THREADS / 32), 1, 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments,
    };
    let grid = [pieces, channels.div_ceil(wide), 1];
    [Launch::new("bias_gradient", precision, grid, THREADS, first), total]
}

/// A tensor's matrix `[rows, columns]`.
fn matrix(stride: usize, precision: Precision) -> MatrixShape {
    MatrixShape { is_transposed: false, stride, precision }
}

fn place(operand: Argument, offset: usize) -> Place {
    Place { operand, offset }
}

/// y = x·Wᵀ + b (+ residual): a product for each source, of which the last adds the bias, and each the sum so far.
pub(super) fn forward(op: &Linear, form: &Form) -> Work {
    let (sources, precision) = (op.sources.len(), form.precision);
    let mut first = 0;
    let step = |(source, &depth): (usize, &usize)| {
        let is_last = source + 1 == sources;
        let addend = match source {
            0 if op.residual => Argument::Input(sources + 2),
            0 => Argument::Null,
            _ => Argument::Output(0),
        };
        let shape = ProductShape {
            rows: op.rows(),
            columns: op.out,
            depth,
            a: matrix(depth, precision),
            b: MatrixShape { is_transposed: true, ..matrix(op.depth(), precision) },
            c: matrix(op.out, precision),
            has_bias: is_last,
            has_addend: addend != Argument::Null,
        };
        let offset = first;
        first += depth;
        Step::Product(Product {
            shape,
            a: place(Argument::Input(source), 0),
            b: place(Argument::Input(sources), offset),
            c: place(Argument::Output(0), 0),
            bias: if is_last { Argument::Input(sources + 1) } else { Argument::Null },
            addend,
        })
    };
    Work { steps: op.sources.iter().enumerate().map(step).collect(), ..Work::default() }
}

/// dx (+)= dy·W, of W the columns of the source.
pub(super) fn input_gradient(op: &Linear, source: usize, form: &Form) -> Work {
    let (depth, precision) = (op.sources[source], form.precision);
    let shape = ProductShape {
        rows: op.rows(),
        columns: depth,
        depth: op.out,
        a: matrix(op.out, precision),
        b: matrix(op.depth(), precision),
        c: matrix(depth, precision),
        has_bias: false,
        has_addend: form.updates(0),
    };
    let product = Product {
        shape,
        a: place(Argument::Input(0), 0),
        b: place(Argument::Input(1), op.sources[..source].iter().sum()),
        c: place(Argument::Output(0), 0),
        bias: Argument::Null,
        addend: if form.updates(0) { Argument::Output(0) } else { Argument::Null },
    };
    Work { steps: vec![Step::Product(product)], ..Work::default() }
}

/// dW (+)= dyᵀ·x, for each source its columns, f32; db (+)= the sum of dy's rows.
pub(super) fn weight_gradient(op: &Linear, form: &Form) -> Work {
    let precision = form.precision;
    let mut first = 0;
    let product = |(source, &columns): (usize, &usize)| {
        let shape = ProductShape {
            rows: op.out,
            columns,
            depth: op.rows(),
            a: MatrixShape { is_transposed: true, ..matrix(op.out, precision) },
            b: matrix(columns, precision),
            c: matrix(op.depth(), Precision::F32),
            has_bias: false,
            has_addend: form.updates(0),
        };
        let offset = first;
        first += columns;
        Step::Product(Product {
            shape,
            a: place(Argument::Input(0), 0),
            b: place(Argument::Input(1 + source), 0),
            c: place(Argument::Output(0), offset),
            bias: Argument::Null,
            addend: if form.updates(0) { Argument::Output(0) } else { Argument::Null },
        })
    };
    let mut work = bias_gradient_work([op.rows(), op.out], form);
    work.steps.extend(op.sources.iter().enumerate().map(product));
    work
}

/// db (+)= the sum of dy's rows, where dy is input 0 and db output 1.
pub(in crate::ops) fn bias_gradient_work(shape: [usize; 2], form: &Form) -> Work {
    let second = |argument| if argument == Argument::Output(0) { Argument::Output(1) } else { argument };
    let launches = bias_gradient(shape, form.precision, form.updates(1)).map(|launch| launch.with(second));
    Work::kernels(launches).with_scratch(size_of::<f32>() * pieces(shape[0]) * shape[1])
}
