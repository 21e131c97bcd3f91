//! The network on every device against diffusers' `UNet2DModel` with the same weights: output, and the gradient of every parameter; and
//! training steps against PyTorch's. The values are made by `tests/reference/unet.py` and `step.py` in f64.

use crate::planned::{Planned, Reference};
use crate::steps::{cpu, gpu, with_kernels};
use crate::values::hyper;
use ddpm_dist::device::{DType, Device, Precision, Region};
use ddpm_dist::diffusion::{DiffusionConfig, Schedule};
use ddpm_dist::ops::adam_ema::{Hyper, adam_ema};
use ddpm_dist::ops::copy::Copy;
use ddpm_dist::ops::grad_norm::grad_norm;
use ddpm_dist::tape::{Phase, Program, Spec, Tape};
use ddpm_dist::unet::{TimestepForm, UnetConfig, unet};
use serde_json::Value;
use std::sync::Arc;

/// A network of tests/reference.
struct Fixture {
    name: &'static str,
    config: UnetConfig,
    tensors: Reference,
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
        Fixture { name, config, tensors: Reference::new(tensors) }
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
    planned: Planned,
    /// Of the images, and how many the network has.
    channels: [usize; 2],
}

impl Network {
    /// `updates` has its weights change, by the numbers "hyper"; "norm" is then the gradients'.
    fn new(device: Device, config: &UnetConfig, shape: &[usize], precision: Precision, updates: bool) -> Network {
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
        Network { planned: Planned::new(&tape, device), channels: [c, shape[3]] }
    }

    /// Writes images, rounded, and filled up with channels of zeros.
    fn set_images(&mut self, name: &str, images: &[f32]) {
        let [channels, with] = self.channels;
        let rest = vec![0.0; with - channels];
        let images: Vec<f32> = images.chunks(channels).flat_map(|pixel| [pixel, &rest].concat()).collect();
        self.planned.set_activations(name, &images);
    }

    fn images(&self, name: &str) -> Vec<f32> {
        let [channels, with] = self.channels;
        self.planned.activations(name).chunks(with).flat_map(|pixel| &pixel[..channels]).copied().collect()
    }

    /// Writes the fixture's weights of that kind to regions, and their copy.
    fn set_weights(&mut self, fixture: &Fixture, kind: &str, regions: &[Region]) {
        self.planned.set_flat(regions, |name, shape| {
            let key = format!("{kind}/{name}");
            assert_eq!(fixture.tensors.shape(&key), shape, "{}: {key}", fixture.name);
            fixture.tensors.f32(&key)
        });
    }

    /// Output for `x` and `t`, and the gradients of mean((output − target)²) in their buffer, with which `updates` is then applied.
    fn step(&mut self, x: &[f32], t: &[u32], target: &[f32], updates: Option<&Hyper>) -> Vec<f32> {
        self.set_images("x", x);
        self.planned.set("t", t);
        // Gradients that are not finite change nothing.
        self.set_images("dy", &vec![f32::NAN; x.len()]);
        self.planned.run();
        let y = self.images("y");
        let scale = 2.0 / y.len() as f64;
        let dy: Vec<f32> =
            y.iter().zip(target).map(|(y, t)| (scale * (f64::from(*y) - f64::from(*t))) as f32).collect();
        self.set_images("dy", &dy);
        if let Some(hyper) = updates {
            self.planned.set("hyper", &hyper.to_array());
        }
        self.planned.run();
        y
    }
}

pub fn root_mean_square(values: &[f32]) -> f64 {
    (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

/// Error relative to the root mean square of the exact values, or to `floor` if that is larger: in f32 the largest, in bf16 its root mean
/// square, as single elements have lost too many digits to be told from wrong ones.
pub fn relative_error(found: &[f32], exact: &[f32], floor: f64, precision: Precision) -> f64 {
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
    let mut network = Network::new(device, &fixture.config, &fixture.tensors.shape("x_t"), precision, false);
    let tolerance = if precision == Precision::F32 { F32 } else { bf16_tolerance(&network.planned.program) };
    network.set_weights(fixture, "weight", &[Region::Weights]);
    let layout = network.planned.program.layout.clone();
    let count = fixture.tensors.names().into_iter().filter(|n| n.starts_with("weight/")).count();
    assert_eq!(layout.iter().count(), count, "{name}: number of parameters");

    let t: Vec<u32> = fixture.tensors.f64("t").iter().map(|&t| t as u32).collect();
    let y = network.step(&fixture.tensors.f32("x_t"), &t, &fixture.tensors.f32("target"), None);
    let error = relative_error(&y, &fixture.tensors.f32("output"), 0.0, precision);
    assert!(error < tolerance, "{name}: output is off by {error:e}");
    let gradients = network.planned.flat(Region::Gradients);
    // Some gradients cancel to nothing (a key bias moves all logits alike): what is left is measured against the others.
    let all: Vec<f32> = layout.iter().flat_map(|p| fixture.tensors.f32(&format!("grad/{}", p.name))).collect();
    let floor = 0.1 * root_mean_square(&all);
    let mut worst = 0.0f64;
    for placed in layout.iter() {
        let exact = fixture.tensors.f32(&format!("grad/{}", placed.name));
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
        let shape = &fixture.tensors.shape("pixels")[1..];
        let (images, image) = (shape[0], shape.iter().product::<usize>());
        let mut network = Network::new(gpu(), &fixture.config, shape, Precision::F32, true);
        network.set_weights(&fixture, "start", &[Region::Weights, Region::Ema]);
        let [pixels, noise, t] = ["pixels", "noise", "t"].map(|key| fixture.tensors.f64(key));
        let [losses, norms] = ["loss", "grad_norm"].map(|key| fixture.tensors.f64(key));
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
            let lr = LR * (step as f64 / 2.0).min(1.0);
            let hyper = Hyper { lr, weight_decay: 0.0, ema_decay: 0.9, ..hyper(step) };
            let y = network.step(&x_t, &t, &noise, Some(&hyper));
            let loss = y.iter().zip(&noise).map(|(y, e)| f64::from(y - e).powi(2)).sum::<f64>() / y.len() as f64;
            assert!((loss / losses[k] - 1.0).abs() < F32, "step {step}: loss {loss}, expected {}", losses[k]);
            let norm = network.planned.get::<f32>("norm");
            assert!((f64::from(norm[0]) / norms[k] - 1.0).abs() < F32, "step {step}: {norm:?}, expected {}", norms[k]);
            for (region, kind) in [(Region::Weights, "weight"), (Region::Ema, "ema")] {
                let found = network.planned.flat(region);
                for placed in network.planned.program.layout.iter().filter(|placed| !placed.name.ends_with("to_k.bias"))
                {
                    let exact = fixture.tensors.f32(&format!("{kind}{step}/{}", placed.name));
                    for (found, exact) in found[placed.range.clone()].iter().zip(exact) {
                        let error = f64::from((found - exact).abs());
                        assert!(error < 1e-3 * LR, "step {step}: {kind} of {} is off by {error:e}", placed.name);
                    }
                }
            }
        }
    });
}
