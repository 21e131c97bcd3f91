use super::{Conv2d, KERNEL, Stride, TAPS};
use crate::device::cpu::Launch;
use crate::device::cpu::gemm::window::Window;
use crate::device::cpu::gemm::winograd::{self, Convolution, Filter};
use crate::device::cpu::gemm::{self, Init, OutRows, Rows, Segment};
use crate::ops::linear::cpu::weight_gradients;
use std::ops::Range;

fn window(op: &Conv2d) -> Window {
    match op.stride {
        Stride::One => Window::same(op.images, op.height, op.width, KERNEL),
        Stride::Two => Window::halving(op.images, op.height, op.width),
    }
}

/// The convolution in Winograd's form, where that is the faster one.
fn fewer_products(op: &Conv2d) -> Option<Convolution> {
    let Conv2d { images, height, width, channels, out, .. } = *op;
    let convolution = Convolution { images, height, width, channels, out };
    (op.stride == Stride::One && convolution.pays()).then_some(convolution)
}

/// Floats of workspace of [`forward`].
pub(super) fn forward_scratch(op: &Conv2d) -> usize {
    match fewer_products(op) {
        Some(convolution) => winograd::filters_len(&convolution),
        None => gemm::packed_len(op.out, TAPS * op.channels),
    }
}

/// Floats of workspace of [`input_gradient`].
pub(super) fn input_gradient_scratch(op: &Conv2d) -> usize {
    match fewer_products(op) {
        Some(convolution) => winograd::filters_len(&convolution.backward()),
        None => gemm::packed_len(op.channels, TAPS * op.out),
    }
}

pub(super) fn forward(op: &Conv2d, launch: &Launch<'_>) {
    let pool = launch.pool();
    let (x, weight, bias) = (launch.input::<f32>(0), launch.input::<f32>(1), launch.input::<f32>(2));
    let residual = op.residual.then(|| launch.input::<f32>(3));
    let (packed, y) = (launch.scratch(), launch.output::<f32>(0));
    let init = Init { bias: Some(bias), accumulate: false, residual };
    if let Some(convolution) = fewer_products(op) {
        winograd::transform_filters(pool, &convolution, Filter::Upright, weight, packed);
        return winograd::convolve(pool, &convolution, x, packed, y, init);
    }
    let depth = TAPS * op.channels;
    gemm::pack_transposed(pool, weight, op.out, depth, packed);
    let window = window(op);
    let offsets = |tap: usize, rows: Range<usize>, out: &mut [usize]| {
        window.input_offsets(tap / KERNEL, tap % KERNEL, rows, op.channels, out);
    };
    gemm::rows_times_packed(
        pool,
        &Rows { segments: &[Segment { data: x, k: op.channels }; TAPS], offsets: &offsets },
        window.outputs(),
        op.out,
        packed,
        y,
        OutRows::Linear { start: 0, ld: op.out },
        init,
    );
}

pub(super) fn input_gradient(op: &Conv2d, launch: &Launch<'_>) {
    let pool = launch.pool();
    let (dy, weight) = (launch.input::<f32>(0), launch.input::<f32>(1));
    let (packed, dx) = (launch.scratch(), launch.output::<f32>(0));
    let init = Init { accumulate: launch.updates(0), ..Init::ZERO };
    if let Some(convolution) = fewer_products(op) {
        let backward = convolution.backward();
        winograd::transform_filters(pool, &backward, Filter::Turned, weight, packed);
        return winograd::convolve(pool, &backward, dy, packed, dx, init);
    }
    // Row (tap, o) of the right operand is W[o, tap, 0..C].
    let row = |i: usize| ((i % op.out) * TAPS + i / op.out) * op.channels;
    gemm::pack_rows(pool, op.channels, TAPS * op.out, row, weight, packed);
    let window = window(op);
    let offsets = |tap: usize, rows: Range<usize>, out: &mut [usize]| {
        window.output_offsets(tap / KERNEL, tap % KERNEL, rows, op.out, out);
    };
    gemm::rows_times_packed(
        pool,
        &Rows { segments: &[Segment { data: dy, k: op.out }; TAPS], offsets: &offsets },
        window.inputs(),
        op.channels,
        packed,
        dx,
        OutRows::Grid { grid: window.input_grid(), start: 0, ld: op.channels },
        init,
    );
}

pub(super) fn weight_gradient(op: &Conv2d, launch: &Launch<'_>) {
    let (dy, x) = (launch.input::<f32>(0), launch.input::<f32>(1));
    let (dw, db, adds) = weight_gradients(launch);
    if let Some(convolution) = fewer_products(op) {
        return winograd::weight_gradient(launch.pool(), &convolution, dy, x, dw, db, adds);
    }
    let window = window(op);
    let offsets = |tap: usize, rows: Range<usize>, out: &mut [usize]| {
        window.input_offsets(tap / KERNEL, tap % KERNEL, rows, op.channels, out);
    };
    gemm::transposed_times_rows(
        launch.pool(),
        dy,
        op.out,
        op.out,
        &Rows { segments: &[Segment { data: x, k: op.channels }; TAPS], offsets: &offsets },
        window.outputs(),
        dw,
        adds,
        Some(db),
    );
}
