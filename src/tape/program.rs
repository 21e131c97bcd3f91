use super::{Op, ParamLayout, Phase};
use crate::collective::{Collective, CollectiveError};
use crate::device::{Binding, Device, Region, Slot};
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// The queue an instruction belongs to. On the CPU they are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Computation, in order.
    Compute,
    /// Communication, beside computation between its start and its wait. It touches nothing but the gradients: all of the arena belongs to
    /// the compute lane, so that a slot is free as soon as its last reader there is done.
    Comm,
}

impl Lane {
    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Compute => "compute",
            Lane::Comm => "comm",
        }
    }
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Runs an op.
    Launch(Arc<dyn Op>),
    /// Begins the sum over ranks of a range of the gradient buffer.
    ReduceStart {
        /// Number of the bucket.
        bucket: usize,
        /// Elements of the flat buffer.
        range: Range<usize>,
    },
    /// Waits for that sum.
    ReduceWait {
        /// Number of the bucket.
        bucket: usize,
        /// Elements of the flat buffer.
        range: Range<usize>,
    },
}

/// One instruction of a program; all places are known.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// What it does.
    pub kind: Kind,
    /// Where it reads.
    pub inputs: Vec<Slot>,
    /// Where it writes.
    pub outputs: Vec<Slot>,
    /// Bit i: output i is added to or changed in place.
    pub updates: u32,
    /// Workspace in the arena.
    pub scratch: Option<Slot>,
    /// Its queue.
    pub lane: Lane,
    /// The part of the step it belongs to.
    pub phase: Phase,
    /// The part of the model it belongs to.
    pub label: String,
}

/// A named input or output of a program.
#[derive(Clone, Debug)]
pub struct IoSlot {
    /// Its name.
    pub name: String,
    /// Its place in [`Region::Io`].
    pub slot: Slot,
}

/// A static list of instructions: a training step or a sampling step.
#[derive(Clone, Debug)]
pub struct Program {
    /// What is run, in order.
    pub instructions: Vec<Instruction>,
    /// Places of the parameters.
    pub layout: ParamLayout,
    /// Named inputs and outputs.
    pub io: Vec<IoSlot>,
    /// Size of the Io region.
    pub io_bytes: usize,
    /// Size of the arena.
    pub arena_bytes: usize,
    /// Floats of workspace that each CPU thread needs.
    pub thread_scratch: usize,
}

/// Why a program stopped.
#[derive(Debug, Error)]
pub enum RunError {
    /// The ranks could not add up their gradients.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl RunError {
    /// What went wrong between ranks, if that is what it is.
    pub fn collective(&self) -> Option<&CollectiveError> {
        let RunError::Collective(error) = self;
        Some(error)
    }
}

impl Program {
    /// Place of a named input or output, to be looked up before the loop.
    ///
    /// # Panics
    /// If the program has none of that name.
    pub fn io(&self, name: &str) -> Slot {
        match self.io.iter().find(|i| i.name == name) {
            Some(io) => io.slot,
            None => panic!("the program has no input or output named {name}"),
        }
    }

    /// Runs all instructions in order.
    ///
    /// # Errors
    /// As [`Program::run_observed`].
    pub fn run(&self, device: &mut Device, binding: &Binding, collective: &mut dyn Collective) -> Result<(), RunError> {
        self.run_observed(device, binding, collective, &mut |_| ())
    }

    /// Runs all instructions in order and calls `done` with the number of each that has been completed.
    ///
    /// # Errors
    /// What the collective reports: the instructions after it have not run.
    pub fn run_observed(
        &self,
        device: &mut Device,
        binding: &Binding,
        collective: &mut dyn Collective,
        done: &mut dyn FnMut(usize),
    ) -> Result<(), RunError> {
        let Device::Cpu(cpu) = &mut *device;
        cpu.reserve_scratch(self.thread_scratch);
        let gradients = || match binding.get(Region::Gradients) {
            Some(buffer) => buffer,
            None => panic!("no buffer for region {}", Region::Gradients.name()),
        };
        for (number, instruction) in self.instructions.iter().enumerate() {
            match &instruction.kind {
                Kind::Launch(op) => {
                    let Instruction { inputs, outputs, updates, scratch, .. } = instruction;
                    let Device::Cpu(cpu) = &mut *device;
                    op.cpu(&cpu.launch(binding, inputs, outputs, *updates, *scratch));
                }
                Kind::ReduceStart { range, .. } => collective.all_reduce_start(device, gradients(), range.clone())?,
                Kind::ReduceWait { range, .. } => collective.all_reduce_wait(device, gradients(), range.clone())?,
            }
            done(number);
        }
        Ok(())
    }
}
