//! A norm with the formula written out in f64; its gradients are central differences, exact to about 1e-9.

use super::super::{Dropout, Norm, Timestep, group_norm};
use crate::ops::testing::{Case, Input, Outcome, assert_close, random};
use crate::rng::{Kind, Stream};
use crate::tape::{Tape, Var};

const SEED: u64 = 0x1234_5678_9abc;
const LAYER: u32 = 7;
pub const STEP: u32 = 1_000_003;
pub const FIRST_SAMPLE: u32 = 40;

/// A few roundings of numbers up to the size of γ·(x − mean)·rstd ≈ 4, the 2 ulp of exp, and SiLU's slope.
pub const ULPS: f64 = 32.0;

/// A norm to be tested; channels of one or two sources.
#[derive(Clone)]
pub struct Setup {
    size: [usize; 3],
    channels: Vec<usize>,
    pub norm: Norm,
    timestep: Option<Timestep>,
    dropout: Option<f32>,
}

impl Setup {
    pub fn new(size: [usize; 3], channels: &[usize], groups: usize) -> Setup {
        let norm = Norm { groups, eps: 1e-6, silu: true };
        Setup { size, channels: channels.to_vec(), norm, timestep: None, dropout: None }
    }

    pub fn without_silu(mut self) -> Setup {
        self.norm.silu = false;
        self
    }

    pub fn timestep(mut self, offset: usize, total: usize) -> Setup {
        self.timestep = Some(Timestep::Add { offset, total });
        self
    }

    pub fn scale_shift(mut self, offset: usize, total: usize) -> Setup {
        self.timestep = Some(Timestep::ScaleShift { offset, total });
        self
    }

    pub fn dropout(mut self, probability: f32) -> Setup {
        self.dropout = Some(probability);
        self
    }

    pub fn total(&self) -> usize {
        self.channels.iter().sum()
    }

    pub fn elements(&self) -> usize {
        self.size.iter().product::<usize>() * self.total()
    }

    /// x1, (x2), gamma, beta, (temb): names, shapes, values.
    pub fn inputs(&self) -> Vec<(&'static str, Vec<usize>, Vec<f32>)> {
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
        if let Some(total) = self.timestep.map(Timestep::total) {
            inputs.push(("temb", vec![n, total], random(5, n * total)));
        }
        inputs
    }

    pub fn case(&self) -> Case {
        let mut inputs: Vec<Input> =
            self.inputs().iter().map(|(name, shape, data)| Input::f32(name, shape.as_slice(), data)).collect();
        inputs.push(Input::u32("clock", [4], &[STEP, FIRST_SAMPLE, 99, 99]));
        Case::new(inputs)
    }

    pub fn build(&self, tape: &mut Tape, vars: &[Var]) -> Var {
        let sources = self.channels.len();
        let timestep = self.timestep.map(|timestep| (vars[sources + 2], timestep));
        let dropout =
            self.dropout.map(|probability| (Dropout { probability, seed: SEED, layer: LAYER }, vars[vars.len() - 1]));
        group_norm(tape, &self.norm, &vars[..sources], [vars[sources], vars[sources + 1]], timestep, dropout)
    }

    pub fn run(&self, dy: &[f32]) -> Outcome {
        self.case().run(dy, |tape, vars| self.build(tape, vars))
    }

    /// 0 or 1/(1 − p) for every element of the output.
    pub fn mask(&self) -> Vec<f32> {
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
        let mut modulation = (vec![0.0; c], vec![0.0; c]);
        match self.timestep {
            Some(Timestep::Add { offset, .. }) => {
                u.iter_mut().enumerate().for_each(|(i, u)| *u += inputs[sources + 2][offset + i % c]);
            }
            Some(Timestep::ScaleShift { offset, .. }) => {
                let (scale, shift) = inputs[sources + 2][offset..offset + 2 * c].split_at(c);
                modulation = (scale.to_vec(), shift.to_vec());
            }
            None => {}
        }
        let (scale, shift) = modulation;
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
                let z = z * (1.0 + scale[i % c]) + shift[i % c];
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
    pub fn check(&self) {
        let dy = random(9, self.elements());
        let found = self.run(&dy);
        let (y, gradients) = self.reference_with_gradients(&dy);
        assert_close("y", &found.y, y, ULPS);
        for ((name, _, _), exact) in self.inputs().iter().zip(gradients) {
            let gradient = found.gradient(name);
            if let ("temb", Some(timestep)) = (*name, self.timestep) {
                let columns = if timestep.scales() { 2 * self.total() } else { self.total() };
                let (first, total) = (timestep.offset(), timestep.total());
                let own = |i: &usize| (first..first + columns).contains(&(i % total));
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
