//! The reference is the formula written out in f64; its gradients are central differences, exact to about 1e-9.

use super::{Dropout, Norm, group_norm};
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, Outcome, Reference, assert_close, random};
use crate::rng::{Kind, Stream};
use crate::tape::{Tape, Var};

const SEED: u64 = 0x1234_5678_9abc;
const LAYER: u32 = 7;
const STEP: u32 = 1_000_003;
const FIRST_SAMPLE: u32 = 40;

/// A norm to be tested; channels of one or two sources.
#[derive(Clone)]
struct Setup {
    size: [usize; 3],
    channels: Vec<usize>,
    norm: Norm,
    /// Offset and number of columns of the timestep term.
    timestep: Option<(usize, usize)>,
    dropout: Option<f32>,
}

impl Setup {
    fn new(size: [usize; 3], channels: &[usize], groups: usize) -> Setup {
        let norm = Norm { groups, eps: 1e-6, silu: true };
        Setup { size, channels: channels.to_vec(), norm, timestep: None, dropout: None }
    }

    fn without_silu(mut self) -> Setup {
        self.norm.silu = false;
        self
    }

    fn timestep(mut self, offset: usize, total: usize) -> Setup {
        self.timestep = Some((offset, total));
        self
    }

    fn dropout(mut self, probability: f32) -> Setup {
        self.dropout = Some(probability);
        self
    }

    fn total(&self) -> usize {
        self.channels.iter().sum()
    }

    fn elements(&self) -> usize {
        self.size.iter().product::<usize>() * self.total()
    }

    /// x1, (x2), gamma, beta, (temb): names, shapes, values.
    fn inputs(&self) -> Vec<(&'static str, Vec<usize>, Vec<f32>)> {
        let [n, h, w] = self.size;
        let mut inputs = vec![];
        for (s, &c) in self.channels.iter().enumerate() {
            // Channels of unlike size and mean.
            let mut x = random(s as u64 + 1, n * h * w * c);
            x.iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = *x * (0.5 + (i % c) as f32 / 8.0) + (i % c % 3) as f32 - 1.0);
            inputs.push((["x1", "x2"][s], vec![n, h, w, c], x));
        }
        let gamma = random(3, self.total()).iter().map(|g| 1.0 + 0.3 * g).collect();
        inputs.push(("gamma", vec![self.total()], gamma));
        inputs.push(("beta", vec![self.total()], random(4, self.total())));
        if let Some((_, total)) = self.timestep {
            inputs.push(("temb", vec![n, total], random(5, n * total)));
        }
        inputs
    }

    fn case(&self) -> Case {
        let mut inputs: Vec<Input> =
            self.inputs().iter().map(|(name, shape, data)| Input::f32(name, shape.as_slice(), data)).collect();
        inputs.push(Input::u32("clock", [4], &[STEP, FIRST_SAMPLE, 99, 99]));
        Case::new(inputs)
    }

    fn build(&self, tape: &mut Tape, vars: &[Var]) -> Var {
        let sources = self.channels.len();
        let timestep = self.timestep.map(|(offset, _)| (vars[sources + 2], offset));
        let dropout =
            self.dropout.map(|probability| (Dropout { probability, seed: SEED, layer: LAYER }, vars[vars.len() - 1]));
        group_norm(tape, &self.norm, &vars[..sources], [vars[sources], vars[sources + 1]], timestep, dropout)
    }

    fn run(&self, dy: &[f32]) -> Outcome {
        self.case().run(dy, |tape, vars| self.build(tape, vars))
    }

    /// 0 or 1/(1 − p) for every element of the output.
    fn mask(&self) -> Vec<f32> {
        let [_, h, w] = self.size;
        let mut mask = vec![1.0; self.elements()];
        let Some(p) = self.dropout else { return mask };
        for (i, mask) in mask.chunks_mut(h * w * self.total()).enumerate() {
            let sample = FIRST_SAMPLE + i as u32;
            let stream = Stream { seed: SEED, kind: Kind::Dropout, layer: LAYER, sample, step: STEP };
            stream.fill_keep(0, 1.0 - p, mask);
        }
        mask
    }

    /// y of one image for inputs in the order of [`Setup::inputs`], restricted to that image.
    fn reference(&self, inputs: &[Vec<f64>], mask: &[f32]) -> Vec<f64> {
        let (c, sources) = (self.total(), self.channels.len());
        let pixels = self.size[1] * self.size[2];
        let mut u = vec![];
        for p in 0..pixels {
            for (s, &cs) in self.channels.iter().enumerate() {
                u.extend_from_slice(&inputs[s][p * cs..(p + 1) * cs]);
            }
        }
        if let Some((offset, _)) = self.timestep {
            u.iter_mut().enumerate().for_each(|(i, u)| *u += inputs[sources + 2][offset + i % c]);
        }
        let mut y = vec![0.0; u.len()];
        let group_of = |i: usize| (i % c) / (c / self.norm.groups);
        for group in 0..self.norm.groups {
            let members: Vec<usize> = (0..u.len()).filter(|&i| group_of(i) == group).collect();
            let m = members.len() as f64;
            let mean = members.iter().map(|&i| u[i]).sum::<f64>() / m;
            let variance = members.iter().map(|&i| (u[i] - mean).powi(2)).sum::<f64>() / m;
            for i in members {
                let normal = (u[i] - mean) / (variance + self.norm.eps).sqrt();
                let z = inputs[sources][i % c] * normal + inputs[sources + 1][i % c];
                let z = if self.norm.silu { z / (1.0 + (-z).exp()) } else { z };
                y[i] = z * f64::from(mask[i]);
            }
        }
        y
    }

    /// Output, and for each input the gradient of Σ dy·y.
    fn reference_with_gradients(&self, dy: &[f32]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let mask = self.mask();
        let inputs = self.inputs();
        let n = self.size[0];
        let per_image = |name: &str| !matches!(name, "gamma" | "beta");
        let mut y = vec![];
        let mut gradients: Vec<Vec<f64>> = inputs.iter().map(|(_, _, data)| vec![0.0; data.len()]).collect();
        for image in 0..n {
            let part = |len: usize| image * (len / n)..(image + 1) * (len / n);
            let (mask, dy) = (&mask[part(mask.len())], &dy[part(dy.len())]);
            let mut own: Vec<Vec<f64>> = inputs
                .iter()
                .map(|(name, _, data)| if per_image(name) { &data[part(data.len())] } else { &data[..] })
                .map(|data| data.iter().copied().map(f64::from).collect())
                .collect();
            y.extend(self.reference(&own, mask));
            let loss = |inputs: &[Vec<f64>]| -> f64 {
                self.reference(inputs, mask).iter().zip(dy).map(|(y, dy)| y * f64::from(*dy)).sum()
            };
            for k in 0..own.len() {
                let start = if per_image(inputs[k].0) { image * own[k].len() } else { 0 };
                for e in 0..own[k].len() {
                    let value = own[k][e];
                    let step = 1e-5;
                    own[k][e] = value + step;
                    let above = loss(&own);
                    own[k][e] = value - step;
                    let below = loss(&own);
                    own[k][e] = value;
                    gradients[k][start + e] += (above - below) / (2.0 * step);
                }
            }
        }
        (y, gradients)
    }

    /// Compares output and all gradients.
    fn check(&self) {
        let dy = random(9, self.elements());
        let found = self.run(&dy);
        let (y, gradients) = self.reference_with_gradients(&dy);
        assert_close("y", &found.y, y, ULPS);
        for ((name, _, _), exact) in self.inputs().iter().zip(gradients) {
            let gradient = found.gradient(name);
            if let ("temb", Some((offset, total))) = (*name, self.timestep) {
                let own = |i: &usize| (offset..offset + self.total()).contains(&(i % total));
                let of = |i: usize| (gradient[i], exact[i]);
                let (found, exact): (Vec<f32>, Vec<f64>) = (0..exact.len()).filter(own).map(of).unzip();
                assert_close("temb", &found, exact, ULPS);
                // The other columns belong to other layers: still as poisoned.
                assert!((0..gradient.len()).filter(|i| !own(i)).all(|i| gradient[i].is_nan()));
            } else {
                assert_close(name, &gradient, exact, ULPS);
            }
        }
    }
}

/// A few roundings of numbers up to the size of γ·(x − mean)·rstd ≈ 4, the 2 ulp of exp, and SiLU's slope.
const ULPS: f64 = 32.0;

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
    for setup in
        [Setup::new([2, 3, 5], &[20], 4).dropout(0.3).timestep(0, 20), Setup::new([2, 9, 9], &[20], 4).without_silu()]
    {
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
    let setup = Setup::new([5, 9, 9], &[20, 12], 4).timestep(1, 40).dropout(0.1);
    let dy = random(9, setup.elements());
    let run = |threads| setup.case().threads(threads).run(&dy, |tape, v| setup.build(tape, v));
    let one = run(1);
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for threads in [2, 3] {
        let more = run(threads);
        assert_eq!(bits(&one.y), bits(&more.y), "y, {threads} threads");
        for name in ["x1", "x2", "gamma", "beta"] {
            assert_eq!(bits(&one.gradient(name)), bits(&more.gradient(name)), "{name}, {threads} threads");
        }
    }
}

/// PyTorch in f64, rounded to f32; made by tests/reference/ops.py.
#[test]
fn matches_pytorch() {
    let file = Reference::open("ops.safetensors");
    // Name, number of sources, groups, SiLU, timestep term, and what a mean of that size costs when it is rounded, in ε.
    for (name, sources, groups, silu, timestep, mean) in [
        ("group_norm", 1, 4, false, false, 0.0),
        ("group_norm_silu", 1, 4, true, false, 0.0),
        ("group_norm_silu_temb", 1, 5, true, true, 0.0),
        ("group_norm_two_sources", 2, 4, false, false, 0.0),
        ("group_norm_silu_two_sources", 2, 4, true, false, 0.0),
        ("group_norm_silu_two_sources_temb", 2, 4, true, true, 0.0),
        ("group_norm_one_channel_groups", 1, 6, true, false, 0.0),
        ("group_norm_one_group", 1, 1, false, true, 0.0),
        ("group_norm_large_mean", 1, 4, false, false, 16.0),
    ] {
        let mut keys = if sources == 1 { vec!["x"] } else { vec!["x1", "x2"] };
        keys.extend(["w", "b"]);
        keys.extend(timestep.then_some("temb"));
        let inputs = keys.iter().map(|key| {
            let full = format!("{name}/{key}");
            Input::f32(key, file.shape(&full).as_slice(), &file.f32(&full))
        });
        let norm = Norm { groups, eps: 1e-6, silu };
        let found = Case::new(inputs.collect()).run(&file.f32(&format!("{name}/dy")), |tape, v| {
            let timestep = v.get(sources + 2).map(|&temb| (temb, 0));
            group_norm(tape, &norm, &v[..sources], [v[sources], v[sources + 1]], timestep, None)
        });
        assert_close(&format!("{name} y"), &found.y, file.f64(&format!("{name}/y")), ULPS + mean);
        for key in keys {
            let exact = file.f64(&format!("{name}/d{key}"));
            assert_close(&format!("{name} d{key}"), &found.gradient(key), exact, ULPS + mean);
        }
    }
}
