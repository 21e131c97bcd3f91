//! Additions folded into the ops before them, and gradients that additions pass on.

use super::super::*;
use crate::device::Region;
use crate::ops::add::add;
use crate::ops::linear::linear;
use crate::ops::silu::silu;
use crate::ops::testing::{Case, Input, Planned, random};

/// x [4, 3] through a linear layer, and a residual r.
fn residual_case() -> Case {
    Case::new(vec![
        Input::f32("x", [4, 3], &random(1, 12)),
        Input::f32("w", [3, 3], &random(2, 9)),
        Input::f32("b", [3], &random(3, 3)),
        Input::f32("r", [4, 3], &random(4, 12)),
    ])
}

/// Output and gradients of `build` with and without fusion, and the ops that are left with it.
fn fused_and_not(build: impl Fn(&mut Tape, &[Var]) -> Var) -> Vec<&'static str> {
    let dy = random(9, 12);
    let plain = residual_case().run(&dy, |tape, v| build(tape, v));
    let mut names = Vec::new();
    let fused = residual_case().run(&dy, |tape, v| {
        let y = build(tape, v);
        tape.fuse_residuals(|op| op == "add");
        names = tape.nodes.iter().map(|n| n.op.name()).collect();
        y
    });
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
    assert!(close(&fused.y, &plain.y), "{:?}, expected {:?}", fused.y, plain.y);
    for name in ["x", "w", "b", "r"] {
        assert!(close(&fused.gradient(name), &plain.gradient(name)), "gradient of {name}");
    }
    names
}

#[test]
fn a_residual_is_added_by_the_layer_before_it() {
    assert_eq!(
        fused_and_not(|tape, v| {
            let y = linear(tape, &[v[0]], v[1], v[2]);
            add(tape, v[3], y)
        }),
        ["linear+residual"]
    );
    // Whichever side the layer is on, and where the residual is computed after it.
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let r = silu(tape, v[3]);
        add(tape, y, r)
    });
    assert_eq!(names, ["silu", "linear+residual"]);
}

#[test]
fn a_value_that_is_read_elsewhere_too_keeps_its_addition() {
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let sum = add(tape, v[3], y);
        let other = silu(tape, y);
        add(tape, sum, other)
    });
    assert_eq!(names, ["linear", "add", "silu", "add"]);
    let names = fused_and_not(|tape, v| {
        let y = linear(tape, &[v[0]], v[1], v[2]);
        let twice = add(tape, y, y);
        add(tape, v[3], twice)
    });
    assert_eq!(names, ["linear", "add", "add"]);
}

#[test]
fn a_published_value_keeps_its_addition() {
    let (x, w, b) = (random(1, 12), random(2, 9), random(3, 3));
    let mut tape = Tape::new();
    let vars = [("x", vec![4, 3]), ("w", vec![3, 3]), ("b", vec![3])].map(|(name, shape)| tape.param(name, &shape[..]));
    let y = linear(&mut tape, &[vars[0]], vars[1], vars[2]);
    tape.publish(y, "y");
    let z = add(&mut tape, vars[0], y);
    tape.publish(z, "z");
    tape.fuse_residuals(|op| op == "add");
    let mut planned = Planned::new(&tape, 1);
    for (name, data) in [("x", &x), ("w", &w), ("b", &b)] {
        planned.set_part(Region::Weights, name, data);
    }
    planned.run();
    let (y, z): (Vec<f32>, Vec<f32>) = (planned.get("y"), planned.get("z"));
    for i in 0..12 {
        let exact: f64 = f64::from(b[i % 3])
            + (0..3).map(|k| f64::from(x[i / 3 * 3 + k]) * f64::from(w[i % 3 * 3 + k])).sum::<f64>();
        assert!((f64::from(y[i]) - exact).abs() < 1e-5, "y[{i}] = {}, expected {exact}", y[i]);
        assert_eq!(z[i], x[i] + y[i]);
    }
}

/// d silu/dx = σ(x)(1 + x(1 − σ(x))).
fn silu_slope(x: f32) -> f64 {
    let x = f64::from(x);
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

#[test]
fn gradients_that_additions_pass_on_are_not_mixed_up() {
    // a reaches the result by four ways: twice as it is, through a SiLU, and through the SiLU of a sum that passes its gradient on.
    let (a, b, dy) = (random(1, 100), random(2, 100), random(3, 100));
    let result = Case::new(vec![Input::f32("a", [100], &a), Input::f32("b", [100], &b)]).run(&dy, |tape, v| {
        let sum = add(tape, v[0], v[1]);
        let bent = silu(tape, sum);
        let of_a = silu(tape, v[0]);
        let left = add(tape, bent, v[0]);
        let right = add(tape, sum, of_a);
        add(tape, left, right)
    });
    for i in 0..100 {
        let through_sum = 1.0 + silu_slope(a[i] + b[i]);
        let expected = [("a", through_sum + 1.0 + silu_slope(a[i])), ("b", through_sum)];
        for (name, slope) in expected {
            let (found, exact) = (f64::from(result.gradient(name)[i]), f64::from(dy[i]) * slope);
            assert!((found - exact).abs() <= 1e-5 * exact.abs().max(1.0), "d{name}[{i}] = {found}, expected {exact}");
        }
    }
}
