//! The configs that ship: each loads, describes a network that exists, and is the model it claims to be.

use ddpm_dist::device::Target;
use ddpm_dist::diffusion::{Schedule, Variance};
use ddpm_dist::sample::ReverseStep;
use ddpm_dist::train::Config;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

fn load(file: &Path) -> Config {
    match ddpm_dist::config::load_with(file, &[], Config::validate) {
        Ok(config) => config,
        Err(error) => panic!("{error}"),
    }
}

/// Parameters, and FLOPs of the forward pass for one image.
fn model_of(config: &Config) -> (usize, u64) {
    let size = config.data.size.expect("data.size, so that `plan` needs no data");
    if let Err(error) = config.model.validate(size.height, size.width) {
        panic!("{error}");
    }
    let size = [size.height, size.width];
    let step = ReverseStep { model: &config.model, size, batch: 1, steps: 1, layout: None };
    let summary = step.program(Target::default()).summary();
    (summary.parameters, summary.forward_flops)
}

#[test]
fn every_config_loads_and_its_network_exists() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let file = entry.unwrap().path();
        let config = load(&file);
        let (parameters, _) = model_of(&config);
        assert!(parameters > 0, "{}", file.display());
        if let Some(channels) = config.data.channels {
            assert_eq!(channels, config.model.image_channels, "{}", file.display());
        }
        names.push(file.file_name().unwrap().to_string_lossy().into_owned());
    }
    names.sort();
    assert_eq!(names, ["celebahq256.toml", "cifar10.toml", "fashion-mnist.toml", "lsun256.toml", "quickstart.toml"]);
}

#[test]
fn the_papers_models_have_the_papers_sizes() {
    // Parameters of the published weights; FLOPs of a forward pass, a multiply-add counting as two.
    for (name, parameters, gflop) in
        [("cifar10", 35_746_307, 12.44), ("lsun256", 113_673_219, 497.0), ("celebahq256", 113_673_219, 497.0)]
    {
        let (found, flops) = model_of(&load(&folder().join(format!("{name}.toml"))));
        assert_eq!(found, parameters, "{name}");
        let found = flops as f64 / 1e9;
        assert!((found / gflop - 1.0).abs() < 0.01, "{name}: {found} GFLOP, expected {gflop}");
    }
}

#[test]
fn the_papers_models_are_trained_as_in_the_paper() {
    for (name, steps, batch, lr, dropout, variance) in [
        ("cifar10", 800_000, 128, 2e-4, 0.1, Variance::FixedLarge),
        ("lsun256", 1_200_000, 64, 2e-5, 0.0, Variance::FixedSmall),
        ("celebahq256", 500_000, 64, 2e-5, 0.0, Variance::FixedSmall),
    ] {
        let config = load(&folder().join(format!("{name}.toml")));
        assert_eq!((config.train.steps, config.train.batch), (steps, batch), "{name}");
        assert_eq!((config.optim.lr, config.optim.warmup_steps, config.optim.clip), (lr, 5000, 1.0), "{name}");
        assert_eq!((config.optim.beta1, config.optim.beta2, config.optim.eps), (0.9, 0.999, 1e-8), "{name}");
        assert_eq!((config.ema.decay, config.ema.warmup), (0.9999, false), "{name}");
        assert_eq!((config.model.dropout, config.data.flip), (dropout, true), "{name}");
        assert_eq!(config.diffusion.variance, variance, "{name}");
        // ᾱ of the last step, in f64: linear from 1e-4 to 0.02 over 1000 steps, as published.
        let schedule = Schedule::new(&config.diffusion).unwrap();
        assert!((schedule.alphas_cumprod[999] / 4.035829765e-5 - 1.0).abs() < 1e-9, "{name}");
    }
}
