//! The device behind [`Device::Cuda`](crate::device::Device): buffers, libraries, and ops whose operands have addresses.

use super::blas::{Blas, Operation};
use super::capture::Graphs;
use super::dnn::{ConvolutionAddresses, Dnn, PreparedConvolution, Rest};
use super::plans::{Libraries, Plans};
use super::{
    Argument, Capture, Card, Convolution, ConvolutionShape, CudaError, Gpu, Graph, Memory, Pass, Piece, PlanTable,
    Precision, PreparedKernel, Product, Step, Work,
};
use crate::device::{Binding, BufferId, DeviceError, Element, Slot};
use std::ops::Range;

/// Bytes that libraries may use while they compute.
pub const WORKSPACE: usize = 256 << 20;

/// A GPU with its libraries and buffers.
pub struct Cuda {
    gpu: Gpu,
    name: String,
    dnn: Dnn,
    blas: Blas,
    workspace: Memory,
    graphs: Graphs,
    plans: Plans,
    buffers: Vec<Memory>,
    /// What kernels read beside their inputs; equal ones are there once.
    constants: Vec<(Vec<u8>, Memory)>,
}

/// Where an instruction reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// Where it reads.
    pub inputs: &'a [Slot],
    /// Where it writes.
    pub outputs: &'a [Slot],
    /// Its workspace.
    pub scratch: Option<Slot>,
}

/// A part of an op's work, with addresses.
pub struct Command(Kind);

enum Kind {
    Kernel(PreparedKernel),
    /// And what it leaves to a kernel.
    Convolution(PreparedConvolution, Option<PreparedKernel>),
    Product(Operation),
}

/// Addresses of an op's operands and constants.
struct Addresses {
    inputs: Vec<u64>,
    outputs: Vec<u64>,
    scratch: u64,
}

impl Addresses {
    /// Where an operand stands; 0 for none.
    ///
    /// # Panics
    /// If the op has no such operand.
    fn of(&self, argument: &Argument) -> u64 {
        match argument {
            Argument::Input(place) => self.inputs[*place],
            Argument::Output(place) => self.outputs[*place],
            Argument::Scratch => self.scratch,
            Argument::Null | Argument::Value(_) => 0,
        }
    }
}

impl Cuda {
    /// The GPU of that number.
    ///
    /// # Errors
    /// No driver, GPU or library, or one that is too old; a `DDPM_DIST_CUDA_GRAPH` or `DDPM_DIST_CUDA_PLANS` that says nothing known.
    pub fn open(ordinal: usize) -> Result<Cuda, CudaError> {
        Cuda::with(Gpu::open(ordinal)?)
    }

    /// The same for copies, libraries and sums between GPUs alone, in a program that has no kernels.
    ///
    /// # Errors
    /// No driver, GPU or library, or one that is too old.
    pub fn without_kernels(ordinal: usize) -> Result<Cuda, CudaError> {
        Cuda::with(Gpu::without_kernels(ordinal)?)
    }

    fn with(gpu: Gpu) -> Result<Cuda, CudaError> {
        let graphs = Graphs::new()?;
        let workspace = gpu.allocate(WORKSPACE)?;
        let blas = Blas::open(gpu.stream().cu_stream(), workspace)?;
        let (name, dnn) = (gpu.name()?, Dnn::open(&gpu)?);
        let (capability, cudnn, cublaslt) = (gpu.compute_capability()?, dnn.version(), blas.version());
        let card = Card { gpu: name.clone(), capability, cudnn, cublaslt };
        let plans = Plans::of(card, WORKSPACE)?;
        let (buffers, constants) = (vec![], vec![]);
        Ok(Cuda { gpu, name, dnn, blas, workspace, graphs, plans, buffers, constants })
    }

    /// `NVIDIA H200, cuDNN 9.10.2`
    pub fn describe(&self) -> String {
        format!("{}, cuDNN {}", self.name, self.dnn.version())
    }

    /// `NVIDIA H200`
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of all buffers, and of what else is taken from the GPU's memory here.
    pub fn memory(&self) -> u64 {
        let constants = self.constants.iter().map(|(_, memory)| memory);
        self.buffers.iter().chain(constants).chain([&self.workspace]).map(|memory| memory.bytes as u64).sum()
    }

    /// What it computes on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Allocates a zeroed buffer.
    ///
    /// # Errors
    /// Too little memory.
    pub fn allocate(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        let memory = self.gpu.allocate(bytes).map_err(|error| match error.is_out_of_memory() {
            true => DeviceError::OutOfMemory { device: "the GPU".into(), bytes },
            false => error.into(),
        })?;
        self.gpu.clear(memory)?;
        self.buffers.push(memory);
        Ok(BufferId(self.buffers.len() - 1))
    }

    /// A range of a buffer.
    ///
    /// # Panics
    /// If it lies outside.
    fn part<T: Element>(&self, buffer: BufferId, offset: usize, len: usize) -> Memory {
        let memory = self.buffers[buffer.0];
        let (first, bytes) = (offset * size_of::<T>(), len * size_of::<T>());
        assert!(first + bytes <= memory.bytes, "{bytes} bytes from {first} on of a buffer of {}", memory.bytes);
        Memory { address: memory.address + first as u64, bytes }
    }

    /// Floats of a buffer, for a library.
    ///
    /// # Panics
    /// If they lie outside.
    pub fn floats(&self, buffer: BufferId, range: &Range<usize>) -> Memory {
        self.part::<f32>(buffer, range.start, range.len())
    }

    /// Copies `data` into a buffer from element `offset` on.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If it lies outside.
    pub fn upload<T: Element>(&self, buffer: BufferId, offset: usize, data: &[T]) -> Result<(), CudaError> {
        self.gpu.upload(self.part::<T>(buffer, offset, data.len()), bytes_of(data))
    }

    /// Copies elements from `offset` on out of a buffer.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If they lie outside.
    pub fn download<T: Element>(&self, buffer: BufferId, offset: usize, out: &mut [T]) -> Result<(), CudaError> {
        self.gpu.download_to(self.part::<T>(buffer, offset, out.len()), bytes_of_mut(out))
    }

    /// Has a plan for each of these pieces, by a search where it knows none. Gives false if it left off, as `goes_on` said.
    ///
    /// # Errors
    /// There is none for one of them, too little memory, or the GPU or a library fails.
    pub fn find_plans(&mut self, pieces: &[Piece], goes_on: &dyn Fn() -> bool) -> Result<bool, CudaError> {
        let Cuda { gpu, dnn, blas, plans, .. } = self;
        plans.find(&mut Libraries { gpu, dnn, blas }, pieces, goes_on)
    }

    /// How many of these pieces need a search, which takes seconds for each.
    pub fn unknown_plans(&self, pieces: &[Piece]) -> usize {
        self.plans.unknown(pieces)
    }

    /// Takes plans from a table, where a piece has none yet. Gives false if they are for another card.
    pub fn prefer_plans(&mut self, table: &PlanTable) -> bool {
        self.plans.prefer(table)
    }

    /// How convolutions and products are computed.
    pub fn plans(&self) -> PlanTable {
        self.plans.in_use()
    }

    /// What plans hold for.
    pub fn card(&self) -> &Card {
        self.plans.card()
    }

    /// An op's work on operands whose buffers are known.
    ///
    /// # Errors
    /// What the GPU or a library cannot do.
    ///
    /// # Panics
    /// If a slot lies outside its buffer or has none, or the work names operands that the op has not: errors of the program.
    pub fn prepare(
        &mut self,
        work: &Work,
        operands: &Operands<'_>,
        binding: &Binding,
    ) -> Result<Vec<Command>, CudaError> {
        let constants = work.constants.iter().map(|bytes| self.constant(bytes)).collect::<Result<Vec<_>, _>>()?;
        let at = |slot: &Slot| self.address(slot, binding);
        let addresses = Addresses {
            inputs: operands.inputs.iter().map(at).chain(constants).collect(),
            outputs: operands.outputs.iter().map(at).collect(),
            scratch: operands.scratch.as_ref().map_or(0, at),
        };
        work.steps.iter().map(|step| self.prepare_step(step, &addresses)).collect()
    }

    fn address(&self, slot: &Slot, binding: &Binding) -> u64 {
        let Some(id) = binding.get(slot.region) else { panic!("no buffer for region {}", slot.region.name()) };
        let memory = self.buffers[id.0];
        let end = slot.len.checked_mul(slot.dtype.size()).and_then(|bytes| bytes.checked_add(slot.offset));
        assert!(end.is_some_and(|end| end <= memory.bytes), "slot outside its buffer: {slot:?}");
        memory.address + slot.offset as u64
    }

    /// The address of a copy of `bytes`.
    fn constant(&mut self, bytes: &[u8]) -> Result<u64, CudaError> {
        if let Some((_, memory)) = self.constants.iter().find(|(known, _)| known == bytes) {
            return Ok(memory.address);
        }
        let memory = self.gpu.allocate(bytes.len())?;
        self.gpu.upload(memory, bytes)?;
        self.constants.push((bytes.to_vec(), memory));
        Ok(memory.address)
    }

    fn prepare_step(&mut self, step: &Step, addresses: &Addresses) -> Result<Command, CudaError> {
        Ok(Command(match step {
            Step::Kernel(launch) => Kind::Kernel(self.gpu.prepare(launch, |argument| addresses.of(argument))?),
            Step::Product(product) => self.prepare_product(product, addresses)?,
            Step::Convolution(convolution) => self.prepare_convolution(convolution, addresses)?,
        }))
    }

    fn prepare_product(&mut self, of: &Product, addresses: &Addresses) -> Result<Kind, CudaError> {
        let at = of.addresses(|argument| addresses.of(argument));
        let product = of.aligned(&at);
        self.find_plans(&[Piece::Product(product)], &|| true)?;
        let Some(choice) = self.plans.product(&product) else { unreachable!("it has just been found") };
        Ok(Kind::Product(self.blas.prepare(choice, at)?))
    }

    fn prepare_convolution(&mut self, of: &Convolution, addresses: &Addresses) -> Result<Kind, CudaError> {
        self.find_plans(&[Piece::Convolution(of.shape)], &|| true)?;
        let Some(plan) = self.plans.convolution(&of.shape) else { unreachable!("it has just been found") };
        let [x, weight, y, bias, residual] =
            [&of.x, &of.weight, &of.y, &of.bias, &of.residual].map(|argument| addresses.of(argument));
        let at = ConvolutionAddresses { x, weight, y, bias, residual };
        // SAFETY: they are addresses of slots inside their buffers, and this thread has the library for itself.
        let prepared = unsafe { plan.prepare(&at, self.workspace.address) }?;
        let left = match (plan.rest(), of.shape.adds) {
            (Rest::Nothing, _) => return Ok(Kind::Convolution(prepared, None)),
            (Rest::Bias, _) => &of.bias_kernel,
            (Rest::Gradient(precision), adds) if precision == output_precision(&of.shape) && adds => &of.add_kernel,
            (Rest::Gradient(_), false) => &of.cast_kernel,
            (Rest::Gradient(_), true) => &None,
        };
        let Some(launch) = left else {
            let (library, what) = (format!("cuDNN {}", self.dnn.version()), of.shape.to_string());
            let refusals = vec!["the sum of a bf16 gradient and an f32 one is not implemented".into()];
            return Err(CudaError::NoPlan { library, what, refusals });
        };
        let kernel = self.gpu.prepare(launch, |argument| match argument {
            Argument::Scratch => self.workspace.address,
            operand => addresses.of(operand),
        })?;
        Ok(Kind::Convolution(prepared, Some(kernel)))
    }

    /// Returns when all that was begun has ended.
    ///
    /// # Errors
    /// What a kernel or a library did wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.gpu.synchronize()
    }

    /// Begins what was prepared on this device.
    ///
    /// # Errors
    /// What the driver or a library refuses; what goes wrong on the GPU comes with a later call.
    pub fn run(&self, commands: &[Command]) -> Result<(), CudaError> {
        for Command(kind) in commands {
            // SAFETY: buffers live as long as the device, and `prepare` has checked that slots lie inside.
            unsafe {
                match kind {
                    Kind::Kernel(kernel) => self.gpu.begin(kernel)?,
                    Kind::Product(product) => self.blas.run(product)?,
                    Kind::Convolution(convolution, rest) => {
                        convolution.run()?;
                        if let Some(kernel) = rest {
                            self.gpu.begin(kernel)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether what runs often should be captured: until that has failed, or never with `DDPM_DIST_CUDA_GRAPH=off`.
    pub fn makes_graphs(&self) -> bool {
        self.graphs.are_on()
    }

    /// Captures what is begun on this device from now on by this thread, in place of running it.
    ///
    /// # Errors
    /// The driver's.
    pub fn capture(&self) -> Result<Capture, CudaError> {
        Capture::begin(self.gpu.stream())
    }

    /// Begins what was captured on this device.
    ///
    /// # Errors
    /// As [`Cuda::run`].
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: this is the device.
        unsafe { graph.launch() }
    }

    /// Makes no more graphs; [`Cuda::take_notice`] then says why.
    pub fn give_up_graphs(&mut self, why: &str) {
        self.graphs.give_up(why);
    }

    /// Has the user told something about plans.
    pub fn notify(&mut self, notice: String) {
        self.plans.notify(notice);
    }

    /// What the user should know and has not been told.
    pub fn take_notice(&mut self) -> Option<String> {
        self.plans.take_notice().or_else(|| self.graphs.take_notice())
    }
}

/// Type of what a convolution gives.
fn output_precision(shape: &ConvolutionShape) -> Precision {
    if shape.pass == Pass::WeightGradient { Precision::F32 } else { shape.precision }
}

fn bytes_of<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: plain numbers without padding.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

fn bytes_of_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: plain numbers without padding, of which every bit pattern is one.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}
