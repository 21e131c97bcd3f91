//! A program as something a person can read.

use super::{Bucket, Instruction, Kind, Phase, Program};
use crate::collective::Exchange;
use crate::device::{DType, Slot};
use std::fmt::Write;

/// What a program needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of parameters.
    pub parameters: usize,
    /// Multiply-adds counted twice, in the forward pass.
    pub forward_flops: u64,
    /// The same, in the whole program.
    pub flops: u64,
    /// Bytes that all operands of all instructions make up.
    pub bytes_moved: u64,
    /// Instructions.
    pub instructions: usize,
    /// Bytes of one flat buffer (weights, gradients, each moment, average).
    pub flat_bytes: usize,
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Bytes of inputs and results.
    pub io_bytes: usize,
}

/// The instructions of one name in one phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpGroup {
    /// The part of the step.
    pub phase: Phase,
    /// Name of the op or of the communication.
    pub name: &'static str,
    /// Their numbers in the program, in order.
    pub instructions: Vec<usize>,
    /// FLOPs of all of them.
    pub flops: u64,
    /// Bytes that all of them read and write.
    pub bytes: u64,
}

impl Program {
    /// Adds up what the program needs.
    pub fn summary(&self) -> Summary {
        let mut forward_flops = 0;
        let mut flops = 0;
        let mut bytes_moved = 0;
        for instruction in &self.instructions {
            flops += instruction.flops();
            if let Kind::Launch(_) = &instruction.kind {
                bytes_moved += instruction.bytes();
            }
            if instruction.phase == Phase::Forward {
                forward_flops += instruction.flops();
            }
        }
        Summary {
            parameters: self.layout.parameters(),
            forward_flops,
            flops,
            bytes_moved,
            instructions: self.instructions.len(),
            flat_bytes: self.layout.len() * DType::F32.size(),
            arena_bytes: self.arena_bytes,
            io_bytes: self.io_bytes,
        }
    }

    /// All instructions by phase and name, in the order in which the program first meets them.
    pub fn op_groups(&self) -> Vec<OpGroup> {
        let mut groups: Vec<OpGroup> = Vec::new();
        for (number, instruction) in self.instructions.iter().enumerate() {
            let (phase, name) = (instruction.phase, instruction.name());
            let at = groups.iter().position(|g| (g.phase, g.name) == (phase, name)).unwrap_or_else(|| {
                groups.push(OpGroup { phase, name, instructions: Vec::new(), flops: 0, bytes: 0 });
                groups.len() - 1
            });
            let group = &mut groups[at];
            group.instructions.push(number);
            group.flops += instruction.flops();
            group.bytes += instruction.bytes();
        }
        groups
    }

    /// One line per instruction: number, lane, phase, op, part of the model, FLOPs, bytes, where it reads and writes.
    pub fn listing(&self) -> String {
        let mut text = String::new();
        for (number, instruction) in self.instructions.iter().enumerate() {
            let places = |slots: &[Slot]| slots.iter().map(place).collect::<Vec<_>>().join(" ");
            let operands = match &instruction.kind {
                Kind::Start(bucket) | Kind::Wait(bucket) => {
                    let Bucket { number, exchange, region, range } = bucket;
                    let unit = if exchange.is_sum() { DType::F32.name() } else { "B" };
                    let start = exchange.in_bytes(range).start;
                    format!("bucket {number}, {}:{start:#x}+{}{unit}", region.name(), range.len())
                }
                Kind::Launch(_) => {
                    let adds = if instruction.updates != 0 { "+" } else { "" };
                    format!("{} -> {adds}{}", places(&instruction.inputs), places(&instruction.outputs))
                }
            };
            let _ = writeln!(
                text,
                "{number:4} {:7} {:8} {:24} {:44} {:>9} {:>9}  {operands}",
                instruction.lane.name(),
                instruction.phase.name(),
                instruction.name(),
                instruction.label,
                human(instruction.flops() as f64, "F", 1000.0),
                human(instruction.bytes() as f64, "B", 1024.0),
            );
        }
        text
    }
}

impl Instruction {
    /// Name of the op or of the communication.
    pub fn name(&self) -> &'static str {
        match &self.kind {
            Kind::Launch(op) => op.name(),
            Kind::Start(bucket) => match bucket.exchange {
                Exchange::AllReduce => "all_reduce_start",
                Exchange::ReduceScatter => "reduce_scatter_start",
                Exchange::AllGather => "all_gather_start",
            },
            Kind::Wait(bucket) => match bucket.exchange {
                Exchange::AllReduce => "all_reduce_wait",
                Exchange::ReduceScatter => "reduce_scatter_wait",
                Exchange::AllGather => "all_gather_wait",
            },
        }
    }

    /// Floating-point operations; a multiply-add is two.
    pub fn flops(&self) -> u64 {
        match &self.kind {
            Kind::Launch(op) => op.flops(),
            _ => 0,
        }
    }

    /// Bytes of all operands; one that is changed in place counts twice, as it is read and written.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::Launch(_) => {
                let inputs: usize = self.inputs.iter().map(Slot::bytes).sum();
                let output = |(i, slot): (usize, &Slot)| slot.bytes() * (1 + (self.updates >> i & 1) as usize);
                (inputs + self.outputs.iter().enumerate().map(output).sum::<usize>()) as u64
            }
            Kind::Start(bucket) | Kind::Wait(bucket) => bucket.bytes() as u64,
        }
    }
}

fn place(slot: &Slot) -> String {
    format!("{}:{:#x}+{}{}", slot.region.name(), slot.offset, slot.len, slot.dtype.name())
}

/// `1234567` as `1.18 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    human(bytes as f64, "B", 1024.0)
}

/// `12440000000` as `12.44 GFLOP`.
pub fn human_flops(flops: u64) -> String {
    human(flops as f64, "FLOP", 1000.0)
}

fn human(value: f64, unit: &str, base: f64) -> String {
    let prefixes: &[&str] = if base == 1024.0 { &["", "Ki", "Mi", "Gi", "Ti"] } else { &["", "k", "M", "G", "T"] };
    let mut value = value;
    let mut step = 0;
    while value >= base && step + 1 < prefixes.len() {
        value /= base;
        step += 1;
    }
    if step == 0 { format!("{value:.0} {unit}") } else { format!("{value:.2} {}{unit}", prefixes[step]) }
}
