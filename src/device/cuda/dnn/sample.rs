//! What a convolution must give, computed here in f64 from its definition, at some elements of the output: the test of a plan that owes
//! nothing to cuDNN.

use super::form::{Form, Tensor, elements, output_of, sizes};
use crate::device::cuda::pattern::{Pattern, Sum, mixed, number};
use crate::device::cuda::{ConvolutionShape, Pass, Precision};

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

/// How closely a plan is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scrutiny {
    /// It is new.
    New,
    /// It was tested when it was found: what it gives where libraries were exchanged or a file was damaged is wrong all over.
    Again,
}

/// Terms that are added up at most to know what a plan must give: a tenth of a second.
const TERMS: usize = 1 << 24;

impl Scrutiny {
    /// Elements that are compared with what they should be, where each is a sum of so many terms.
    fn samples(self, terms: usize) -> u64 {
        let [fewest, most] = match self {
            Scrutiny::New => [64, 512],
            Scrutiny::Again => [8, 64],
        };
        ((TERMS / terms) as u64).clamp(fewest, most)
    }
}

/// Terms of an element of the output, away from edges.
fn terms(shape: &ConvolutionShape) -> usize {
    let pixels = shape.out_size().iter().product::<usize>();
    match shape.pass {
        Pass::Forward => shape.filter * shape.filter * shape.channels,
        Pass::InputGradient => shape.filter * shape.filter * shape.out,
        Pass::WeightGradient => shape.images * pixels,
    }
}

/// The first element, of all or of some, that differs from what the convolution must give, in words.
pub(super) fn fault(
    shape: &ConvolutionShape,
    form: Form,
    patterns: &Patterns,
    found: &[u8],
    scrutiny: Scrutiny,
) -> Option<String> {
    let precision = form.output(shape);
    let tensor = output_of(shape.pass);
    let number = |i: usize| number(found, i, precision);
    // Before the run the output holds NaN, or what is added to.
    let all = if scrutiny == Scrutiny::New { 0..elements(shape, tensor) } else { 0..0 };
    if let Some(i) = all.into_iter().find(|&i| !number(i).is_finite()) {
        return Some(format!("element {i} is {}", number(i)));
    }
    let [outer, channels, rows, columns] = sizes(shape, tensor);
    for sample in 0..scrutiny.samples(terms(shape)) {
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
        let bound = sum.bound(precision);
        let is_right = (number(i) - sum.value).abs() <= bound;
        // Also where it is not a number.
        if !is_right {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_result() {
        let shape = ConvolutionShape {
            pass: Pass::Forward,
            images: 2,
            size: [6, 6],
            channels: 8,
            out: 16,
            filter: 3,
            stride: 1,
            padding: [1, 1],
            precision: Precision::F32,
            has_bias: false,
            has_residual: false,
            adds: false,
        };
        let (form, unwritten) = (Form::Whole, vec![0xFF; elements(&shape, Tensor::Y) * size_of::<f32>()]);
        for scrutiny in [Scrutiny::New, Scrutiny::Again] {
            let fault = fault(&shape, form, &Patterns::new(&shape, form), &unwritten, scrutiny);
            assert!(fault.is_some_and(|fault| fault.contains("NaN")), "{scrutiny:?}");
        }
    }
}
