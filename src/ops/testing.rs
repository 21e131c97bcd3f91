//! Runs a few ops as a program of their own, with every input a parameter, so that all gradients can be read.

use super::copy::Copy;
use crate::collective::Solo;
use crate::device::{Binding, Device, Region, cpu::Cpu};
use crate::tape::{Shape, Spec, Tape, Var, plan};
use std::sync::Arc;

/// Standard normal numbers that depend on `seed` alone.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f64 + 0.5) / (1u64 << 31) as f64
    };
    (0..len).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}

/// An input of a case.
pub struct Input {
    name: String,
    spec: Spec,
    f32: Vec<f32>,
    u32: Vec<u32>,
    u8: Vec<u8>,
}

impl Input {
    /// A differentiable input.
    pub fn f32(name: &str, shape: impl Into<Shape>, data: &[f32]) -> Input {
        let spec = Spec::f32(shape);
        Input { name: name.into(), spec, f32: data.to_vec(), u32: vec![], u8: vec![] }
    }

    /// Timesteps, counters.
    pub fn u32(name: &str, shape: impl Into<Shape>, data: &[u32]) -> Input {
        let spec = Spec::u32(shape);
        Input { name: name.into(), spec, f32: vec![], u32: data.to_vec(), u8: vec![] }
    }

    /// Pixels.
    pub fn u8(name: &str, shape: impl Into<Shape>, data: &[u8]) -> Input {
        let spec = Spec::u8(shape);
        Input { name: name.into(), spec, f32: vec![], u32: vec![], u8: data.to_vec() }
    }
}

/// Ops under test: their inputs and the number of threads.
pub struct Case {
    inputs: Vec<Input>,
    threads: usize,
}

/// What a case gave.
pub struct Outcome {
    /// The output.
    pub y: Vec<f32>,
    gradients: Vec<(String, Vec<f32>)>,
}

impl Outcome {
    /// Gradient with respect to an input.
    pub fn gradient(&self, name: &str) -> Vec<f32> {
        self.gradients.iter().find(|(n, _)| n == name).map(|(_, g)| g.clone()).unwrap()
    }
}

impl Case {
    pub fn new(inputs: Vec<Input>) -> Case {
        Case { inputs, threads: 2 }
    }

    pub fn threads(mut self, threads: usize) -> Case {
        self.threads = threads;
        self
    }

    /// Output only. All memory that is not an input starts as NaN.
    pub fn forward(&self, build: impl FnOnce(&mut Tape, &[Var]) -> Var) -> Vec<f32> {
        self.execute(None, build).y
    }

    /// Output and the gradients of all f32 inputs for the upstream gradient `dy`. Each gradient is asked for.
    pub fn run(&self, dy: &[f32], build: impl FnOnce(&mut Tape, &[Var]) -> Var) -> Outcome {
        self.execute(Some(dy), build)
    }

    fn execute(&self, dy: Option<&[f32]>, build: impl FnOnce(&mut Tape, &[Var]) -> Var) -> Outcome {
        let mut tape = Tape::new();
        let is_param = |i: &Input| i.spec.dtype == crate::device::DType::F32;
        let shape = |i: &Input| i.spec.shape.clone().unwrap();
        let vars: Vec<Var> = self
            .inputs
            .iter()
            .map(|i| if is_param(i) { tape.param(&i.name, shape(i)) } else { tape.io(&i.name, i.spec.clone()) })
            .collect();
        let y = build(&mut tape, &vars);
        let y_shape = tape.shape(y).clone();
        let y_out = tape.io("test y", Spec::f32(y_shape.clone()));
        tape.push_into(Arc::new(Copy { shape: y_shape.clone() }), &[y], &[y_out], 0);
        if dy.is_some() {
            let gradient = tape.io("test dy", Spec::f32(y_shape.clone()));
            tape.backward(y, gradient);
        }
        let program = plan(&tape, None, None);
        let mut device = Device::Cpu(Cpu::new(self.threads));
        let mut binding = Binding::default();
        for (region, bytes) in [
            (Region::Weights, program.layout.len() * 4),
            (Region::Gradients, program.layout.len() * 4),
            (Region::Arena, program.arena_bytes),
            (Region::Io, program.io_bytes),
        ] {
            let buffer = device.allocate(bytes).unwrap();
            device.upload(buffer, 0, &vec![f32::NAN; bytes / 4]);
            binding = binding.with(region, buffer);
        }
        let (weights, gradients) = (binding.get(Region::Weights).unwrap(), binding.get(Region::Gradients).unwrap());
        let io = binding.get(Region::Io).unwrap();
        for input in &self.inputs {
            match input.spec.dtype {
                crate::device::DType::F32 => {
                    device.upload(weights, program.layout.get(&input.name).unwrap().range.start, &input.f32);
                }
                crate::device::DType::U32 => device.upload(io, program.io(&input.name).offset / 4, &input.u32),
                crate::device::DType::U8 => device.upload(io, program.io(&input.name).offset, &input.u8),
            }
        }
        if let Some(dy) = dy {
            device.upload(io, program.io("test dy").offset / 4, dy);
        }
        program.run(&mut device, &binding, &mut Solo).unwrap();
        let mut y = vec![0.0; y_shape.len()];
        device.download(io, program.io("test y").offset / 4, &mut y);
        let read = |i: &Input| {
            let range = program.layout.get(&i.name).unwrap().range.clone();
            let mut gradient = vec![0.0; range.len()];
            device.download(gradients, range.start, &mut gradient);
            (i.name.clone(), gradient)
        };
        let gradients =
            if dy.is_some() { self.inputs.iter().filter(|i| is_param(i)).map(read).collect() } else { vec![] };
        Outcome { y, gradients }
    }
}

/// Compares with exact values; the tolerance is `ulps`·ε of the value's own size plus as much of the values' root mean square (sums
/// cancel).
pub fn assert_close(what: &str, found: &[f32], exact: impl IntoIterator<Item = f64>, ulps: f64) {
    let exact: Vec<f64> = exact.into_iter().collect();
    assert_eq!(found.len(), exact.len(), "{what}: number of elements");
    let scale = (exact.iter().map(|x| x * x).sum::<f64>() / exact.len() as f64).sqrt();
    for (i, (f, e)) in found.iter().zip(&exact).enumerate() {
        let tolerance = ulps * f64::from(f32::EPSILON) * (e.abs() + scale);
        let error = (f64::from(*f) - e).abs();
        assert!(error <= tolerance, "{what}[{i}] = {f}, expected {e} (error {error:e}, tolerance {tolerance:e})");
    }
}
