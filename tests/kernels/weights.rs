//! What surrounds the libraries' convolutions and products: bias gradients, casts, and weights in other layouts.

use crate::elementwise::BOTH;
use crate::machine::{Buffer, run_launch, run_with};
use crate::values::{activations, bytes_of, bytes_of_f32, f32_of, normals, rounded};
use ddpm_dist::device::cuda::{Launch, Precision};
use ddpm_dist::ops::conv2d::cuda::{padded, transposed, unpadded};
use ddpm_dist::ops::linear::cuda::{bias, bias_gradient, pieces};

#[test]
fn biases_and_residuals_are_added_and_rounded_once() {
    // Whole packs of channels, odd ones, fewer than a pack, fewer elements than a pack, more than a block.
    for [rows, channels] in [[64, 8], [16, 32], [49, 3], [5, 13], [1, 1], [300, 24]] {
        for precision in BOTH {
            for has_residual in [false, true] {
                let len = rows * channels;
                let [[b, b_values], [residual, residual_values], [y, y_values]] =
                    [(1, channels), (2, len), (3, len)].map(|(seed, len)| activations(seed, len, precision));
                let inputs = [Buffer::Input(b), Buffer::Input(residual)];
                let launch = bias([rows, channels], precision, has_residual);
                let found = run_launch(&launch, &inputs, &[Buffer::Updated(y)]).remove(0);

                let [b, residual, y] =
                    [b_values, residual_values, y_values].map(|bytes| f32_of(&bytes, Precision::F32));
                for (i, found) in f32_of(&found, precision).into_iter().enumerate() {
                    let sum = y[i] + b[i % channels];
                    let sum = rounded(if has_residual { sum + residual[i] } else { sum }, precision);
                    assert_eq!(found.to_bits(), sum.to_bits(), "{rows} × {channels}, {precision:?}: element {i}");
                }
            }
        }
    }
}

#[test]
fn bias_gradients_are_sums_of_rows() {
    // One image's time embedding, the models' widths, a padded picture, odd ones, several pieces and a last one that is short.
    for shape @ [rows, channels] in
        [[1, 512], [64, 128], [16, 256], [49, 8], [3, 5], [300, 24], [77, 3], [513, 264], [10_000, 8], [1, 1]]
    {
        for precision in BOTH {
            for adds in [false, true] {
                let [dy, _] = activations(1, rows * channels, precision);
                let before = normals(2, channels);
                let [first, total] = bias_gradient(shape, precision, adds);
                let workspace = Buffer::Output(4 * pieces(rows) * channels);
                let partials = run_with(&first, &[Buffer::Input(dy.clone())], &[], &workspace).remove(0);
                let output = if adds { Buffer::Updated(bytes_of_f32(&before)) } else { Buffer::Output(4 * channels) };
                let found = run_with(&total, &[], &[output], &Buffer::Input(partials)).remove(0);

                let values = f32_of(&dy, precision);
                for (c, found) in f32_of(&found, Precision::F32).into_iter().enumerate() {
                    let column = values.iter().skip(c).step_by(channels).map(|&x| f64::from(x));
                    let before = if adds { f64::from(before[c]) } else { 0.0 };
                    let expected = before + column.clone().sum::<f64>();
                    // Each rounding is at most half an ulp of a partial sum, and no sum has more terms in a row than this.
                    let additions = rows.div_ceil(8 * pieces(rows)) + 8 + pieces(rows).div_ceil(32) + 5 + 1;
                    let size = before.abs() + column.map(f64::abs).sum::<f64>();
                    let bound = additions as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                    let error = (f64::from(found) - expected).abs();
                    assert!(error <= bound, "{shape:?}, {precision:?}: channel {c} is {found}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn casts_round_to_the_nearest() {
    for len in [1, 7, 8, 2048, 5003] {
        let mut values = normals(3, len);
        // A tie to even, what rounds up to infinity, a subnormal number, and what is no number.
        let special = [1.003_906_3, f32::MAX, f32::from_bits(0x0001_8000), f32::NAN, f32::NEG_INFINITY, -0.0];
        values.iter_mut().zip(special).for_each(|(value, special)| *value = special);
        let inputs = [Buffer::Input(bytes_of_f32(&values))];
        let narrow = run_launch(&Launch::cast(len, Precision::Bf16), &inputs, &[Buffer::Output(2 * len)]).remove(0);
        for (found, &x) in f32_of(&narrow, Precision::Bf16).into_iter().zip(&values) {
            let expected = rounded(x, Precision::Bf16);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && x.is_nan(), "{x}: {found}");
        }
        let wide = run_launch(
            &Launch::cast(len, Precision::F32),
            &[Buffer::Input(narrow.clone())],
            &[Buffer::Output(4 * len)],
        );
        assert_eq!(wide[0], bytes_of_f32(&f32_of(&narrow, Precision::Bf16)));
    }
}

#[test]
fn weights_go_to_ohwi_and_back() {
    for [o, i, hw] in [[3, 40, 9], [8, 3, 9], [2, 65, 1], [1, 33, 33]] {
        let oihw = normals(4, o * i * hw);
        let inputs = [Buffer::Input(bytes_of_f32(&oihw))];
        let output = [Buffer::Output(4 * oihw.len())];
        let ohwi = run_launch(&transposed([o, i, hw]), &inputs, &output).remove(0);
        for (at, found) in f32_of(&ohwi, Precision::F32).into_iter().enumerate() {
            let [of_o, of_hw, of_i] = [at / (hw * i), at / i % hw, at % i];
            assert_eq!(found, oihw[(of_o * i + of_i) * hw + of_hw], "{at}");
        }
        let back = run_launch(&transposed([o, hw, i]), &[Buffer::Input(ohwi)], &output).remove(0);
        assert_eq!(back, bytes_of_f32(&oihw));
    }
}

#[test]
fn padding_comes_and_goes() {
    // The first layer's weights, OHWI by channels; the last one's, by filters; nothing to pad.
    for ([rows, columns], [with_rows, with_columns]) in
        [([16 * 9, 3], [16 * 9, 8]), ([3, 9 * 32], [8, 9 * 32]), ([5, 7], [5, 7])]
    {
        for precision in BOTH {
            let values = normals(5, rows * columns);
            let inputs = [Buffer::Input(bytes_of_f32(&values))];
            let output = [Buffer::Output(with_rows * with_columns * precision.bytes())];
            let launch = padded([rows, columns], [with_rows, with_columns], precision);
            let copy = run_launch(&launch, &inputs, &output).remove(0);
            for (at, found) in f32_of(&copy, precision).into_iter().enumerate() {
                let [row, column] = [at / with_columns, at % with_columns];
                let is_there = row < rows && column < columns;
                let expected = if is_there { rounded(values[row * columns + column], precision) } else { 0.0 };
                assert_eq!(found.to_bits(), expected.to_bits(), "{row}, {column}");
            }
            let gradient: Vec<f32> =
                normals(6, with_rows * with_columns).into_iter().map(|x| rounded(x, precision)).collect();
            for adds in [false, true] {
                let output = match adds {
                    true => Buffer::Updated(bytes_of_f32(&values)),
                    false => Buffer::Output(4 * values.len()),
                };
                let launch = unpadded([rows, columns], with_columns, precision, adds);
                let inputs = [Buffer::Input(bytes_of(&gradient, precision))];
                let found = run_launch(&launch, &inputs, &[output]).remove(0);
                for (at, found) in f32_of(&found, Precision::F32).into_iter().enumerate() {
                    let before = if adds { values[at] } else { 0.0 };
                    assert_eq!(found, before + gradient[at / columns * with_columns + at % columns], "{at}");
                }
            }
        }
    }
}
