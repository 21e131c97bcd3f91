//! The planner, on random programs and on a UNet's training step; fusion; shared gradients.

use super::*;
use crate::collective::Solo;
use crate::device::{ALIGNMENT, Binding, Device, Region, Slot, cpu::Cpu, cpu::Launch};
use crate::ops::add::add;
use crate::ops::grad_norm::grad_norm;
use crate::ops::linear::linear;
use crate::ops::silu::silu;
use crate::ops::testing::{Case, Input, Planned, random};
use crate::unet::{UnetConfig, unet};
use proptest::prelude::*;
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
    device.upload(arena, 0, &vec![f32::NAN; program.arena_bytes / 4]);
    device.upload(io, program.io("x").offset / 4, &input());
    let binding = Binding::default().with(Region::Io, io).with(Region::Arena, arena);
    program.run(&mut device, &binding, &mut Solo).unwrap();
    let slot = program.io("out");
    let mut out = vec![0.0; slot.len];
    device.download(io, slot.offset / 4, &mut out);
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
    tape.fuse_residuals(|op| op == "add");
    let dout = tape.io("dout", Spec::f32([2, 8, 8, 1]));
    tape.backward(out, dout);
    tape.begin(Phase::Update);
    let norm = tape.io("norm", Spec::f32([2]));
    grad_norm(&mut tape, norm);
    let program = plan(&tape, None, Some(buckets));
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
    let moved = plan(&tape, Some(&layout), Some(Buckets { first: 1 << 10, other: 4 << 10 }));
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

/// x [4, 3] through a linear layer, and a residual r.
fn residual_case() -> Case {
    Case::new(vec![
        Input::f32("x", [4, 3], &random(1, 12)),
        Input::f32("w", [3, 3], &random(2, 9)),
        Input::f32("b", [3], &random(3, 3)),
        Input::f32("r", [4, 3], &random(4, 12)),
    ])
}

/// Output and gradients of `build` with and without fusion, and the ops that are left with it.
fn fused_and_not(build: impl Fn(&mut Tape, &[Var]) -> Var) -> Vec<&'static str> {
    let dy = random(9, 12);
    let plain = residual_case().run(&dy, |tape, v| build(tape, v));
    let mut names = Vec::new();
    let fused = residual_case().run(&dy, |tape, v| {
        let y = build(tape, v);
        tape.fuse_residuals(|op| op == "add");
        names = tape.nodes.iter().map(|n| n.op.name()).collect();
        y
    });
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
    assert!(close(&fused.y, &plain.y), "{:?}, expected {:?}", fused.y, plain.y);
    for name in ["x", "w", "b", "r"] {
        assert!(close(&fused.gradient(name), &plain.gradient(name)), "gradient of {name}");
    }
    names
}

#[test]
fn a_residual_is_added_by_the_layer_before_it() {
    assert_eq!(
        fused_and_not(|tape, v| {
            let y = linear(tape, &[v[0]], v[1], v[2]);
            add(tape, v[3], y)
        }),
        ["linear+residual"]
    );
    // Whichever side the layer is on, and where the residual is computed after it.
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let r = silu(tape, v[3]);
        add(tape, y, r)
    });
    assert_eq!(names, ["silu", "linear+residual"]);
}

#[test]
fn a_value_that_is_read_elsewhere_too_keeps_its_addition() {
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let sum = add(tape, v[3], y);
        let other = silu(tape, y);
        add(tape, sum, other)
    });
    assert_eq!(names, ["linear", "add", "silu", "add"]);
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let twice = add(tape, y, y);
        add(tape, v[3], twice)
    });
    assert_eq!(names, ["linear", "add", "add"]);
}

#[test]
fn a_published_value_keeps_its_addition() {
    let (x, w, b) = (random(1, 12), random(2, 9), random(3, 3));
    let mut tape = Tape::new();
    let vars = [("x", vec![4, 3]), ("w", vec![3, 3]), ("b", vec![3])].map(|(name, shape)| tape.param(name, &shape[..]));
    let y = linear(&mut tape, &[vars[0]], vars[1], vars[2]);
    tape.publish(y, "y");
    let z = add(&mut tape, vars[0], y);
    tape.publish(z, "z");
    tape.fuse_residuals(|op| op == "add");
    let mut planned = Planned::new(&tape, 1);
    for (name, data) in [("x", &x), ("w", &w), ("b", &b)] {
        planned.set_part(Region::Weights, name, data);
    }
    planned.run();
    let (y, z): (Vec<f32>, Vec<f32>) = (planned.get("y"), planned.get("z"));
    for i in 0..12 {
        let exact: f64 = f64::from(b[i % 3])
            + (0..3).map(|k| f64::from(x[i / 3 * 3 + k]) * f64::from(w[i % 3 * 3 + k])).sum::<f64>();
        assert!((f64::from(y[i]) - exact).abs() < 1e-5, "y[{i}] = {}, expected {exact}", y[i]);
        assert_eq!(z[i], x[i] + y[i]);
    }
}

#[test]
#[should_panic(expected = "no input or output named nothing")]
fn an_unknown_name_is_a_fault_of_the_caller() {
    unet_program(Buckets::default()).1.io("nothing");
}

/// d silu/dx = σ(x)(1 + x(1 − σ(x))).
fn silu_slope(x: f32) -> f64 {
    let x = f64::from(x);
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

#[test]
fn gradients_that_additions_pass_on_are_not_mixed_up() {
    // a reaches the result by four ways: twice as it is, through a SiLU, and through the SiLU of a sum that passes its gradient on.
    let (a, b, dy) = (random(1, 100), random(2, 100), random(3, 100));
    let result = Case::new(vec![Input::f32("a", [100], &a), Input::f32("b", [100], &b)]).run(&dy, |tape, v| {
        let sum = add(tape, v[0], v[1]);
        let bent = silu(tape, sum);
        let of_a = silu(tape, v[0]);
        let left = add(tape, bent, v[0]);
        let right = add(tape, sum, of_a);
        add(tape, left, right)
    });
    for i in 0..100 {
        let through_sum = 1.0 + silu_slope(a[i] + b[i]);
        let expected = [("a", through_sum + 1.0 + silu_slope(a[i])), ("b", through_sum)];
        for (name, slope) in expected {
            let (found, exact) = (f64::from(result.gradient(name)[i]), f64::from(dy[i]) * slope);
            assert!((found - exact).abs() <= 1e-5 * exact.abs().max(1.0), "d{name}[{i}] = {found}, expected {exact}");
        }
    }
}
