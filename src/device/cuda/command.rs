//! An op's work with the addresses of its operands, ready to be begun as often as it is wanted.

use super::blas::Operation;
use super::dnn::{ConvolutionAddresses, PreparedConvolution, Rest};
use super::{
    Argument, Convolution, ConvolutionShape, Cuda, CudaError, Pass, Piece, Precision, PreparedKernel, Product, Step,
    Work,
};
use crate::device::{Binding, Slot};

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
        let commands = work.steps.iter().map(|step| self.prepare_step(step, &addresses)).collect::<Result<_, _>>();
        commands.map_err(|error| self.cause(error))
    }

    /// What lies behind a refusal: where the card has failed, the driver says more than a library that notices it.
    fn cause(&self, error: CudaError) -> CudaError {
        match error {
            CudaError::Library { .. } | CudaError::NoPlan { .. } => self.gpu.lost().unwrap_or(error),
            other => other,
        }
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
            (Rest::Gradient(_), _) => &of.cast_kernel,
        };
        let Some(launch) = left else { panic!("{}: no kernel for what cuDNN leaves", of.shape) };
        let kernel = self.gpu.prepare(launch, |argument| match argument {
            Argument::Scratch => self.workspace.address,
            operand => addresses.of(operand),
        })?;
        Ok(Kind::Convolution(prepared, Some(kernel)))
    }

    /// Begins what was prepared on this device.
    ///
    /// # Errors
    /// What the driver or a library refuses; what goes wrong on the GPU comes with a later call.
    pub fn run(&self, commands: &[Command]) -> Result<(), CudaError> {
        self.run_each(commands).map_err(|error| self.cause(error))
    }

    fn run_each(&self, commands: &[Command]) -> Result<(), CudaError> {
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
}

/// Type of what a convolution gives.
fn output_precision(shape: &ConvolutionShape) -> Precision {
    if shape.pass == Pass::WeightGradient { Precision::F32 } else { shape.precision }
}
