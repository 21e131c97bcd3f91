//! What a convolution must give, computed here in f64 from its definition, at some elements of the output: the test of a plan that owes
//! nothing to cuDNN.

use super::form::{Form, Tensor, elements, output_of, sizes};
use crate::device::cuda::{ConvolutionShape, Pass, Precision};

/// Random numbers in (-1, 1), over and over: those of a tensor of any size, known without keeping it.
pub(super) struct Pattern {
    numbers: Vec<f32>,
}

/// A prime: neighbours in no dimension of a tensor have the same numbers.
const PERIOD: usize = 65_537;

/// splitmix64's finalizer.
fn mixed(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Pattern {
    /// Numbers of a tensor of that type.
    pub fn new(seed: u64, precision: Precision) -> Pattern {
        let number = |i: u64| {
            let bits = (mixed(seed << 32 | i) >> 40) as f32;
            let number = bits / f32::from_bits(0x4B00_0000) - 1.0;
            match precision {
                Precision::F32 => number,
                Precision::Bf16 => f32::from_bits(number.to_bits() & 0xFFFF_0000),
            }
        };
        Pattern { numbers: (0..PERIOD as u64).map(number).collect() }
    }

    fn at(&self, i: usize) -> f64 {
        self.numbers[i % PERIOD].into()
    }

    /// The first `len` elements as a device holds them.
    pub fn bytes(&self, len: usize, precision: Precision) -> Vec<u8> {
        let of = |numbers: &[f32]| -> Vec<u8> {
            match precision {
                Precision::F32 => numbers.iter().flat_map(|number| number.to_ne_bytes()).collect(),
                Precision::Bf16 => {
                    numbers.iter().flat_map(|number| ((number.to_bits() >> 16) as u16).to_ne_bytes()).collect()
                }
            }
        };
        let period = of(&self.numbers);
        period.iter().copied().cycle().take(len * precision.bytes()).collect()
    }
}

/// The numbers of all tensors; the output's are what is there before.
pub(super) struct Patterns {
    of: [Pattern; 5],
}

impl Patterns {
    pub fn new(shape: &ConvolutionShape, form: Form) -> Patterns {
        let tensors = [Tensor::X, Tensor::Weight, Tensor::Y, Tensor::Bias, Tensor::Residual];
        Patterns { of: tensors.map(|tensor| Pattern::new(1 + tensor as u64, precision_of(shape, form, tensor))) }
    }

    pub fn of(&self, tensor: Tensor) -> &Pattern {
        &self.of[tensor as usize]
    }
}

/// The type of a tensor as cuDNN has it.
pub(super) fn precision_of(shape: &ConvolutionShape, form: Form, tensor: Tensor) -> Precision {
    if tensor == output_of(shape.pass) { form.output(shape) } else { shape.precision }
}

/// A sum with what bounds its rounding.
#[derive(Default)]
struct Sum {
    value: f64,
    squares: f64,
    terms: usize,
}

impl Sum {
    fn add(&mut self, term: f64) {
        self.value += term;
        self.squares += term * term;
        self.terms += 1;
    }
}

/// The first of `samples` elements that differs from what the convolution must give, in words.
pub(super) fn fault(
    shape: &ConvolutionShape,
    form: Form,
    patterns: &Patterns,
    found: &[u8],
    samples: u64,
) -> Option<String> {
    let precision = form.output(shape);
    let tensor = output_of(shape.pass);
    let number = |i: usize| -> f64 {
        let at = &found[i * precision.bytes()..][..precision.bytes()];
        match *at {
            [a, b, c, d] => f32::from_ne_bytes([a, b, c, d]).into(),
            [a, b] => f32::from_bits(u32::from(u16::from_ne_bytes([a, b])) << 16).into(),
            _ => f64::NAN,
        }
    };
    // Before the run the output holds NaN, or what is added to.
    if let Some(i) = (0..elements(shape, tensor)).find(|&i| !number(i).is_finite()) {
        return Some(format!("element {i} is {}", number(i)));
    }
    let [outer, channels, rows, columns] = sizes(shape, tensor);
    for sample in 0..samples {
        // Half of all places are at an edge: that is where plans go wrong.
        let place = |which: u64, size: usize| {
            let drawn = mixed(sample * 8 + which) as usize;
            match drawn % 4 {
                0 => 0,
                1 => size - 1,
                _ => drawn / 4 % size,
            }
        };
        let place = [place(0, outer), place(1, rows), place(2, columns), place(3, channels)];
        let mut sum = sum(shape, patterns, place);
        let [n, h, w, c] = place;
        let i = ((n * rows + h) * columns + w) * channels + c;
        let part = form.part(shape);
        if part.adds {
            sum.add(patterns.of(tensor).at(i));
        }
        if part.has_bias {
            sum.add(patterns.of(Tensor::Bias).at(c));
        }
        if part.has_residual {
            sum.add(patterns.of(Tensor::Residual).at(i));
        }
        // K terms one after another, each sum rounded towards zero as tensor cores do, make an error of about ε K^1.5 times a term's
        // size, and K times the root of their squares is that; the result is rounded once more.
        let half = match precision {
            Precision::F32 => f64::from(f32::EPSILON) / 2.0,
            Precision::Bf16 => 1.0 / 256.0,
        };
        let bound = f64::from(f32::EPSILON) * sum.terms as f64 * sum.squares.sqrt() + 1.01 * half * sum.value.abs();
        if (number(i) - sum.value).abs() > bound {
            return Some(format!("element {place:?} is {}, expected {} ± {bound}", number(i), sum.value));
        }
    }
    None
}

/// What stands at a place `[n, row, column, channel]` of the output (`[o, row, column, channel]` of weights), without what is added to it.
fn sum(shape: &ConvolutionShape, patterns: &Patterns, [n, row, column, channel]: [usize; 4]) -> Sum {
    let [height, width] = shape.size;
    let [out_height, out_width] = shape.out_size();
    let [x, weight, y] = [Tensor::X, Tensor::Weight, Tensor::Y].map(|tensor| patterns.of(tensor));
    let (filter, channels, out) = (shape.filter, shape.channels, shape.out);
    let x_at = |n: usize, [h, w]: [usize; 2], c: usize| x.at(((n * height + h) * width + w) * channels + c);
    let weight_at = |o: usize, [u, v]: [usize; 2], c: usize| weight.at(((o * filter + u) * filter + v) * channels + c);
    let y_at = |n: usize, [p, q]: [usize; 2], o: usize| y.at(((n * out_height + p) * out_width + q) * out + o);
    // The pixel of x under a place of the filter, for a pixel of y.
    let under =
        |p: usize, u: usize, size: usize| (p * shape.stride + u).checked_sub(shape.padding[0]).filter(|&at| at < size);
    // The pixel of y whose filter has that place at a pixel of x.
    let over = |h: usize, u: usize, size: usize| {
        let at = (h + shape.padding[0]).checked_sub(u).filter(|at| at.is_multiple_of(shape.stride))?;
        Some(at / shape.stride).filter(|&p| p < size)
    };
    let taps = || (0..filter).flat_map(|u| (0..filter).map(move |v| [u, v]));
    let mut sum = Sum::default();
    match shape.pass {
        Pass::Forward => {
            for [u, v] in taps() {
                let (Some(h), Some(w)) = (under(row, u, height), under(column, v, width)) else { continue };
                (0..channels).for_each(|c| sum.add(x_at(n, [h, w], c) * weight_at(channel, [u, v], c)));
            }
        }
        Pass::InputGradient => {
            for [u, v] in taps() {
                let (Some(p), Some(q)) = (over(row, u, out_height), over(column, v, out_width)) else { continue };
                (0..out).for_each(|o| sum.add(y_at(n, [p, q], o) * weight_at(o, [u, v], channel)));
            }
        }
        Pass::WeightGradient => {
            for image in 0..shape.images {
                for p in 0..out_height {
                    let Some(h) = under(p, row, height) else { continue };
                    for q in 0..out_width {
                        let Some(w) = under(q, column, width) else { continue };
                        sum.add(y_at(image, [p, q], n) * x_at(image, [h, w], channel));
                    }
                }
            }
        }
    }
    sum
}
