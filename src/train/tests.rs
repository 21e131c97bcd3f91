//! A training step against PyTorch, the schedules of its scalars, and that training trains.

use super::step::hyper;
use super::*;
use crate::collective::Solo;
use crate::device::cpu::{Cpu, Launch};
use crate::device::cuda::{Form, Work};
use crate::device::{Device, DeviceKind, Precision, Region, Target};
use crate::diffusion::{DiffusionConfig, Schedule};
use crate::ops::adam_ema::{Hyper, adam_ema};
use crate::ops::grad_norm::grad_norm;
use crate::ops::testing::{Planned, Reference, pixels, random};
use crate::tape::{Op, Phase, Shape, Signature, Spec, Tape};
use crate::unet::{UnetConfig, unet};

/// L_simple (eq. 14) against a given target, since the ε of the real step is drawn by the step itself.
///
/// Inputs: output and target. Outputs: gradient of the mean squared error, and the error [1].
#[derive(Debug)]
struct GivenLoss {
    shape: Shape,
}

impl Op for GivenLoss {
    fn name(&self) -> &'static str {
        "given_loss"
    }

    fn signature(&self) -> Signature {
        let spec = Spec::f32(self.shape.clone());
        Signature { inputs: vec![spec.clone(), spec.clone()], outputs: vec![spec, Spec::f32([1])] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        let (out, target, dout) = (launch.input::<f32>(0), launch.input::<f32>(1), launch.output::<f32>(0));
        let count = self.shape.len() as f64;
        let mut sum = 0.0;
        for i in 0..dout.len() {
            let difference = f64::from(out[i]) - f64::from(target[i]);
            sum += difference * difference;
            dout[i] = (2.0 / count * difference) as f32;
        }
        launch.output::<f32>(1)[0] = (sum / count) as f32;
    }

    fn cuda(&self, _: &Form) -> Work {
        unreachable!("it runs on the CPU")
    }
}

const SHAPE: [usize; 4] = [4, 8, 8, 1];

/// The model of `tests/reference/step.json`.
fn reference_model() -> UnetConfig {
    UnetConfig {
        image_channels: 1,
        channels: vec![4, 8],
        blocks: 1,
        attention_levels: vec![0],
        groups: 2,
        dropout: 0.0,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        ..UnetConfig::default()
    }
}

/// UNet → loss → backward → grad_norm → adam_ema with the ops of the real step, x_t and ε given.
fn given_step(model: &UnetConfig) -> Planned {
    let mut tape = Tape::new();
    let x_t = tape.io("x_t", Spec::f32(SHAPE));
    let t = tape.io("t", Spec::u32([SHAPE[0]]));
    let target = tape.io("target", Spec::f32(SHAPE));
    let hyper = tape.io("hyper", Spec::f32([Hyper::LEN]));
    let out = unet(&mut tape, model, x_t, t, None);
    tape.begin(Phase::Backward);
    let outputs = tape.push(GivenLoss { shape: SHAPE.into() }, &[out, target]);
    tape.backward(out, outputs[0]);
    tape.begin(Phase::Update);
    let norm = tape.io("norm", Spec::f32([2]));
    grad_norm(&mut tape, norm);
    adam_ema(&mut tape, false, norm, hyper);
    tape.publish(outputs[1], "loss");
    Planned::new(&tape, 2)
}

/// Five steps of `tests/reference/step.py`, each after the other from the same start: loss, gradient norm, all weights and averages.
///
/// Adam moves a weight by about the learning rate, whatever the size of its gradient, so errors are told in that unit: a thousandth of a
/// step. A wrong constant anywhere (β, bias correction, clipping, the order of warm-up and decay) is tenths of a step. PyTorch's own
/// rounding in f32 is a third of it (tests/reference/README.md).
#[test]
fn five_steps_are_those_of_pytorch() {
    const LR: f64 = 1e-3;
    const TOLERANCE: f64 = 1e-3 * LR;
    let reference = Reference::open("step.safetensors");
    let mut config = Config { model: reference_model(), ..Config::default() };
    config.optim = OptimConfig { lr: LR, warmup_steps: 2, clip: 1.0, ..OptimConfig::default() };
    config.ema.decay = 0.9;
    let mut step = given_step(&config.model);
    let names: Vec<String> = step.program.layout.iter().map(|p| p.name.clone()).collect();
    let zeros = vec![0.0; step.program.layout.len()];
    for region in [Region::Weights, Region::Gradients, Region::Moment1, Region::Moment2, Region::Ema] {
        step.set_flat(region, &zeros);
    }
    for name in &names {
        let start = reference.f32(&format!("start/{name}"));
        step.set_part(Region::Weights, name, &start);
        step.set_part(Region::Ema, name, &start);
    }

    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    let (all_pixels, all_noise, all_t) = (reference.f64("pixels"), reference.f64("noise"), reference.f64("t"));
    let (losses, norms, rates) = (reference.f64("loss"), reference.f64("grad_norm"), reference.f64("lr"));
    let image: usize = SHAPE[1..].iter().product();
    for k in 0..5 {
        let t: Vec<u32> = all_t[k * SHAPE[0]..][..SHAPE[0]].iter().map(|&t| t as u32).collect();
        let elements = k * SHAPE[0] * image..(k + 1) * SHAPE[0] * image;
        let noise = &all_noise[elements.clone()];
        let x_t: Vec<f32> = all_pixels[elements]
            .iter()
            .zip(noise)
            .enumerate()
            .map(|(i, (p, e))| schedule.q_sample(p / 127.5 - 1.0, t[i / image] as usize, *e) as f32)
            .collect();
        step.set("x_t", &x_t);
        step.set("t", &t);
        step.set("target", &noise.iter().map(|&e| e as f32).collect::<Vec<_>>());
        let scalars = hyper(&config, k as u64);
        assert!((scalars.lr - rates[k]).abs() < 1e-12, "lr of step {k}: {}", scalars.lr);
        step.set("hyper", &scalars.to_array());
        step.run();

        let loss = f64::from(step.get::<f32>("loss")[0]);
        assert!((loss - losses[k]).abs() < TOLERANCE, "step {k}: loss {loss}, PyTorch {}", losses[k]);
        let norm = step.get::<f32>("norm");
        assert!(
            (f64::from(norm[0]) - norms[k]).abs() < 1e-5 * norms[k],
            "step {k}: norm {}, PyTorch {}",
            norm[0],
            norms[k]
        );
        assert_eq!(norm[1], 1.0);
        // Gradients of key biases are rounding noise around zero, which Adam makes as large as any other.
        for name in names.iter().filter(|n| !n.ends_with("to_k.bias")) {
            for (region, key) in [(Region::Weights, "weight"), (Region::Ema, "ema")] {
                let exact = reference.f64(&format!("{key}{}/{name}", k + 1));
                for (i, (found, exact)) in step.part(region, name).iter().zip(&exact).enumerate() {
                    let error = (f64::from(*found) - exact).abs();
                    assert!(error < TOLERANCE, "step {k}: {key} {name}[{i}] = {found}, PyTorch {exact}");
                }
            }
        }
    }
}

#[test]
fn learning_rates_are_those_of_diffusers_schedules() {
    let reference = Reference::open("optimizer.safetensors");
    let constant = OptimConfig { lr: 2.0, warmup_steps: 4, ..OptimConfig::default() };
    let cosine = OptimConfig { decay: Decay::Cosine, decay_steps: 10, ..constant.clone() };
    for (key, optim) in [("constant_warmup4", &constant), ("cosine_warmup4_total10", &cosine)] {
        // Update k = 1, 2, … is step k − 1, counted from 0.
        for (k, factor) in reference.f64(key).iter().enumerate().skip(1) {
            let lr = optim.lr_at(k as u64 - 1);
            assert!((lr - 2.0 * factor).abs() < 1e-12, "{key}: lr of update {k} is {lr}, expected {}", 2.0 * factor);
        }
    }
    assert_eq!(cosine.lr_at(9), 0.0, "the last update of the decay is at its end");
}

#[test]
fn a_decay_ends_at_its_lowest_rate_and_stays_there() {
    let optim = OptimConfig {
        lr: 1e-3,
        min_lr: 1e-5,
        warmup_steps: 0,
        decay: Decay::Cosine,
        decay_steps: 100,
        ..OptimConfig::default()
    };
    let rates: Vec<f64> = (0..300).map(|step| optim.lr_at(step)).collect();
    assert!(rates[0] < 1e-3 && rates[0] > 0.99e-3);
    assert!((rates[49] - 0.5 * (1e-3 + 1e-5)).abs() < 1e-12, "half-way: {}", rates[49]);
    assert!(rates[..100].windows(2).all(|w| w[1] < w[0]));
    assert!(rates[99..].iter().all(|&lr| (lr - 1e-5).abs() < 1e-18));
    // The length of the run has no say.
    assert_eq!(OptimConfig::default().lr_at(800_000), 2e-4);
}

#[test]
fn the_average_decays_as_in_diffusers() {
    let reference = Reference::open("optimizer.safetensors");
    for (run, ema) in [
        ("adam", EmaConfig { decay: 0.9, warmup: false }),
        ("adam_unclipped", EmaConfig { decay: 0.9999, warmup: false }),
        ("adamw", EmaConfig { decay: 0.4, warmup: true }),
    ] {
        for (step, exact) in reference.f64(&format!("{run}/ema_decay")).iter().enumerate() {
            let found = ema.decay_at(step as u64);
            assert!((found - exact).abs() < 1e-12, "{run}: decay of step {step} is {found}, diffusers' {exact}");
        }
    }
    let slow = EmaConfig { decay: 0.9999, warmup: true };
    assert_eq!(slow.decay_at(89), 90.0 / 99.0);
    assert_eq!(slow.decay_at(1_000_000), 0.9999);
}

#[test]
fn bias_corrections_belong_to_the_step_after() {
    let config = Config::default();
    let first = hyper(&config, 0);
    assert!((first.bias_correction1 - 0.1).abs() < 1e-15 && (first.bias_correction2 - 1e-3).abs() < 1e-15);
    let tenth = hyper(&config, 9);
    assert!((tenth.bias_correction1 - (1.0 - 0.9f64.powi(10))).abs() < 1e-15);
    assert_eq!((tenth.max_grad_norm, tenth.ema_decay, tenth.eps), (1.0, 0.9999, 1e-8));
}

/// Everything that draws numbers or sums over the batch, switched on.
fn small_config() -> Config {
    let model = UnetConfig {
        image_channels: 3,
        channels: vec![8, 16],
        blocks: 1,
        attention_levels: vec![1],
        groups: 4,
        dropout: 0.2,
        ..UnetConfig::default()
    };
    let mut config = Config { model, ..Config::default() };
    config.data.flip = true;
    config.train.batch = 5;
    config.train.seed = 17;
    config.optim = OptimConfig { lr: 2e-3, warmup_steps: 3, clip: 0.5, ..OptimConfig::default() };
    config.ema.decay = 0.9;
    config
}

struct Run {
    device: Device,
    trainer: Trainer,
    config: Config,
    size: [usize; 2],
}

impl Run {
    fn new(config: Config, size: [usize; 2], threads: usize) -> Run {
        let mut device = Device::Cpu(Cpu::new(threads));
        let schedule = Schedule::new(&config.diffusion).unwrap();
        let trainer = Trainer::new(&mut device, &config, &schedule, size, Share::solo(&config.train).unwrap()).unwrap();
        Run { device, trainer, config, size }
    }

    fn step(&mut self, step: u64, pixels: &[u8]) -> Metrics {
        let losses =
            self.trainer.step(&mut self.device, &mut Solo, &self.config, step, Images::Pixels(pixels)).unwrap();
        let (norm, images) = (losses.norm, losses.losses.iter().copied().zip(losses.timesteps.iter().copied()));
        Metrics::new(images, self.config.diffusion.timesteps, norm)
    }

    fn image(&self) -> usize {
        self.size[0] * self.size[1] * self.config.model.image_channels
    }

    fn state(&self, region: Region) -> Vec<f32> {
        let mut flat = vec![0.0; self.trainer.program().layout.len()];
        self.device.download(self.trainer.buffer(region), 0, &mut flat).unwrap();
        flat
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let run = |threads: usize| {
        let mut run = Run::new(small_config(), [12, 8], threads);
        let count = run.config.train.batch * run.image();
        let metrics: Vec<Metrics> = (0..5).map(|step| run.step(step, &pixels(step, count))).collect();
        let state = STATE.map(|region| run.state(region).iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        (metrics, state)
    };
    let (metrics, state) = run(1);
    assert!(metrics.iter().all(|m| m.finite && m.grad_norm > 0.0));
    assert!(metrics.iter().any(|m| m.grad_norm > 0.5), "no gradient was clipped");
    assert_ne!(state[0], state[3], "the average is not the weights");
    for threads in [2, 3] {
        let (other_metrics, other_state) = run(threads);
        assert_eq!(other_metrics, metrics, "{threads} threads");
        assert!(other_state == state, "{threads} threads give other bits");
    }
}

#[test]
fn a_step_draws_by_its_number_and_the_seed() {
    let first = |seed: u64, step: u64| {
        let mut config = small_config();
        config.train.seed = seed;
        let mut run = Run::new(config, [8, 8], 2);
        // The same weights whatever the seed.
        let weights: Vec<f32> = random(5, run.trainer.program().layout.len()).iter().map(|x| 0.1 * x).collect();
        run.trainer.set_parameters(&mut run.device, &weights).unwrap();
        let count = run.config.train.batch * run.image();
        run.step(step, &pixels(1, count))
    };
    assert_eq!(first(17, 3), first(17, 3));
    assert_ne!(first(17, 3).loss, first(17, 4).loss);
    assert_ne!(first(17, 3).loss, first(18, 3).loss);
}

#[test]
fn training_lowers_the_loss() {
    let mut config = small_config();
    config.train.batch = 8;
    config.model.dropout = 0.0;
    config.optim = OptimConfig { lr: 4e-3, warmup_steps: 10, ..OptimConfig::default() };
    let mut run = Run::new(config, [8, 8], 2);
    // Eight plain images of one colour each.
    let image = run.image();
    let pixels: Vec<u8> = (0..8 * image).map(|i| (32 * (i / image)) as u8).collect();
    let losses: Vec<f64> = (0..250).map(|step| run.step(step, &pixels).loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (start, end) = (mean(&losses[..5]), mean(&losses[200..]));
    assert!((start - 1.0).abs() < 0.2, "an untrained network predicts 0, so the loss is the variance of ε: {start}");
    assert!(end < 0.35, "mean loss of the last 50 of 250 steps: {end}");
    let moved = run.state(Region::Weights).iter().zip(run.state(Region::Ema)).any(|(w, e)| *w != e);
    assert!(moved);
}

#[test]
fn what_is_not_finite_is_told_and_changes_nothing() {
    let mut run = Run::new(small_config(), [8, 8], 2);
    let count = run.config.train.batch * run.image();
    run.step(0, &pixels(0, count));
    let range = run.trainer.program().layout.get("conv_out.bias").unwrap().range.clone();
    let mut weights = run.state(Region::Weights);
    weights[range.start] = f32::NAN;
    run.device.upload(run.trainer.buffer(Region::Weights), 0, &weights).unwrap();
    let before = STATE.map(|region| run.state(region).iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let metrics = run.step(1, &pixels(1, count));
    assert!(!metrics.finite && metrics.loss.is_nan());
    let after = STATE.map(|region| run.state(region).iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    assert!(before == after, "the state of a step that is not finite must stay as it was");
}

#[test]
fn quartiles_of_t_make_up_the_loss() {
    let mut config = small_config();
    config.train.batch = 64;
    let mut run = Run::new(config, [4, 4], 2);
    let count = 64 * run.image();
    let metrics = run.step(0, &pixels(0, count));
    let known: Vec<f64> = metrics.quartiles.iter().flatten().copied().collect();
    assert_eq!(known.len(), 4, "64 draws of t reach every quarter");
    let (low, high) = known.iter().fold((f64::MAX, 0.0f64), |(l, h), &q| (l.min(q), h.max(q)));
    assert!(low <= metrics.loss && metrics.loss <= high, "{metrics:?}");
}

#[test]
fn parameters_stand_at_the_same_places_whatever_computes() {
    let mut config = small_config();
    config.model.image_channels = 3;
    let share = Share::solo(&config.train).unwrap();
    let layout =
        |kind, precision| step_programs(&config, [8, 8], &share, Target { kind, precision }).0[0].layout.clone();
    let expected = layout(DeviceKind::Cpu, Precision::F32);
    for precision in [Precision::F32, Precision::Bf16] {
        assert!(layout(DeviceKind::Cuda, precision) == expected, "{precision:?}");
    }
}

/// Images that the device holds are those that are uploaded.
#[test]
fn images_by_number_are_those_by_pixels() {
    let config = small_config();
    let (size, count) = ([8, 8], 11);
    let mut run = Run::new(config.clone(), size, 2);
    let image = run.image();
    let all = pixels(3, count * image);
    let mut device = Device::Cpu(Cpu::new(2));
    let schedule = Schedule::new(&config.diffusion).unwrap();
    let share = Share::solo(&config.train).unwrap();
    let mut holding = Trainer::holding(&mut device, &config, &schedule, size, share, Some(count)).unwrap();
    device.upload(holding.images().unwrap(), 0, &all).unwrap();
    for (step, numbers) in [[10u32, 0, 3, 3, 7], [1, 2, 10, 9, 4]].iter().enumerate() {
        let taken: Vec<u8> =
            numbers.iter().flat_map(|&number| &all[number as usize * image..][..image]).copied().collect();
        let expected = run.step(step as u64, &taken);
        let losses = holding.step(&mut device, &mut Solo, &config, step as u64, Images::Numbers(numbers)).unwrap();
        let (norm, images) = (losses.norm, losses.losses.iter().copied().zip(losses.timesteps.iter().copied()));
        assert_eq!(Metrics::new(images, config.diffusion.timesteps, norm), expected);
    }
    let mut weights = vec![0.0; holding.program().layout.len()];
    device.download(holding.buffer(Region::Weights), 0, &mut weights).unwrap();
    assert!(weights == run.state(Region::Weights));
}
