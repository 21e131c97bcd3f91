use super::cpu::residual;
use super::{LossInputs, mse_loss};
use crate::device::Region;
use crate::diffusion::{DiffusionConfig, Objective, Schedule};
use crate::ops::add::add;
use crate::ops::copy::Copy;
use crate::ops::q_sample::tests::draws;
use crate::ops::q_sample::{TrainingBatch, q_sample};
use crate::ops::testing::{Planned, Reference, assert_close, pixels, random};
use crate::tape::{Spec, Tape, Var};
use std::sync::Arc;

const T: usize = 50;

fn batch(images: usize, height: usize, width: usize, channels: usize) -> TrainingBatch {
    TrainingBatch { images, height, width, channels, timesteps: T, flip: true, seed: 77, held: None }
}

/// Coefficients of the target that differ at each timestep.
fn table() -> Vec<f32> {
    random(3, 2 * T)
}

/// A program that gives "dout" and "loss" for what `network` makes of x_t and a parameter "w".
fn program(
    batch: &TrainingBatch,
    global: usize,
    threads: usize,
    network: impl FnOnce(&mut Tape, Var, Var) -> Var,
) -> Planned {
    let mut tape = Tape::new();
    let w = tape.param("w", batch.shape());
    let pixels = tape.io("pixels", Spec::u8(batch.shape()));
    let noising = tape.io("noising", Spec::f32([T, 2]));
    let target = tape.io("target", Spec::f32([T, 2]));
    let clock = tape.io("clock", Spec::u32([4]));
    let (x_t, t) = q_sample(&mut tape, batch, pixels.into(), noising, clock);
    let out = network(&mut tape, x_t, w);
    let (dout, loss) =
        mse_loss(&mut tape, batch, global, LossInputs { out, images: pixels.into(), t, table: target, clock });
    let copies = [("dout", dout), ("loss", loss)];
    for (name, value) in copies {
        let shape = tape.shape(value).clone();
        let io = tape.io(name, Spec::f32(shape.clone()));
        tape.push_into(Arc::new(Copy { shape }), &[value], &[io], 0);
    }
    tape.backward(out, dout);
    Planned::new(&tape, threads)
}

fn run(planned: &mut Planned, pixels: &[u8], w: &[f32], noising: &[f32], clock: [u32; 2]) {
    run_to(planned, pixels, w, noising, &table(), clock);
}

fn run_to(planned: &mut Planned, pixels: &[u8], w: &[f32], noising: &[f32], target: &[f32], clock: [u32; 2]) {
    planned.set_part(Region::Weights, "w", w);
    planned.set("pixels", pixels);
    planned.set("noising", noising);
    planned.set("target", target);
    planned.set("clock", &[clock[0], clock[1], 0, 0]);
    planned.run();
}

#[test]
fn gradient_is_that_of_the_f64_loss_by_finite_differences() {
    for (n, h, w, c) in [(3, 5, 7, 3), (2, 28, 28, 1), (4, 1, 1, 1), (2, 3, 703, 3), (3, 6, 5, 4)] {
        let batch = batch(n, h, w, c);
        let (image, global) = (batch.elements(), 3 * n);
        let (pixels, out) = (pixels(4, n * image), random(5, n * image));
        let mut planned = program(&batch, global, 2, |tape, _, w| add(tape, w, w));
        let half: Vec<f32> = out.iter().map(|out| out / 2.0).collect();
        run(&mut planned, &pixels, &half, &[0.5; 2 * T], [12, 40]);
        let (dout, loss): (Vec<f32>, Vec<f32>) = (planned.get("dout"), planned.get("loss"));

        let targets: Vec<f64> = (0..n)
            .flat_map(|j| {
                let (x_0, epsilon, t) = draws(&batch, &pixels[j * image..][..image], 12, 40 + j as u32);
                let [a, b] = [0, 1].map(|k| f64::from(table()[2 * t as usize + k]));
                x_0.into_iter().zip(epsilon).map(move |(x, z)| a * x + b * f64::from(z))
            })
            .collect();
        // L as a function of one element of the network's output: a parabola, so central differences have no truncation error.
        let square = |i: usize, shift: f64| (f64::from(out[i]) + shift - targets[i]).powi(2);
        let mean = (global * image) as f64;
        let by_differences = (0..n * image).map(|i| (square(i, 0.5) - square(i, -0.5)) / mean);
        assert_close("dout", &dout, by_differences, 4.0);
        let of_image = |j: usize| (0..image).map(|e| square(j * image + e, 0.0)).sum::<f64>() / image as f64;
        assert_close("loss", &loss, (0..n).map(of_image), 4.0);
        // The network is out = w + w.
        let twice: Vec<f32> = dout.iter().map(|d| 2.0 * d).collect();
        assert!(planned.part(Region::Gradients, "w") == twice);
    }
}

/// The loss of each objective is to what the formulas of `diffusion` call its target.
#[test]
fn targets_are_those_of_the_objectives() {
    let batch = batch(3, 5, 7, 3);
    let image = batch.elements();
    let (pixels, out) = (pixels(4, 3 * image), random(5, 3 * image));
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        let config = DiffusionConfig { timesteps: T, objective, ..DiffusionConfig::default() };
        let schedule = Schedule::new(&config).unwrap();
        let mut planned = program(&batch, 3, 2, |_, _, w| w);
        let (noising, target) = (schedule.q_sample_table(), schedule.target_table());
        run_to(&mut planned, &pixels, &out, noising.as_flattened(), target.as_flattened(), [12, 40]);
        let differences: Vec<f64> = (0..3)
            .flat_map(|j| {
                let (x_0, epsilon, t) = draws(&batch, &pixels[j * image..][..image], 12, 40 + j as u32);
                let target = |x_0: f64, noise: f64| match objective {
                    Objective::Epsilon => noise,
                    Objective::X0 => x_0,
                    Objective::V => schedule.predict_v(x_0, t as usize, noise),
                };
                let targets: Vec<f64> = x_0.iter().zip(&epsilon).map(|(x, e)| target(*x, f64::from(*e))).collect();
                let out = &out[j * image..][..image];
                out.iter().zip(targets).map(|(out, target)| f64::from(*out) - target).collect::<Vec<_>>()
            })
            .collect();
        let gradient = differences.iter().map(|d| 2.0 * d / (3 * image) as f64);
        // As in the test by differences, and one rounding of the target's coefficients.
        assert_close("dout", &planned.get::<f32>("dout"), gradient, 5.0);
        let losses = differences.chunks(image).map(|d| d.iter().map(|d| d * d).sum::<f64>() / image as f64);
        assert_close("loss", &planned.get::<f32>("loss"), losses, 5.0);
    }
}

#[test]
fn matches_pytorch() {
    let file = Reference::open("ops.safetensors");
    for objective in ["epsilon", "x0", "v"] {
        let name = |key: &str| format!("mse_{objective}/{key}");
        let [x_0, noise, out] = ["x0", "noise", "out"].map(|key| file.f32(&name(key)));
        let (a, b) = (file.f64(&name("sqrt_alphas_cumprod")), file.f64(&name("sqrt_one_minus_alphas_cumprod")));
        let image = out.len() / a.len();
        let mut dout = vec![f32::NAN; out.len()];
        let mut sum = 0.0;
        for j in 0..a.len() {
            let target = match objective {
                "epsilon" => [0.0, 1.0],
                "x0" => [1.0, 0.0],
                _ => [-b[j] as f32, a[j] as f32],
            };
            let range = j * image..(j + 1) * image;
            let [x_0, noise, out] = [&x_0, &noise, &out].map(|data| &data[range.clone()]);
            let scale = (2.0 / dout.len() as f64) as f32;
            sum += residual(&mut dout[range], out, x_0, noise, target, scale);
        }
        assert_close(objective, &dout, file.f64(&name("dout")), 5.0);
        let loss = file.f64(&name("loss"))[0];
        let error = (sum / dout.len() as f64 - loss).abs() / loss;
        // Each difference is rounded thrice; over 315 squares that averages out.
        assert!(error < 3.0 * f64::from(f32::EPSILON), "{objective}: loss off by {error:e}");
    }
}

#[test]
fn draws_again_what_q_sample_drew() {
    // A network that gives back x_t, measured against x_t: nothing but the same t, flip and ε gives zero.
    let batch = batch(9, 19, 43, 3);
    let pixels = pixels(6, batch.shape().len());
    let mut planned = program(&batch, 9, 2, add);
    for step in [0, 1, 1_000_000] {
        run(&mut planned, &pixels, &vec![0.0; pixels.len()], &table(), [step, 1 << 20]);
        assert_eq!(planned.get::<f32>("loss"), [0.0; 9]);
        assert!(planned.get::<f32>("dout").iter().all(|d| *d == 0.0));
    }
}

#[test]
fn a_diverged_image_shows_in_its_own_loss() {
    let batch = batch(3, 4, 4, 3);
    let pixels = pixels(6, batch.shape().len());
    let mut planned = program(&batch, 3, 2, |_, _, w| w);
    let mut out = random(1, pixels.len());
    out[48 + 7] = f32::NAN;
    out[96 + 47] = 1e30;
    run(&mut planned, &pixels, &out, &table(), [1, 0]);
    let loss: Vec<f32> = planned.get("loss");
    assert!(loss[0].is_finite() && loss[1].is_nan() && loss[2] == f32::INFINITY, "{loss:?}");
    // The gradient at 1e30 would be finite: the whole image says that its loss is not.
    let dout: Vec<f32> = planned.get("dout");
    assert!(dout[..48].iter().all(|d| d.is_finite()) && dout[48..].iter().all(|d| d.is_nan()), "{dout:?}");
}

#[test]
fn bits_do_not_depend_on_threads() {
    let batch = batch(7, 9, 11, 3);
    let (pixels, out) = (pixels(6, batch.shape().len()), random(8, batch.shape().len()));
    let result = |threads| {
        let mut planned = program(&batch, 7, threads, |_, _, w| w);
        run(&mut planned, &pixels, &out, &table(), [4, 2]);
        (planned.get::<f32>("dout"), planned.get::<f32>("loss"))
    };
    assert_eq!(result(1), result(2));
    assert_eq!(result(1), result(3));
}
