use super::Linear;
use crate::device::cpu::Launch;
use crate::device::cpu::gemm::{self, Init, OutRows, Rows, Segment};
use std::ops::Range;

/// The sources as parts of the rows of one matrix: row r of a source starts at r times its channels.
fn with_rows<R>(op: &Linear, launch: &Launch<'_>, first: usize, body: impl FnOnce(&Rows<'_>) -> R) -> R {
    let segment = |s: usize| Segment { data: launch.input::<f32>(first + s), k: op.sources[s] };
    let offsets = |s: usize, rows: Range<usize>, out: &mut [usize]| {
        for (offset, row) in out.iter_mut().zip(rows) {
            *offset = row * op.sources[s];
        }
    };
    match op.sources.len() {
        1 => body(&Rows { segments: &[segment(0)], offsets: &offsets }),
        _ => body(&Rows { segments: &[segment(0), segment(1)], offsets: &offsets }),
    }
}

pub(super) fn forward(op: &Linear, launch: &Launch<'_>) {
    let pool = launch.pool();
    let sources = op.sources.len();
    let (weight, bias) = (launch.input::<f32>(sources), launch.input::<f32>(sources + 1));
    let residual = op.residual.then(|| launch.input::<f32>(sources + 2));
    let packed = launch.scratch();
    gemm::pack_transposed(pool, weight, op.out, op.depth(), packed);
    let y = launch.output::<f32>(0);
    with_rows(op, launch, 0, |rows| {
        let to = OutRows::Linear { start: 0, ld: op.out };
        let init = Init { bias: Some(bias), accumulate: false, residual };
        gemm::rows_times_packed(pool, rows, op.rows(), op.out, packed, y, to, init);
    });
}

pub(super) fn input_gradient(op: &Linear, source: usize, launch: &Launch<'_>) {
    let pool = launch.pool();
    let (dy, weight) = (launch.input::<f32>(0), launch.input::<f32>(1));
    let (depth, channels) = (op.depth(), op.sources[source]);
    let first: usize = op.sources[..source].iter().sum();
    let packed = launch.scratch();
    gemm::pack_rows(pool, channels, op.out, |n| n * depth + first, weight, packed);
    let offsets = |_: usize, rows: Range<usize>, out: &mut [usize]| {
        for (offset, row) in out.iter_mut().zip(rows) {
            *offset = row * op.out;
        }
    };
    gemm::rows_times_packed(
        pool,
        &Rows { segments: &[Segment { data: dy, k: op.out }], offsets: &offsets },
        op.rows(),
        channels,
        packed,
        launch.output::<f32>(0),
        OutRows::Linear { start: 0, ld: channels },
        Init { accumulate: launch.updates(0), ..Init::ZERO },
    );
}

pub(super) fn weight_gradient(op: &Linear, launch: &Launch<'_>) {
    let dy = launch.input::<f32>(0);
    let (dw, db, adds) = weight_gradients(launch);
    with_rows(op, launch, 1, |rows| {
        gemm::transposed_times_rows(launch.pool(), dy, op.out, op.out, rows, op.rows(), dw, adds, Some(db));
    });
}

/// Where the gradients of weights and bias go, and whether they are added to what is there: a product has both or neither added, so where
/// it is one of them (layers that share a bias and no weights) the other begins as zeros.
pub(in crate::ops) fn weight_gradients<'a>(launch: &Launch<'a>) -> (&'a mut [f32], &'a mut [f32], bool) {
    let (dw, db) = (launch.output::<f32>(0), launch.output::<f32>(1));
    match (launch.updates(0), launch.updates(1)) {
        (true, false) => db.fill(0.0),
        (false, true) => dw.fill(0.0),
        (true, true) | (false, false) => {}
    }
    (dw, db, launch.updates(0) || launch.updates(1))
}
