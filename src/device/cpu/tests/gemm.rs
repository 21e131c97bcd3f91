//! Every product on every instruction set of this machine, against the same sum in f64.
//!
//! Tolerance: a sum of K products in f32 in any order differs from the exact one by at most about K·ε·Σ|a·b| (Higham,
//! *Accuracy and Stability of Numerical Algorithms*, §3.1); each element is held to that with its own Σ|a·b|.

use std::ops::Range;

use super::{Numbers, levels, pool};
use crate::device::cpu::Pool;
use crate::device::cpu::gemm::serial::{self, Form};
use crate::device::cpu::gemm::window::{Grid, Window};
use crate::device::cpu::gemm::{self, Init, OutRows, Rows, Segment, ZERO_ROW};

/// A sum in f64 and what it may be off in f32.
#[derive(Clone, Copy, Default)]
struct Exact {
    sum: f64,
    size: f64,
    terms: usize,
}

impl Exact {
    fn add(&mut self, a: f32, b: f32) {
        self.sum += f64::from(a) * f64::from(b);
        self.size += (f64::from(a) * f64::from(b)).abs();
        self.terms += 1;
    }

    fn assert_near(&self, found: f32, what: impl std::fmt::Debug) {
        let bound = (self.terms + 2) as f64 * f64::from(f32::EPSILON) * self.size;
        let off = (f64::from(found) - self.sum).abs();
        assert!(off <= bound, "{what:?}: {found} instead of {}, off by {off:e}, at most {bound:e}", self.sum);
    }
}

/// A left operand with random segments, offsets and padding.
struct Left {
    data: Vec<Vec<f32>>,
    k: Vec<usize>,
    /// `[segment][row]`.
    offsets: Vec<Vec<usize>>,
}

impl Left {
    fn new(numbers: &mut Numbers, rows: usize, k: &[usize]) -> Self {
        let mut left = Left { data: Vec::new(), k: k.to_vec(), offsets: Vec::new() };
        for &k in k {
            let ld = k + numbers.size(0..4);
            left.data.push(numbers.floats(rows * ld + 3));
            // Runs of padding, so that whole tiles of it occur, and rows in any order.
            let mut padding = 0;
            left.offsets.push(
                (0..rows)
                    .map(|_| {
                        if padding == 0 && numbers.size(0..8) == 0 {
                            padding = numbers.size(1..30);
                        }
                        padding = padding.max(1) - 1;
                        if padding > 0 { ZERO_ROW } else { numbers.size(0..rows) * ld + numbers.size(0..4) }
                    })
                    .collect(),
            );
        }
        left
    }

    fn segments(&self) -> Vec<Segment<'_>> {
        self.data.iter().zip(&self.k).map(|(data, &k)| Segment { data, k }).collect()
    }

    fn fill(&self, s: usize, rows: Range<usize>, out: &mut [usize]) {
        out.copy_from_slice(&self.offsets[s][rows]);
    }

    /// Row r as one slice.
    fn row(&self, r: usize) -> Vec<f32> {
        let mut row = Vec::new();
        for (s, &k) in self.k.iter().enumerate() {
            match self.offsets[s][r] {
                ZERO_ROW => row.extend(std::iter::repeat_n(0.0, k)),
                offset => row.extend(&self.data[s][offset..offset + k]),
            }
        }
        row
    }
}

/// Lengths of segments: one, several alike, several different, many short.
fn random_segments(numbers: &mut Numbers) -> Vec<usize> {
    let sizes = [1, 3, 5, 16, 20, 32, 33, 100, 130];
    match numbers.size(0..5) {
        0 => vec![numbers.pick(&[1, 3, 5, 20, 64, 300, 1100])],
        1 => vec![numbers.pick(&sizes); 9],
        2 => vec![numbers.pick(&sizes), numbers.pick(&sizes)],
        3 => vec![numbers.pick(&[1, 2, 3, 5]); 9],
        _ => [vec![numbers.pick(&[0, 7, 40]); 3], vec![numbers.pick(&sizes); 2]].concat(),
    }
}

#[test]
fn rows_times_packed_is_the_product() {
    let mut numbers = Numbers(1);
    let pools = [pool(1), pool(2), pool(3)];
    for case in 0..120 {
        let rows = numbers.pick(&[1, 2, 7, 33, 64, 145, 300]);
        let n = numbers.pick(&[1, 2, 3, 3, 16, 17, 20, 32, 33, 48, 64, 70, 80, 128, 131]);
        let k = random_segments(&mut numbers);
        let left = Left::new(&mut numbers, rows, &k);
        let segments = left.segments();
        let k: usize = k.iter().sum();
        let weights = numbers.floats(n * k);
        let transposed = numbers.size(0..2) == 0;
        let weight = |k_index: usize, column: usize| {
            if transposed { weights[column * k + k_index] } else { weights[(k - 1 - k_index) * n + column] }
        };
        let (bias, accumulate, residual) = (numbers.size(0..2) == 0, numbers.size(0..3) == 0, numbers.size(0..3) == 0);
        // Rows of the result: linear with a gap, or every row of a grid by residue classes.
        let (start, ld) = (numbers.size(0..3), n + numbers.size(0..3));
        let width = numbers.pick(&[1, 2, 3, 5, rows]);
        let grid = Grid { images: 1, height: rows.div_ceil(width), width, stride: numbers.size(1..4) };
        let on_grid = numbers.size(0..2) == 0;
        let out_rows = if on_grid { OutRows::Grid { grid, start, ld } } else { OutRows::Linear { start, ld } };
        let place = |r: usize| start + ld * if on_grid { grid.pixel(r) } else { r };
        let len = start + ld * grid.len().max(rows);
        let bias_values = numbers.floats(n);
        let residual_values = numbers.floats(len);
        let before = if accumulate { numbers.floats(len) } else { vec![f32::NAN; len] };
        let init =
            Init { bias: bias.then_some(&bias_values), accumulate, residual: residual.then_some(&residual_values) };

        for level in levels() {
            let mut first: Option<Vec<f32>> = None;
            for pool in &pools {
                let mut packed = vec![f32::NAN; gemm::packed_len(n, k)];
                if transposed {
                    gemm::pack_transposed_at(level, pool, &weights, n, k, &mut packed);
                } else {
                    gemm::pack_rows_at(level, pool, n, k, |i| (k - 1 - i) * n, &weights, &mut packed);
                }
                let mut out = before.clone();
                let a = Rows { segments: &segments, offsets: &|s, rows, out| left.fill(s, rows, out) };
                gemm::rows_times_packed_at(level, pool, &a, rows, n, &packed, &mut out, out_rows, init);
                if let Some(first) = &first {
                    assert!(first.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "bits differ by threads");
                    continue;
                }
                let mut written = vec![false; len];
                for r in 0..rows {
                    let row = left.row(r);
                    for (column, &bias_value) in bias_values.iter().enumerate() {
                        let at = place(r) + column;
                        let mut exact = Exact::default();
                        if bias {
                            exact.add(bias_value, 1.0);
                        }
                        if accumulate {
                            exact.add(before[at], 1.0);
                        }
                        if residual {
                            exact.add(residual_values[at], 1.0);
                        }
                        for (i, &a) in row.iter().enumerate() {
                            exact.add(a, weight(i, column));
                        }
                        exact.assert_near(out[at], (level, case, rows, n, &left.k, r, column, init.accumulate));
                        written[at] = true;
                    }
                }
                for (at, _) in written.iter().enumerate().filter(|(_, written)| !**written) {
                    assert_eq!(out[at].to_bits(), before[at].to_bits(), "{level:?} {case}: wrote outside its columns");
                }
                first = Some(out);
            }
        }
    }
}

#[test]
fn transposed_times_rows_is_the_sum_of_outer_products() {
    let mut numbers = Numbers(2);
    let pools = [pool(1), pool(2), pool(3)];
    for case in 0..80 {
        // The long ones are cut into parts.
        let rows = if case % 10 == 0 { 3000 } else { numbers.pick(&[0, 1, 2, 7, 33, 64, 145, 300]) };
        let m = numbers.pick(&[1, 3, 5, 16, 20, 33, 64, 131]);
        let k = random_segments(&mut numbers);
        let left = Left::new(&mut numbers, rows, &k);
        let segments = left.segments();
        let k: usize = k.iter().sum();
        let ld = m + numbers.size(0..3);
        let dy = numbers.floats(rows * ld);
        let (accumulate, bias) = (numbers.size(0..2) == 0, numbers.size(0..2) == 0);
        let before = if accumulate { numbers.floats(m * k) } else { vec![f32::NAN; m * k] };
        let bias_before = if accumulate { numbers.floats(m) } else { vec![f32::NAN; m] };

        let mut exact = vec![Exact::default(); m * k];
        let mut exact_bias = vec![Exact::default(); m];
        if accumulate {
            exact.iter_mut().zip(&before).for_each(|(exact, &x)| exact.add(x, 1.0));
            exact_bias.iter_mut().zip(&bias_before).for_each(|(exact, &x)| exact.add(x, 1.0));
        }
        for r in 0..rows {
            let row = left.row(r);
            for i in 0..m {
                let dy = dy[r * ld + i];
                exact_bias[i].add(dy, 1.0);
                exact[i * k..][..k].iter_mut().zip(&row).for_each(|(exact, &x)| exact.add(dy, x));
            }
        }
        for level in levels() {
            let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
            for pool in &pools {
                let (mut dw, mut db) = (before.clone(), bias_before.clone());
                let a = Rows { segments: &segments, offsets: &|s, rows, out| left.fill(s, rows, out) };
                let db_out = bias.then_some(&mut db[..]);
                gemm::transposed_times_rows_at(level, pool, &dy, ld, m, &a, rows, &mut dw, accumulate, db_out);
                if let Some((first, first_bias)) = &first {
                    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same(first, &dw) && same(first_bias, &db), "bits differ by threads");
                    continue;
                }
                for (at, exact) in exact.iter().enumerate() {
                    exact.assert_near(dw[at], (level, case, rows, m, &left.k, at / k, at % k));
                }
                if bias {
                    for (i, exact) in exact_bias.iter().enumerate() {
                        exact.assert_near(db[i], (level, case, "bias", i));
                    }
                }
                first = Some((dw, db));
            }
        }
    }
}

#[test]
fn serial_products_are_the_products() {
    let mut numbers = Numbers(3);
    for case in 0..150 {
        let m = numbers.pick(&[1, 2, 7, 33, 64, 145, 600]);
        let n = numbers.pick(&[1, 3, 16, 17, 33, 64, 70, 131]);
        let k = numbers.pick(&[0, 1, 3, 5, 20, 64, 129, 530]);
        let form = [Form::Nn, Form::Nt, Form::Tn][numbers.size(0..3)];
        let alpha = [1.0, 0.125, -0.7][numbers.size(0..3)];
        let beta = [0.0, 1.0, 0.3][numbers.size(0..3)];
        let (a_rows, a_columns) = if form == Form::Tn { (k, m) } else { (m, k) };
        let (b_rows, b_columns) = if form == Form::Nt { (n, k) } else { (k, n) };
        let lda = a_columns.max(1) + numbers.size(0..3);
        let ldb = b_columns.max(1) + numbers.size(0..3);
        let ldc = n + numbers.size(0..3);
        let a = numbers.floats(a_rows * lda);
        let b = numbers.floats(b_rows * ldb);
        let before = if beta == 0.0 { vec![f32::NAN; m * ldc] } else { numbers.floats(m * ldc) };
        for level in levels() {
            let mut c = before.clone();
            let mut scratch = vec![f32::NAN; serial::SCRATCH];
            serial::gemm_at(level, form, [m, n, k], alpha, (&a, lda), (&b, ldb), beta, (&mut c, ldc), &mut scratch);
            for i in 0..m {
                for j in 0..ldc {
                    let at = i * ldc + j;
                    if j >= n {
                        assert_eq!(c[at].to_bits(), before[at].to_bits(), "wrote outside its columns");
                        continue;
                    }
                    let mut exact = Exact::default();
                    if beta != 0.0 {
                        exact.add(beta, before[at]);
                    }
                    for x in 0..k {
                        let a = if form == Form::Tn { a[x * lda + i] } else { a[i * lda + x] };
                        let b = if form == Form::Nt { b[j * ldb + x] } else { b[x * ldb + j] };
                        exact.add(alpha * a, b);
                    }
                    // One more rounding of each term: alpha is multiplied into b.
                    exact.terms += 1;
                    exact.assert_near(c[at], (level, case, form, m, n, k, i, j));
                }
            }
        }
    }
}

/// A convolution and its two gradients, through [`Window`], against the definition.
#[test]
fn convolutions_are_convolutions() {
    let mut numbers = Numbers(4);
    let pool = pool(2);
    for case in 0..40 {
        let (images, height, width) = (numbers.size(1..4), numbers.size(1..10), numbers.size(1..10));
        let (cin, cout) = (numbers.pick(&[1, 3, 5, 16, 33]), numbers.pick(&[1, 3, 8, 20, 33]));
        let size = numbers.pick(&[1, 3, 5]);
        let window = match case % 3 {
            0 => Window::same(images, height, width, size),
            1 => Window::halving(images, height, width),
            _ => Window {
                stride: numbers.size(1..4),
                pad_top: numbers.size(0..size),
                pad_left: numbers.size(0..size),
                out_height: numbers.size(1..8),
                out_width: numbers.size(1..8),
                ..Window::same(images, height, width, size)
            },
        };
        let size = if case % 3 == 1 { 3 } else { size };
        let taps = size * size;
        let x = numbers.floats(window.inputs() * cin);
        let w = numbers.floats(cout * taps * cin);
        let dy = numbers.floats(window.outputs() * cout);

        let mut y_exact = vec![Exact::default(); window.outputs() * cout];
        let mut dx_exact = vec![Exact::default(); window.inputs() * cin];
        let mut dw_exact = vec![Exact::default(); w.len()];
        for image in 0..images {
            for oy in 0..window.out_height {
                for ox in 0..window.out_width {
                    let out = ((image * window.out_height + oy) * window.out_width + ox) * cout;
                    for tap in 0..taps {
                        let iy = (oy * window.stride + tap / size) as isize - window.pad_top as isize;
                        let ix = (ox * window.stride + tap % size) as isize - window.pad_left as isize;
                        if iy < 0 || ix < 0 || iy >= height as isize || ix >= width as isize {
                            continue;
                        }
                        let input = ((image * height + iy as usize) * width + ix as usize) * cin;
                        for co in 0..cout {
                            for ci in 0..cin {
                                let weight = (co * taps + tap) * cin + ci;
                                y_exact[out + co].add(x[input + ci], w[weight]);
                                dx_exact[input + ci].add(dy[out + co], w[weight]);
                                dw_exact[weight].add(dy[out + co], x[input + ci]);
                            }
                        }
                    }
                }
            }
        }
        let check = |name: &str, found: &[f32], exact: &[Exact]| {
            for (i, (found, exact)) in found.iter().zip(exact).enumerate() {
                exact.assert_near(*found, (name, case, window, size, cin, cout, i));
            }
        };

        let inputs = vec![Segment { data: &x, k: cin }; taps];
        let forward =
            |tap: usize, rows, out: &mut [usize]| window.input_offsets(tap / size, tap % size, rows, cin, out);
        let a = Rows { segments: &inputs, offsets: &forward };
        let mut packed = vec![f32::NAN; gemm::packed_len(cout, taps * cin)];
        gemm::pack_transposed(&pool, &w, cout, taps * cin, &mut packed);
        let mut y = vec![f32::NAN; window.outputs() * cout];
        let linear = OutRows::Linear { start: 0, ld: cout };
        gemm::rows_times_packed(&pool, &a, window.outputs(), cout, &packed, &mut y, linear, Init::ZERO);
        check("fprop", &y, &y_exact);

        let mut dw = vec![f32::NAN; w.len()];
        gemm::transposed_times_rows(&pool, &dy, cout, cout, &a, window.outputs(), &mut dw, false, None);
        check("wgrad", &dw, &dw_exact);

        let outputs = vec![Segment { data: &dy, k: cout }; taps];
        let backward =
            |tap: usize, rows, out: &mut [usize]| window.output_offsets(tap / size, tap % size, rows, cout, out);
        let a = Rows { segments: &outputs, offsets: &backward };
        let mut packed = vec![f32::NAN; gemm::packed_len(cin, taps * cout)];
        let row = |i: usize| (i % cout * taps + i / cout) * cin;
        gemm::pack_rows(&pool, cin, taps * cout, row, &w, &mut packed);
        let mut dx = vec![f32::NAN; x.len()];
        let rows = OutRows::Grid { grid: window.input_grid(), start: 0, ld: cin };
        gemm::rows_times_packed(&pool, &a, window.inputs(), cin, &packed, &mut dx, rows, Init::ZERO);
        check("dgrad", &dx, &dx_exact);
    }
}

#[test]
fn a_grid_numbers_every_pixel_once_and_classes_one_after_another() {
    for (images, height, width, stride) in [(2, 5, 7, 2), (1, 4, 4, 2), (3, 2, 1, 3), (2, 3, 4, 1)] {
        let grid = Grid { images, height, width, stride };
        let order: Vec<usize> = (0..grid.len()).map(|row| grid.pixel(row)).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..grid.len()).collect::<Vec<_>>());
        let class = |pixel: usize| (pixel / width % height % stride, pixel % width % stride);
        let classes: Vec<_> = order.iter().map(|&pixel| class(pixel)).collect();
        assert!(classes.is_sorted());
    }
}

#[test]
#[should_panic(expected = "a row of 4 floats starts at 5 of 8")]
fn an_offset_outside_its_segment_is_refused() {
    let x = [0.0; 8];
    let a = Rows { segments: &[Segment { data: &x, k: 4 }], offsets: &|_, _, out| out.fill(5) };
    let out_rows = OutRows::Linear { start: 0, ld: 3 };
    gemm::rows_times_packed(&Pool::new(1), &a, 2, 3, &[0.0; 64], &mut [0.0; 6], out_rows, Init::ZERO);
}

#[test]
#[should_panic(expected = "do not fit in 6 floats")]
fn rows_that_would_overlap_are_refused() {
    let x = [0.0; 8];
    let a = Rows { segments: &[Segment { data: &x, k: 4 }], offsets: &|_, _, out| out.fill(0) };
    let out_rows = OutRows::Linear { start: 0, ld: 2 };
    gemm::rows_times_packed(&Pool::new(1), &a, 2, 3, &[0.0; 64], &mut [0.0; 6], out_rows, Init::ZERO);
}
