//! The reference is the formula written out in f64 ([`Setup`]), and PyTorch.

mod setup;

use super::{Norm, Timestep, group_norm};
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, assert_close, random};
use crate::tape::{Tape, Var};
use setup::{FIRST_SAMPLE, STEP, Setup};

#[test]
fn one_source() {
    Setup::new([2, 3, 5], &[20], 4).check();
    Setup::new([2, 4, 4], &[32], 8).check();
}

#[test]
fn groups_across_the_border_of_two_sources() {
    Setup::new([2, 3, 5], &[12, 20], 4).check();
    Setup::new([2, 3, 3], &[9, 6], 3).check();
    Setup::new([1, 2, 2], &[64, 32], 8).check();
}

#[test]
fn timestep_term() {
    Setup::new([2, 3, 5], &[20], 5).timestep(3, 31).check();
    Setup::new([2, 2, 3], &[10, 18], 4).timestep(0, 28).check();
}

#[test]
fn scale_and_shift_by_the_timestep() {
    Setup::new([2, 3, 5], &[20], 5).scale_shift(3, 47).check();
    Setup::new([2, 2, 3], &[10, 18], 4).scale_shift(0, 56).check();
    Setup::new([2, 3, 5], &[5, 2], 1).without_silu().scale_shift(1, 16).check();
    Setup::new([3, 3, 5], &[7, 9], 4).scale_shift(2, 34).dropout(0.1).check();
    Setup::new([2, 1, 1], &[8], 2).scale_shift(0, 16).check(); // one pixel
    Setup::new([1, 13, 11], &[7], 7).scale_shift(5, 19).check(); // more than one block
}

/// With a scale of −1 nothing of the norm is left.
#[test]
fn a_scale_of_minus_one_leaves_the_shift() {
    let (n, h, w, c) = (2, 3, 5, 8);
    let shift = random(2, n * c);
    let temb: Vec<f32> = shift.chunks(c).flat_map(|shift| [&[-1.0; 8], shift].concat()).collect();
    let case = Case::new(vec![
        Input::f32("x", [n, h, w, c], &random(1, n * h * w * c)),
        Input::f32("gamma", [c], &random(3, c)),
        Input::f32("beta", [c], &random(4, c)),
        Input::f32("temb", [n, 2 * c], &temb),
    ]);
    let timestep = Timestep::ScaleShift { offset: 0, total: 2 * c };
    let norm = Norm { groups: 2, eps: 1e-6, silu: false };
    let found = case.run(&random(9, n * h * w * c), |tape, v| {
        group_norm(tape, &norm, &v[..1], [v[1], v[2]], Some((v[3], timestep)), None)
    });
    for (i, y) in found.y.iter().enumerate() {
        assert_eq!(*y, shift[i / (h * w * c) * c + i % c], "element {i}");
    }
    for name in ["x", "gamma", "beta"] {
        assert!(found.gradient(name).iter().all(|gradient| *gradient == 0.0), "{name}");
    }
}

#[test]
fn without_silu() {
    Setup::new([2, 3, 5], &[20], 4).without_silu().check();
    Setup::new([2, 3, 5], &[5, 2], 1).without_silu().timestep(1, 9).check();
}

#[test]
fn dropout() {
    Setup::new([2, 3, 5], &[20], 4).dropout(0.3).check();
    Setup::new([3, 3, 5], &[7, 9], 4).timestep(2, 20).dropout(0.1).check();
    Setup::new([2, 3, 3], &[6], 2).without_silu().dropout(0.5).check();
}

#[test]
fn awkward_sizes() {
    Setup::new([3, 1, 1], &[8], 2).check(); // one pixel
    Setup::new([2, 5, 3], &[6], 6).check(); // one channel per group
    Setup::new([1, 13, 11], &[7], 1).check(); // more than one block, no vector fits
    Setup::new([1, 9, 9], &[1], 1).check();
    Setup::new([1, 3, 3], &[80], 16).dropout(0.2).check(); // 16 + 4 lanes
}

#[test]
fn one_pixel_and_one_channel_per_group_is_all_epsilon() {
    // The variance is 0: y = SiLU(β), dx = 0 but for two roundings of γ·rstd·dz, with rstd = ε^−½ = 1000 and SiLU' < 1.1.
    let setup = Setup::new([2, 1, 1], &[4], 4);
    let dy = random(1, 8);
    let found = setup.run(&dy);
    let inputs = setup.inputs();
    let (gamma, beta) = (&inputs[1].2, &inputs[2].2);
    assert_close("y", &found.y, (0..8).map(|i| f64::from(beta[i % 4])).map(|b| b / (1.0 + (-b).exp())), 4.0);
    for (i, dx) in found.gradient("x1").iter().enumerate() {
        assert!(dx.abs() <= 2.0 * f32::EPSILON * 1000.0 * 1.1 * (gamma[i % 4] * dy[i]).abs(), "dx[{i}] = {dx}");
    }
}

/// Many pixels far from zero: a variance from sums about zero in f32 would be off by far more than the inputs' own rounding.
#[test]
fn large_mean_and_many_pixels() {
    let (n, h, w, c, groups) = (2, 40, 50, 8, 2);
    let mean = 1000.0;
    let x: Vec<f32> = random(1, n * h * w * c).iter().map(|x| x + mean).collect();
    let (gamma, beta) = (vec![1.0; c], vec![0.0; c]);
    let case = Case::new(vec![
        Input::f32("x", [n, h, w, c], &x),
        Input::f32("gamma", [c], &gamma),
        Input::f32("beta", [c], &beta),
    ]);
    let y = case.forward(|tape, v| {
        group_norm(tape, &Norm { groups, eps: 1e-6, silu: false }, &v[..1], [v[1], v[2]], None, None)
    });
    let mut exact = vec![0.0; x.len()];
    for group in 0..n * groups {
        let own = |i: &usize| i / (h * w * c) == group / groups && i % c / (c / groups) == group % groups;
        let members: Vec<usize> = (0..x.len()).filter(own).collect();
        let count = members.len() as f64;
        let mean = members.iter().map(|&i| f64::from(x[i])).sum::<f64>() / count;
        let variance = members.iter().map(|&i| (f64::from(x[i]) - mean).powi(2)).sum::<f64>() / count;
        members.iter().for_each(|&i| exact[i] = (f64::from(x[i]) - mean) / (variance + 1e-6).sqrt());
    }
    // Half an ulp of the mean (2⁻¹⁵) is what rounding it costs: 512 ε.
    assert_close("y", &y, exact, 512.0 + 8.0);
}

#[test]
fn adds_to_gradients_that_are_there() {
    for setup in [
        Setup::new([2, 3, 5], &[20], 4).dropout(0.3).timestep(0, 20),
        Setup::new([2, 3, 5], &[20], 4).dropout(0.3).scale_shift(0, 40),
        Setup::new([2, 9, 9], &[20], 4).without_silu(),
    ] {
        let dy = random(9, setup.elements());
        let plain = setup.run(&dy);
        let residual = setup.case().run(&dy, |tape, v| {
            let y = setup.build(tape, v);
            add(tape, y, v[0])
        });
        let added: Vec<f64> = plain.gradient("x1").iter().zip(&dy).map(|(dx, dy)| f64::from(dx + dy)).collect();
        // Only the order of the additions may differ.
        assert_close("x1", &residual.gradient("x1"), added, 4.0);
        assert_eq!(residual.gradient("gamma"), plain.gradient("gamma"));
    }
}

#[test]
fn adds_to_the_gradient_of_one_of_two_sources() {
    let setup = Setup::new([2, 3, 5], &[24, 24], 3).dropout(0.2);
    let dy = random(9, setup.elements());
    let plain = setup.run(&dy);
    for k in 0..2 {
        // The loss is Σ dy·(y + [x_k, x_k], normalised): the gradient of the second term comes first.
        let norm = Norm { groups: 4, eps: 1e-5, silu: false };
        let second = |tape: &mut Tape, v: &[Var]| {
            let same = add(tape, v[k], v[k]);
            group_norm(tape, &norm, &[same, v[1 - k]], [v[2], v[3]], None, None)
        };
        let alone = setup.case().run(&dy, second);
        let both = setup.case().run(&dy, |tape, v| {
            let y = setup.build(tape, v);
            let z = second(tape, v);
            add(tape, y, z)
        });
        for name in ["x1", "x2", "gamma", "beta"] {
            let parts = plain.gradient(name).into_iter().zip(alone.gradient(name));
            assert_close(name, &both.gradient(name), parts.map(|(a, b)| f64::from(a) + f64::from(b)), 4.0);
        }
    }
}

#[test]
fn a_norm_applied_twice_adds_up_the_gradients_of_its_parameters() {
    let setup = Setup::new([2, 3, 5], &[20], 4);
    let dy = random(9, setup.elements());
    let found = setup.case().run(&dy, |tape, v| {
        let once = setup.build(tape, v);
        group_norm(tape, &setup.norm, &[once], [v[1], v[2]], None, None)
    });
    // Both norms with parameters of their own, of equal value.
    let inputs = setup.inputs();
    let [x, gamma, beta] = [0, 1, 2].map(|k| &inputs[k].2);
    let apart = Case::new(vec![
        Input::f32("x", [2, 3, 5, 20], x),
        Input::f32("gamma 1", [20], gamma),
        Input::f32("beta 1", [20], beta),
        Input::f32("gamma 2", [20], gamma),
        Input::f32("beta 2", [20], beta),
    ])
    .run(&dy, |tape, v| {
        let once = group_norm(tape, &setup.norm, &v[..1], [v[1], v[2]], None, None);
        group_norm(tape, &setup.norm, &[once], [v[3], v[4]], None, None)
    });
    for name in ["gamma", "beta"] {
        let [first, second] = ["1", "2"].map(|k| apart.gradient(&format!("{name} {k}")));
        let sum = first.iter().zip(&second).map(|(a, b)| f64::from(*a) + f64::from(*b));
        assert_close(name, &found.gradient(name), sum, 2.0);
    }
}

/// With γ = 0 and β = 1 the output is the mask itself.
#[test]
fn the_mask_is_the_streams_and_keeps_its_rate() {
    let (n, h, w, c, p) = (3, 16, 16, 32, 0.1);
    let setup = Setup::new([n, h, w], &[c], 8).without_silu().dropout(p);
    let dy = random(9, setup.elements());
    let case = Case::new(vec![
        Input::f32("x1", [n, h, w, c], &random(1, n * h * w * c)),
        Input::f32("gamma", [c], &vec![0.0; c]),
        Input::f32("beta", [c], &vec![1.0; c]),
        Input::u32("clock", [4], &[STEP, FIRST_SAMPLE, 0, 0]),
    ]);
    let found = case.run(&dy, |tape, v| setup.build(tape, v));
    assert_eq!(found.y, setup.mask());
    let kept = found.y.iter().filter(|y| **y != 0.0).count() as f64;
    let (expected, elements) = (f64::from(1.0 - p), found.y.len() as f64);
    let sigma = (expected * (1.0 - expected) * elements).sqrt();
    assert!((kept - expected * elements).abs() < 4.0 * sigma, "{kept} of {elements} kept");
    // Images have masks of their own.
    let images: Vec<&[f32]> = found.y.chunks(h * w * c).collect();
    assert!(images[0] != images[1] && images[1] != images[2]);
    // The backward pass draws the same one.
    let exact = |channel: usize| {
        let own = found.y.iter().zip(&dy).skip(channel).step_by(c);
        own.map(|(mask, dy)| f64::from(*mask) * f64::from(*dy)).sum::<f64>()
    };
    assert_close("beta", &found.gradient("beta"), (0..c).map(exact), 8.0);
}

#[test]
fn equal_bits_at_any_number_of_threads() {
    let setup = Setup::new([5, 9, 9], &[20, 12], 4).dropout(0.1);
    for setup in [setup.clone().timestep(1, 40), setup.scale_shift(1, 70)] {
        let dy = random(9, setup.elements());
        let run = |threads| setup.case().threads(threads).run(&dy, |tape, v| setup.build(tape, v));
        let one = run(1);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for threads in [2, 3] {
            let more = run(threads);
            assert_eq!(bits(&one.y), bits(&more.y), "y, {threads} threads");
            for name in ["x1", "x2", "gamma", "beta", "temb"] {
                assert_eq!(bits(&one.gradient(name)), bits(&more.gradient(name)), "{name}, {threads} threads");
            }
        }
    }
}
