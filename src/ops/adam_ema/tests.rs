use super::{Hyper, adam_ema, bias_correction};
use crate::device::Region;
use crate::ops::grad_norm::grad_norm;
use crate::ops::testing::{Planned, Reference, assert_close, random};
use crate::tape::{Phase, Spec, Tape};

const EPS: f64 = f32::EPSILON as f64;
const STATE: [Region; 4] = [Region::Weights, Region::Moment1, Region::Moment2, Region::Ema];

fn optimizer(sizes: &[usize], decoupled: bool, threads: usize) -> Planned {
    let mut tape = Tape::new();
    for (i, size) in sizes.iter().enumerate() {
        tape.param(&format!("p{i}"), [*size]);
    }
    let norm = tape.io("norm", Spec::f32([2]));
    let scalars = tape.io("scalars", Spec::f32([Hyper::LEN]));
    tape.begin(Phase::Update);
    grad_norm(&mut tape, norm);
    adam_ema(&mut tape, decoupled, norm, scalars);
    let mut planned = Planned::new(&tape, threads);
    let zeros = vec![0.0; planned.program.layout.len()];
    STATE.iter().chain(&[Region::Gradients]).for_each(|region| planned.set_flat(*region, &zeros));
    planned
}

fn hyper(step: u64) -> Hyper {
    Hyper {
        lr: 2e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        bias_correction1: bias_correction(0.9, step),
        bias_correction2: bias_correction(0.999, step),
        max_grad_norm: 1.0,
        ema_decay: 0.9999,
    }
}

/// Weights, moments and average after one step by the textbook, in f64.
fn textbook([w, m, v, ema]: [f64; 4], g: f64, norm: f64, h: &Hyper, decoupled: bool) -> [f64; 4] {
    let clip = if h.max_grad_norm > 0.0 { (h.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let g = clip * g + if decoupled { 0.0 } else { h.weight_decay * w };
    let w = w * if decoupled { 1.0 - h.lr * h.weight_decay } else { 1.0 };
    let m = h.beta1 * m + (1.0 - h.beta1) * g;
    let v = h.beta2 * v + (1.0 - h.beta2) * g * g;
    let w = w - h.lr / h.bias_correction1 * m / ((v / h.bias_correction2).sqrt() + h.eps);
    [w, m, v, h.ema_decay * ema + (1.0 - h.ema_decay) * w]
}

#[test]
fn each_step_is_the_textbook_step_from_the_same_state() {
    let sizes = [1000, 1, 63, 70_001];
    for (decoupled, weight_decay, max_grad_norm) in
        [(false, 0.0, 1.0), (false, 0.1, 0.0), (true, 0.1, 1e9), (true, 0.0, 3.0)]
    {
        let mut planned = optimizer(&sizes, decoupled, 2);
        let initial: Vec<Vec<f32>> = sizes.iter().enumerate().map(|(i, len)| random(i as u64, *len)).collect();
        for (i, weights) in initial.iter().enumerate() {
            planned.set_part(Region::Weights, &format!("p{i}"), weights);
            planned.set_part(Region::Ema, &format!("p{i}"), &random(50 + i as u64, sizes[i]));
        }
        for step in 1..=5 {
            let h = Hyper { weight_decay, max_grad_norm, lr: 1e-3 * step as f64, ..hyper(step) };
            planned.set("scalars", &h.to_array());
            for (i, len) in sizes.iter().enumerate() {
                let scale = [1e-3, 5.0, 0.0, 20.0, 1e-6][step as usize - 1];
                let g: Vec<f32> = random(100 * step + i as u64, *len).iter().map(|g| scale * g).collect();
                planned.set_part(Region::Gradients, &format!("p{i}"), &g);
            }
            let before = STATE.map(|region| planned.flat(region));
            planned.run();
            let norm = f64::from(planned.get::<f32>("norm")[0]);
            let after = STATE.map(|region| planned.flat(region));
            let gradients = planned.flat(Region::Gradients);
            let layout = planned.program.layout.clone();
            for i in layout.iter().flat_map(|p| p.range.clone()) {
                let old = [0, 1, 2, 3].map(|k| f64::from(before[k][i]));
                let g = f64::from(gradients[i]);
                let new = textbook(old, g, norm, &h, decoupled);
                // Each result is rounded once at its own size, and a few times at the size of what is added to it.
                let l2 = if decoupled { 0.0 } else { weight_decay * old[0].abs() };
                let (g, change) = (g.abs() + l2, (new[0] - old[0]).abs());
                let sizes = [
                    old[0].abs() + new[0].abs() + 12.0 * (change + h.lr * weight_decay * old[0].abs()),
                    old[1].abs() + new[1].abs() + 8.0 * 0.1 * (g + old[1].abs()),
                    old[2].abs() + new[2].abs() + 8.0 * 1e-3 * (g * g + old[2].abs()),
                    old[3].abs() + new[3].abs(),
                ];
                // Cancellation in m moves w by as much as m is off, and the average by its share of that.
                let share = [1.0, 0.0, 0.0, 1.0 - h.ema_decay];
                let m_error = 0.5 * EPS * sizes[1];
                let slope = h.lr / h.bias_correction1 / ((new[2] / h.bias_correction2).sqrt() + h.eps);
                for k in 0..4 {
                    let tolerance = EPS * sizes[k] + share[k] * 2.0 * slope * m_error + 1e-44;
                    let error = (f64::from(after[k][i]) - new[k]).abs();
                    let what = STATE[k].name();
                    assert!(
                        error <= tolerance,
                        "step {step} {what}[{i}] = {}, expected {}: {error:e} > {tolerance:e}",
                        after[k][i],
                        new[k]
                    );
                }
            }
        }
    }
}

#[test]
fn follows_pytorch_for_ten_steps() {
    let file = Reference::open("optimizer.safetensors");
    let (start, gradients) = (file.f32("start"), file.f32("grads"));
    let count = start.len();
    for (name, decoupled, weight_decay, max_grad_norm) in
        [("adam", false, 0.0, 1.0), ("adam_unclipped", false, 0.0, 1e9), ("adamw", true, 0.1, 1.0)]
    {
        let column = |key: &str| file.f64(&format!("{name}/{key}"));
        let (lr, ema_decay, grad_norm) = (column("lr"), column("ema_decay"), column("grad_norm"));
        let mut planned = optimizer(&[count], decoupled, 2);
        planned.set_part(Region::Weights, "p0", &start);
        planned.set_part(Region::Ema, "p0", &start);
        for k in 0..lr.len() {
            let h = Hyper { lr: lr[k], ema_decay: ema_decay[k], weight_decay, max_grad_norm, ..hyper(k as u64 + 1) };
            planned.set("scalars", &h.to_array());
            planned.set_part(Region::Gradients, "p0", &gradients[k * count..][..count]);
            planned.run();
            let norm = f64::from(planned.get::<f32>("norm")[0]);
            assert!((norm - grad_norm[k]).abs() <= EPS * grad_norm[k], "{name}: norm {norm} of step {k}");
            // Errors of all steps so far add up; the file holds f32.
            let ulps = 1.0 + 2.0 * (k + 1) as f64;
            for (region, key) in STATE.into_iter().zip(["param", "exp_avg", "exp_avg_sq", "ema"]) {
                let expected = column(key)[k * count..][..count].to_vec();
                assert_close(
                    &format!("{name} {key} after step {}", k + 1),
                    &planned.part(region, "p0"),
                    expected,
                    ulps,
                );
            }
        }
    }
}

#[test]
fn nothing_changes_where_a_gradient_is_not_finite() {
    let sizes = [100, 5000];
    for poison in [f32::NAN, f32::INFINITY] {
        let mut planned = optimizer(&sizes, true, 2);
        for (k, region) in STATE.into_iter().enumerate() {
            let magnitudes: Vec<f32> = random(k as u64, 5000).iter().map(|x| x.abs()).collect();
            planned.set_part(region, "p1", &magnitudes);
        }
        let mut g = random(9, 5000);
        g[4321] = poison;
        planned.set_part(Region::Gradients, "p1", &g);
        planned.set("scalars", &Hyper { weight_decay: 0.1, ..hyper(1) }.to_array());
        let bits = |planned: &Planned| STATE.map(|r| planned.flat(r).iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        let before = bits(&planned);
        planned.run();
        assert_eq!(planned.get::<f32>("norm")[1], 0.0);
        assert!(bits(&planned) == before, "{poison} changed something");
        g[4321] = 0.0;
        planned.set_part(Region::Gradients, "p1", &g);
        planned.run();
        assert!(bits(&planned).iter().zip(&before).all(|(after, before)| after != before), "all four change otherwise");
    }
}

#[test]
fn gaps_stay_zero() {
    let sizes = [1, 65, 130];
    let mut planned = optimizer(&sizes, true, 2);
    for step in 1..=3 {
        for (i, len) in sizes.iter().enumerate() {
            planned.set_part(Region::Gradients, &format!("p{i}"), &random(step + 10 * i as u64, *len));
        }
        planned.set("scalars", &Hyper { weight_decay: 0.1, ..hyper(step) }.to_array());
        planned.run();
    }
    let layout = planned.program.layout.clone();
    let mut gap = vec![true; layout.len()];
    layout.iter().for_each(|p| gap[p.range.clone()].fill(false));
    assert_eq!(gap.iter().filter(|gap| **gap).count(), 63 + 63 + 62);
    for region in STATE {
        let flat = planned.flat(region);
        assert!(flat.iter().zip(&gap).all(|(x, gap)| (*x == 0.0) == *gap), "{}", region.name());
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let result = |threads| {
        let mut planned = optimizer(&[50_000, 333], false, threads);
        for step in 1..=3 {
            planned.set_part(Region::Gradients, "p0", &random(step, 50_000));
            planned.set_part(Region::Gradients, "p1", &random(step + 10, 333));
            planned.set("scalars", &Hyper { weight_decay: 0.1, ..hyper(step) }.to_array());
            planned.run();
        }
        STATE.map(|region| planned.flat(region))
    };
    let one = result(1);
    assert!(one == result(2) && one == result(3));
}

#[test]
fn huge_finite_gradients_leave_everything_finite() {
    let mut planned = optimizer(&[64], false, 1);
    planned.set_part(Region::Gradients, "p0", &[1e38; 64]);
    for step in 1..=3 {
        planned.set("scalars", &Hyper { max_grad_norm: 0.0, ..hyper(step) }.to_array());
        planned.run();
    }
    for region in STATE {
        assert!(planned.flat(region).iter().all(|x| x.is_finite()), "{}", region.name());
    }
}

#[test]
fn an_average_of_constant_weights_is_the_weights() {
    // With a rounded decay in place of a rounded 1 − decay the average would settle 1.7e-4 beside them.
    let mut planned = optimizer(&[64], false, 1);
    let weights = random(1, 64);
    planned.set_part(Region::Weights, "p0", &weights);
    planned.set_part(Region::Ema, "p0", &weights);
    for step in 1..=200 {
        planned.set("scalars", &hyper(step).to_array());
        planned.run();
    }
    assert_eq!(planned.flat(Region::Ema), weights);
}

#[test]
fn bias_corrections_are_exact_at_both_ends() {
    for (beta, step) in [(0.9, 1), (0.999, 1), (0.999, 2), (0.999, 1000), (0.9, 100_000)] {
        let exact = 1.0 - f64::powi(beta, step);
        assert!((bias_correction(beta, step as u64) - exact).abs() < 1e-15, "{beta}^{step}");
    }
    assert_eq!(bias_correction(0.999, 800_000_000), 1.0);
}
