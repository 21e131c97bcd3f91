//! A tape as a program on a device, and the tensors of tests/reference.

use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Binding, DType, Device, Element, Region, Slot};
use ddpm_dist::tape::{Loaded, Program, Tape, plan};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use std::sync::Arc;

/// A file of tests/reference, which goes with this program to machines that have no source.
pub struct Reference(SafeTensors<'static>);

impl Reference {
    pub fn new(file: &'static [u8]) -> Reference {
        Reference(SafeTensors::deserialize(file).unwrap())
    }

    pub fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    pub fn shape(&self, key: &str) -> Vec<usize> {
        self.0.tensor(key).unwrap().shape().to_vec()
    }

    pub fn f64(&self, key: &str) -> Vec<f64> {
        let tensor = self.0.tensor(key).unwrap_or_else(|error| panic!("{key}: {error}"));
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{key}: {other:?}"),
        }
    }

    pub fn f32(&self, key: &str) -> Vec<f32> {
        self.f64(key).into_iter().map(|x| x as f32).collect()
    }
}

/// A program on a device, with a buffer behind every region.
pub struct Planned {
    pub program: Arc<Program>,
    loaded: Loaded,
    binding: Binding,
    device: Device,
}

impl Planned {
    pub fn new(tape: &Tape, mut device: Device) -> Planned {
        let program = Arc::new(plan(tape, None, None));
        let flat = 4 * program.layout.len();
        let mut binding = Binding::default();
        for (region, bytes) in [
            (Region::Weights, flat),
            (Region::Gradients, flat),
            (Region::Moment1, flat),
            (Region::Moment2, flat),
            (Region::Ema, flat),
            (Region::Compute, flat / 2),
            (Region::Arena, program.arena_bytes),
            (Region::Io, program.io_bytes),
        ] {
            let buffer = device.allocate(bytes).unwrap();
            // Whatever is read before it is written is NaN; gaps between parameters are zeros.
            let nothing = if matches!(region, Region::Arena | Region::Io) { 0xFFu8 } else { 0 };
            device.upload(buffer, 0, &vec![nothing; bytes]).unwrap();
            binding = binding.with(region, buffer);
        }
        let loaded = program.load(&mut device, binding).unwrap();
        Planned { program, loaded, binding, device }
    }

    pub fn run(&mut self) {
        self.loaded.run(&mut self.device, &mut Solo).unwrap();
    }

    pub fn set<T: Element>(&mut self, name: &str, data: &[T]) {
        let slot = self.program.io(name);
        assert_eq!((slot.dtype, slot.len), (T::DTYPE, data.len()), "{name}");
        self.device.upload(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), data).unwrap();
    }

    pub fn get<T: Element>(&self, name: &str) -> Vec<T> {
        let slot = self.program.io(name);
        let mut data = vec![T::default(); slot.len];
        self.device.download(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), &mut data).unwrap();
        data
    }

    /// Writes activations, rounded where the program has bf16.
    pub fn set_activations(&mut self, name: &str, values: &[f32]) {
        match self.program.io(name).dtype {
            DType::Bf16 => self.set(name, &values.iter().copied().map(bf16::from_f32).collect::<Vec<_>>()),
            _ => self.set(name, values),
        }
    }

    pub fn activations(&self, name: &str) -> Vec<f32> {
        match self.program.io(name).dtype {
            DType::Bf16 => self.get::<bf16>(name).into_iter().map(f32::from).collect(),
            _ => self.get(name),
        }
    }

    /// All of a flat buffer.
    pub fn flat(&self, region: Region) -> Vec<f32> {
        let mut data = vec![0.0; self.program.layout.len()];
        self.device.download(self.binding.get(region).unwrap(), 0, &mut data).unwrap();
        data
    }

    /// The gradient of a parameter, as the op gives it that reads the parameter: of activations it is bf16 where those are.
    pub fn gradient(&self, name: &str) -> Vec<f32> {
        let range = &self.program.layout.get(name).unwrap().range;
        let mut outputs = self.program.instructions.iter().flat_map(|instruction| &instruction.outputs);
        let is_it = |slot: &&Slot| slot.region == Region::Gradients && slot.offset == 4 * range.start;
        let slot = outputs.rfind(is_it).unwrap_or_else(|| panic!("nothing writes the gradient of {name}"));
        let buffer = self.binding.get(Region::Gradients).unwrap();
        match slot.dtype {
            DType::Bf16 => {
                let mut data = vec![bf16::ZERO; range.len()];
                self.device.download(buffer, 2 * range.start, &mut data).unwrap();
                data.into_iter().map(f32::from).collect()
            }
            _ => self.flat(Region::Gradients)[range.clone()].to_vec(),
        }
    }

    /// Writes parameters to regions, and their copy in bf16: `values` gives each by its name and shape.
    pub fn set_flat(&mut self, regions: &[Region], values: impl Fn(&str, &[usize]) -> Vec<f32>) {
        let mut flat = vec![0.0f32; self.program.layout.len()];
        for placed in self.program.layout.iter() {
            flat[placed.range.clone()].copy_from_slice(&values(&placed.name, placed.shape.dims()));
        }
        for region in regions {
            self.device.upload(self.binding.get(*region).unwrap(), 0, &flat).unwrap();
        }
        let copy: Vec<bf16> = flat.into_iter().map(bf16::from_f32).collect();
        self.device.upload(self.binding.get(Region::Compute).unwrap(), 0, &copy).unwrap();
    }
}
