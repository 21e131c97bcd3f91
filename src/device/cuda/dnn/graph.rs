//! A convolution as cuDNN's operation graph: the convolution, then sums with the residual and the bias. In the other order cuDNN 9.19 has only
//! engines that it compiles at run time, for seconds each.

use super::descriptor::Descriptor;
use super::form::{Form, Tensor, output_of, sizes};
use super::library::{Library, Refusal};
use crate::device::cuda::{ConvolutionShape, Pass, Precision};
use cudarc::cudnn::sys;
use cudarc::cudnn::sys::cudnnBackendAttributeName_t as Name;
use cudarc::cudnn::sys::cudnnBackendDescriptorType_t as Kind;
use cudarc::cudnn::sys::cudnnDataType_t as DataType;

/// What every address of a tensor is a multiple of.
pub(super) const ALIGNMENT: u64 = 16;

/// A graph that is finalized.
#[derive(Debug)]
pub(super) struct Graph {
    /// First, so that it goes before what it is made of.
    pub graph: Descriptor,
    _operations: Vec<Descriptor>,
    _parts: Vec<Descriptor>,
    /// What it reads and writes.
    pub tensors: Vec<Tensor>,
}

/// The number by which the graph and the addresses know a tensor.
pub(super) fn id_of(tensor: Tensor) -> i64 {
    1 + tensor as i64
}

/// Numbers of tensors that exist within the graph only.
const FIRST_VIRTUAL: i64 = 100;

impl Graph {
    /// The graph of what `form` has cuDNN compute of `shape`.
    pub fn new(
        library: &'static Library,
        handle: sys::cudnnHandle_t,
        shape: &ConvolutionShape,
        form: Form,
    ) -> Result<Graph, Refusal> {
        let part = form.part(shape);
        let mut builder =
            Builder { library, shape: part, output: form.output(shape), parts: Vec::new(), tensors: Vec::new() };
        let operations = builder.operations()?;
        let all: Vec<&Descriptor> = operations.iter().collect();
        let graph = Descriptor::new(library, Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[handle])?
            .with_descriptors(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &all)?
            .finalized()?;
        Ok(Graph { graph, _operations: operations, _parts: builder.parts, tensors: builder.tensors })
    }
}

/// The attributes of a pass.
struct Names {
    kind: Kind,
    convolution: Name,
    x: Name,
    weight: Name,
    y: Name,
    alpha: Name,
    beta: Name,
}

fn names(pass: Pass) -> Names {
    match pass {
        Pass::Forward => Names {
            kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
            x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
            weight: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
            y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
            alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
            beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
        },
        Pass::InputGradient => Names {
            kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
            x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
            weight: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
            y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
            alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
            beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
        },
        Pass::WeightGradient => Names {
            kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
            x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
            weight: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
            y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
            alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
            beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
        },
    }
}

struct Builder {
    library: &'static Library,
    /// Of cuDNN's part.
    shape: ConvolutionShape,
    /// Type of the output.
    output: Precision,
    /// All that operations are made of.
    parts: Vec<Descriptor>,
    tensors: Vec<Tensor>,
}

impl Builder {
    fn operations(&mut self) -> Result<Vec<Descriptor>, Refusal> {
        let shape = self.shape;
        let addends: Vec<Tensor> = [(shape.has_residual, Tensor::Residual), (shape.has_bias, Tensor::Bias)]
            .into_iter()
            .filter_map(|(is_there, tensor)| is_there.then_some(tensor))
            .collect();
        let convolution = self.convolution()?;
        let [x, weight] = [self.tensor(Tensor::X)?, self.tensor(Tensor::Weight)?];
        let mut sum = match addends.is_empty() {
            true => self.tensor(Tensor::Y)?,
            false => self.sum(0)?,
        };
        let names = names(shape.pass);
        let beta = if shape.adds { 1.0f32 } else { 0.0 };
        let mut operations = vec![
            Descriptor::new(self.library, names.kind)?
                .with_descriptors(names.convolution, &[&self.parts[convolution]])?
                .with_descriptors(names.x, &[&self.parts[x]])?
                .with_descriptors(names.weight, &[&self.parts[weight]])?
                .with_descriptors(names.y, &[&self.parts[sum]])?
                .with(names.alpha, &[1.0f32])?
                .with(names.beta, &[beta])?
                .finalized()?,
        ];
        for (i, &addend) in addends.iter().enumerate() {
            let term = self.tensor(addend)?;
            let next = match i + 1 == addends.len() {
                true => self.tensor(Tensor::Y)?,
                false => self.sum(i + 1)?,
            };
            let addition = self.addition()?;
            let operation = Descriptor::new(self.library, Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
                .with_descriptors(Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &[&self.parts[addition]])?
                .with_descriptors(Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &[&self.parts[sum]])?
                .with_descriptors(Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &[&self.parts[term]])?
                .with_descriptors(Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &[&self.parts[next]])?;
            operations.push(operation.finalized()?);
            sum = next;
        }
        Ok(operations)
    }

    /// The place of a part among the others.
    fn keep(&mut self, part: Descriptor) -> usize {
        self.parts.push(part);
        self.parts.len() - 1
    }

    fn convolution(&mut self) -> Result<usize, Refusal> {
        let twice = |value: usize| [value as i64; 2];
        let [before, after] = self.shape.padding;
        let convolution = Descriptor::new(self.library, Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, &[DataType::CUDNN_DATA_FLOAT])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE, &[sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2i64])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, &twice(1))?
            .with(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &twice(self.shape.stride))?
            .with(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &twice(before))?
            .with(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &twice(after))?
            .finalized()?;
        Ok(self.keep(convolution))
    }

    fn addition(&mut self) -> Result<usize, Refusal> {
        let addition = Descriptor::new(self.library, Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_POINTWISE_MODE, &[sys::cudnnPointwiseMode_t::CUDNN_POINTWISE_ADD])?
            .with(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, &[DataType::CUDNN_DATA_FLOAT])?
            .finalized()?;
        Ok(self.keep(addition))
    }

    /// A tensor that is in memory.
    fn tensor(&mut self, tensor: Tensor) -> Result<usize, Refusal> {
        self.tensors.push(tensor);
        let precision = if tensor == output_of(self.shape.pass) { self.output } else { self.shape.precision };
        self.describe(tensor, id_of(tensor), precision, false)
    }

    /// A tensor like y that is not: f32, as sums are rounded once.
    fn sum(&mut self, number: usize) -> Result<usize, Refusal> {
        self.describe(Tensor::Y, FIRST_VIRTUAL + number as i64, Precision::F32, true)
    }

    fn describe(&mut self, tensor: Tensor, id: i64, precision: Precision, is_virtual: bool) -> Result<usize, Refusal> {
        let sizes = sizes(&self.shape, tensor).map(|size| size as i64);
        let [_, channels, height, width] = sizes;
        // Channels are neighbours, then pixels of a row.
        let strides = [height * width * channels, 1, width * channels, channels];
        let data_type = match precision {
            Precision::F32 => DataType::CUDNN_DATA_FLOAT,
            Precision::Bf16 => DataType::CUDNN_DATA_BFLOAT16,
        };
        let tensor = Descriptor::new(self.library, Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[data_type])?
            .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &sizes)?
            .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &strides)?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[id])?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[ALIGNMENT as i64])?
            .with(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, &[is_virtual])?
            .finalized()?;
        Ok(self.keep(tensor))
    }
}
