//! The planner, on random programs.

mod buckets;
mod fusion;
mod slices;

use super::*;
use crate::collective::Solo;
use crate::device::cuda::{Form, Work};
use crate::device::{ALIGNMENT, Binding, Device, Region, Slot, cpu::Cpu, cpu::Launch};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Any number of inputs and outputs of any lengths: element i of output j is `mix(j, inputs, i)`. Poisons its workspace.
#[derive(Clone, Debug)]
struct Mix {
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    scratch: usize,
}

fn mix(j: usize, inputs: &[&[f32]], i: usize) -> f32 {
    inputs.iter().fold((j + 1) as f32, |sum, input| 0.5 * sum + input[i % input.len()])
}

impl Op for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn signature(&self) -> Signature {
        let specs = |lens: &[usize]| lens.iter().map(|&len| Spec::f32([len])).collect();
        Signature { inputs: specs(&self.inputs), outputs: specs(&self.outputs) }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: self.scratch, thread: 0 }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        launch.scratch().fill(f32::NAN);
        let inputs: Vec<&[f32]> = (0..self.inputs.len()).map(|k| launch.input(k)).collect();
        for j in 0..self.outputs.len() {
            for (i, y) in launch.output::<f32>(j).iter_mut().enumerate() {
                let old = if launch.updates(j) { *y } else { 0.0 };
                *y = old + mix(j, &inputs, i);
            }
        }
    }

    fn cuda(&self, _: &Form) -> Work {
        unreachable!("it runs on the CPU")
    }
}

/// What a random node reads, the lengths of its new outputs, its workspace, and perhaps an older value that it changes in place.
/// Values are named by where they stand among those there are: 0 the oldest, 1 the newest.
type RandomNode = (Vec<f64>, Vec<usize>, usize, Option<f64>);

fn pick(place: f64, len: usize) -> usize {
    ((place * len as f64) as usize).min(len - 1)
}

/// A tape of random nodes over one input, its last node's result in `out`, and every value as an evaluator computes it that gives each
/// value memory of its own.
fn random_tape(nodes: &[RandomNode]) -> (Tape, Vec<f32>) {
    let mut tape = Tape::new();
    let len = |tape: &Tape, v: Var| tape.shape(v).len();
    let x = tape.io("x", Spec::f32([5]));
    let mut values: Vec<(Var, Vec<f32>)> = vec![(x, input())];
    for (reads, lens, scratch, update) in nodes {
        let reads: Vec<usize> = reads.iter().map(|&p| pick(p, values.len())).collect();
        // An op may not write what it reads, and the input is not ours to change.
        let update = update.map(|p| pick(p, values.len())).filter(|i| *i > 0 && !reads.contains(i));
        let vars: Vec<Var> = reads.iter().map(|&i| values[i].0).collect();
        let mut outputs: Vec<Var> =
            lens.iter().map(|&l| tape.temporary([l].into(), crate::device::DType::F32, false)).collect();
        let inputs: Vec<&[f32]> = reads.iter().map(|&i| &values[i].1[..]).collect();
        let mut results: Vec<Vec<f32>> =
            lens.iter().enumerate().map(|(j, &l)| (0..l).map(|i| mix(j, &inputs, i)).collect()).collect();
        let mut updates = 0;
        if let Some(target) = update {
            let (j, old) = (outputs.len(), &values[target].1);
            let new = (0..old.len()).map(|i| old[i] + mix(j, &inputs, i)).collect();
            outputs.push(values[target].0);
            updates = 1 << j;
            values[target].1 = new;
        }
        let op = Mix {
            inputs: vars.iter().map(|&v| len(&tape, v)).collect(),
            outputs: outputs.iter().map(|&v| len(&tape, v)).collect(),
            scratch: *scratch,
        };
        tape.push_into(Arc::new(op), &vars, &outputs, updates);
        values.extend(outputs.into_iter().zip(results.drain(..)));
    }
    let (last, expected) = values.pop().unwrap();
    let out = tape.io("out", Spec::f32([expected.len()]));
    let op = Mix { inputs: vec![expected.len()], outputs: vec![expected.len()], scratch: 0 };
    tape.push_into(Arc::new(op), &[last], &[out], 0);
    let expected = (0..expected.len()).map(|i| mix(0, &[&expected], i)).collect();
    (tape, expected)
}

fn input() -> Vec<f32> {
    vec![0.25, -1.0, 3.0, 0.125, 7.0]
}

/// First and last node that touch each temporary (and each workspace), with its place: read from the tape and the planned program, which
/// have the same nodes in the same order.
fn tenants(tape: &Tape, program: &Program) -> Vec<(usize, usize, Slot)> {
    assert_eq!(tape.nodes.len(), program.instructions.len());
    let mut found: Vec<Option<(usize, usize, Slot)>> = vec![None; tape.values.len()];
    let mut all = Vec::new();
    for (id, (node, instruction)) in tape.nodes.iter().zip(&program.instructions).enumerate() {
        let vars = node.inputs.iter().chain(&node.outputs);
        for (var, slot) in vars.zip(instruction.inputs.iter().chain(&instruction.outputs)) {
            if slot.region == Region::Arena {
                let entry = found[var.index()].get_or_insert((id, id, *slot));
                assert_eq!(entry.2, *slot, "a value has one place");
                entry.1 = id;
            }
        }
        all.extend(instruction.scratch.map(|slot| (id, id, slot)));
    }
    all.extend(found.into_iter().flatten());
    all
}

fn assert_places_are_sound(tape: &Tape, program: &Program) {
    let tenants = tenants(tape, program);
    for (i, (first, last, slot)) in tenants.iter().enumerate() {
        assert_eq!(slot.offset % ALIGNMENT, 0);
        assert!(slot.offset + slot.bytes() <= program.arena_bytes);
        for (other_first, other_last, other) in &tenants[..i] {
            let together = first <= other_last && other_first <= last;
            assert!(!together || !slot.overlaps(other), "{slot:?} and {other:?} live at the same time");
        }
    }
}

fn run(program: &Program) -> Vec<f32> {
    let mut device = Device::Cpu(Cpu::new(1));
    let io = device.allocate(program.io_bytes).unwrap();
    let arena = device.allocate(program.arena_bytes).unwrap();
    device.upload(arena, 0, &vec![f32::NAN; program.arena_bytes / 4]).unwrap();
    device.upload(io, program.io("x").offset / 4, &input()).unwrap();
    let binding = Binding::default().with(Region::Io, io).with(Region::Arena, arena);
    Arc::new(program.clone()).load(&mut device, binding).unwrap().run(&mut device, &mut Solo).unwrap();
    let slot = program.io("out");
    let mut out = vec![0.0; slot.len];
    device.download(io, slot.offset / 4, &mut out).unwrap();
    out
}

proptest! {
    #[test]
    fn values_that_live_together_never_share_memory(
        nodes in prop::collection::vec(
            (
                prop::collection::vec(0.0..1.0f64, 1..4),
                prop::collection::vec(1usize..300, 1..3),
                prop_oneof![Just(0usize), 1usize..200],
                prop::option::of(0.0..1.0f64),
            ),
            1..40,
        )
    ) {
        let (tape, expected) = random_tape(&nodes);
        let program = plan(&tape, None, None);
        assert_places_are_sound(&tape, &program);
        prop_assert_eq!(run(&program), expected);
    }
}

#[test]
fn memory_of_a_chain_is_reused() {
    let nodes: Vec<RandomNode> = (0..50).map(|_| (vec![1.0], vec![1000], 0, None)).collect();
    let (tape, expected) = random_tape(&nodes);
    let program = plan(&tape, None, None);
    assert_eq!(run(&program), expected);
    assert!(program.arena_bytes <= 3 * 4096, "{} bytes for two values of 4000 at a time", program.arena_bytes);
}
