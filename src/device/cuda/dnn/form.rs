//! How much of a convolution cuDNN is asked for, and what is left for kernels of this program.

use crate::device::cuda::{ConvolutionShape, Pass, Precision};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What cuDNN computes of a convolution. Not every version and GPU has an engine for all that is asked, in f32 less than in bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Form {
    /// All of it.
    Whole,
    /// y without bias and residual.
    Plain,
    /// A gradient of the output's type, written to the workspace.
    Apart,
    /// A bf16 gradient of weights that are to be f32, written to the workspace: sums are f32 and rounded once, as PyTorch's autocast has
    /// them. cuDNN has many engines for it, and few that write f32.
    Narrow,
}

/// What is left to do after cuDNN's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing.
    Nothing,
    /// y has neither bias nor residual yet.
    Bias,
    /// The gradient stands at the beginning of the workspace, of that precision. It is to be added to the output, or to become it.
    Gradient(Precision),
}

impl Form {
    /// Those that give `shape`: the fastest of the first, if one of them can be had, else of the next.
    pub(super) fn all(shape: &ConvolutionShape) -> Vec<Vec<Form>> {
        let adds = shape.adds.then_some(Form::Apart);
        match (shape.pass, shape.precision) {
            (Pass::Forward, _) => {
                let is_more = shape.has_bias || shape.has_residual;
                [vec![Form::Whole]].into_iter().chain(is_more.then(|| vec![Form::Plain])).collect()
            }
            // What is left of any of them moves the weights once, which are few beside what the convolution reads.
            (Pass::WeightGradient, Precision::Bf16) => {
                vec![[Form::Whole, Form::Narrow].into_iter().chain(adds).collect()]
            }
            _ => [vec![Form::Whole]].into_iter().chain(adds.map(|form| vec![form])).collect(),
        }
    }

    /// What it leaves.
    pub fn rest(self, shape: &ConvolutionShape) -> Rest {
        match self {
            Form::Whole => Rest::Nothing,
            Form::Plain => Rest::Bias,
            Form::Apart | Form::Narrow => Rest::Gradient(self.output(shape)),
        }
    }

    /// The shape that cuDNN computes.
    pub(super) fn part(self, shape: &ConvolutionShape) -> ConvolutionShape {
        match self {
            Form::Whole => *shape,
            Form::Plain => ConvolutionShape { has_bias: false, has_residual: false, ..*shape },
            Form::Apart | Form::Narrow => ConvolutionShape { adds: false, ..*shape },
        }
    }

    /// The type of what cuDNN writes.
    pub(super) fn output(self, shape: &ConvolutionShape) -> Precision {
        match shape.pass {
            Pass::WeightGradient if self != Form::Narrow => Precision::F32,
            _ => shape.precision,
        }
    }

    /// Bytes of the workspace that cuDNN writes its result to.
    pub(super) fn result_bytes(self, shape: &ConvolutionShape) -> usize {
        match self.rest(shape) {
            Rest::Gradient(precision) => {
                (elements(shape, output_of(shape.pass)) * precision.bytes()).next_multiple_of(256)
            }
            Rest::Nothing | Rest::Bias => 0,
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::Whole => "as one",
            Form::Plain => "without bias and residual",
            Form::Apart => "apart from what it is added to",
            Form::Narrow => "in bf16",
        })
    }
}

/// A tensor of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tensor {
    /// `[N, H, W, C]`
    X,
    /// `[O, F, F, C]`
    Weight,
    /// `[N, H', W', O]`
    Y,
    /// `[O]`
    Bias,
    /// Like y.
    Residual,
}

/// What a pass writes.
pub(super) fn output_of(pass: Pass) -> Tensor {
    match pass {
        Pass::Forward => Tensor::Y,
        Pass::InputGradient => Tensor::X,
        Pass::WeightGradient => Tensor::Weight,
    }
}

/// Batch, channels, rows and columns of a tensor, as cuDNN orders sizes whatever the layout: images or filters first.
pub(super) fn sizes(shape: &ConvolutionShape, tensor: Tensor) -> [usize; 4] {
    let [height, width] = shape.size;
    let [out_height, out_width] = shape.out_size();
    match tensor {
        Tensor::X => [shape.images, shape.channels, height, width],
        Tensor::Weight => [shape.out, shape.channels, shape.filter, shape.filter],
        Tensor::Y | Tensor::Residual => [shape.images, shape.out, out_height, out_width],
        Tensor::Bias => [1, shape.out, 1, 1],
    }
}

pub(super) fn elements(shape: &ConvolutionShape, tensor: Tensor) -> usize {
    sizes(shape, tensor).into_iter().product()
}

/// `input gradient of a convolution of 128×32×32×3 with 128 filters of 3×3, stride 1, padding 1 and 1, bf16, added to what is there`
impl fmt::Display for ConvolutionShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.pass {
            Pass::Forward => "",
            Pass::InputGradient => "input gradient of a ",
            Pass::WeightGradient => "weight gradient of a ",
        };
        let ConvolutionShape { images, size: [height, width], channels, out, filter, stride, .. } = self;
        let [before, after] = self.padding;
        let precision = match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        };
        write!(
            f,
            "{prefix}convolution of {images}×{height}×{width}×{channels} with {out} filters of {filter}×{filter}"
        )?;
        write!(f, ", stride {stride}, padding {before} and {after}, {precision}")?;
        let more = [
            (self.has_bias, ", with a bias"),
            (self.has_residual, ", with a residual"),
            (self.adds, ", added to what is there"),
        ];
        more.iter().filter(|(is_so, _)| *is_so).try_for_each(|(_, text)| f.write_str(text))
    }
}
