//! Each op alone on a GPU: all of its [`Work`](ddpm_dist::device::cuda::Work), as a program of one instruction at the very place that it has in
//! a larger one, against the op on CPU cores. What it only writes, and its workspace, hold NaN before.

use crate::cpu::on_cpu_from;
use crate::machine::not_tested;
use crate::steps::{config, gpu, with_kernels};
use crate::values::{bytes_of_f32, bytes_of_u32, hyper, normals, pixels};
use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Binding, DType, Device, DeviceKind, Precision, Region, Slot, Target};
use ddpm_dist::ops::add::add;
use ddpm_dist::ops::attention::attention;
use ddpm_dist::ops::cast::Cast;
use ddpm_dist::ops::conv2d::{Stride, conv2d};
use ddpm_dist::ops::copy::Copy;
use ddpm_dist::ops::group_norm::{Dropout, Norm, Timestep, group_norm};
use ddpm_dist::ops::linear::linear;
use ddpm_dist::ops::pad::pad;
use ddpm_dist::ops::silu::silu;
use ddpm_dist::ops::timestep_embedding::timestep_embedding;
use ddpm_dist::ops::upsample::upsample;
use ddpm_dist::sample::ReverseStep;
use ddpm_dist::tape::{Instruction, Kind, Op, Program, Spec, Tape, Var, plan};
use ddpm_dist::train::{Shards, Share, step_programs};
use ddpm_dist::unet::TimestepForm;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Puts ops on a tape that it gets with the channels of activations; gives what is to be differentiated.
type Trace = fn(&mut Tape, usize) -> Var;

/// Ops on sizes that nothing divides, with each input read twice: each gradient is written once and added to once.
const ALONE: [Trace; 10] = [
    |tape, c| {
        let x = tape.param("x", [3, 7, 5, c]);
        // Layers with weights of their own and one bias: one of the two gradients is there already, the other not.
        let [w, v, b] =
            [tape.param("w", [2 * c, 3, 3, c]), tape.param("v", [2 * c, 3, 3, 2 * c]), tape.param("b", [2 * c])];
        twice(tape, |tape| {
            let first = conv2d(tape, x, w, b, Stride::One);
            let second = conv2d(tape, first, v, b, Stride::One);
            add(tape, second, first)
        })
    },
    |tape, c| {
        let x = tape.param("x", [1, 6, 10, c]);
        let [weight, bias] = [tape.param("w", [c, 3, 3, c]), tape.param("b", [c])];
        twice(tape, |tape| conv2d(tape, x, weight, bias, Stride::Two))
    },
    |tape, c| {
        let [a, b] = [tape.param("x", [2, 3, 5, c]), tape.param("z", [2, 3, 5, 2 * c])];
        let [weight, bias] = [tape.param("w", [c, 3 * c]), tape.param("b", [c])];
        twice(tape, |tape| {
            let y = linear(tape, &[a, b], weight, bias);
            add(tape, y, a)
        })
    },
    |tape, c| {
        let qkv = tape.param("qkv", [2, 7, 5, 9 * c]);
        twice(tape, |tape| attention(tape, qkv, 3))
    },
    |tape, c| {
        let [x, skip] = [tape.param("x", [2, 5, 3, c]), tape.param("skip", [2, 5, 3, 2 * c])];
        let [gamma, beta] = ["gamma", "beta"].map(|name| tape.param(name, [3 * c]));
        let (matrix, clock) = (tape.param("matrix", [2, 9 * c + 3]), tape.io("clock", Spec::u32([4])));
        let norm = Norm { groups: c / 2, eps: 1e-6, silu: true };
        let [scale_shift, term] = [
            Timestep::ScaleShift { offset: 1, total: 9 * c + 3 },
            Timestep::Add { offset: 6 * c + 2, total: 9 * c + 3 },
        ];
        let dropout = Dropout { probability: 0.3, seed: 77, layer: 2 };
        let a = group_norm(tape, &norm, &[x, skip], [gamma, beta], Some((matrix, scale_shift)), Some((dropout, clock)));
        let b = group_norm(tape, &norm, &[x, skip], [gamma, beta], Some((matrix, term)), None);
        add(tape, a, b)
    },
    |tape, c| {
        let x = tape.param("x", [3, 5, 1, c]);
        twice(tape, |tape| silu(tape, x))
    },
    |tape, c| {
        let x = tape.param("x", [2, 3, 5, c]);
        twice(tape, |tape| upsample(tape, x))
    },
    |tape, c| {
        let x = tape.param("x", [3, 5, c]);
        // Of weights, whose gradients are f32.
        let [w, v, b] = [tape.param("w", [c, c - 3]), tape.param("v", [c - 3, c]), tape.param("b", [c - 3])];
        twice(tape, |tape| {
            let [w, v, b] = [w, v, b].map(|weight| pad(tape, weight, [c, c]));
            let y = linear(tape, &[x], w, b);
            linear(tape, &[y], v, b)
        })
    },
    |tape, c| {
        let t = tape.io("t", Spec::u32([3]));
        let [weight, bias] = [tape.param("w", [c, 2 * c]), tape.param("b", [c])];
        twice(tape, |tape| {
            let embedding = timestep_embedding(tape, t, 2 * c, 1.0, false);
            linear(tape, &[embedding], weight, bias)
        })
    },
    |tape, c| {
        let x = tape.param("x", [7, c]);
        twice(tape, |tape| {
            let y = silu(tape, x);
            tape.push1(Copy { shape: [7, c].into() }, &[y])
        })
    },
];

fn twice(tape: &mut Tape, trace: impl Fn(&mut Tape) -> Var) -> Var {
    let [a, b] = [0, 1].map(|_| trace(tape));
    // Its gradient is that of both, which are not added into one of the ops: that is another op.
    add(tape, a, b)
}

/// Programs that have all ops between them.
fn programs(precision: Precision) -> Vec<Program> {
    let target = Target { kind: DeviceKind::Cuda, precision };
    // Tensor cores take eight channels at a time, and images are filled up to as many: an op on CPU cores has them as they are.
    let (channels, image) = if precision == Precision::F32 { (6, 3) } else { (8, 8) };
    let mut programs: Vec<Program> = [false, true]
        .into_iter()
        .flat_map(|fuses| ALONE.map(|trace| (fuses, trace)))
        .map(|(fuses, trace)| {
            let mut tape = Tape::on(target);
            let y = trace(&mut tape, channels);
            if fuses {
                tape.fuse_residuals(|name| name == "add");
            }
            let dy = Spec::computed(tape.shape(y).clone());
            let dy = tape.io("dy", dy);
            tape.backward(y, dy);
            plan(&tape, None, None)
        })
        .collect();
    let mut odd = config(&[channels * 2, channels * 4], image, 4);
    odd.model.timestep = TimestepForm::ScaleShift;
    odd.train.shards = Shards::Fixed(2);
    odd.train.precision = precision;
    programs.extend(step_programs(&odd, [6, 10], &Share::solo(&odd.train).unwrap(), target).0);
    let step = ReverseStep { model: &odd.model, size: [6, 10], batch: 3, steps: 10, layout: None };
    programs.push(step.program(target));
    if precision == Precision::Bf16 {
        let mut tape = Tape::on(target);
        tape.param("w", [1000]);
        let [weights, copy] = [Region::Weights, Region::Compute].map(|region| tape.flat(region));
        tape.push_into(Arc::new(Cast), &[weights], &[copy], 0);
        programs.push(plan(&tape, None, None));
    }
    programs
}

/// A program on a GPU that runs an instruction at a time.
struct Machine {
    device: Device,
    binding: Binding,
    program: Program,
}

impl Machine {
    fn new(program: Program) -> Machine {
        let mut device = gpu();
        let mut binding = Binding::default();
        let flat = program.layout.len();
        let sums = 1 + program
            .instructions
            .iter()
            .flat_map(slots)
            .filter(|slot| slot.region == Region::Gradients)
            .fold(0, |most, slot| most.max((slot.offset + slot.bytes()).div_ceil(4 * flat.max(1))));
        let scaled =
            |seed: u64, len: usize, scale: f32| normals(seed, len).iter().map(|x| x * scale).collect::<Vec<_>>();
        let squares = scaled(4, flat, 1e-3).iter().map(|x| x * x).collect::<Vec<_>>();
        for (region, content) in [
            (Region::Weights, bytes_of_f32(&scaled(1, flat, 0.2))),
            (Region::Moment1, bytes_of_f32(&scaled(3, flat, 1e-3))),
            (Region::Moment2, bytes_of_f32(&squares)),
            (Region::Ema, bytes_of_f32(&scaled(5, flat, 0.2))),
            // Upper halves of f32 numbers.
            (
                Region::Compute,
                scaled(1, flat, 0.2).iter().flat_map(|x| [x.to_ne_bytes()[2], x.to_ne_bytes()[3]]).collect(),
            ),
            // Gaps between parameters are zeros.
            (Region::Gradients, vec![0; 4 * flat * sums]),
            (Region::Arena, vec![0xFF; program.arena_bytes]),
            (Region::Io, vec![0xFF; program.io_bytes]),
        ] {
            let buffer = device.allocate(content.len()).unwrap();
            device.upload(buffer, 0, &content).unwrap();
            binding = binding.with(region, buffer);
        }
        let mut machine = Machine { device, binding, program };
        for io in machine.program.io.clone() {
            let content = input(&io.name, &io.slot);
            assert_eq!(content.len(), io.slot.bytes(), "{}", io.name);
            machine.write(&io.slot, &content);
        }
        machine
    }

    fn read(&self, slot: &Slot) -> Vec<u8> {
        let mut content = vec![0u8; slot.bytes()];
        self.device.download(self.binding.get(slot.region).unwrap(), slot.offset, &mut content).unwrap();
        content
    }

    fn write(&mut self, slot: &Slot, content: &[u8]) {
        self.device.upload(self.binding.get(slot.region).unwrap(), slot.offset, content).unwrap();
    }

    /// Runs each op, and compares what it gives with what it gives on CPU cores from the same inputs. They follow one another: the inputs are
    /// what ops before have given.
    fn check(&mut self) {
        for instruction in self.program.instructions.clone() {
            if let Kind::Launch(op) = &instruction.kind {
                self.check_op(op, &instruction);
            }
        }
    }

    fn check_op(&mut self, op: &Arc<dyn Op>, instruction: &Instruction) {
        let Instruction { inputs, outputs, updates, scratch, .. } = instruction;
        let signature = op.signature();
        let kept: Vec<Vec<u8>> = outputs.iter().map(|slot| self.read(slot)).collect();
        for (i, slot) in outputs.iter().enumerate().filter(|(i, _)| updates >> i & 1 == 0) {
            self.write(slot, &vec![0xFF; kept[i].len()]);
        }
        if let Some(scratch) = scratch {
            self.write(scratch, &vec![0xFF; scratch.bytes()]);
        }
        let on_host = |machine: &Machine, slots: &[Slot], specs: &[Spec]| -> Vec<Vec<u8>> {
            slots.iter().zip(specs).map(|(slot, spec)| widened(machine.read(slot), slot, spec)).collect()
        };
        let (given, before) = (on_host(self, inputs, &signature.inputs), on_host(self, outputs, &signature.outputs));
        let expected = on_cpu_from(op.clone(), &given, &before, *updates);

        let alone = Program { instructions: vec![instruction.clone()], ..self.program.clone() };
        Arc::new(alone).load(&mut self.device, self.binding).unwrap().run(&mut self.device, &mut Solo).unwrap();
        for (i, (slot, spec)) in outputs.iter().zip(&signature.outputs).enumerate() {
            let found = self.read(slot);
            let name = format!("output {i} (of {updates:b} changed) of {op:?}, {:?}", self.program.target.precision);
            let terms = op.flops() as usize / slot.len;
            self.compare(&name, &widened(found.clone(), slot, spec), &expected[i], spec, terms);
            // What neither has written (columns of other layers) is as it was.
            let size = slot.dtype.size();
            let whole = found.chunks(size).zip(kept[i].chunks(size));
            let whole: Vec<u8> = whole
                .flat_map(|(found, kept)| if found.iter().all(|b| *b == 0xFF) { kept } else { found })
                .copied()
                .collect();
            self.write(slot, &whole);
        }
    }

    /// An element may be off by the roundings of a sum of so many terms in random directions, in f32, relative to its own size and to the usual
    /// one (sums cancel). In bf16 it is rounded once more, by 2⁻⁸ of itself, and so was at most one partial result on the way, of up to four
    /// times the usual size.
    fn compare(&self, name: &str, found: &[u8], expected: &[u8], spec: &Spec, terms: usize) {
        let dtype = spec.dtype(Precision::F32);
        if matches!(dtype, DType::U8 | DType::U32) {
            return assert_eq!(found, expected, "{name}");
        }
        let [found, expected] = [found, expected].map(|bytes| numbers(bytes, dtype));
        assert_eq!(found.len(), expected.len(), "{name}");
        let there = || expected.iter().filter(|x| !x.is_nan());
        assert!(there().next().is_some(), "{name}: there are no numbers");
        let usual = (there().map(|x| x * x).sum::<f64>() / there().count() as f64).sqrt();
        let f32_roundings = (4.0 * (terms as f64).sqrt() + 4.0) * f64::from(f32::EPSILON);
        let unit = if self.program.target.precision == Precision::Bf16 { 1.0 / 256.0 } else { 0.0 };
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let tolerance = f32_roundings * (expected.abs() + usual) + unit * (expected.abs() + 4.0 * usual);
            let is_close = (found - expected).abs() <= tolerance || found.is_nan() && expected.is_nan();
            assert!(is_close, "{name}: element {i} is {found}, expected {expected}, not within {tolerance:e}");
        }
    }
}

fn slots(instruction: &Instruction) -> impl Iterator<Item = &Slot> {
    instruction.inputs.iter().chain(&instruction.outputs)
}

/// What a host would write there.
fn input(name: &str, slot: &Slot) -> Vec<u8> {
    match (name, slot.dtype) {
        ("clock", _) => bytes_of_u32(&[5, 40, 9, 1]),
        ("hyper", _) => bytes_of_f32(&hyper(7).to_array()),
        (_, DType::U8) => pixels(7, slot.len),
        (_, DType::U32) => bytes_of_u32(&(0..slot.len as u32).map(|i| 900 - 70 * i).collect::<Vec<_>>()),
        // The last column of a sampler's table is where x_0 is clipped, which is above 0.
        ("table", _) => bytes_of_f32(&normals(8, slot.len).iter().map(|x| x.abs() + 0.1).collect::<Vec<_>>()),
        (_, DType::F64) => unreachable!("a host writes none"),
        (_, DType::F32) => bytes_of_f32(&normals(9, slot.len)),
        (_, DType::Bf16) => {
            normals(9, slot.len).iter().flat_map(|x| [x.to_ne_bytes()[2], x.to_ne_bytes()[3]]).collect()
        }
    }
}

/// A GPU's numbers as the op has them on CPU cores.
fn widened(bytes: Vec<u8>, slot: &Slot, spec: &Spec) -> Vec<u8> {
    match (slot.dtype, spec.dtype(Precision::F32)) {
        (DType::Bf16, DType::F32) => bytes
            .as_chunks()
            .0
            .iter()
            .flat_map(|[a, b]| match [a, b] {
                // Nobody's.
                [0xFF, 0xFF] => [0xFF; 4],
                _ => [0, 0, *a, *b],
            })
            .collect(),
        (found, expected) => {
            assert_eq!(found, expected);
            bytes
        }
    }
}

fn numbers(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::Bf16 => bytes.as_chunks().0.iter().map(|[a, b]| f64::from(f32::from_ne_bytes([0, 0, *a, *b]))).collect(),
        DType::F64 => bytes.as_chunks().0.iter().map(|bytes| f64::from_ne_bytes(*bytes)).collect(),
        _ => bytes.as_chunks().0.iter().map(|bytes| f64::from(f32::from_ne_bytes(*bytes))).collect(),
    }
}

#[test]
fn each_op_does_what_it_does_on_the_cpu() {
    with_kernels("ops::each_op_does_what_it_does_on_the_cpu", || {
        BOTH.into_iter().flat_map(programs).for_each(|program| Machine::new(program).check());
    });
}

/// The ops of the source, by the lines that make them ops.
fn ops_of_the_source(folder: &Path) -> BTreeSet<String> {
    let folders = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    folders
        .flat_map(|folder| {
            let text = std::fs::read_to_string(folder.join("mod.rs")).unwrap();
            let ops = text.lines().filter_map(|line| line.strip_prefix("impl Op for ")?.strip_suffix(" {"));
            let ops: Vec<String> = ops.map(String::from).collect();
            assert!(!ops.is_empty(), "{}: no op", folder.display());
            ops
        })
        .collect()
}

#[test]
fn no_op_is_missing_there() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    if !folder.is_dir() {
        return not_tested("ops::no_op_is_missing_there: there is no source beside this program");
    }
    for precision in BOTH {
        let programs = programs(precision);
        let ops = programs.iter().flat_map(|program| &program.instructions).filter_map(|instruction| {
            match &instruction.kind {
                // The name of its type.
                Kind::Launch(op) => Some(format!("{op:?}").split(' ').next().unwrap_or_default().to_string()),
                _ => None,
            }
        });
        let found: BTreeSet<String> = ops.collect();
        let mut expected = ops_of_the_source(&folder);
        if precision == Precision::F32 {
            // There is no copy in bf16.
            expected.remove("Cast");
        }
        assert_eq!(found, expected, "{precision:?}");
    }
}
