//! `kernels/layout.cu`; convolutions are cuDNN's, and their bias gradients those of [`linear`](crate::ops::linear::cuda).

use crate::device::cuda::{Argument, Launch, Precision};

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
