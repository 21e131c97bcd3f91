use super::{cpu::exp, silu};
use crate::ops::testing::{Case, Input, assert_close, random};

#[test]
fn exp_is_within_two_ulp() {
    for i in -860_000..=870_000 {
        let x = i as f32 * 1e-4;
        let exact = f64::from(x).exp();
        let error = (f64::from(exp(x)) - exact).abs() / exact;
        assert!(error <= 2.0 * f64::from(f32::EPSILON), "exp({x}) = {} is off by {error:e}", exp(x));
    }
}

#[test]
fn matches_f64_and_its_derivative() {
    let x: Vec<f32> = random(1, 40_003).iter().map(|x| x * 4.0).collect();
    let dy = random(2, x.len());
    let result = Case::new(vec![Input::f32("x", [x.len()], &x)]).run(&dy, |tape, v| silu(tape, v[0]));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let exact = |x: &f32| f64::from(*x) * sigmoid(f64::from(*x));
    let derivative = |x: &f32| {
        let (x, s) = (f64::from(*x), sigmoid(f64::from(*x)));
        s * (1.0 + x * (1.0 - s))
    };
    assert_close("y", &result.y, x.iter().map(exact), 4.0);
    assert_close("dx", &result.gradient("x"), x.iter().zip(&dy).map(|(x, dy)| derivative(x) * f64::from(*dy)), 8.0);
}
