//! Each op on every device against PyTorch: its output and the gradient of each of its inputs, as `tests/reference/ops.py` has them from f64;
//! and what is left of Algorithms 1 and 2, the optimiser's updates and the means of reverse steps.

use crate::planned::{Planned, Reference};
use crate::pytorch::relative_error;
use crate::steps::{cpu, gpu, with_kernels};
use crate::values::hyper;
use ddpm_dist::device::{Device, Precision, Region};
use ddpm_dist::ops::adam_ema::{Hyper, adam_ema};
use ddpm_dist::ops::attention::attention;
use ddpm_dist::ops::conv2d::{Stride, conv2d};
use ddpm_dist::ops::copy::Copy;
use ddpm_dist::ops::grad_norm::grad_norm;
use ddpm_dist::ops::group_norm::{Norm, Timestep, group_norm};
use ddpm_dist::ops::linear::linear;
use ddpm_dist::ops::p_sample::{State, StepInputs, p_sample};
use ddpm_dist::ops::silu::silu;
use ddpm_dist::ops::timestep_embedding::timestep_embedding;
use ddpm_dist::ops::upsample::upsample;
use ddpm_dist::tape::{Phase, Spec, Tape, Var};
use serde_json::Value;
use std::sync::Arc;

type Trace = Box<dyn Fn(&mut Tape, &[Var]) -> Var>;

/// An op with its inputs, by their names in the file.
struct Case {
    name: String,
    inputs: Vec<&'static str>,
    trace: Trace,
    /// How far f32 may be off in the output and in the gradient of an input, as [`assert_close`] has it.
    ulps: Box<dyn Fn(&str) -> f64>,
    /// By how much what is lost of an input is larger in the output than the roundings of bf16; none where nothing of it would be left.
    bf16: Option<f64>,
    /// Whether it is a product of channels, which tensor cores take eight at a time: others are filled up with zeros.
    fills: bool,
}

/// Errors of a sum of `terms` products that point in random directions.
fn of_terms(terms: usize) -> f64 {
    4.0 * (terms as f64).sqrt() + 4.0
}

impl Case {
    /// One whose output and gradients are off by so much each.
    fn new(
        name: &str,
        inputs: &[&'static str],
        [y, gradients]: [f64; 2],
        trace: impl Fn(&mut Tape, &[Var]) -> Var + 'static,
    ) -> Case {
        let ulps = Box::new(move |key: &str| if key == "y" { y } else { gradients });
        let (name, inputs, trace) = (name.to_string(), inputs.to_vec(), Box::new(trace));
        Case { name, inputs, trace, ulps, bf16: Some(1.0), fills: false }
    }

    /// A product of pixels of `taps` places with `inputs` of which the last two are weights [O, …, I] and bias.
    fn product(
        file: &Reference,
        name: &str,
        inputs: &[&'static str],
        taps: usize,
        trace: impl Fn(&mut Tape, &[Var]) -> Var + 'static,
    ) -> Case {
        let [weights, y] = ["w", "y"].map(|key| file.shape(&format!("{name}/{key}")));
        let (out, channels) = (weights[0], *weights.last().unwrap());
        let rows = y.iter().product::<usize>() / out;
        let ulps = move |key: &str| match key {
            "y" => of_terms(taps * channels),
            "dw" | "db" => of_terms(rows),
            _ => of_terms(taps * out),
        };
        Case { ulps: Box::new(ulps), fills: true, ..Case::new(name, inputs, [0.0; 2], trace) }
    }
}

/// The op of a case of `cases.json`; none where it is no op by itself.
fn case(file: &Reference, name: &str, attributes: &Value) -> Option<Case> {
    let number = |key: &str| attributes[key].as_u64().unwrap_or(0) as usize;
    Some(match attributes["op"].as_str()? {
        "conv3x3" => {
            let stride = if number("stride") == 2 { Stride::Two } else { Stride::One };
            Case::product(file, name, &["x", "w", "b"], 9, move |tape, v| conv2d(tape, v[0], v[1], v[2], stride))
        }
        "linear" if number("sources") == 2 => {
            let product =
                Case::product(file, name, &["x1", "x2", "w", "b"], 1, |tape, v| linear(tape, &v[..2], v[2], v[3]));
            // No network has two sources that would have to be filled up.
            Case { bf16: None, ..product }
        }
        "linear" => Case::product(file, name, &["x", "w", "b"], 1, |tape, v| linear(tape, &v[..1], v[1], v[2])),
        "group_norm" => group_norm_case(name, number("sources"), attributes),
        "attention" => {
            let heads = number("heads");
            // Scores near ±150 are rounded to a few times 150 ε, and so are their probabilities: in bf16 nothing is left.
            let (ulps, bf16) = if name == "attention_sharp" { (1024.0, None) } else { (32.0, Some(1.0)) };
            Case { bf16, ..Case::new(name, &["qkv"], [ulps; 2], move |tape, v| attention(tape, v[0], heads)) }
        }
        "silu" => Case::new(name, &["x"], [5.0, 9.0], |tape, v| silu(tape, v[0])),
        // A copy; three additions and the file's rounding.
        "upsample" => Case::new(name, &["x"], [0.0, 2.0], |tape, v| upsample(tape, v[0])),
        "timestep_embedding" => {
            let (dim, shift) = (number("dim"), number("freq_shift") as f64);
            let flips = attributes["flip_sin_to_cos"] == true;
            // Both sides are exact values rounded to f32.
            Case::new(name, &["t"], [1.0; 2], move |tape, v| timestep_embedding(tape, v[0], dim, shift, flips))
        }
        // Its noise is drawn.
        "mse" => return None,
        other => panic!("{name}: {other}"),
    })
}

fn group_norm_case(name: &str, sources: usize, attributes: &Value) -> Case {
    let norm = Norm {
        groups: attributes["groups"].as_u64().unwrap() as usize,
        eps: attributes["eps"].as_f64().unwrap(),
        silu: attributes["silu"] == true,
    };
    let (temb, scales) = (attributes["temb"] != false, attributes["temb"] == "scale_shift");
    let mut inputs = if sources == 1 { vec!["x"] } else { vec!["x1", "x2"] };
    inputs.extend(["w", "b"]);
    inputs.extend(temb.then_some("temb"));
    // A mean of 30 that is rounded.
    let (ulps, bf16) = if name == "group_norm_large_mean" { (32.0 + 16.0, 30.0) } else { (32.0, 1.0) };
    let case = Case::new(name, &inputs, [ulps; 2], move |tape, v| {
        let timestep = v.get(sources + 2).map(|&temb| {
            let (offset, total) = (0, tape.shape(temb).rows_and_columns().1);
            (temb, if scales { Timestep::ScaleShift { offset, total } } else { Timestep::Add { offset, total } })
        });
        group_norm(tape, &norm, &v[..sources], [v[sources], v[sources + 1]], timestep, None)
    });
    Case { bf16: Some(bf16), ..case }
}

/// A tensor of a case: `qkv` is q, k and v side by side, as one product gives them.
fn tensor(file: &Reference, case: &Case, key: &str) -> (Vec<usize>, Vec<f64>) {
    let full = |key: &str| format!("{}/{key}", case.name);
    let Some(prefix) = key.strip_suffix("qkv") else { return (file.shape(&full(key)), file.f64(&full(key))) };
    let parts = ["q", "k", "v"].map(|part| file.f64(&full(&format!("{prefix}{part}"))));
    let mut shape = file.shape(&full("q"));
    let channels = shape.pop().unwrap();
    let rows = shape.iter().product::<usize>();
    shape.push(3 * channels);
    (
        shape,
        (0..rows).flat_map(|row| parts.each_ref().map(|part| &part[row * channels..][..channels]).concat()).collect(),
    )
}

/// A shape where channels are multiples of eight: the last dimension, and of weights the first, too.
fn filled_up(key: &str, shape: &[usize]) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if key == "w" {
        shape[0] = shape[0].next_multiple_of(8);
    }
    shape.iter_mut().last().into_iter().for_each(|channels| *channels = channels.next_multiple_of(8));
    shape
}

/// Zeros after each row of each dimension.
fn fill(data: &[f32], from: &[usize], to: &[usize]) -> Vec<f32> {
    let ([_, from @ ..], [_, inner @ ..]) = (from, to) else { return data.to_vec() };
    let rows = data.chunks(from.iter().product());
    let mut filled: Vec<f32> = rows.flat_map(|row| fill(row, from, inner)).collect();
    filled.resize(to.iter().product(), 0.0);
    filled
}

/// [`fill`]'s data.
fn cut(data: &[f32], from: &[usize], to: &[usize]) -> Vec<f32> {
    let ([_, from @ ..], [rows, inner @ ..]) = (from, to) else { return data.to_vec() };
    data.chunks(from.iter().product()).take(*rows).flat_map(|row| cut(row, from, inner)).collect()
}

/// As many times ε as `ulps` says of the value's own size and as much of the values' root mean square (sums cancel).
#[track_caller]
fn assert_close(what: &str, found: &[f32], exact: &[f64], ulps: f64) {
    assert_eq!(found.len(), exact.len(), "{what}: number of elements");
    let scale = (exact.iter().map(|x| x * x).sum::<f64>() / exact.len() as f64).sqrt();
    for (i, (f, e)) in found.iter().zip(exact).enumerate() {
        let tolerance = ulps * f64::from(f32::EPSILON) * (e.abs() + scale);
        let error = (f64::from(*f) - e).abs();
        assert!(error <= tolerance, "{what}[{i}] = {f}, expected {e} (error {error:e}, tolerance {tolerance:e})");
    }
}

/// Runs a case on a device, and compares the output and all gradients.
fn check(file: &Reference, case: &Case, device: Device, precision: Precision) {
    let fills = case.fills && precision == Precision::Bf16;
    let shape_of = |key: &str, shape: &[usize]| if fills { filled_up(key, shape) } else { shape.to_vec() };
    let is_differentiable = case.inputs != ["t"];
    let mut tape = Tape::on(device.target(precision));
    let given: Vec<_> = case.inputs.iter().map(|key| (*key, tensor(file, case, key))).collect();
    let inputs: Vec<Var> = given
        .iter()
        .map(|(key, (shape, _))| match is_differentiable {
            true => tape.param(key, shape_of(key, shape).as_slice()),
            false => tape.io(key, Spec::u32(shape.as_slice())),
        })
        .collect();
    let y = (case.trace)(&mut tape, &inputs);
    let shape = tape.shape(y).clone();
    let out = tape.io("test y", Spec::computed(shape.clone()));
    tape.push_into(Arc::new(Copy { shape: shape.clone() }), &[y], &[out], 0);
    if is_differentiable {
        let dy = tape.io("test dy", Spec::computed(shape.clone()));
        tape.backward(y, dy);
    }
    let mut planned = Planned::new(&tape, device);
    let narrow = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<_>>();
    let (y_shape, y) = tensor(file, case, "y");
    if is_differentiable {
        planned.set_flat(&[Region::Weights], |name, to| {
            let (_, (shape, values)) = given.iter().find(|(key, _)| *key == name).unwrap();
            fill(&narrow(values), shape, to)
        });
        planned.set_activations("test dy", &fill(&narrow(&tensor(file, case, "dy").1), &y_shape, shape.dims()));
    } else {
        planned.set("t", &given[0].1.1.iter().map(|t| *t as u32).collect::<Vec<_>>());
    }
    planned.run();

    let compare = |key: &str, found: &[f32], exact: &[f64]| {
        let what = format!("{key} of {} in {}", case.name, precision.name());
        if precision == Precision::F32 {
            return assert_close(&what, found, exact, (case.ulps)(key));
        }
        // Inputs, a gradient, a partial result and what is written are rounded by 2⁻⁹ at most; twice a random walk of as many.
        let roundings = (case.inputs.len() + 3) as f64;
        let tolerance = case.bf16.unwrap() * 2.0 * roundings.sqrt() / 512.0;
        let error = relative_error(found, &narrow(exact), 0.0, precision);
        assert!(error <= tolerance, "{what} is off by {error:e} of its size, not within {tolerance:e}");
    };
    compare("y", &cut(&planned.activations("test y"), shape.dims(), &y_shape), &y);
    if is_differentiable {
        for (key, (shape, _)) in &given {
            let placed = planned.program.layout.get(key).unwrap();
            let found = cut(&planned.gradient(key), placed.shape.dims(), shape);
            let key = format!("d{key}");
            compare(&key, &found, &tensor(file, case, &key).1);
        }
    }
}

fn check_all(device: fn() -> Device, precision: Precision) {
    let file = Reference::new(include_bytes!("../reference/ops.safetensors"));
    let cases: Value = serde_json::from_slice(include_bytes!("../reference/cases.json")).unwrap();
    let cases = cases.as_object().unwrap().iter().filter_map(|(name, attributes)| case(&file, name, attributes));
    let cases: Vec<Case> = cases.filter(|case| precision == Precision::F32 || case.bf16.is_some()).collect();
    assert!(cases.len() >= 38, "{} cases", cases.len());
    cases.iter().for_each(|case| check(&file, case, device(), precision));
}

#[test]
fn ops_on_cpu_cores_are_those_of_pytorch() {
    check_all(cpu, Precision::F32);
}

#[test]
fn ops_on_a_gpu_are_those_of_pytorch() {
    with_kernels("pytorch_ops::ops_on_a_gpu_are_those_of_pytorch", || check_all(gpu, Precision::F32));
}

#[test]
fn ops_in_bf16_on_a_gpu_are_those_of_pytorch() {
    with_kernels("pytorch_ops::ops_in_bf16_on_a_gpu_are_those_of_pytorch", || check_all(gpu, Precision::Bf16));
}

/// Ten updates each of Adam and AdamW, with and without clipping.
fn updates_are_those_of_pytorch(device: fn() -> Device) {
    let file = Reference::new(include_bytes!("../reference/optimizer.safetensors"));
    let (start, gradients) = (file.f32("start"), file.f32("grads"));
    let count = start.len();
    for (name, decoupled, weight_decay, max_grad_norm) in
        [("adam", false, 0.0, 1.0), ("adam_unclipped", false, 0.0, 1e9), ("adamw", true, 0.1, 1.0)]
    {
        let device = device();
        let mut tape = Tape::on(device.target(Precision::F32));
        tape.param("w", [count]);
        let [norm, scalars] = [("norm", 2), ("hyper", Hyper::LEN)].map(|(name, len)| tape.io(name, Spec::f32([len])));
        tape.begin(Phase::Update);
        grad_norm(&mut tape, norm);
        adam_ema(&mut tape, decoupled, norm, scalars);
        let mut planned = Planned::new(&tape, device);
        planned.set_flat(&[Region::Weights, Region::Ema], |_, _| start.clone());
        let column = |key: &str| file.f64(&format!("{name}/{key}"));
        let (lr, ema_decay, grad_norm) = (column("lr"), column("ema_decay"), column("grad_norm"));
        for k in 0..lr.len() {
            let step = k as u64 + 1;
            let hyper = Hyper { lr: lr[k], ema_decay: ema_decay[k], weight_decay, max_grad_norm, ..hyper(step) };
            planned.set("hyper", &hyper.to_array());
            planned.set_flat(&[Region::Gradients], |_, _| gradients[k * count..][..count].to_vec());
            planned.run();
            let norm = f64::from(planned.get::<f32>("norm")[0]);
            assert!(
                (norm - grad_norm[k]).abs() <= f64::from(f32::EPSILON) * grad_norm[k],
                "{name}: {norm} of step {k}"
            );
            // Errors of all steps so far add up; the file holds f32.
            let ulps = 1.0 + 2.0 * step as f64;
            let state = [Region::Weights, Region::Moment1, Region::Moment2, Region::Ema];
            for (region, key) in state.into_iter().zip(["param", "exp_avg", "exp_avg_sq", "ema"]) {
                let what = format!("{name} {key} after step {step}");
                assert_close(&what, &planned.flat(region)[..count], &column(key)[k * count..][..count], ulps);
            }
        }
    }
}

#[test]
fn updates_on_a_gpu_are_those_of_pytorch() {
    updates_are_those_of_pytorch(cpu);
    with_kernels("pytorch_ops::updates_on_a_gpu_are_those_of_pytorch", || updates_are_those_of_pytorch(gpu));
}

/// Reverse steps without noise, from x_t and the network's x_0, give the means of q(x_{t−1} | x_t, x_0) (eq. 7).
fn means_are_those_of_the_library(device: fn() -> Device) {
    let file = Reference::new(include_bytes!("../reference/q_sample.safetensors"));
    let (x_t, x_0, t) = (file.f32("x_t"), file.f32("x0"), file.f64("t"));
    let mut shape = file.shape("x_t");
    shape[0] = 1;
    let image: usize = shape.iter().product();
    for schedule in ["linear", "cosine"] {
        let [alpha_bars, betas] =
            ["alphas_cumprod", "betas"].map(|key| file.f64(&format!("ddpm_pytorch/{schedule}_T1000/{key}")));
        let expected = file.f64(&format!("ddpm_pytorch/{schedule}/posterior_mean"));
        let device = device();
        let mut tape = Tape::on(device.target(Precision::F32));
        let state = State {
            x: tape.io("x", Spec::f32(shape.as_slice())),
            input: tape.io("input", Spec::computed(shape.as_slice())),
            t: tape.io("t", Spec::u32([1])),
            clock: tape.io("clock", Spec::u32([4])),
        };
        let inputs = StepInputs {
            out: tape.io("out", Spec::computed(shape.as_slice())),
            table: tape.io("table", Spec::f32([2, 9])),
            timesteps: tape.io("timesteps", Spec::u32([2])),
        };
        p_sample(&mut tape, state, inputs);
        let mut planned = Planned::new(&tape, device);
        for (j, t) in t.iter().map(|t| *t as usize).enumerate() {
            let (alpha_bar, before) = (alpha_bars[t], if t == 0 { 1.0 } else { alpha_bars[t - 1] });
            let c_x0 = betas[t] * before.sqrt() / (1.0 - alpha_bar);
            let c_xt = (1.0 - betas[t]).sqrt() * (1.0 - before) / (1.0 - alpha_bar);
            let row = [0.0, 1.0, 0.0, 0.0, c_x0 as f32, c_xt as f32, 0.0, 0.0, 0.0];
            let range = j * image..(j + 1) * image;
            planned.set("x", &x_t[range.clone()]);
            planned.set("out", &x_0[range.clone()]);
            planned.set("table", [row, [f32::NAN; 9]].as_flattened());
            planned.set("timesteps", &[t as u32, 0]);
            planned.set("clock", &[0u32; 4]);
            planned.run();
            for (i, (found, place)) in planned.get::<f32>("x").iter().zip(range).enumerate() {
                let size = c_x0 * f64::from(x_0[place]).abs() + c_xt * f64::from(x_t[place]).abs();
                let error = (f64::from(*found) - expected[place]).abs();
                // Coefficient, product, sum, and the file's own rounding, half an ε each; the schedules of both sides agree to 1e-10.
                let tolerance = 2.0 * f64::from(f32::EPSILON) * size + 1e-10;
                assert!(error <= tolerance, "{schedule} t={t} [{i}]: {found} {error:e}");
            }
        }
    }
}

#[test]
fn means_of_reverse_steps_on_a_gpu_are_those_of_the_library() {
    means_are_those_of_the_library(cpu);
    with_kernels("pytorch_ops::means_of_reverse_steps_on_a_gpu_are_those_of_the_library", || {
        means_are_those_of_the_library(gpu);
    });
}
