use super::linear;
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, assert_close, random, ulps};
use crate::tape::{Tape, Var};

/// y = Σ_s x_s·W_sᵀ + b in f64.
fn exact(sources: &[(&[f32], usize)], w: &[f32], b: &[f32]) -> Vec<f64> {
    let rows = sources[0].0.len() / sources[0].1;
    let depth: usize = sources.iter().map(|s| s.1).sum();
    let row = |r: usize| sources.iter().flat_map(move |(x, k)| x[r * k..(r + 1) * k].iter());
    (0..rows)
        .flat_map(|r| {
            b.iter().enumerate().map(move |(n, &b)| {
                let products = row(r).zip(&w[n * depth..]).map(|(x, w)| f64::from(*x) * f64::from(*w));
                f64::from(b) + products.sum::<f64>()
            })
        })
        .collect()
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

#[test]
fn matches_f64_and_its_differences_for_one_source_and_two() {
    for (rows, sources, out) in [(1, vec![3], 1), (7, vec![33], 20), (50, vec![12, 20], 17), (129, vec![64, 5], 96)] {
        let depth: usize = sources.iter().sum();
        let x: Vec<Vec<f32>> = sources.iter().enumerate().map(|(s, k)| random(s as u64, rows * k)).collect();
        let (w, b, dy) = (random(7, out * depth), random(8, out), random(9, rows * out));
        let mut inputs: Vec<Input> =
            (0..sources.len()).map(|s| Input::f32(["x0", "x1"][s], [rows, sources[s]], &x[s])).collect();
        inputs.extend([Input::f32("w", [out, depth], &w), Input::f32("b", [out], &b)]);
        let build = |tape: &mut Tape, v: &[Var]| {
            let (sources, params) = v.split_at(v.len() - 2);
            linear(tape, sources, params[0], params[1])
        };
        let result = Case::new(inputs).run(&dy, build);

        let y_of = |x: &[Vec<f32>], w: &[f32], b: &[f32]| {
            exact(&x.iter().zip(&sources).map(|(x, &k)| (&x[..], k)).collect::<Vec<_>>(), w, b)
        };
        assert_close("y", &result.y, y_of(&x, &w, &b), ulps(depth));
        // The layer is linear in each operand, so a difference over any distance is the derivative: replace one operand by a single 1.
        let unit = |len: usize, i: usize| (0..len).map(|j| f32::from(j == i)).collect::<Vec<f32>>();
        let zeros = vec![0.0; out];
        for s in 0..sources.len() {
            let gradient = (0..x[s].len()).map(|i| {
                let mut x: Vec<Vec<f32>> = x.iter().map(|x| vec![0.0; x.len()]).collect();
                x[s] = unit(x[s].len(), i);
                dot(&y_of(&x, &w, &zeros), &dy)
            });
            assert_close("dx", &result.gradient(["x0", "x1"][s]), gradient, ulps(out));
        }
        let dw = (0..w.len()).map(|i| dot(&y_of(&x, &unit(w.len(), i), &zeros), &dy));
        assert_close("dw", &result.gradient("w"), dw, ulps(rows));
        let db = (0..out).map(|n| (0..rows).map(|r| f64::from(dy[r * out + n])).sum());
        assert_close("db", &result.gradient("b"), db, ulps(rows));
    }
}

#[test]
fn a_residual_is_added_by_the_layer_itself() {
    let (x, w, b, r, dy) = (random(1, 60), random(2, 36), random(3, 6), random(4, 60), random(5, 60));
    let inputs = || {
        vec![
            Input::f32("x", [10, 6], &x),
            Input::f32("w", [6, 6], &w),
            Input::f32("b", [6], &b),
            Input::f32("r", [10, 6], &r),
        ]
    };
    let build = |fuse: bool| {
        move |tape: &mut Tape, v: &[Var]| {
            let y = linear(tape, &[v[0]], v[1], v[2]);
            let sum = add(tape, v[3], y);
            if fuse {
                tape.fuse_residuals(|op| op == "add");
            }
            sum
        }
    };
    let fused = Case::new(inputs()).run(&dy, build(true));
    let apart = Case::new(inputs()).run(&dy, build(false));
    assert_close("y", &fused.y, apart.y.iter().map(|&y| f64::from(y)), 4.0);
    assert_eq!(fused.gradient("r"), dy);
    for name in ["x", "w", "b"] {
        assert_eq!(fused.gradient(name), apart.gradient(name), "{name}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (x, w, b, dy) = (random(1, 3000 * 40), random(2, 72 * 40), random(3, 72), random(4, 3000 * 72));
    let run = |threads| {
        let inputs = vec![Input::f32("x", [3000, 40], &x), Input::f32("w", [72, 40], &w), Input::f32("b", [72], &b)];
        let result = Case::new(inputs).threads(threads).run(&dy, |tape, v| linear(tape, &[v[0]], v[1], v[2]));
        (result.gradient("x"), result.gradient("w"), result.gradient("b"), result.y)
    };
    assert!(run(1) == run(2) && run(1) == run(3));
}

/// The gradient of the bias is there already when that of the second weights is written.
#[test]
fn layers_may_share_a_bias_alone() {
    let (rows, depth, out) = (7, 5, 6);
    let (x, dy) = (random(1, rows * depth), random(2, rows * out));
    let inputs = vec![
        Input::f32("x", [rows, depth], &x),
        Input::f32("w", [out, depth], &random(3, out * depth)),
        Input::f32("v", [out, depth], &random(4, out * depth)),
        Input::f32("b", [out], &random(5, out)),
    ];
    let found = Case::new(inputs).run(&dy, |tape, inputs| {
        let [y, z] = [inputs[1], inputs[2]].map(|weight| linear(tape, &[inputs[0]], weight, inputs[3]));
        add(tape, y, z)
    });
    let of_weight = |i: usize| (0..rows).map(|r| f64::from(dy[r * out + i / depth] * x[r * depth + i % depth])).sum();
    for name in ["w", "v"] {
        assert_close(name, &found.gradient(name), (0..out * depth).map(of_weight), ulps(rows));
    }
    let of_bias = |i: usize| (0..rows).map(|r| 2.0 * f64::from(dy[r * out + i])).sum();
    assert_close("b", &found.gradient("b"), (0..out).map(of_bias), ulps(2 * rows));
}
