//! The network on every device against diffusers' `UNet2DModel` with the same weights: output, and the gradient of every parameter; and
//! training steps against PyTorch's. The values are made by `tests/reference/unet.py` and `step.py` in f64.

use crate::steps::{cpu, gpu, with_kernels};
use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Binding, DType, Device, Element, Precision, Region};
use ddpm_dist::diffusion::{DiffusionConfig, Schedule};
use ddpm_dist::ops::adam_ema::{Hyper, adam_ema, bias_correction};
use ddpm_dist::ops::copy::Copy;
use ddpm_dist::ops::grad_norm::grad_norm;
use ddpm_dist::tape::{Loaded, Phase, Program, Spec, Tape, plan};
use ddpm_dist::unet::{TimestepForm, UnetConfig, unet};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::sync::Arc;

/// A fixture of tests/reference, which goes with this program to machines that have no source.
struct Fixture {
    name: &'static str,
    config: UnetConfig,
    tensors: SafeTensors<'static>,
}

macro_rules! fixture {
    ($name:literal) => {
        Fixture::new(
            $name,
            include_bytes!(concat!("../reference/", $name, ".json")),
            include_bytes!(concat!("../reference/", $name, ".safetensors")),
        )
    };
}

impl Fixture {
    fn new(name: &'static str, json: &[u8], tensors: &'static [u8]) -> Fixture {
        let config = config(&serde_json::from_slice(json).unwrap());
        Fixture { name, config, tensors: SafeTensors::deserialize(tensors).unwrap() }
    }

    fn shape(&self, key: &str) -> Vec<usize> {
        self.tensors.tensor(key).unwrap().shape().to_vec()
    }

    fn f64(&self, key: &str) -> Vec<f64> {
        let tensor = self.tensors.tensor(key).unwrap();
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{key}: {other:?}"),
        }
    }

    fn f32(&self, key: &str) -> Vec<f32> {
        self.f64(key).into_iter().map(|x| x as f32).collect()
    }
}

fn config(json: &Value) -> UnetConfig {
    let number = |key: &str| json[key].as_u64().unwrap() as usize;
    let channels: Vec<usize> =
        json["block_out_channels"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap() as usize).collect();
    let attends = |block: &Value| block.as_str().unwrap().starts_with("Attn");
    let levels = json["down_block_types"].as_array().unwrap();
    UnetConfig {
        image_channels: number("in_channels"),
        attention_levels: (0..channels.len()).filter(|&level| attends(&levels[level])).collect(),
        channels,
        blocks: number("layers_per_block"),
        mid_attention: json["add_attention"].as_bool().unwrap(),
        head_channels: json["attention_head_dim"].as_u64().unwrap_or(0) as usize,
        groups: number("norm_num_groups"),
        mid_attention_groups: match (json["attn_norm_num_groups"].as_u64(), &json["resnet_time_scale_shift"]) {
            (None, form) if form == "scale_shift" => Some(0), // diffusers leaves the norm away
            (groups, _) => groups.map(|g| g as usize),
        },
        norm_eps: json["norm_eps"].as_f64().unwrap(),
        dropout: json["dropout"].as_f64().unwrap(),
        timestep: match json["resnet_time_scale_shift"].as_str().unwrap() {
            "default" => TimestepForm::Add,
            "scale_shift" => TimestepForm::ScaleShift,
            other => panic!("{other}"),
        },
        flip_sin_to_cos: json["flip_sin_to_cos"].as_bool().unwrap(),
        freq_shift: json["freq_shift"].as_f64().unwrap(),
    }
}

/// The network on a device: inputs "x" and "t", output "y" and its gradient "dy".
struct Network {
    program: Arc<Program>,
    loaded: Loaded,
    binding: Binding,
    device: Device,
    precision: Precision,
    /// Of the images, and how many the network has.
    channels: [usize; 2],
}

impl Network {
    /// `updates` has its weights change, by the numbers "hyper"; "norm" is then the gradients'.
    fn new(mut device: Device, config: &UnetConfig, shape: &[usize], precision: Precision, updates: bool) -> Network {
        let [n, h, w, c] = shape[..] else { panic!("{shape:?}") };
        config.validate(h, w).unwrap();
        let mut tape = Tape::on(device.target(precision));
        let shape = [n, h, w, tape.padded(c)];
        let x = tape.io("x", Spec::computed(shape));
        let t = tape.io("t", Spec::u32([n]));
        let out = unet(&mut tape, config, x, t, None);
        let y = tape.io("y", Spec::computed(shape));
        tape.push_into(Arc::new(Copy { shape: shape.into() }), &[out], &[y], 0);
        let dy = tape.io("dy", Spec::computed(shape));
        tape.backward(out, dy);
        if updates {
            tape.begin(Phase::Update);
            let [hyper, norm] = [("hyper", Hyper::LEN), ("norm", 2)].map(|(name, len)| tape.io(name, Spec::f32([len])));
            grad_norm(&mut tape, norm);
            adam_ema(&mut tape, false, norm, hyper);
        }
        let program = Arc::new(plan(&tape, None, None));
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
        Network { program, loaded, binding, device, precision, channels: [c, shape[3]] }
    }

    fn set<T: Element>(&mut self, name: &str, data: &[T]) {
        let slot = self.program.io(name);
        assert_eq!((slot.dtype, slot.len), (T::DTYPE, data.len()), "{name}");
        self.device.upload(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), data).unwrap();
    }

    fn get<T: Element>(&self, name: &str) -> Vec<T> {
        let slot = self.program.io(name);
        let mut data = vec![T::default(); slot.len];
        self.device.download(self.binding.get(Region::Io).unwrap(), slot.offset / size_of::<T>(), &mut data).unwrap();
        data
    }

    /// Writes images, rounded, and filled up with channels of zeros.
    fn set_images(&mut self, name: &str, images: &[f32]) {
        let [channels, with] = self.channels;
        let rest = vec![0.0; with - channels];
        let images: Vec<f32> = images.chunks(channels).flat_map(|pixel| [pixel, &rest].concat()).collect();
        match self.precision {
            Precision::F32 => self.set(name, &images),
            Precision::Bf16 => self.set(name, &images.into_iter().map(bf16::from_f32).collect::<Vec<_>>()),
        }
    }

    fn images(&self, name: &str) -> Vec<f32> {
        let [channels, with] = self.channels;
        let all: Vec<f32> = match self.precision {
            Precision::F32 => self.get(name),
            Precision::Bf16 => self.get::<bf16>(name).into_iter().map(f32::from).collect(),
        };
        all.chunks(with).flat_map(|pixel| &pixel[..channels]).copied().collect()
    }

    /// All of a flat buffer.
    fn flat(&self, region: Region) -> Vec<f32> {
        let mut data = vec![0.0; self.program.layout.len()];
        self.device.download(self.binding.get(region).unwrap(), 0, &mut data).unwrap();
        data
    }

    /// Writes the fixture's weights of that kind to regions, and their copy.
    fn set_weights(&mut self, fixture: &Fixture, kind: &str, regions: &[Region]) {
        let mut flat = vec![0.0f32; self.program.layout.len()];
        for placed in self.program.layout.iter() {
            let key = format!("{kind}/{}", placed.name);
            assert_eq!(fixture.shape(&key), placed.shape.dims(), "{}: {key}", fixture.name);
            flat[placed.range.clone()].copy_from_slice(&fixture.f32(&key));
        }
        for region in regions {
            self.device.upload(self.binding.get(*region).unwrap(), 0, &flat).unwrap();
        }
        let copy: Vec<bf16> = flat.into_iter().map(bf16::from_f32).collect();
        self.device.upload(self.binding.get(Region::Compute).unwrap(), 0, &copy).unwrap();
    }

    fn run(&mut self) {
        self.loaded.run(&mut self.device, &mut Solo).unwrap();
    }

    /// Output for `x` and `t`, and the gradients of mean((output − target)²) in their buffer, with which `updates` is then applied.
    fn step(&mut self, x: &[f32], t: &[u32], target: &[f32], updates: Option<&Hyper>) -> Vec<f32> {
        self.set_images("x", x);
        self.set("t", t);
        // Gradients that are not finite change nothing.
        self.set_images("dy", &vec![f32::NAN; x.len()]);
        self.run();
        let y = self.images("y");
        let scale = 2.0 / y.len() as f64;
        let dy: Vec<f32> =
            y.iter().zip(target).map(|(y, t)| (scale * (f64::from(*y) - f64::from(*t))) as f32).collect();
        self.set_images("dy", &dy);
        if let Some(hyper) = updates {
            self.set("hyper", &hyper.to_array());
        }
        self.run();
        y
    }
}

fn root_mean_square(values: &[f32]) -> f64 {
    (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

/// Error relative to the root mean square of the exact values, or to `floor` if that is larger: in f32 the largest, in bf16 its root mean
/// square, as single elements have lost too many digits to be told from wrong ones.
fn relative_error(found: &[f32], exact: &[f32], floor: f64, precision: Precision) -> f64 {
    assert_eq!(found.len(), exact.len());
    let errors: Vec<f32> = found.iter().zip(exact).map(|(f, e)| (f - e).abs()).collect();
    let error = match precision {
        // A NaN is worse than anything.
        _ if errors.iter().any(|error| error.is_nan()) => f64::INFINITY,
        Precision::F32 => f64::from(errors.into_iter().fold(0.0, f32::max)),
        Precision::Bf16 => root_mean_square(&errors),
    };
    error / root_mean_square(exact).max(floor)
}

/// Rounding errors of a chain of about 30 layers, each a sum of up to a few hundred f32 products, in random directions.
const F32: f64 = 30.0 * 8.0 * f32::EPSILON as f64;

/// Each op that writes bf16 rounds by 2⁻⁹; as a random walk that is √n·2⁻⁹ after n of them, twice that at most.
fn bf16_tolerance(program: &Program) -> f64 {
    let outputs = program.instructions.iter().flat_map(|instruction| &instruction.outputs);
    let roundings = outputs.filter(|slot| slot.dtype == DType::Bf16).count();
    2.0 * (roundings as f64).sqrt() / 512.0
}

fn is_that_of_diffusers(fixture: &Fixture, device: Device, precision: Precision) {
    let Fixture { name, .. } = fixture;
    let mut network = Network::new(device, &fixture.config, &fixture.shape("x_t"), precision, false);
    let tolerance = if precision == Precision::F32 { F32 } else { bf16_tolerance(&network.program) };
    network.set_weights(fixture, "weight", &[Region::Weights]);
    let layout = network.program.layout.clone();
    let count = fixture.tensors.names().iter().filter(|n| n.starts_with("weight/")).count();
    assert_eq!(layout.iter().count(), count, "{name}: number of parameters");

    let t: Vec<u32> = fixture.f64("t").iter().map(|&t| t as u32).collect();
    let y = network.step(&fixture.f32("x_t"), &t, &fixture.f32("target"), None);
    let error = relative_error(&y, &fixture.f32("output"), 0.0, precision);
    assert!(error < tolerance, "{name}: output is off by {error:e}");
    let gradients = network.flat(Region::Gradients);
    // Some gradients cancel to nothing (a key bias moves all logits alike): what is left is measured against the others.
    let all: Vec<f32> = layout.iter().flat_map(|p| fixture.f32(&format!("grad/{}", p.name))).collect();
    let floor = 0.1 * root_mean_square(&all);
    let mut worst = 0.0f64;
    for placed in layout.iter() {
        let exact = fixture.f32(&format!("grad/{}", placed.name));
        let error = relative_error(&gradients[placed.range.clone()], &exact, floor, precision);
        assert!(error < tolerance, "{name}: gradient of {} is off by {error:e}", placed.name);
        worst = worst.max(error);
    }
    println!("{name}, {}: output {error:.1e}, worst gradient {worst:.1e} of {tolerance:.1e}", precision.name());
}

fn fixtures() -> [Fixture; 5] {
    [
        fixture!("unet_grey28"),
        fixture!("unet_grey8"),
        fixture!("unet_colour16"),
        fixture!("unet_colour12x20"),
        fixture!("unet_grey20x12"),
    ]
}

#[test]
fn networks_on_cpu_cores_are_those_of_diffusers() {
    fixtures().iter().for_each(|fixture| is_that_of_diffusers(fixture, cpu(), Precision::F32));
}

#[test]
fn networks_on_a_gpu_are_those_of_diffusers() {
    with_kernels("pytorch::networks_on_a_gpu_are_those_of_diffusers", || {
        fixtures().iter().for_each(|fixture| is_that_of_diffusers(fixture, gpu(), Precision::F32));
        // The others have channels that tensor cores do not take.
        fixtures()[..2].iter().for_each(|fixture| is_that_of_diffusers(fixture, gpu(), Precision::Bf16));
    });
}

/// Adam moves a weight by about the learning rate, whatever the size of its gradient, so errors are told in that unit: a thousandth of a
/// step. PyTorch's own rounding in f32 is a third of it (tests/reference/README.md).
#[test]
fn five_steps_on_a_gpu_are_those_of_pytorch() {
    const LR: f64 = 1e-3;
    with_kernels("pytorch::five_steps_on_a_gpu_are_those_of_pytorch", || {
        let fixture = fixture!("step");
        let shape = &fixture.shape("pixels")[1..];
        let (images, image) = (shape[0], shape.iter().product::<usize>());
        let mut network = Network::new(gpu(), &fixture.config, shape, Precision::F32, true);
        network.set_weights(&fixture, "start", &[Region::Weights, Region::Ema]);
        let [pixels, noise, t] = ["pixels", "noise", "t"].map(|key| fixture.f64(key));
        let [losses, norms] = ["loss", "grad_norm"].map(|key| fixture.f64(key));
        let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
        for k in 0..5 {
            let t: Vec<u32> = t[k * images..][..images].iter().map(|t| *t as u32).collect();
            let noise = &noise[k * image..][..image];
            let x_t: Vec<f32> = (0..image)
                .map(|i| {
                    let x_0 = pixels[k * image + i] / 127.5 - 1.0;
                    schedule.q_sample(x_0, t[i / (image / images)] as usize, noise[i]) as f32
                })
                .collect();
            let noise: Vec<f32> = noise.iter().map(|x| *x as f32).collect();
            let step = k as u64 + 1;
            let hyper = Hyper {
                lr: LR * (step as f64 / 2.0).min(1.0),
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                bias_correction1: bias_correction(0.9, step),
                bias_correction2: bias_correction(0.999, step),
                max_grad_norm: 1.0,
                ema_decay: 0.9,
            };
            let y = network.step(&x_t, &t, &noise, Some(&hyper));
            let loss = y.iter().zip(&noise).map(|(y, e)| f64::from(y - e).powi(2)).sum::<f64>() / y.len() as f64;
            assert!((loss / losses[k] - 1.0).abs() < F32, "step {step}: loss {loss}, expected {}", losses[k]);
            let norm = network.get::<f32>("norm");
            assert!((f64::from(norm[0]) / norms[k] - 1.0).abs() < F32, "step {step}: {norm:?}, expected {}", norms[k]);
            for (region, kind) in [(Region::Weights, "weight"), (Region::Ema, "ema")] {
                let found = network.flat(region);
                for placed in network.program.layout.iter().filter(|placed| !placed.name.ends_with("to_k.bias")) {
                    let exact = fixture.f32(&format!("{kind}{step}/{}", placed.name));
                    for (found, exact) in found[placed.range.clone()].iter().zip(exact) {
                        let error = f64::from((found - exact).abs());
                        assert!(error < 1e-3 * LR, "step {step}: {kind} of {} is off by {error:e}", placed.name);
                    }
                }
            }
        }
    });
}
