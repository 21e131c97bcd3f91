//! y = x·Wᵀ + b over the last dimension: linear layers and 1×1 convolutions, with one source or two.
//!
//! Two sources stand for their concatenation along the channels, which is never made: W's first columns meet the first source, its
//! last columns the second.

pub(super) mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use super::copy::pass_gradient;
use crate::device::cpu::{Launch, gemm};
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Scratch, Shape, Signature, Spec, Tape, Var};

/// y[r, n] = Σ_k x[r, k]·W[n, k] + b[n] (+ residual[r, n]).
///
/// Inputs: one or two sources `[…, K_s]`, W `[N, ΣK_s]`, b `[N]`, and the residual `[…, N]` if there is one. Output `[…, N]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// All dimensions but the last.
    lead: Shape,
    /// Channels of each source.
    sources: Vec<usize>,
    /// Channels of the output.
    out: usize,
    residual: bool,
}

/// Gradient of one source: dx[r, k] (+)= Σ_n dy[r, n]·W[n, first + k]. Inputs: dy, W.
#[derive(Clone, Debug)]
pub struct LinearInputGradient {
    of: Linear,
    source: usize,
}

/// dW[n, k] (+)= Σ_r dy[r, n]·x[r, k] and db[n] (+)= Σ_r dy[r, n]. Inputs: dy, the sources. Outputs: dW, db.
#[derive(Clone, Debug)]
pub struct LinearWeightGradient {
    of: Linear,
}

/// Puts a linear layer on the tape: `weight` is `[N, ΣK]`, `bias` `[N]`; `sources` are one or two values of equal leading dimensions.
pub fn linear(tape: &mut Tape, sources: &[Var], weight: Var, bias: Var) -> Var {
    let first = tape.shape(sources[0]).dims();
    let lead = Shape::from(&first[..first.len() - 1]);
    let channels = sources.iter().map(|&s| tape.shape(s).rows_and_columns().1).collect();
    let out = tape.shape(weight).dims()[0];
    let inputs: Vec<Var> = sources.iter().copied().chain([weight, bias]).collect();
    tape.push1(Linear { lead, sources: channels, out, residual: false }, &inputs)
}

impl Linear {
    fn rows(&self) -> usize {
        self.lead.len()
    }

    fn depth(&self) -> usize {
        self.sources.iter().sum()
    }

    fn with_channels(&self, channels: usize) -> Shape {
        let mut dims = self.lead.dims().to_vec();
        dims.push(channels);
        Shape::from(&dims[..])
    }

    fn source_specs(&self) -> Vec<Spec> {
        self.sources.iter().map(|&k| Spec::computed(self.with_channels(k))).collect()
    }

    fn weight(&self) -> Shape {
        [self.out, self.depth()].into()
    }

    fn multiply_adds(&self, depth: usize) -> u64 {
        2 * (self.rows() * self.out * depth) as u64
    }
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        if self.residual { "linear+residual" } else { "linear" }
    }

    fn signature(&self) -> Signature {
        let y = Spec::computed(self.with_channels(self.out));
        let mut inputs = self.source_specs();
        inputs.extend([self.weight(), [self.out].into()].map(Spec::computed));
        inputs.extend(self.residual.then(|| y.clone()));
        Signature { inputs, outputs: vec![y] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: gemm::packed_len(self.out, self.depth()), thread: 0 }
    }

    fn flops(&self) -> u64 {
        self.multiply_adds(self.depth())
    }

    fn products(&self) -> u64 {
        self.multiply_adds(self.depth())
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let dy = gradient.of_output(0);
        let weight = self.sources.len();
        let without_residual = Linear { residual: false, ..self.clone() };
        for source in 0..self.sources.len() {
            if gradient.wants(source) {
                let op = LinearInputGradient { of: without_residual.clone(), source };
                gradient.emit(op, &[dy, gradient.input(weight)], &[Of::Input(source)]);
            }
        }
        let inputs: Vec<Var> = std::iter::once(dy).chain((0..weight).map(|s| gradient.input(s))).collect();
        gradient.emit(
            LinearWeightGradient { of: without_residual },
            &inputs,
            &[Of::Input(weight), Of::Input(weight + 1)],
        );
        if self.residual {
            pass_gradient(gradient, weight + 2, &self.with_channels(self.out));
        }
    }

    fn with_residual(&self) -> Option<Box<dyn Op>> {
        (!self.residual).then(|| Box::new(Linear { residual: true, ..self.clone() }) as Box<dyn Op>)
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::forward(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::forward(self, form)
    }
}

impl Op for LinearInputGradient {
    fn name(&self) -> &'static str {
        "linear_input_gradient"
    }

    fn signature(&self) -> Signature {
        let Linear { sources, out, .. } = &self.of;
        Signature {
            inputs: [self.of.with_channels(*out), self.of.weight()].map(Spec::computed).to_vec(),
            outputs: vec![Spec::computed(self.of.with_channels(sources[self.source]))],
        }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: gemm::packed_len(self.of.sources[self.source], self.of.out), thread: 0 }
    }

    fn flops(&self) -> u64 {
        self.of.multiply_adds(self.of.sources[self.source])
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::input_gradient(&self.of, self.source, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::input_gradient(&self.of, self.source, form)
    }
}

impl Op for LinearWeightGradient {
    fn name(&self) -> &'static str {
        "linear_weight_gradient"
    }

    fn signature(&self) -> Signature {
        let mut inputs = vec![Spec::computed(self.of.with_channels(self.of.out))];
        inputs.extend(self.of.source_specs());
        Signature { inputs, outputs: vec![Spec::f32(self.of.weight()), Spec::f32([self.of.out])] }
    }

    fn flops(&self) -> u64 {
        self.of.multiply_adds(self.of.depth()) + (self.of.rows() * self.of.out) as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::weight_gradient(&self.of, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        cuda::weight_gradient(&self.of, form)
    }
}
