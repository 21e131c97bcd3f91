//! The order of parameters, and the sums over ranks, in a UNet's training step.

use super::super::*;
use crate::collective::fake::{Clock, Cost, Event, Fake};
use crate::collective::{Collective, CollectiveError, Exchange, Solo};
use crate::device::{ALIGNMENT, Binding, Device, Region, Slot, cpu::Cpu};
use crate::ops::grad_norm::grad_norm;
use crate::ops::testing::random;
use crate::unet::{UnetConfig, unet};
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
    for (first, other, tail) in [(1, 1, 1), (4 << 10, 16 << 10, 8 << 10), (1 << 20, 25 << 20, 8 << 20)] {
        let (_, program) = unet_program(Buckets { first, other, tail });
        let mut end = 0;
        let mut started = 0;
        let mut waited = 0;
        for (number, instruction) in program.instructions.iter().enumerate() {
            match &instruction.kind {
                Kind::Start(Bucket { number: bucket, exchange, region, range }) => {
                    assert_eq!((*exchange, *region), (Exchange::AllReduce, Region::Gradients));
                    let here = (*bucket, range.start);
                    assert_eq!(here, (started, end), "buckets are begun in the order of their places");
                    assert!(range.start * 4 % ALIGNMENT == 0 && range.end > range.start);
                    assert!(completed(&program, range).unwrap() < number, "bucket {bucket} is reduced too early");
                    let left = (program.layout.len() - range.start) * 4;
                    let before_the_tail = left.saturating_sub(other);
                    let limit = if started == 0 { first } else { other.min(before_the_tail).max(tail) };
                    let whole = range.len() * 4 >= limit || range.end == program.layout.len();
                    assert!(whole, "bucket {bucket} of {} bytes is smaller than asked for", range.len() * 4);
                    end = range.end;
                    started += 1;
                }
                Kind::Wait(bucket) => {
                    assert_eq!(bucket.number, waited);
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
    let moved = plan(&tape, Some(&layout), Some(Buckets { first: 1 << 10, other: 4 << 10, tail: 2 << 10 }.into()));
    assert_eq!(moved.layout, layout);
    assert_ne!(moved.layout, program.layout);
    let ranges: Vec<_> = moved.exchanges().map(|(number, bucket)| (number, bucket.range.clone())).collect();
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

const SMALL: Buckets = Buckets { first: 4 << 10, other: 16 << 10, tail: 16 << 10 };

/// One of two ranks with equal gradients.
fn pair() -> Fake {
    Fake::new(0, 2, Clock::default(), Cost { each: Duration::ZERO, per_byte: 0.0 })
}

/// Gradients and norm of a UNet's step, or the error it ended with, and the number of instructions that were done.
fn run_with(collective: &mut dyn Collective) -> (Result<(Vec<f32>, f32), RunError>, usize) {
    let (_, program) = unet_program(SMALL);
    let mut done = 0;
    (run_observed(&program, collective, &mut |_| done += 1), done)
}

fn run_observed(
    program: &Program,
    collective: &mut dyn Collective,
    done: &mut dyn FnMut(usize),
) -> Result<(Vec<f32>, f32), RunError> {
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
    device.upload(weights, 0, &small).unwrap();
    for (name, seed) in [("x", 2), ("dout", 3)] {
        let slot = program.io(name);
        device.upload(io, slot.offset / 4, &random(seed, slot.len)).unwrap();
    }
    let program = std::sync::Arc::new(program.clone());
    program.load(&mut device, binding)?.run_observed(&mut device, collective, &mut |_, number| {
        done(number);
        Ok(())
    })?;
    let (mut found, mut norm) = (vec![0.0; flat], [0.0f32; 2]);
    device.download(gradients, 0, &mut found)?;
    device.download(io, program.io("norm").offset / 4, &mut norm)?;
    Ok((found, norm[0]))
}

#[test]
fn every_gradient_is_summed_over_the_ranks_once_and_before_the_update() {
    let (alone, _) = run_with(&mut Solo);
    let mut pair = pair();
    let (together, _) = run_with(&mut pair);
    let begun = pair.begun().len();
    assert!(begun > 3 && pair.events().len() == 2 * begun, "{pair:?}");
    let ((alone, norm), (together, norm_together)) = (alone.unwrap(), together.unwrap());
    assert!(norm > 0.0 && norm_together == 2.0 * norm, "the norm is that of the sums");
    assert!(alone.iter().zip(&together).all(|(x, y)| *y == 2.0 * x));
}

#[test]
fn a_lost_rank_ends_the_step_before_the_update() {
    let (_, all) = run_with(&mut Solo);
    let mut pair = pair().losing(1, 2);
    let (result, done) = run_with(&mut pair);
    assert!(matches!(result, Err(RunError::Collective(CollectiveError::PeerLost { rank: 1, .. }))));
    assert!(done < all && pair.events().len() == 2, "{pair:?}");
}

/// What a step waits for its sums if each takes `BUCKET` and one GFLOP `gflop`: as measured on the events of a run, and by the schedule
/// alone. And the run's collective.
fn exposed(program: &Program, gflop: Duration) -> (Duration, Duration, Fake) {
    let takes = |number: usize| match &program.instructions[number].kind {
        Kind::Launch(op) => gflop.mul_f64(op.flops() as f64 * 1e-9),
        _ => Duration::ZERO,
    };
    let clock = Clock::default();
    let mut fake = Fake::new(0, 4, clock.clone(), Cost { each: BUCKET, per_byte: 0.0 });
    run_observed(program, &mut fake, &mut |number| clock.pass(takes(number))).unwrap();

    // The compute lane without any waiting, and the sums behind it.
    let (mut computed, mut summed) = (Duration::ZERO, Duration::ZERO);
    let mut late = Duration::ZERO;
    for (number, instruction) in program.instructions.iter().enumerate() {
        match instruction.kind {
            Kind::Launch(_) => computed += takes(number),
            Kind::Start(_) => summed = summed.max(computed) + BUCKET,
            Kind::Wait(_) => late = summed.saturating_sub(computed),
        }
    }
    (fake.exposed(), late, fake)
}

const BUCKET: Duration = Duration::from_millis(200);

#[test]
fn the_backward_pass_covers_the_sums_that_it_can() {
    let (_, program) = unet_program(SMALL);
    let backward: u64 = launches(&program)
        .filter(|(_, i)| i.phase == Phase::Backward)
        .map(|(_, i)| match &i.kind {
            Kind::Launch(op) => op.flops(),
            _ => 0,
        })
        .sum();
    // How long a GFLOP takes if all of the backward pass takes so many buckets' time.
    let speed = |buckets: f64| BUCKET.mul_f64(buckets / (backward as f64 * 1e-9));
    let mut all = Duration::ZERO;
    let mut waits = Vec::new();
    for buckets in [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, 10_000.0] {
        let (measured, predicted, fake) = exposed(&program, speed(buckets));
        assert_eq!(measured, predicted, "backward takes {buckets} buckets");
        all = BUCKET * fake.begun().len() as u32;
        waits.push(measured);
        // Every sum is begun before any is waited for: those of a step do not wait for each other's turn.
        let first_wait = fake.events().iter().position(|e| matches!(e, Event::Waited { .. }));
        assert_eq!(first_wait, Some(fake.begun().len()));
    }
    assert!(all >= 4 * BUCKET, "{all:?}");
    assert_eq!(waits[0], all, "nothing is computed, nothing covered");
    assert_eq!(*waits.last().unwrap(), BUCKET, "all but the last, which no computation comes after");
    assert!(waits.is_sorted_by(|a, b| a >= b) && waits[3] < all, "{waits:?}");

    // What this test would see if sums were waited for as soon as they are begun.
    let mut eager = program.clone();
    eager.instructions.retain(|i| !matches!(i.kind, Kind::Wait(_)));
    for number in (0..eager.instructions.len()).rev() {
        if let Kind::Start(bucket) = eager.instructions[number].kind.clone() {
            let wait = Instruction { kind: Kind::Wait(bucket), ..eager.instructions[number].clone() };
            eager.instructions.insert(number + 1, wait);
        }
    }
    assert_eq!(exposed(&eager, speed(100.0)).0, all);
}
