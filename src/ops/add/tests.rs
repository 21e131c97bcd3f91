use super::add;
use crate::ops::testing::{Case, Input, random};

#[test]
fn adds_and_passes_the_gradient_to_both() {
    let (a, b, dy) = (random(1, 70_001), random(2, 70_001), random(3, 70_001));
    let result = Case::new(vec![Input::f32("a", [70_001], &a), Input::f32("b", [70_001], &b)])
        .run(&dy, |tape, v| add(tape, v[0], v[1]));
    for i in 0..a.len() {
        assert_eq!(result.y[i], a[i] + b[i]);
    }
    assert_eq!(result.gradient("a"), dy);
    assert_eq!(result.gradient("b"), dy);
}

#[test]
fn a_value_added_to_itself_gets_both_gradients() {
    let (a, dy) = (random(1, 33), random(3, 33));
    let result = Case::new(vec![Input::f32("a", [33], &a)]).run(&dy, |tape, v| {
        let twice = add(tape, v[0], v[0]);
        add(tape, twice, v[0])
    });
    for (da, dy) in result.gradient("a").iter().zip(&dy) {
        assert_eq!(*da, 3.0 * dy);
    }
}
