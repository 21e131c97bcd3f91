//! The reference is the formula written out in f64; its gradients are central differences.

use super::attention;
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, Outcome, assert_close, random};

/// Shape of a case: q, k and v are [images, height, width, channels] each.
#[derive(Clone, Copy)]
struct Setup {
    images: usize,
    height: usize,
    width: usize,
    channels: usize,
    heads: usize,
    /// Standard deviation of q, k and v.
    size: f32,
}

impl Setup {
    fn new(images: usize, [height, width]: [usize; 2], channels: usize, heads: usize) -> Setup {
        Setup { images, height, width, channels, heads, size: 1.0 }
    }

    fn tokens(&self) -> usize {
        self.height * self.width
    }

    fn elements(&self) -> usize {
        self.images * self.tokens() * self.channels
    }

    fn qkv(&self) -> Vec<f32> {
        random(1, 3 * self.elements()).iter().map(|x| x * self.size).collect()
    }

    fn case(&self) -> Case {
        let shape = [self.images, self.height, self.width, 3 * self.channels];
        Case::new(vec![Input::f32("qkv", shape, &self.qkv())])
    }

    fn run(&self, dy: &[f32]) -> Outcome {
        self.case().run(dy, |tape, v| attention(tape, v[0], self.heads))
    }

    /// o of one image.
    fn reference(&self, qkv: &[f64]) -> Vec<f64> {
        let (t, c, d) = (self.tokens(), self.channels, self.channels / self.heads);
        let at = |token: usize, part: usize, channel: usize| qkv[token * 3 * c + part * c + channel];
        let mut o = vec![0.0; t * c];
        for head in 0..self.heads {
            let own = head * d..(head + 1) * d;
            for i in 0..t {
                let scores: Vec<f64> = (0..t)
                    .map(|j| own.clone().map(|e| at(i, 0, e) * at(j, 1, e)).sum::<f64>() / (d as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for e in own.clone() {
                    let weighted = |j: usize| (scores[j] - max).exp() / sum * at(j, 2, e);
                    o[i * c + e] = (0..t).map(weighted).sum();
                }
            }
        }
        o
    }

    /// Rounding errors of o and of the gradient of one image, carried through the formulas to first order: those of a sum are half an ulp
    /// of the sum of its terms' sizes for each product, and √terms of them for the additions, whose directions are random.
    fn rounding(&self, qkv: &[f64], dy: &[f32]) -> (Vec<f64>, Vec<f64>) {
        const EPS: f64 = f32::EPSILON as f64;
        let (t, c, d) = (self.tokens(), self.channels, self.channels / self.heads);
        let of_sum = |terms: usize, sizes: f64| EPS / 2.0 * ((terms as f64).sqrt() + 3.0) * sizes;
        let scale = 1.0 / (d as f64).sqrt();
        let (mut o_error, mut error, mut size) = (vec![0.0; t * c], vec![0.0; 3 * t * c], vec![0.0; 3 * t * c]);
        for head in 0..self.heads {
            let own = head * d..(head + 1) * d;
            let at = |token: usize, part: usize, channel: usize| token * 3 * c + part * c + channel;
            for i in 0..t {
                let terms = |j: usize| own.clone().map(move |e| qkv[at(i, 0, e)] * qkv[at(j, 1, e)] * scale);
                let s: Vec<f64> = (0..t).map(|j| terms(j).sum()).collect();
                let ds: Vec<f64> = (0..t).map(|j| of_sum(d, terms(j).map(f64::abs).sum())).collect();
                let max = s.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
                let p: Vec<f64> = s.iter().map(|s| (s - max).exp() / sum).collect();
                let mean: f64 = p.iter().zip(&ds).map(|(p, ds)| p * ds).sum();
                // dp = p·(ds − Σ p·ds); exp, sum, reciprocal and product add a few ε. Backward, p is e^(s − log Σ e^s): what the
                // logarithm's rounding adds is not divided out, and neither is that of the difference.
                let forward: Vec<f64> =
                    (0..t).map(|j| p[j] * ((1.0 - 2.0 * p[j]) * ds[j] + mean + 4.0 * EPS)).collect();
                let logarithm = max + sum.ln();
                let backward: Vec<f64> = (0..t)
                    .map(|j| {
                        p[j] * (ds[j] + mean + EPS / 2.0 * (logarithm.abs() + (s[j] - logarithm).abs()) + 4.0 * EPS)
                    })
                    .collect();
                let (mut dot, mut dot_error, mut dot_size) = (0.0, 0.0, 0.0);
                for e in own.clone() {
                    let v = |j: usize| qkv[at(j, 2, e)];
                    let o: f64 = (0..t).map(|j| p[j] * v(j)).sum();
                    let sizes = (0..t).map(|j| p[j] * v(j).abs()).sum();
                    let rounding = (0..t).map(|j| forward[j] * v(j).abs()).sum::<f64>() + of_sum(t, sizes);
                    o_error[i * c + e] = rounding;
                    let dy = f64::from(dy[i * c + e]);
                    dot += dy * o;
                    dot_error += dy.abs() * rounding;
                    dot_size += (dy * o).abs();
                }
                for j in 0..t {
                    let terms = own.clone().map(|e| f64::from(dy[i * c + e]) * qkv[at(j, 2, e)]);
                    let difference = (terms.clone().sum::<f64>() - dot).abs();
                    let known =
                        of_sum(d, terms.map(f64::abs).sum()) + dot_error + of_sum(d, dot_size) + EPS * difference;
                    let d_score = backward[j] * difference + p[j] * known;
                    for e in own.clone() {
                        let dy = f64::from(dy[i * c + e]).abs();
                        for (place, factor) in [(at(i, 0, e), at(j, 1, e)), (at(j, 1, e), at(i, 0, e))] {
                            error[place] += d_score * qkv[factor].abs() * scale;
                            size[place] += p[j] * difference * qkv[factor].abs() * scale;
                        }
                        error[at(j, 2, e)] += backward[j] * dy;
                        size[at(j, 2, e)] += p[j] * dy;
                    }
                }
            }
        }
        error.iter_mut().zip(size).for_each(|(error, size)| *error += of_sum(t, size));
        (o_error, error)
    }

    /// Compares the output, and the gradient of every `stride`-th element of each image, to within `ulps`, or to their own rounding.
    fn check(&self, ulps: Option<f64>, stride: usize) {
        let dy = random(9, self.elements());
        let found = self.run(&dy);
        let gradient = found.gradient("qkv");
        let qkv = self.qkv();
        let (mut y, mut exact, mut sampled) = (vec![], vec![], vec![]);
        let (mut y_bounds, mut bounds) = (vec![], vec![]);
        let (qkv_len, o_len) = (qkv.len() / self.images, dy.len() / self.images);
        for image in 0..self.images {
            let mut own: Vec<f64> = qkv[image * qkv_len..][..qkv_len].iter().copied().map(f64::from).collect();
            let dy = &dy[image * o_len..][..o_len];
            y.extend(self.reference(&own));
            let (of_o, of_gradient) = self.rounding(&own, dy);
            y_bounds.extend(of_o);
            for e in (image..qkv_len).step_by(stride) {
                let (value, step) = (own[e], 1e-5);
                let mut loss = |x: f64| -> f64 {
                    own[e] = x;
                    self.reference(&own).iter().zip(dy).map(|(y, dy)| y * f64::from(*dy)).sum()
                };
                exact.push((loss(value + step) - loss(value - step)) / (2.0 * step));
                loss(value);
                sampled.push(gradient[image * qkv_len + e]);
                bounds.push(of_gradient[e]);
            }
        }
        if let Some(ulps) = ulps {
            assert_close("o", &found.y, y, ulps);
            assert_close("dqkv", &sampled, exact, ulps);
            return;
        }
        for (what, found, exact, bounds) in [("o", &found.y, y, y_bounds), ("dqkv", &sampled, exact, bounds)] {
            for (i, ((found, exact), bound)) in found.iter().zip(exact).zip(bounds).enumerate() {
                // Central differences with a step of h: f‴h²/6, f‴ up to (k/√d)³·|dy·v| = 13³·270, and below.
                let (error, bound) = ((f64::from(*found) - exact).abs(), bound + 1e-5);
                assert!(error <= bound, "{what}[{i}] = {found}, expected {exact} (error {error:e}, bound {bound:e})");
            }
        }
    }
}

/// A score of size s is rounded to s·ε (with a few roundings more in its sum), and so is its probability. These are below 8.
const ULPS: f64 = 32.0;

#[test]
fn one_token_is_v() {
    let setup = Setup::new(2, [1, 1], 20, 2);
    let qkv = setup.qkv();
    let dy = random(9, 40);
    let found = setup.run(&dy);
    for image in 0..2 {
        assert_eq!(found.y[image * 20..][..20], qkv[image * 60 + 40..][..20]);
        let gradient = &found.gradient("qkv")[image * 60..][..60];
        assert_eq!(gradient[40..], dy[image * 20..][..20]);
        // p = 1, dp = do·v, which the softmax takes away but for its rounding.
        assert!(gradient[..40].iter().all(|x| x.abs() < 1e-5), "{gradient:?}");
    }
}

#[test]
fn few_tokens() {
    for heads in [1, 2, 4] {
        Setup::new(2, [1, 5], 20, heads).check(Some(ULPS), 1);
    }
    Setup::new(2, [3, 4], 30, 3).check(Some(ULPS), 1);
}

#[test]
fn an_odd_number_of_tokens() {
    for heads in [1, 2] {
        Setup::new(2, [7, 7], 32, heads).check(Some(ULPS), 97);
    }
    Setup::new(1, [5, 13], 24, 3).check(Some(ULPS), 97);
}

#[test]
fn many_tokens() {
    Setup::new(1, [16, 16], 32, 1).check(Some(ULPS), 1999);
    Setup::new(1, [16, 16], 20, 2).check(Some(ULPS), 1999);
}

/// More than one block of queries, the last of them short.
#[test]
fn several_blocks_of_queries() {
    Setup::new(1, [25, 43], 8, 1).check(Some(ULPS), 4999);
}

/// Scores up to about 4σ = 4·15² = 900: e^score is no f32, and a score is rounded to a few hundred ε, by which its probability is off.
/// Where one probability is 1, dp − do·o should vanish and is the rounding of two sums.
#[test]
fn large_scores() {
    let setup = Setup { size: 15.0, ..Setup::new(2, [3, 4], 20, 1) };
    setup.check(None, 1);
}

#[test]
fn adds_to_a_gradient_that_is_there() {
    // q, k and v are read twice.
    for setup in [Setup::new(2, [7, 7], 32, 2), Setup::new(1, [25, 43], 8, 1)] {
        let dy = random(9, setup.elements());
        let twice = setup.case().run(&dy, |tape, v| {
            let a = attention(tape, v[0], setup.heads);
            let b = attention(tape, v[0], 1);
            add(tape, a, b)
        });
        let [a, b] = [setup.heads, 1].map(|heads| Setup { heads, ..setup }.run(&dy).gradient("qkv"));
        let sum = a.iter().zip(&b).map(|(a, b)| f64::from(*a) + f64::from(*b));
        // The second gradient's sums over the tokens start from the first gradient instead of 0, so all of them round differently.
        assert_close("dqkv", &twice.gradient("qkv"), sum, ULPS);
    }
}

#[test]
fn equal_bits_at_any_number_of_threads() {
    let setup = Setup::new(5, [7, 9], 24, 2);
    let dy = random(9, setup.elements());
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let run = |threads| {
        let found = setup.case().threads(threads).run(&dy, |tape, v| attention(tape, v[0], setup.heads));
        (bits(&found.y), bits(&found.gradient("qkv")))
    };
    let one = run(1);
    for threads in [2, 3] {
        assert_eq!(one, run(threads), "{threads} threads");
    }
}
