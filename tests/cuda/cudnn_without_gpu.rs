//! NVIDIA's cuDNN itself has a plan for each convolution of the configs that ship, on an H200 that need not be there: `DDPM_DIST_CUDNN` names
//! its `libcudnn.so.9`. On a GPU, that GPU's.

use crate::build::Build;
use crate::machine::{not_tested, run_cases, say};
use ddpm_dist::config::load_with;
use ddpm_dist::device::cuda::dnn::{Dnn, Form};
use ddpm_dist::device::cuda::{ConvolutionShape, Gpu, Pass, Piece, Precision, WORKSPACE};
use ddpm_dist::device::{DeviceKind, Target};
use ddpm_dist::sample::ReverseStep;
use ddpm_dist::train::{Config, Share, step_programs};
use std::collections::BTreeMap;

/// In the program, which goes to machines without these files.
const CONFIGS: [(&str, &str); 5] = [
    ("celebahq256", include_str!("../../configs/celebahq256.toml")),
    ("cifar10", include_str!("../../configs/cifar10.toml")),
    ("fashion-mnist", include_str!("../../configs/fashion-mnist.toml")),
    ("lsun256", include_str!("../../configs/lsun256.toml")),
    ("quickstart", include_str!("../../configs/quickstart.toml")),
];

fn config(text: &str) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    load_with(file.path(), &[], Config::validate).unwrap_or_else(|error| panic!("{error}"))
}

/// The convolutions of a training step and of a sampling step, each once.
fn convolutions(config: &Config, precision: Precision) -> Vec<ConvolutionShape> {
    let target = Target { kind: DeviceKind::Cuda, precision };
    let size = config.data.size.map_or([32, 32], |size| [size.height, size.width]);
    let share = Share::new(&config.train, 0, 1).unwrap();
    let (mut programs, _) = step_programs(config, size, &share, target);
    let step = ReverseStep { model: &config.model, size, batch: config.sample.batch, steps: 10, layout: None };
    programs.push(step.program(target));
    let mut shapes = Vec::new();
    for piece in programs.iter().flat_map(|program| program.pieces()) {
        if let Piece::Convolution(shape) = piece
            && !shapes.contains(&shape)
        {
            shapes.push(shape);
        }
    }
    shapes
}

#[test]
fn each_convolution_of_the_configs_has_a_plan() {
    let is_on_gpu = std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu");
    if !is_on_gpu && std::env::var_os("DDPM_DIST_CUDNN").is_none() {
        return not_tested("NVIDIA's cuDNN without a GPU: DDPM_DIST_CUDNN names no libcudnn.so.9");
    }
    let name = "cudnn_without_gpu::each_convolution_of_the_configs_has_a_plan";
    run_cases(name, &[Build::BareDriver, Build::CudnnWithoutGpu], &[(&[], ())], |()| {
        let gpu = Gpu::without_kernels(0).unwrap_or_else(|error| panic!("{error}"));
        let dnn = Dnn::open(&gpu).unwrap_or_else(|error| panic!("{error}"));
        let mut forms: BTreeMap<String, usize> = BTreeMap::new();
        let mut missing = Vec::new();
        for (name, text) in CONFIGS {
            for precision in [Precision::F32, Precision::Bf16] {
                for shape in convolutions(&config(text), precision) {
                    match dnn.plan(&shape, WORKSPACE) {
                        Ok(plan) => {
                            let form = plan.choice().form;
                            let key = format!("{:?} {precision:?} {form:?}", shape.pass);
                            *forms.entry(key).or_default() += 1;
                            // Others than the one that CI installs may do so in parts.
                            if !is_on_gpu && precision == Precision::Bf16 && shape.pass == Pass::Forward {
                                assert_eq!(form, Form::Whole, "{name}: {shape}");
                            }
                        }
                        Err(error) => missing.push(format!("{name}: {error}")),
                    }
                }
            }
        }
        say(&format!("cuDNN {}: {forms:?}", dnn.version()));
        assert!(missing.is_empty(), "{}", missing.join("\n"));
    });
}
