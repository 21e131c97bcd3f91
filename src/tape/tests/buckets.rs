//! The order of parameters, and the sums over ranks, in a UNet's training step.

use super::super::*;
use crate::collective::{Collective, CollectiveError, Solo};
use crate::device::{ALIGNMENT, Binding, BufferId, Device, Region, Slot, cpu::Cpu};
use crate::ops::grad_norm::grad_norm;
use crate::ops::testing::random;
use crate::unet::{UnetConfig, unet};
use std::ops::Range;
use std::time::Duration;

/// A UNet's gradients with small buckets: attention (fused q/k/v), shared timestep projections, skips.
fn unet_program(buckets: Buckets) -> (Tape, Program) {
    let config = UnetConfig {
        image_channels: 1,
        channels: vec![8, 16],
        blocks: 1,
        attention_levels: vec![0],
        groups: 4,
        ..UnetConfig::default()
    };
    let mut tape = Tape::new();
    let x = tape.io("x", Spec::f32([2, 8, 8, 1]));
    let t = tape.io("t", Spec::u32([2]));
    let out = unet(&mut tape, &config, x, t, None);
    let dout = tape.io("dout", Spec::f32([2, 8, 8, 1]));
    tape.backward(out, dout);
    tape.begin(Phase::Update);
    let norm = tape.io("norm", Spec::f32([2]));
    grad_norm(&mut tape, norm);
    let program = plan(&tape, None, Some(buckets.into()));
    (tape, program)
}

fn launches(program: &Program) -> impl Iterator<Item = (usize, &Instruction)> {
    program.instructions.iter().enumerate().filter(|(_, i)| matches!(i.kind, Kind::Launch(_)))
}

/// The last instruction of the backward pass that writes to these elements of the gradient buffer.
fn completed(program: &Program, range: &std::ops::Range<usize>) -> Option<usize> {
    let writes = |slot: &Slot| {
        let start = slot.offset / 4;
        slot.region == Region::Gradients && start < range.end && range.start < start + slot.len
    };
    launches(program).filter(|(_, i)| i.outputs.iter().any(writes)).map(|(n, _)| n).last()
}

#[test]
fn parameters_stand_in_the_order_in_which_their_gradients_are_completed() {
    let (tape, program) = unet_program(Buckets::default());
    let mut end = 0;
    let mut previous = 0;
    for placed in program.layout.iter() {
        assert!(placed.range.start >= end, "{} overlaps the parameter before it", placed.name);
        end = placed.range.end;
        let at = completed(&program, &placed.range).unwrap_or_else(|| panic!("{} has no gradient", placed.name));
        assert!(at >= previous, "{} is complete at {at}, the parameter before it at {previous}", placed.name);
        previous = at;
    }
    assert_eq!(program.layout.len() * 4 % ALIGNMENT, 0);
    assert!(program.layout.len() >= end);
    assert_eq!(program.layout.iter().next().unwrap().name, "conv_out.weight");

    // Parts of one parameter without a gap, everything else on its own aligned place.
    for param in tape.params() {
        let ranges: Vec<_> = param.parts.iter().map(|p| program.layout.get(&p.name).unwrap().range.clone()).collect();
        assert_eq!(ranges[0].start * 4 % ALIGNMENT, 0, "{}", param.parts[0].name);
        assert!(ranges.windows(2).all(|w| w[0].end == w[1].start), "{} and its neighbours", param.parts[0].name);
        for (range, part) in ranges.iter().zip(&param.parts) {
            assert_eq!(range.len(), part.shape.len());
        }
    }
    let is_whole = |p: &&Param| p.parts.len() == 3 && p.parts[0].name.ends_with("to_q.weight");
    assert!(tape.params().iter().any(|p| is_whole(&p)), "q, k and v are read as one");
}

#[test]
fn buckets_cover_the_gradients_and_start_when_they_are_complete() {
    for (first, other) in [(1, 1), (4 << 10, 16 << 10), (1 << 20, 25 << 20)] {
        let (_, program) = unet_program(Buckets { first, other });
        let mut end = 0;
        let mut started = 0;
        let mut waited = 0;
        for (number, instruction) in program.instructions.iter().enumerate() {
            match &instruction.kind {
                Kind::ReduceStart { bucket, range } => {
                    assert_eq!(
                        (*bucket, range.start),
                        (started, end),
                        "buckets are begun in the order of their places"
                    );
                    assert!(range.start * 4 % ALIGNMENT == 0 && range.end > range.start);
                    assert!(completed(&program, range).unwrap() < number, "bucket {bucket} is reduced too early");
                    let limit = if started == 0 { first } else { other };
                    let whole = range.len() * 4 >= limit || range.end == program.layout.len();
                    assert!(whole, "bucket {bucket} of {} bytes is smaller than asked for", range.len() * 4);
                    end = range.end;
                    started += 1;
                }
                Kind::ReduceWait { bucket, .. } => {
                    assert_eq!(*bucket, waited);
                    waited += 1;
                }
                Kind::Launch(_) if instruction.phase == Phase::Update => {
                    assert_eq!(waited, started, "an update reads gradients that are not summed");
                }
                Kind::Launch(_) => assert_eq!(waited, 0, "the backward pass waits for no sum"),
            }
        }
        assert_eq!(end, program.layout.len(), "all gradients are summed");
        assert_eq!(waited, started);
        assert_eq!(started == 1, first == 1 << 20, "{started} buckets of {first} and {other} bytes");
    }
}

#[test]
fn a_program_can_take_the_layout_of_another() {
    let (tape, program) = unet_program(Buckets::default());
    let reversed: Vec<Param> = tape.params().iter().rev().cloned().collect();
    let layout = ParamLayout::new(reversed.iter());
    let moved = plan(&tape, Some(&layout), Some(Buckets { first: 1 << 10, other: 4 << 10 }.into()));
    assert_eq!(moved.layout, layout);
    assert_ne!(moved.layout, program.layout);
    let ranges: Vec<_> = moved
        .instructions
        .iter()
        .enumerate()
        .filter_map(|(n, i)| match &i.kind {
            Kind::ReduceStart { range, .. } => Some((n, range.clone())),
            _ => None,
        })
        .collect();
    assert_eq!((ranges[0].1.start, ranges[ranges.len() - 1].1.end), (0, layout.len()));
    assert!(ranges.iter().all(|(n, range)| completed(&moved, range).unwrap() < *n));
}

#[test]
fn an_unaligned_end_leaves_a_gap_and_a_joint_parameter_does_not() {
    let part = |name: &str, len: usize| Part { name: name.into(), shape: [len].into() };
    let single = |name: &str, len: usize| Param { shape: [len].into(), parts: vec![part(name, len)] };
    let joint = Param { shape: [13].into(), parts: vec![part("q", 3), part("k", 5), part("v", 5)] };
    let params = [single("a", 1), joint, single("b", 64), single("c", 65)];
    let layout = ParamLayout::new(params.iter());
    let ranges: Vec<_> = layout.iter().map(|p| (p.name.as_str(), p.range.clone())).collect();
    assert_eq!(ranges, [("a", 0..1), ("q", 64..67), ("k", 67..72), ("v", 72..77), ("b", 128..192), ("c", 192..257)]);
    assert_eq!((layout.len(), layout.parameters()), (320, 143));
}

#[test]
#[should_panic(expected = "no input or output named nothing")]
fn an_unknown_name_is_a_fault_of_the_caller() {
    unet_program(Buckets::default()).1.io("nothing");
}

/// Two ranks with equal gradients: what is summed is doubled when it is waited for. Fails when it is to begin sum number `fails_at`.
#[derive(Debug)]
struct Pair {
    begun: Vec<Range<usize>>,
    waited: usize,
    fails_at: usize,
}

impl Collective for Pair {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        2
    }

    fn all_reduce_start(&mut self, _: &mut Device, _: BufferId, range: Range<usize>) -> Result<(), CollectiveError> {
        if self.begun.len() == self.fails_at {
            return Err(CollectiveError::PeerLost { rank: 1, operation: "a test".into() });
        }
        self.begun.push(range);
        Ok(())
    }

    fn all_reduce_wait(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        assert_eq!(self.begun[self.waited], range, "sums are waited for in the order in which they were begun");
        self.waited += 1;
        let mut values = vec![0.0f32; range.len()];
        device.download(buffer, range.start, &mut values);
        values.iter_mut().for_each(|x| *x *= 2.0);
        device.upload(buffer, range.start, &values);
        Ok(())
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![mine.clone(), mine])
    }

    fn set_patience(&mut self, _: Duration) {}
}

/// Gradients and norm of a UNet's step, or the error it ended with, and the number of instructions that were done.
fn run_with(collective: &mut dyn Collective) -> (Result<(Vec<f32>, f32), RunError>, usize) {
    let (_, program) = unet_program(Buckets { first: 4 << 10, other: 16 << 10 });
    let mut device = Device::Cpu(Cpu::new(2));
    let flat = program.layout.len();
    let [io, arena, weights, gradients] =
        [program.io_bytes, program.arena_bytes, 4 * flat, 4 * flat].map(|bytes| device.allocate(bytes).unwrap());
    let binding = Binding::default()
        .with(Region::Io, io)
        .with(Region::Arena, arena)
        .with(Region::Weights, weights)
        .with(Region::Gradients, gradients);
    let small: Vec<f32> = random(1, flat).iter().map(|x| 0.1 * x).collect();
    device.upload(weights, 0, &small);
    for (name, seed) in [("x", 2), ("dout", 3)] {
        let slot = program.io(name);
        device.upload(io, slot.offset / 4, &random(seed, slot.len));
    }
    let mut done = 0;
    let result = program.run_observed(&mut device, &binding, collective, &mut |_| done += 1).map(|()| {
        let (mut found, mut norm) = (vec![0.0; flat], [0.0f32; 2]);
        device.download(gradients, 0, &mut found);
        device.download(io, program.io("norm").offset / 4, &mut norm);
        (found, norm[0])
    });
    (result, done)
}

#[test]
fn every_gradient_is_summed_over_the_ranks_once_and_before_the_update() {
    let (alone, _) = run_with(&mut Solo);
    let mut pair = Pair { begun: vec![], waited: 0, fails_at: usize::MAX };
    let (together, _) = run_with(&mut pair);
    assert!(pair.begun.len() > 3 && pair.waited == pair.begun.len(), "{pair:?}");
    let ((alone, norm), (together, norm_together)) = (alone.unwrap(), together.unwrap());
    assert!(norm > 0.0 && norm_together == 2.0 * norm, "the norm is that of the sums");
    assert!(alone.iter().zip(&together).all(|(x, y)| *y == 2.0 * x));
}

#[test]
fn a_lost_rank_ends_the_step_before_the_update() {
    let (_, all) = run_with(&mut Solo);
    let mut pair = Pair { begun: vec![], waited: 0, fails_at: 2 };
    let (result, done) = run_with(&mut pair);
    assert!(matches!(result, Err(RunError::Collective(CollectiveError::PeerLost { rank: 1, .. }))));
    assert!(done < all && pair.waited == 0);
}
