//! A step whose update is divided among the ranks: each has the sum of its slice of the gradients, updates its slice of the parameters with
//! its slice of the optimiser's state, and gives what it has updated to all.
//!
//! This is a rewrite of a program that sums whole buckets and updates everything on each rank. Each bucket is divided into equal slices, one
//! for each rank. Of an op of the update that works on flat buffers there is then one launch for each bucket, on this rank's slice of it;
//! what such an op writes and all ranks have is gathered. What only this rank needs, and keeps, stands slice after slice in buffers of the
//! rank's own: slice [s, e)/n for the bucket [s, e) of n ranks.

use super::program::{Bucket, Instruction, Kind, Program};
use super::{Op, ParamLayout, Phase, Spec};
use crate::collective::{Exchange, slice_of};
use crate::device::{Region, Slot};
use std::ops::Range;

/// How an update is divided.
#[derive(Clone, Copy, Debug)]
pub struct Slices<'a> {
    /// The rank whose program it is …
    pub rank: usize,
    /// … of so many.
    pub ranks: usize,
    /// The flat buffers of which a rank has its slices only.
    pub own: &'a [Region],
}

/// The same step, divided. Its buckets are multiples of what ops make one result of, for each rank.
///
/// # Panics
/// If a bucket has no such slices.
pub fn in_slices(program: Program, slices: &Slices<'_>) -> Program {
    let layout = &program.layout;
    let mut divided = Divided { slices, layout, buckets: vec![], instructions: vec![], gathered: vec![] };
    for instruction in program.instructions {
        divided.add(instruction);
    }
    divided.wait();
    let instructions = divided.instructions;
    Program { instructions, ..program }
}

/// A divided program in the making.
struct Divided<'a> {
    slices: &'a Slices<'a>,
    layout: &'a ParamLayout,
    /// Elements of the flat buffers, in the order in which they are summed.
    buckets: Vec<Range<usize>>,
    instructions: Vec<Instruction>,
    /// What is being gathered.
    gathered: Vec<Bucket>,
}

impl Divided<'_> {
    fn add(&mut self, instruction: Instruction) {
        let scattered = |bucket| Bucket { exchange: Exchange::ReduceScatter, ..bucket };
        match instruction.kind.clone() {
            Kind::Start(bucket) => {
                self.buckets.push(bucket.range.clone());
                self.instructions.push(Instruction { kind: Kind::Start(scattered(bucket)), ..instruction });
            }
            Kind::Wait(bucket) => {
                self.instructions.push(Instruction { kind: Kind::Wait(scattered(bucket)), ..instruction });
            }
            Kind::Launch(op) if instruction.phase == Phase::Update => self.divide(&*op, instruction),
            Kind::Launch(_) => self.instructions.push(instruction),
        }
    }

    /// An op of the update: on this rank's slice of each bucket, or on what has been gathered.
    fn divide(&mut self, op: &dyn Op, instruction: Instruction) {
        let signature = op.signature();
        let is_flat = |spec: &Spec| spec.shape.is_none() && spec.block == 1;
        if !signature.inputs.iter().chain(&signature.outputs).any(is_flat) {
            self.wait();
            return self.instructions.push(instruction);
        }
        for (number, bucket) in self.buckets.clone().into_iter().enumerate() {
            let own = |slots: &[Slot], specs: &[Spec]| -> Vec<Slot> {
                slots.iter().zip(specs).map(|(slot, spec)| self.slices.slot(slot, spec, &bucket)).collect()
            };
            let inputs = own(&instruction.inputs, &signature.inputs);
            let outputs = own(&instruction.outputs, &signature.outputs);
            let slice = slice_of(&bucket, self.slices.rank, self.slices.ranks);
            let part = op.of_parameters(self.layout.parameters_in(&slice)).map(Kind::Launch);
            let kind = part.unwrap_or_else(|| instruction.kind.clone());
            self.instructions.push(Instruction { kind, inputs, outputs, ..instruction.clone() });
            for (slot, spec) in instruction.outputs.iter().zip(&signature.outputs) {
                if spec.shape.is_none() && !self.slices.own.contains(&slot.region) {
                    self.gather(number, slot, spec, &bucket);
                }
            }
        }
    }

    /// Begins to gather what the ranks have written of a bucket.
    fn gather(&mut self, number: usize, slot: &Slot, spec: &Spec, bucket: &Range<usize>) {
        let byte = |element: usize| slot.offset + element / spec.block * slot.dtype.size();
        let range = byte(bucket.start)..byte(bucket.end);
        let bucket = Bucket { number, exchange: Exchange::AllGather, region: slot.region, range };
        self.instructions.push(Instruction::communication(Kind::Start(bucket.clone()), Phase::Update));
        self.gathered.push(bucket);
    }

    /// Waits for all that is being gathered.
    fn wait(&mut self) {
        let wait = |bucket| Instruction::communication(Kind::Wait(bucket), Phase::Update);
        self.instructions.extend(self.gathered.drain(..).map(wait));
    }
}

impl Slices<'_> {
    /// This rank's part of an operand: all of it, unless there is some for each element of a flat buffer.
    fn slot(&self, slot: &Slot, spec: &Spec, bucket: &Range<usize>) -> Slot {
        if spec.shape.is_some() {
            return *slot;
        }
        let own = slice_of(bucket, self.rank, self.ranks);
        let first = if self.own.contains(&slot.region) { bucket.start / self.ranks } else { own.start };
        assert!(first.is_multiple_of(spec.block) && own.len().is_multiple_of(spec.block), "{own:?}: no slice");
        let offset = slot.offset + first / spec.block * slot.dtype.size();
        Slot { offset, len: own.len() / spec.block, ..*slot }
    }
}
