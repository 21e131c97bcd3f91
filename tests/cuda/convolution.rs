//! A convolution's tensors on a GPU, and what it must give, in f64 from its definition.

use crate::values::{bytes_of, f32_of, normals, rounded};
use ddpm_dist::device::cuda::dnn::{ConvolutionAddresses, ConvolutionPlan, Rest};
use ddpm_dist::device::cuda::{ConvolutionShape, CudaError, Gpu, Memory, Pass, Precision};

pub const PASSES: [Pass; 3] = [Pass::Forward, Pass::InputGradient, Pass::WeightGradient];

/// A shape without bias, residual and addition.
pub const fn shape(
    pass: Pass,
    [images, height, width, channels]: [usize; 4],
    [out, filter, stride]: [usize; 3],
    padding: [usize; 2],
    precision: Precision,
) -> ConvolutionShape {
    ConvolutionShape {
        pass,
        images,
        size: [height, width],
        channels,
        out,
        filter,
        stride,
        padding,
        precision,
        has_bias: false,
        has_residual: false,
        adds: false,
    }
}

/// The tensors' numbers, as both sides have them. An output that is not added to holds what would spoil any sum.
pub struct Operands {
    shape: ConvolutionShape,
    x: Vec<f32>,
    weight: Vec<f32>,
    y: Vec<f32>,
    bias: Vec<f32>,
    residual: Vec<f32>,
}

/// A sum, the sum of its terms' sizes, and how many they are.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    size: f64,
    terms: usize,
}

impl Sum {
    fn add(&mut self, term: f64) {
        self.value += term;
        self.size += term.abs();
        self.terms += 1;
    }
}

impl Operands {
    pub fn new(shape: &ConvolutionShape) -> Operands {
        let [height, width] = shape.size;
        let [out_height, out_width] = shape.out_size();
        let x = shape.images * height * width * shape.channels;
        let weight = shape.out * shape.filter * shape.filter * shape.channels;
        let y = shape.images * out_height * out_width * shape.out;
        let drawn = |seed: u64, len: usize, precision: Precision| -> Vec<f32> {
            normals(seed, len).into_iter().map(|number| rounded(number, precision)).collect()
        };
        let of = |pass: Pass, seed: u64, len: usize| match shape.pass == pass {
            true if shape.adds => drawn(seed, len, output_precision(shape)),
            true => vec![f32::NAN; len],
            false => drawn(seed, len, shape.precision),
        };
        Operands {
            shape: *shape,
            x: of(Pass::InputGradient, 1, x),
            weight: of(Pass::WeightGradient, 2, weight),
            y: of(Pass::Forward, 3, y),
            bias: drawn(4, shape.out, shape.precision),
            residual: drawn(5, y, shape.precision),
        }
    }

    fn output(&self) -> &[f32] {
        match self.shape.pass {
            Pass::Forward => &self.y,
            Pass::InputGradient => &self.x,
            Pass::WeightGradient => &self.weight,
        }
    }

    /// The output, element by element.
    fn expected(&self) -> Vec<Sum> {
        let shape = &self.shape;
        let ([height, width], [out_height, out_width]) = (shape.size, shape.out_size());
        let mut sums = vec![Sum::default(); self.output().len()];
        let mut meet = |x: usize, weight: usize, y: usize| {
            let number = |values: &[f32], i: usize| f64::from(values[i]);
            match shape.pass {
                Pass::Forward => sums[y].add(number(&self.x, x) * number(&self.weight, weight)),
                Pass::InputGradient => sums[x].add(number(&self.y, y) * number(&self.weight, weight)),
                Pass::WeightGradient => sums[weight].add(number(&self.x, x) * number(&self.y, y)),
            }
        };
        for n in 0..shape.images {
            for (p, q) in (0..out_height).flat_map(|p| (0..out_width).map(move |q| (p, q))) {
                for (u, v) in (0..shape.filter).flat_map(|u| (0..shape.filter).map(move |v| (u, v))) {
                    let [h, w] = [p * shape.stride + u, q * shape.stride + v];
                    let [h, w] = [h.wrapping_sub(shape.padding[0]), w.wrapping_sub(shape.padding[0])];
                    if h >= height || w >= width {
                        continue;
                    }
                    for (o, c) in (0..shape.out).flat_map(|o| (0..shape.channels).map(move |c| (o, c))) {
                        let x = ((n * height + h) * width + w) * shape.channels + c;
                        let weight = ((o * shape.filter + u) * shape.filter + v) * shape.channels + c;
                        meet(x, weight, ((n * out_height + p) * out_width + q) * shape.out + o);
                    }
                }
            }
        }
        for (i, sum) in sums.iter_mut().enumerate() {
            if shape.adds {
                sum.add(self.output()[i].into());
            }
            if shape.has_bias {
                sum.add(self.bias[i % shape.out].into());
            }
            if shape.has_residual {
                sum.add(self.residual[i].into());
            }
        }
        sums
    }

    /// The first element that is not what a plan must give, in words.
    pub fn difference(&self, found: &[f32], plan: &ConvolutionPlan) -> Option<String> {
        // What is stored is rounded to the nearest: once, or by cuDNN and by what is left after it.
        let (precision, roundings) = match plan.rest() {
            Rest::Nothing => (output_precision(&self.shape), 1.0),
            Rest::Bias => (self.shape.precision, 2.0),
            Rest::Gradient(precision) => (precision, 2.0),
        };
        let stored = roundings
            * match precision {
                Precision::F32 => f64::from(f32::EPSILON) / 2.0,
                Precision::Bf16 => 1.0 / 256.0,
            };
        let expected = self.expected();
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).enumerate().find_map(|(i, (&found, sum))| {
            // Each of K sums is rounded, by an ulp at most where hardware rounds towards zero.
            let bound = (sum.terms as f64 * f64::from(f32::EPSILON) + 1.01 * stored) * sum.size;
            let error = (f64::from(found) - sum.value).abs();
            // What is no number is no less than anything.
            let is_right = error <= bound;
            (!is_right).then(|| format!("{}: element {i} is {found}, expected {} ± {bound}", self.shape, sum.value))
        })
    }

    /// What a plan gives for these operands with what it leaves done, as f32; twice, and the same bits.
    pub fn compute(&self, gpu: &Gpu, plan: &ConvolutionPlan) -> Result<Vec<f32>, CudaError> {
        let shape = &self.shape;
        let output = output_precision(shape);
        let place = |values: &[f32], pass: Pass| -> Result<Memory, CudaError> {
            let precision = if shape.pass == pass { output } else { shape.precision };
            let bytes = bytes_of(values, precision);
            let memory = gpu.allocate(bytes.len())?;
            gpu.upload(memory, &bytes)?;
            Ok(memory)
        };
        let x = place(&self.x, Pass::InputGradient)?;
        let weight = place(&self.weight, Pass::WeightGradient)?;
        let y = place(&self.y, Pass::Forward)?;
        let operand = |values: &[f32]| -> Result<Memory, CudaError> {
            let bytes = bytes_of(values, shape.precision);
            let memory = gpu.allocate(bytes.len())?;
            gpu.upload(memory, &bytes)?;
            Ok(memory)
        };
        let (bias, residual) = (operand(&self.bias)?, operand(&self.residual)?);
        let workspace = gpu.allocate(plan.workspace())?;
        let addresses = ConvolutionAddresses {
            x: x.address,
            weight: weight.address,
            y: y.address,
            bias: bias.address,
            residual: residual.address,
        };
        // SAFETY: the tensors are as large as the shape says, the workspace as the plan says, and all stay until it has run.
        let prepared = unsafe { plan.prepare(&addresses, workspace.address) }?;
        let memory = match shape.pass {
            Pass::Forward => y,
            Pass::InputGradient => x,
            Pass::WeightGradient => weight,
        };
        let run = || -> Result<Vec<f32>, CudaError> {
            gpu.upload(memory, &bytes_of(self.output(), output))?;
            prepared.run()?;
            let found = f32_of(&gpu.download(memory)?, output);
            Ok(match plan.rest() {
                Rest::Nothing => found,
                Rest::Bias => self.with_bias(found),
                Rest::Gradient(precision) => {
                    let bytes = memory.bytes / output.bytes() * precision.bytes();
                    let part = f32_of(&gpu.download(Memory { bytes, ..workspace })?, precision);
                    let sum = |(old, new): (f32, f32)| if shape.adds { rounded(old + new, output) } else { new };
                    found.into_iter().zip(part).map(sum).collect()
                }
            })
        };
        let found = run()?;
        let again = run()?;
        assert!(found.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "{shape}: other bits");
        [x, weight, y, bias, residual, workspace].into_iter().try_for_each(|memory| gpu.free(memory))?;
        Ok(found)
    }

    /// What kernels/bias.cu does.
    fn with_bias(&self, y: Vec<f32>) -> Vec<f32> {
        let end = |(i, mut value): (usize, f32)| {
            if self.shape.has_bias {
                value += self.bias[i % self.shape.out];
            }
            rounded(if self.shape.has_residual { value + self.residual[i] } else { value }, self.shape.precision)
        };
        y.into_iter().enumerate().map(end).collect()
    }
}

fn output_precision(shape: &ConvolutionShape) -> Precision {
    if shape.pass == Pass::WeightGradient { Precision::F32 } else { shape.precision }
}
