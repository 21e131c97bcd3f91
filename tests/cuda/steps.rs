//! Training steps and reverse steps on a GPU against those on CPU cores, where the same programs run.

use crate::machine::{WITH_KERNELS, not_tested, run_cases, say};
use ddpm_dist::collective::Solo;
use ddpm_dist::device::cuda::{Cuda, Image};
use ddpm_dist::device::{Device, Precision, Region, cpu::Cpu};
use ddpm_dist::diffusion::{SamplerConfig, SamplerTable, Schedule};
use ddpm_dist::rng::{Kind, Stream};
use ddpm_dist::sample::{Progress, Request, ReverseProcess, ReverseStep, SampleError, Sampler};
use ddpm_dist::train::{Config, Images, Shards, Share, Trainer};
use ddpm_dist::unet::{TimestepForm, UnetConfig};

pub fn gpu() -> Device {
    Device::Cuda(Box::new(Cuda::open(0).unwrap_or_else(|error| panic!("{error}"))))
}

pub fn cpu() -> Device {
    Device::Cpu(Cpu::new(1))
}

/// Runs `body` where there are kernels and all libraries.
pub fn with_kernels(test: &str, body: impl Fn()) {
    match Image::embedded() {
        Some(_) => run_cases(test, &WITH_KERNELS, &[(&[], ())], |()| body()),
        None => not_tested(&format!("{test}: built without nvcc")),
    }
}

/// A small network with all that the large ones have, and images of that size.
pub fn config(channels: &[usize], image_channels: usize, batch: usize) -> Config {
    let model = UnetConfig {
        image_channels,
        channels: channels.to_vec(),
        blocks: 1,
        attention_levels: vec![1],
        groups: 4,
        dropout: 0.1,
        ..UnetConfig::default()
    };
    let mut config = Config { model, ..Config::default() };
    config.train.batch = batch;
    config.train.seed = 5;
    config.optim.warmup_steps = 0;
    config
}

pub fn pixels(config: &Config, size: [usize; 2], step: u64) -> Vec<u8> {
    let len = config.train.batch * size[0] * size[1] * config.model.image_channels;
    let mut words = vec![0u32; len.div_ceil(4)];
    Stream { seed: 77 + step, kind: Kind::Init, layer: 0, sample: 0, step: 0 }.fill_bits(0, &mut words);
    words.iter().flat_map(|word| word.to_le_bytes()).take(len).collect()
}

/// What steps leave.
#[derive(PartialEq)]
pub struct Run {
    losses: Vec<Vec<f32>>,
    timesteps: Vec<Vec<u32>>,
    norms: Vec<f32>,
    /// Of the last step.
    gradients: Vec<f32>,
    weights: Vec<f32>,
    ema: Vec<f32>,
    /// Names and places of the parameters.
    places: Vec<(String, std::ops::Range<usize>)>,
}

pub fn train(device: &mut Device, config: &Config, size: [usize; 2], steps: u64) -> Run {
    train_ahead(device, config, size, steps, 0)
}

/// The same where so many steps are under way when the results of one are read.
pub fn train_ahead(device: &mut Device, config: &Config, size: [usize; 2], steps: u64, ahead: usize) -> Run {
    let schedule = Schedule::new(&config.diffusion).unwrap();
    let share = Share::solo(&config.train).unwrap();
    let mut trainer = Trainer::new(device, config, &schedule, size, share).unwrap();
    let (mut losses, mut timesteps, mut norms) = (vec![], vec![], vec![]);
    for step in 0..steps + ahead as u64 {
        if step < steps {
            trainer.begin(device, &mut Solo, config, step, Images::Pixels(&pixels(config, size, step))).unwrap();
        }
        if step < ahead as u64 {
            continue;
        }
        let found = trainer.finish(device, &mut Solo).unwrap();
        losses.push(found.losses.to_vec());
        timesteps.push(found.timesteps.to_vec());
        assert_eq!(found.norm[1], 1.0, "step {step} is finite");
        norms.push(found.norm[0]);
    }
    let layout = &trainer.program().layout;
    let places = layout.iter().map(|placed| (placed.name.clone(), placed.range.clone())).collect();
    let [mut gradients, mut weights, mut ema] = [(); 3].map(|()| vec![0.0; layout.len()]);
    trainer.gradients(device, &mut gradients).unwrap();
    device.download(trainer.buffer(Region::Weights), 0, &mut weights).unwrap();
    device.download(trainer.buffer(Region::Ema), 0, &mut ema).unwrap();
    Run { losses, timesteps, norms, gradients, weights, ema, places }
}

/// ‖found − expected‖/‖expected‖
fn error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(f, e)| square(f64::from(*f) - f64::from(*e))).sum();
    let size: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// A gradient that is zero but for rounding (attention does not see a shift of all keys) has no relative error.
fn is_noise(name: &str) -> bool {
    name.ends_with("to_k.bias")
}

/// Relative error that a gradient may have: of each parameter.
fn assert_alike(found: &Run, expected: &Run, tolerance: f64) {
    assert_eq!(found.timesteps, expected.timesteps, "both draw the same bits");
    for (step, (found, expected)) in found.losses.iter().zip(&expected.losses).enumerate() {
        assert!(error(found, expected) < tolerance, "losses of step {step}: {found:?}, expected {expected:?}");
    }
    assert!(error(&found.norms, &expected.norms) < tolerance, "{:?}, expected {:?}", found.norms, expected.norms);
    let (name, worst) = worst_gradient(found, expected);
    assert!(worst < tolerance, "gradient of {name}: relative error {worst:e}");
}

/// Relative errors of sums of up to some thousand terms in another order, through some forty layers and back.
const F32: f64 = 2e-5;
/// Activations and their gradients are rounded by 2⁻⁹ in some sixty places one after another: as a random walk √60·2⁻⁹, twice that at most.
const BF16: f64 = 0.03;

#[test]
fn a_step_in_f32_is_that_of_the_cpu() {
    with_kernels("steps::a_step_in_f32_is_that_of_the_cpu", || {
        let grey = config(&[8, 16], 1, 3);
        let mut colour = config(&[8, 16], 3, 2);
        colour.model.timestep = TimestepForm::ScaleShift;
        colour.model.head_channels = 8;
        let mut odd = config(&[12, 20], 3, 1);
        odd.model.blocks = 2;
        for (config, size) in [(&grey, [8, 8]), (&colour, [12, 20]), (&odd, [6, 10])] {
            let [found, expected] = [gpu(), cpu()].map(|mut device| train(&mut device, config, size, 1));
            assert_alike(&found, &expected, F32);
        }
    });
}

/// As [`F32`], of sums of 131072 terms through some hundred layers: 2⁻²⁴·√131072·√100.
const F32_AT_FULL_SIZE: f64 = 2e-4;

/// As [`BF16`], through some 250 places of 22 blocks forward and back: √250·2⁻⁹, twice that at most. Of as many layers with fewer channels no
/// gradient was found to be off by more than 0.026, and one without an image of four by no less than 0.2.
const BF16_AT_FULL_SIZE: f64 = 0.06;

/// On the machine made of software it would take hours. The batch is that of the benchmark, whose plans it finds.
#[test]
#[ignore = "takes a GPU, and seconds of sixteen cores: tests/gpu/run starts it"]
fn the_papers_network_at_full_size_is_that_of_the_cpu() {
    let mut exact = Config::default();
    (exact.train.batch, exact.optim.warmup_steps) = (128, 0);
    let mut rounded = exact.clone();
    rounded.train.precision = Precision::Bf16;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let on_cpu = |count| train(&mut Device::Cpu(Cpu::new(threads)), &exact, [32, 32], count);
    let [first, steps] = [1, 3].map(on_cpu);
    for (config, of_gradients, of_losses) in [(&exact, F32_AT_FULL_SIZE, 1e-3), (&rounded, BF16_AT_FULL_SIZE, BF16)] {
        let found = train(&mut gpu(), config, [32, 32], 1);
        let (name, worst) = worst_gradient(&found, &first);
        say(&format!("at full size, {:?}: relative errors", config.train.precision));
        say(&format!("  {:.1e} of the losses", error(&found.losses[0], &first.losses[0])));
        say(&format!("  {:.1e} of the gradient's norm", error(&found.norms, &first.norms)));
        say(&format!("  {worst:.1e} of the gradient of {name}, and less of all others"));
        assert_eq!(found.timesteps, first.timesteps, "both draw the same bits");
        let of_norm = of_gradients.min(BF16);
        assert!(error(&found.norms, &first.norms) < of_norm, "{:?}, expected {:?}", found.norms, first.norms);
        assert!(worst < of_gradients, "gradient of {name}: relative error {worst:e}");
        let found = train(&mut gpu(), config, [32, 32], 3);
        for (step, (found, expected)) in found.losses.iter().zip(&steps.losses).enumerate() {
            assert!(error(found, expected) < of_losses, "losses of step {step}: {found:?}, expected {expected:?}");
        }
    }
}

/// The layers of the paper's network with fewer channels.
#[test]
fn a_wrong_gradient_of_one_layer_is_seen_in_bf16() {
    with_kernels("steps::a_wrong_gradient_of_one_layer_is_seen_in_bf16", || {
        let (size, batch) = ([16, 16], 4);
        let mut exact = config(&[16, 32, 32, 32], 3, batch);
        exact.model.blocks = 2;
        let [mut rounded, mut first] = [(); 2].map(|()| exact.clone());
        rounded.train.precision = Precision::Bf16;
        first.train.batch = 1;
        let found = train(&mut gpu(), &rounded, size, 1);
        let [expected, first] = [&exact, &first].map(|config| train(&mut cpu(), config, size, 1));
        assert_eq!(found.timesteps, expected.timesteps, "both draw the same bits");
        assert_eq!(first.timesteps[0], expected.timesteps[0][..1], "one is the first image of the other");
        let (name, worst) = worst_gradient(&found, &expected);
        assert!(worst < BF16_AT_FULL_SIZE, "gradient of {name}: relative error {worst:e}");
        for (name, range) in found.places.iter().filter(|(name, _)| !is_noise(name)) {
            let [found, expected, first] = [&found, &expected, &first].map(|run| &run.gradients[range.clone()]);
            let too_large: Vec<f32> = found.iter().map(|g| 1.5 * g).collect();
            let without_an_image: Vec<f32> = found.iter().zip(first).map(|(g, one)| g - one / batch as f32).collect();
            for wrong in [too_large, without_an_image] {
                let error = error(&wrong, expected);
                assert!(error > BF16_AT_FULL_SIZE, "a wrong gradient of {name} is not seen: relative error {error:e}");
            }
        }
    });
}

/// The parameter whose gradient has the largest relative error, and that error.
fn worst_gradient<'a>(found: &'a Run, expected: &Run) -> (&'a str, f64) {
    assert_eq!(found.places, expected.places);
    let with_error = |(name, range): &'a (String, std::ops::Range<usize>)| {
        (name.as_str(), error(&found.gradients[range.clone()], &expected.gradients[range.clone()]))
    };
    let errors = found.places.iter().filter(|(name, _)| !is_noise(name)).map(with_error);
    errors.max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap()
}

#[test]
fn shards_add_up_as_on_the_cpu() {
    with_kernels("steps::shards_add_up_as_on_the_cpu", || {
        let mut config = config(&[8, 16], 3, 8);
        config.train.shards = Shards::Fixed(4);
        let [found, expected] = [gpu(), cpu()].map(|mut device| train(&mut device, &config, [8, 8], 2));
        assert_alike(&found, &expected, F32);
    });
}

#[test]
fn twenty_steps_go_the_way_of_the_cpu() {
    with_kernels("steps::twenty_steps_go_the_way_of_the_cpu", || {
        let config = config(&[8, 16], 3, 4);
        let [found, again, expected] = [gpu(), gpu(), cpu()].map(|mut device| train(&mut device, &config, [8, 8], 20));
        // Adam's first steps have the size of the learning rate whatever the gradient's: rounding noise grows.
        for (found, expected) in found.losses.iter().zip(&expected.losses) {
            assert!(error(found, expected) < 1e-3, "{found:?}, expected {expected:?}");
        }
        assert!(error(&found.weights, &expected.weights) < 1e-3);
        assert!(found.weights == again.weights && found.ema == again.ema, "two runs leave the same bits");
    });
}

#[test]
fn bf16_goes_the_way_of_f32() {
    with_kernels("steps::bf16_goes_the_way_of_f32", || {
        let exact = config(&[16, 32], 3, 4);
        let mut rounded = exact.clone();
        rounded.train.precision = Precision::Bf16;
        let [found, again] = [gpu(), gpu()].map(|mut device| train(&mut device, &rounded, [8, 8], 8));
        let expected = train(&mut cpu(), &exact, [8, 8], 8);
        assert!(found.weights == again.weights, "two runs leave the same bits");
        assert_eq!(found.timesteps, expected.timesteps);
        let first = [train(&mut gpu(), &rounded, [8, 8], 1), train(&mut cpu(), &exact, [8, 8], 1)];
        assert_alike(&first[0], &first[1], BF16);
        for (found, expected) in found.losses.iter().zip(&expected.losses) {
            assert!(error(found, expected) < BF16, "{found:?}, expected {expected:?}");
        }
    });
}

/// Images of a network with drawn weights, two at a time, in six steps each.
pub fn images(device: &mut Device, precision: Precision, count: usize) -> Vec<f32> {
    sample(device, precision, count, 6, 0.1, &mut |_| true).unwrap().unwrap()
}

/// The same of weights of that standard deviation and in so many steps, after each of which is asked whether to go on.
pub fn sample(
    device: &mut Device,
    precision: Precision,
    count: usize,
    steps: usize,
    deviation: f32,
    observe: &mut dyn FnMut(Progress) -> bool,
) -> Result<Option<Vec<f32>>, SampleError> {
    let config = config(&[8, 16], 3, 1);
    let table = SamplerConfig { steps, ..SamplerConfig::default() };
    let table = SamplerTable::new(&Schedule::new(&config.diffusion).unwrap(), &table).unwrap();
    let step = ReverseStep { model: &config.model, size: [8, 8], batch: 2, steps: steps + 4, layout: None };
    let sampler = Sampler::new(device, &step, precision)?;
    let mut flat = vec![0.0; sampler.layout().len()];
    Stream { seed: 3, kind: Kind::Init, layer: 0, sample: 0, step: 0 }.fill_normal(0, &mut flat);
    flat.iter_mut().for_each(|w| *w *= deviation);
    let weights = device.allocate(4 * flat.len()).unwrap();
    device.upload(weights, 0, &flat).unwrap();
    let process = ReverseProcess { weights, table: &table };
    let request = Request { count, seed: 9, initial_noise: None, stages: 0 };
    sampler.sample(device, &mut Solo, process, request, observe)
}

#[test]
fn images_are_those_of_the_cpu() {
    with_kernels("steps::images_are_those_of_the_cpu", || {
        let expected = images(&mut cpu(), Precision::F32, 3);
        let found = images(&mut gpu(), Precision::F32, 3);
        assert!(error(&found, &expected) < 1e-4, "{}", error(&found, &expected));
        let first = images(&mut gpu(), Precision::F32, 1);
        assert!(found.starts_with(&first), "an image does not depend on how many there are");
        let rounded = images(&mut gpu(), Precision::Bf16, 3);
        assert!(error(&rounded, &expected) < BF16, "{}", error(&rounded, &expected));
    });
}
