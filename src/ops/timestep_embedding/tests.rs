use super::timestep_embedding;
use crate::ops::testing::{Case, Input, assert_close};

fn run(t: &[u32], dim: usize, shift: f64, flip: bool, threads: usize) -> Vec<f32> {
    let case = Case::new(vec![Input::u32("t", [t.len()], t)]).threads(threads);
    case.forward(|tape, v| timestep_embedding(tape, v[0], dim, shift, flip))
}

#[test]
fn follows_its_formula_to_the_last_timestep() {
    let t: Vec<u32> = (0..1000).collect();
    let y = run(&t, 128, 1.0, false, 2);
    let exact = t.iter().flat_map(|&t| {
        (0..128).map(move |column| {
            let angle = f64::from(t) * 10000f64.powf(-f64::from(column % 64) / 63.0);
            if column < 64 { angle.sin() } else { angle.cos() }
        })
    });
    assert_close("y", &y, exact, 1.0);
    assert_eq!(y[63 + 128], (1e-4f64).sin() as f32, "the lowest frequency is 1/10000");
}

#[test]
fn odd_and_smallest_sizes() {
    let y = run(&[0, 3], 5, 0.0, false, 1);
    let [a, b] = [3.0f64, 3.0 * 0.01];
    let exact = [0.0, 0.0, 1.0, 1.0, 0.0, a.sin(), b.sin(), a.cos(), b.cos(), 0.0];
    assert_close("dim 5", &y, exact, 1.0);
    // half − shift = 0: only f_0 = 1 is left.
    assert_close("dim 2", &run(&[1], 2, 1.0, true, 1), [1f64.cos(), 1f64.sin()], 1.0);
    assert_eq!(run(&[7], 1, 0.0, false, 1), [0.0]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let t: Vec<u32> = (0..37).map(|i| i * 27).collect();
    assert_eq!(run(&t, 66, 1.0, false, 1), run(&t, 66, 1.0, false, 3));
}
