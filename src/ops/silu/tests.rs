use super::silu;
use crate::ops::testing::{Case, Input, assert_close, random};

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

/// A network that has diverged is not made to look well: what is not finite stays so.
#[test]
fn infinities_and_nan_are_not_hidden() {
    let x = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY, 3.0];
    let result = Case::new(vec![Input::f32("x", [4], &x)]).run(&[1.0; 4], |tape, v| silu(tape, v[0]));
    assert!(!result.y[0].is_finite() && result.y[1].is_nan() && result.y[2] == f32::INFINITY, "{:?}", result.y);
    assert!(result.gradient("x")[..3].iter().all(|dx| !dx.is_finite()), "{:?}", result.gradient("x"));
    assert!(result.y[3].is_finite() && result.gradient("x")[3].is_finite());
}
