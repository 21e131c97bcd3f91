//! Parameters, dropout and bounds of the network. tests/cuda/pytorch.rs compares it with diffusers' `UNet2DModel` on every device.

use super::{Randomness, TimestepForm, UnetConfig, initial_parameters, unet};
use crate::device::Region;
use crate::ops::copy::Copy;
use crate::ops::group_norm::Dropout;
use crate::ops::testing::{Planned, random};
use crate::tape::{Kind, ParamLayout, Spec, Tape, plan};
use std::sync::Arc;

/// The network with inputs "x", "t" and "clock", output "y" and its gradient "dy"; `seed` of its dropout where it is trained.
fn network(config: &UnetConfig, shape: [usize; 4], threads: usize, seed: Option<u64>) -> Planned {
    config.validate(shape[1], shape[2]).unwrap();
    let mut tape = Tape::new();
    let x = tape.io("x", Spec::f32(shape));
    let t = tape.io("t", Spec::u32([shape[0]]));
    let clock = tape.io("clock", Spec::u32([4]));
    let out = unet(&mut tape, config, x, t, seed.map(|seed| Randomness { seed, clock }));
    let y = tape.io("y", Spec::f32(shape));
    tape.push_into(Arc::new(Copy { shape: shape.into() }), &[out], &[y], 0);
    let dy = tape.io("dy", Spec::f32(shape));
    tape.backward(out, dy);
    Planned::new(&tape, threads)
}

/// Output for `x` and `t`, and the gradients of mean((output − target)²), in the flat buffer.
fn run(network: &mut Planned, x: &[f32], t: &[u32], target: &[f32]) -> (Vec<f32>, Vec<f32>) {
    network.set("x", x);
    network.set("t", t);
    network.set("dy", &vec![0.0f32; x.len()]);
    network.run();
    let y: Vec<f32> = network.get("y");
    let scale = 2.0 / y.len() as f64;
    let dy: Vec<f32> = y.iter().zip(target).map(|(y, t)| (scale * (f64::from(*y) - f64::from(*t))) as f32).collect();
    network.set("dy", &dy);
    network.run();
    (y, network.flat(Region::Gradients))
}

fn root_mean_square(values: &[f32]) -> f64 {
    (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

/// Largest error relative to the root mean square of the exact values, or to `floor` if that is larger.
fn relative_error(found: &[f32], exact: &[f32], floor: f64) -> f64 {
    assert_eq!(found.len(), exact.len());
    found.iter().zip(exact).map(|(f, e)| f64::from((f - e).abs())).fold(0.0, |worst, error| {
        // A NaN is worse than anything.
        if error.is_nan() { f64::INFINITY } else { f64::max(worst, error) }
    }) / root_mean_square(exact).max(floor)
}

/// Rounding errors of a chain of about 30 layers, each a sum of up to a few hundred f32 products, in random directions.
const TOLERANCE: f64 = 30.0 * 8.0 * f32::EPSILON as f64;

#[test]
fn the_paper_models_have_their_parameters() {
    let count = |config: &UnetConfig, size: usize| {
        config.validate(size, size).unwrap();
        let mut tape = Tape::new();
        let x = tape.io("x", Spec::f32([1, size, size, 3]));
        let t = tape.io("t", Spec::u32([1]));
        unet(&mut tape, config, x, t, None);
        plan(&tape, None, None).summary()
    };
    let cifar = count(&UnetConfig::default(), 32);
    assert_eq!(cifar.parameters, 35_746_307);
    assert!((12.3e9..12.6e9).contains(&(cifar.forward_flops as f64)), "{}", cifar.forward_flops);
    let large = UnetConfig {
        channels: vec![128, 128, 256, 256, 512, 512],
        attention_levels: vec![4],
        dropout: 0.0,
        ..UnetConfig::default()
    };
    assert_eq!(count(&large, 256).parameters, 113_673_219);
    // Twice the columns: 512 weights and a bias for each of the 128·5 + 256·17 channels of the residual blocks.
    let scaled = UnetConfig { timestep: TimestepForm::ScaleShift, ..UnetConfig::default() };
    assert_eq!(count(&scaled, 32).parameters, 35_746_307 + 513 * (128 * 5 + 256 * 17));
}

#[test]
fn initial_parameters_are_the_papers() {
    let config = UnetConfig { channels: vec![32, 64], attention_levels: vec![1], ..UnetConfig::default() };
    let mut tape = Tape::new();
    let x = tape.io("x", Spec::f32([1, 8, 8, 3]));
    let t = tape.io("t", Spec::u32([1]));
    unet(&mut tape, &config, x, t, None);
    let layout = plan(&tape, None, None).layout;
    let flat = initial_parameters(&tape, &layout, 7).unwrap();
    let values = |name: &str| &flat[layout.get(name).unwrap().range.clone()];
    assert!(values("conv_norm_out.weight").iter().all(|&w| w == 1.0));
    assert!(values("conv_in.bias").iter().all(|&w| w == 0.0));
    let bounded = |name: &str, limit: f64| {
        let largest = values(name).iter().fold(0.0f32, |a, b| a.max(b.abs()));
        assert!(f64::from(largest) <= limit && f64::from(largest) > 0.95 * limit, "{name}: {largest} of {limit}");
    };
    bounded("conv_in.weight", (6.0f64 / (9 * (3 + 32)) as f64).sqrt());
    bounded("time_embedding.linear_1.weight", (6.0f64 / (32 + 128) as f64).sqrt());
    bounded("mid_block.resnets.0.conv2.weight", (6e-10 / (9 * 128) as f64).sqrt());
    bounded("mid_block.attentions.0.to_out.0.weight", (6e-10 / 128.0f64).sqrt());

    // Values belong to names, not to places.
    let mut placed: Vec<_> = tape.params().to_vec();
    placed.reverse();
    let other = ParamLayout::new(placed.iter());
    let moved = initial_parameters(&tape, &other, 7).unwrap();
    assert_eq!(values("conv_out.weight"), &moved[other.get("conv_out.weight").unwrap().range.clone()]);
}

/// Dropout of a training pass: one layer of its own for each residual block, numbered as the network runs them, with the config's
/// probability and the run's seed; none elsewhere, and none where there is no training.
#[test]
fn every_residual_block_has_a_dropout_of_its_own() {
    let (shape, seed) = ([2, 8, 8, 3], 77);
    let config = UnetConfig {
        channels: vec![8, 16],
        blocks: 2,
        attention_levels: vec![0],
        groups: 4,
        dropout: 0.3,
        ..UnetConfig::default()
    };
    let dropouts = |network: &Planned| -> Vec<(String, String)> {
        let instructions = network.program.instructions.iter().filter_map(|instruction| match &instruction.kind {
            Kind::Launch(op) if op.name() == "group_norm" => Some((instruction.label.clone(), format!("{op:?}"))),
            _ => None,
        });
        instructions.filter(|(_, op)| op.contains("Dropout {")).collect()
    };
    let found = dropouts(&network(&config, shape, 1, Some(seed)));
    // Two blocks a level down, two in the middle, three a level up.
    let down = (0..2).flat_map(|level| (0..2).map(move |block| format!("down_blocks.{level}.resnets.{block}")));
    let middle = (0..2).map(|block| format!("mid_block.resnets.{block}"));
    let up = (0..2).flat_map(|level| (0..3).map(move |block| format!("up_blocks.{level}.resnets.{block}")));
    let blocks: Vec<String> = down.chain(middle).chain(up).collect();
    assert_eq!(found.len(), blocks.len());
    for (layer, ((label, op), block)) in found.iter().zip(&blocks).enumerate() {
        assert_eq!(*label, format!("{block}.norm2"));
        let expected = Dropout { probability: 0.3, seed, layer: layer as u32 };
        assert!(op.contains(&format!("{expected:?}")), "{label}: {op}");
    }
    assert!(dropouts(&network(&config, shape, 1, None)).is_empty());
    let without = UnetConfig { dropout: 0.0, ..config };
    assert!(dropouts(&network(&without, shape, 1, Some(seed))).is_empty());
}

#[test]
fn training_draws_the_same_dropout_for_the_same_step_alone() {
    let (shape, t) = ([2, 8, 8, 3], [3, 800]);
    let config = UnetConfig { channels: vec![8, 16], blocks: 1, groups: 4, dropout: 0.3, ..UnetConfig::default() };
    let without = UnetConfig { dropout: 0.0, ..config.clone() };
    let (x, target) = (random(1, 2 * 192), random(2, 2 * 192));
    let pass = |config: &UnetConfig, seed: Option<u64>, clock: [u32; 2]| {
        let mut network = network(config, shape, 2, seed);
        let weights: Vec<f32> = random(3, network.program.layout.len()).iter().map(|w| 0.1 * w).collect();
        network.set_flat(Region::Weights, &weights);
        network.set("clock", &[clock[0], clock[1], 0, 0]);
        run(&mut network, &x, &t, &target)
    };
    let trained = pass(&config, Some(7), [5, 40]);
    // Output and gradients, but for the gaps between parameters, which hold NaN.
    let same = |a: &(Vec<f32>, Vec<f32>), b: &(Vec<f32>, Vec<f32>)| {
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        (bits(&a.0) == bits(&b.0), bits(&a.1) == bits(&b.1))
    };
    assert_eq!(same(&trained, &pass(&config, Some(7), [5, 40])), (true, true));
    for (what, other) in [
        ("seed", pass(&config, Some(8), [5, 40])),
        ("step", pass(&config, Some(7), [6, 40])),
        ("image", pass(&config, Some(7), [5, 42])),
        ("no dropout", pass(&config, None, [5, 40])),
    ] {
        assert_eq!(same(&trained, &other), (false, false), "{what}");
    }
    // Nothing else is different in training.
    assert_eq!(same(&pass(&without, Some(7), [5, 40]), &pass(&config, None, [5, 40])), (true, true));
    // The second image alone is drawn as beside the first.
    let mut alone = network(&config, [1, 8, 8, 3], 2, Some(7));
    let weights: Vec<f32> = random(3, alone.program.layout.len()).iter().map(|w| 0.1 * w).collect();
    alone.set_flat(Region::Weights, &weights);
    alone.set("clock", &[5u32, 41, 0, 0]);
    let (y, _) = run(&mut alone, &x[192..], &t[1..], &target[192..]);
    assert!(relative_error(&y, &trained.0[192..], 0.0) < TOLERANCE);
}

#[test]
fn work_beyond_counting_is_refused_by_its_key() {
    let cifar10 = UnetConfig::default();
    let lsun256 =
        UnetConfig { channels: vec![128, 128, 256, 256, 512, 512], attention_levels: vec![4], ..cifar10.clone() };
    for (model, side, images) in [(&cifar10, 32, 1 << 20), (&lsun256, 256, 1 << 13), (&lsun256, 1024, 64)] {
        model.validate_work(side, side, images, "train.batch").unwrap();
    }
    let huge = UnetConfig { channels: vec![1 << 16, 1 << 16], ..cifar10.clone() };
    huge.validate_work(32, 32, 1, "train.batch").unwrap();
    let key =
        |model: &UnetConfig, side, images| model.validate_work(side, side, images, "train.batch").unwrap_err().key;
    assert_eq!(key(&huge, 32, 1 << 20), "train.batch");
    assert_eq!(key(&huge, 8192, 1 << 20), "model.channels");
    // Attention over 8192² pixels.
    let attentive = UnetConfig { channels: vec![64], attention_levels: vec![0], ..cifar10 };
    assert_eq!(key(&attentive, 8192, 1 << 20), "model.channels");
    assert_eq!(key(&attentive, 8192, 16), "model.channels");
    assert_eq!(key(&attentive, usize::MAX, usize::MAX), "model.channels");
}

#[test]
fn the_bound_of_the_work_holds() {
    // FLOPs of the paper's models by its own count, per image; the bound is above and not absurdly so.
    let lsun256 =
        UnetConfig { channels: vec![128, 128, 256, 256, 512, 512], attention_levels: vec![4], ..UnetConfig::default() };
    for (model, side, flops) in [(UnetConfig::default(), 32, 12.44e9), (lsun256, 256, 497e9)] {
        let most = 2f64.powi(60) / flops;
        model.validate_work(side, side, (most / 100.0) as usize, "batch").unwrap();
        model.validate_work(side, side, most as usize, "batch").unwrap_err();
    }
}
