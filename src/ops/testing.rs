//! Runs a few ops as a program of their own, with every input a parameter, so that all gradients can be read.

use super::copy::Copy;
use crate::collective::Solo;
use crate::device::{Binding, DType, Device, Element, Precision, Region, cpu::Cpu};
use crate::tape::{Loaded, Program, Shape, Spec, Tape, Var, plan};
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

/// Pixels that depend on `seed` alone.
pub fn pixels(seed: u64, len: usize) -> Vec<u8> {
    random(seed, len).iter().map(|x| (x * 1e4) as i64 as u8).collect()
}

/// An input of a case.
pub struct Input {
    name: String,
    spec: Spec,
    f32: Vec<f32>,
    u32: Vec<u32>,
}

impl Input {
    /// A differentiable input.
    pub fn f32(name: &str, shape: impl Into<Shape>, data: &[f32]) -> Input {
        let spec = Spec::f32(shape);
        Input { name: name.into(), spec, f32: data.to_vec(), u32: vec![] }
    }

    /// Timesteps, counters.
    pub fn u32(name: &str, shape: impl Into<Shape>, data: &[u32]) -> Input {
        let spec = Spec::u32(shape);
        Input { name: name.into(), spec, f32: vec![], u32: data.to_vec() }
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
        let is_param = |i: &Input| i.spec.dtype(Precision::F32) == DType::F32;
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
        let mut planned = Planned::new(&tape, self.threads);
        for input in &self.inputs {
            match input.spec.dtype(Precision::F32) {
                DType::F32 => planned.set_part(Region::Weights, &input.name, &input.f32),
                DType::U32 => planned.set(&input.name, &input.u32),
                DType::U8 | DType::Bf16 | DType::F64 => unreachable!("pixels go through `Planned`"),
            }
        }
        if let Some(dy) = dy {
            planned.set("test dy", dy);
        }
        planned.run();
        let read = |i: &Input| (i.name.clone(), planned.part(Region::Gradients, &i.name));
        let gradients =
            if dy.is_some() { self.inputs.iter().filter(|i| is_param(i)).map(read).collect() } else { vec![] };
        Outcome { y: planned.get("test y"), gradients }
    }
}

/// A tape as a program on a device, with a buffer behind every region. All memory is NaN until it is set.
pub struct Planned {
    pub program: Arc<Program>,
    device: Device,
    binding: Binding,
    loaded: Loaded,
}

impl Planned {
    pub fn new(tape: &Tape, threads: usize) -> Planned {
        let program = Arc::new(plan(tape, None, None));
        let mut device = Device::Cpu(Cpu::new(threads));
        let mut binding = Binding::default();
        let flat = program.layout.len() * 4;
        for (region, bytes) in [
            (Region::Weights, flat),
            (Region::Gradients, flat),
            (Region::Moment1, flat),
            (Region::Moment2, flat),
            (Region::Ema, flat),
            (Region::Arena, program.arena_bytes),
            (Region::Io, program.io_bytes),
        ] {
            let buffer = device.allocate(bytes).unwrap();
            device.upload(buffer, 0, &vec![f32::NAN; bytes / 4]).unwrap();
            binding = binding.with(region, buffer);
        }
        let loaded = program.load(&mut device, binding).unwrap();
        Planned { program, device, binding, loaded }
    }

    pub fn run(&mut self) {
        self.loaded.run(&mut self.device, &mut Solo).unwrap();
    }

    /// Writes an input by name.
    pub fn set<T: Element>(&mut self, name: &str, data: &[T]) {
        let slot = self.program.io(name);
        assert_eq!((slot.dtype, slot.len), (T::DTYPE, data.len()), "{name}");
        self.device.upload(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), data).unwrap();
    }

    /// Reads an output by name.
    pub fn get<T: Element + Default>(&self, name: &str) -> Vec<T> {
        let slot = self.program.io(name);
        assert_eq!(slot.dtype, T::DTYPE, "{name}");
        let mut data = vec![T::default(); slot.len];
        self.device.download(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), &mut data).unwrap();
        data
    }

    /// Writes a parameter's place in a flat buffer.
    pub fn set_part(&mut self, region: Region, name: &str, data: &[f32]) {
        let range = self.program.layout.get(name).unwrap().range.clone();
        assert_eq!(range.len(), data.len(), "{name}");
        self.device.upload(self.binding.get(region).unwrap(), range.start, data).unwrap();
    }

    /// Reads a parameter's place in a flat buffer.
    pub fn part(&self, region: Region, name: &str) -> Vec<f32> {
        self.flat(region)[self.program.layout.get(name).unwrap().range.clone()].to_vec()
    }

    /// Writes all of a flat buffer.
    pub fn set_flat(&mut self, region: Region, data: &[f32]) {
        assert_eq!(data.len(), self.program.layout.len());
        self.device.upload(self.binding.get(region).unwrap(), 0, data).unwrap();
    }

    /// Reads all of a flat buffer.
    pub fn flat(&self, region: Region) -> Vec<f32> {
        let mut data = vec![0.0; self.program.layout.len()];
        self.device.download(self.binding.get(region).unwrap(), 0, &mut data).unwrap();
        data
    }
}

/// A file of tests/reference: values that PyTorch and diffusers computed in f64.
pub struct Reference(Vec<u8>);

impl Reference {
    pub fn open(file: &str) -> Reference {
        Reference(std::fs::read(format!("{}/tests/reference/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap())
    }

    /// A tensor's elements, whatever their type.
    pub fn f64(&self, name: &str) -> Vec<f64> {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        let data = tensor.data();
        match tensor.dtype() {
            safetensors::Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            safetensors::Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            safetensors::Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            safetensors::Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        file.names().into_iter().map(String::from).collect()
    }

    /// A tensor's elements as f32 (exact where the file has f32).
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.f64(name).iter().map(|x| *x as f32).collect()
    }
}

/// Errors of a sum of `terms` products that point in random directions, for [`assert_close`].
pub fn ulps(terms: usize) -> f64 {
    4.0 * (terms as f64).sqrt() + 4.0
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
