use super::{Op, ParamLayout, Phase};
use crate::collective::{Collective, CollectiveError, Exchange};
use crate::device::{Binding, Device, DeviceError, Precision, Region, Slot, Target, Tick, cuda};
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// The queue an instruction belongs to. On the CPU they are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Computation, in order.
    Compute,
    /// Communication, beside computation between its start and its wait. It touches gradients, weights, and of the arena what is written
    /// before its start and read after its wait: all of the arena belongs to the compute lane, so that a slot is free as soon as its last
    /// reader there is done.
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
    /// Begins an exchange between ranks.
    Start(Bucket),
    /// Waits for it.
    Wait(Bucket),
}

/// A part of a region that ranks exchange at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its number, from 0, in the order in which gradients are complete.
    pub number: usize,
    /// What becomes of it.
    pub exchange: Exchange,
    /// Where it is.
    pub region: Region,
    /// Elements there: floats of a sum, bytes otherwise.
    pub range: Range<usize>,
}

impl Bucket {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.exchange.in_bytes(&self.range).len()
    }
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
    /// What it is made for.
    pub target: Target,
}

/// Why a program stopped.
#[derive(Debug, Error)]
pub enum RunError {
    /// The ranks could not add up their gradients.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl RunError {
    /// What went wrong between ranks, if that is what it is.
    pub fn collective(&self) -> Option<&CollectiveError> {
        match self {
            RunError::Collective(error) => Some(error),
            RunError::Device(_) => None,
        }
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

    /// Floats of the longest of its sums over ranks; 0 if it has none.
    pub fn longest_sum(&self) -> usize {
        let sums = self.exchanges().filter(|(_, bucket)| bucket.exchange.is_sum());
        sums.map(|(_, bucket)| bucket.range.len()).max().unwrap_or(0)
    }

    /// What ranks exchange, in the order in which it is begun, with the numbers of the instructions that begin it.
    pub fn exchanges(&self) -> impl Iterator<Item = (usize, &Bucket)> {
        self.instructions.iter().enumerate().filter_map(|(number, instruction)| match &instruction.kind {
            Kind::Start(bucket) => Some((number, bucket)),
            Kind::Launch(_) | Kind::Wait(_) => None,
        })
    }

    /// Readies the program for runs with these buffers: all that can be known before the first one.
    ///
    /// # Errors
    /// What the device cannot do.
    ///
    /// # Panics
    /// If the program was made for another kind of device, or a region that it refers to has no buffer.
    pub fn load(self: &Arc<Self>, device: &mut Device, binding: Binding) -> Result<Loaded, DeviceError> {
        assert_eq!(self.target.kind, device.kind(), "a program for another kind of device");
        let commands = match device {
            Device::Cpu(_) if self.target.precision != Precision::F32 => {
                return Err(DeviceError::Precision(self.target.precision));
            }
            Device::Cpu(cpu) => {
                cpu.reserve_scratch(self.thread_scratch);
                vec![]
            }
            Device::Cuda(cuda) => {
                // All at once: what is found is then written once.
                cuda.find_plans(&self.pieces(), &|| true)?;
                let commands = self
                    .instructions
                    .iter()
                    .map(|instruction| instruction.prepare(self.target.precision, cuda, &binding));
                commands.collect::<Result<_, _>>()?
            }
        };
        let longest_sum = self.longest_sum();
        Ok(Loaded { program: self.clone(), binding, commands, longest_sum, replay: Replay::Cold })
    }

    /// What it asks of a GPU's libraries, each once.
    pub fn pieces(&self) -> Vec<cuda::Piece> {
        let mut pieces = Vec::new();
        for piece in self.instructions.iter().flat_map(|instruction| instruction.pieces(self.target.precision)) {
            if !pieces.contains(&piece) {
                pieces.push(piece);
            }
        }
        pieces
    }
}

impl Instruction {
    /// One between ranks.
    pub(super) fn communication(kind: Kind, phase: Phase) -> Instruction {
        let (lane, label) = (Lane::Comm, String::new());
        Instruction { kind, inputs: vec![], outputs: vec![], updates: 0, scratch: None, lane, phase, label }
    }

    /// What the op asks of a GPU; nothing for what is not an op.
    fn work(&self, precision: Precision) -> Option<cuda::Work> {
        let Kind::Launch(op) = &self.kind else { return None };
        let signature = op.signature();
        let specs = signature.inputs.iter().chain(&signature.outputs);
        let slots = self.inputs.iter().chain(&self.outputs);
        // All flat operands of an op are as long.
        let flat = specs.zip(slots).find(|(spec, _)| spec.shape.is_none()).map_or(0, |(_, slot)| slot.len);
        Some(op.cuda(&cuda::Form { precision, updates: self.updates, flat }))
    }

    /// What of that is a library's.
    fn pieces(&self, precision: Precision) -> Vec<cuda::Piece> {
        // Buffers begin at multiples of more than what matters to a library.
        let address = |argument: &cuda::Argument| match argument {
            cuda::Argument::Input(i) => self.inputs.get(*i).map_or(0, |slot| slot.offset as u64),
            cuda::Argument::Output(i) => self.outputs.get(*i).map_or(0, |slot| slot.offset as u64),
            _ => 0,
        };
        let piece = |step: cuda::Step| match step {
            cuda::Step::Kernel(_) => None,
            cuda::Step::Convolution(convolution) => Some(cuda::Piece::Convolution(convolution.shape)),
            cuda::Step::Product(product) => Some(cuda::Piece::Product(product.aligned(&product.addresses(address)))),
        };
        self.work(precision).into_iter().flat_map(|work| work.steps).filter_map(piece).collect()
    }

    /// The same with the addresses of its operands.
    fn prepare(
        &self,
        precision: Precision,
        cuda: &mut cuda::Cuda,
        binding: &Binding,
    ) -> Result<Vec<cuda::Command>, DeviceError> {
        let Some(work) = self.work(precision) else { return Ok(vec![]) };
        let operands = cuda::Operands { inputs: &self.inputs, outputs: &self.outputs, scratch: self.scratch };
        Ok(cuda.prepare(&work, &operands, binding)?)
    }
}

/// A program that is ready to run on a device.
pub struct Loaded {
    program: Arc<Program>,
    binding: Binding,
    /// Of each instruction, on a GPU.
    commands: Vec<Vec<cuda::Command>>,
    /// Floats of the longest sum over ranks; 0 for none.
    longest_sum: usize,
    replay: Replay,
}

/// How far a program on a GPU is on its way to one call of the driver.
enum Replay {
    /// It has not run: libraries still load what they need, and a capture allows that no more.
    Cold,
    /// It has run.
    Warm,
    /// It has been captured.
    Captured(cuda::Graph),
    /// It goes on one by one.
    Single,
}

impl Loaded {
    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Runs all instructions in order, each time with the same collective, which is dropped after this. A GPU captures them at the second
    /// run, unless sums over ranks need the host, and from then on has them as one graph. So have all ranks that add up, or none.
    ///
    /// # Errors
    /// As [`Loaded::run_timed`]. Where a capture fails, the program runs as it did before, and [`Device::take_notice`] says so.
    pub fn run(&mut self, device: &mut Device, collective: &mut dyn Collective) -> Result<(), RunError> {
        if let Replay::Warm = &self.replay {
            self.replay = self.capture(device, collective)?.map_or(Replay::Single, Replay::Captured);
        }
        match (&self.replay, &*device) {
            (Replay::Captured(graph), Device::Cuda(cuda)) => cuda.replay(graph).map_err(DeviceError::from)?,
            _ => self.run_observed(device, collective, &mut |_, _| Ok(()))?,
        }
        if let Replay::Cold = &self.replay {
            self.replay = Replay::Warm;
        }
        Ok(())
    }

    /// The program as a graph, where all ranks that add up in it have one. None of the instructions has run.
    fn capture(&self, device: &mut Device, collective: &mut dyn Collective) -> Result<Option<cuda::Graph>, RunError> {
        let Device::Cuda(cuda) = &*device else { return Ok(None) };
        if self.longest_sum > 0 && collective.needs_the_host() {
            return Ok(None);
        }
        // Twice: no rank captures sums that another does not, nor keeps a graph of them. NCCL wants it so.
        if !self.is_so_everywhere(cuda.makes_graphs(), collective)? {
            return Ok(None);
        }
        if self.longest_sum > 0 {
            // A library that refuses is given up, and with it what it has under way. Programs without sums are each rank's own business.
            collective.come_to_rest()?;
        }
        let graph = match self.record(device, collective) {
            Ok(graph) => Some(graph),
            Err(RunError::Device(why) | RunError::Collective(CollectiveError::Device(why))) => {
                if let Device::Cuda(cuda) = &mut *device {
                    cuda.give_up_graphs(&why.to_string());
                }
                None
            }
            Err(error) => return Err(error),
        };
        if self.is_so_everywhere(graph.is_some(), collective)? {
            return Ok(graph);
        }
        // It waits for graphs that hold sums.
        drop(graph);
        if self.longest_sum > 0 {
            collective.renew(device)?;
        }
        Ok(None)
    }

    /// Whether `mine` holds at all ranks, if they add up in this program, else here.
    fn is_so_everywhere(&self, mine: bool, collective: &mut dyn Collective) -> Result<bool, RunError> {
        if self.longest_sum == 0 {
            return Ok(mine);
        }
        let all = collective.all_gather(vec![u8::from(mine)])?;
        Ok(all.iter().all(|theirs| *theirs == [1]))
    }

    /// All instructions as a graph.
    fn record(&self, device: &mut Device, collective: &mut dyn Collective) -> Result<cuda::Graph, RunError> {
        let Device::Cuda(cuda) = &*device else { unreachable!("graphs are made on GPUs") };
        let capture = cuda.capture().map_err(DeviceError::from)?;
        self.run_observed(device, collective, &mut |_, _| Ok(()))?;
        Ok(capture.end().map_err(DeviceError::from)?)
    }

    /// Runs all instructions in order, and gives the moments before the first and after each by the device's clock. On a GPU, from one to the
    /// next is the time of an instruction; where that is a few microseconds, it is the time that the host takes to begin it.
    ///
    /// # Errors
    /// What the collective or the device reports: the instructions after it have not run.
    pub fn run_timed(&self, device: &mut Device, collective: &mut dyn Collective) -> Result<Vec<Tick>, RunError> {
        let mut ticks = vec![device.tick()?];
        self.run_observed(device, collective, &mut |device, _| {
            ticks.push(device.tick()?);
            Ok(())
        })?;
        Ok(ticks)
    }

    /// Runs, or on a GPU begins, all instructions in order, and calls `then` after each.
    ///
    /// # Errors
    /// Those of `then`, and what the collective or the device reports: the instructions after it have not run.
    pub fn run_observed(
        &self,
        device: &mut Device,
        collective: &mut dyn Collective,
        then: &mut dyn FnMut(&Device, usize) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let Loaded { program, binding, commands, longest_sum, .. } = self;
        if *longest_sum > 0 {
            collective.reserve(device, *longest_sum)?;
        }
        let buffer_of = |region: Region| match binding.get(region) {
            Some(buffer) => buffer,
            None => panic!("no buffer for region {}", region.name()),
        };
        for (number, instruction) in program.instructions.iter().enumerate() {
            match (&instruction.kind, &mut *device) {
                (Kind::Launch(op), Device::Cpu(cpu)) => {
                    let Instruction { inputs, outputs, updates, scratch, .. } = instruction;
                    op.cpu(&cpu.launch(binding, inputs, outputs, *updates, *scratch));
                }
                (Kind::Launch(_), Device::Cuda(cuda)) => {
                    cuda.run(&commands[number]).map_err(DeviceError::from)?;
                }
                (Kind::Start(Bucket { exchange, region, range, .. }), device) => {
                    collective.start(*exchange, device, buffer_of(*region), range.clone())?;
                }
                (Kind::Wait(Bucket { exchange, region, range, .. }), device) => {
                    collective.wait(*exchange, device, buffer_of(*region), range.clone())?;
                }
            }
            then(device, number)?;
        }
        Ok(())
    }
}
