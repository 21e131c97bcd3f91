//! Group normalisation (Wu & He 2018) with what stands around it in a residual block folded in: the concatenation of two sources and
//! the timestep before it as a term or after it as scale and shift, SiLU and dropout after it.

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Scratch, Signature, Spec, Tape, Var};
use std::ops::Range;

/// What the timestep does to a norm of C channels, by columns of a matrix [N, `total`], from column `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timestep {
    /// C columns, added before the norm (Ho et al. 2020).
    Add {
        /// First column.
        offset: usize,
        /// Columns of the whole matrix.
        total: usize,
    },
    /// C columns `scale`, then C columns `shift`: what the norm gives is multiplied by 1 + scale, and shift is added (Nichol &
    /// Dhariwal 2021; the adaptive group normalisation of Dhariwal & Nichol 2021).
    ScaleShift {
        /// First column.
        offset: usize,
        /// Columns of the whole matrix.
        total: usize,
    },
}

impl Timestep {
    /// First column.
    fn offset(self) -> usize {
        let (Timestep::Add { offset, .. } | Timestep::ScaleShift { offset, .. }) = self;
        offset
    }

    /// Columns of the whole matrix.
    fn total(self) -> usize {
        let (Timestep::Add { total, .. } | Timestep::ScaleShift { total, .. }) = self;
        total
    }

    /// Whether the columns are scales and shifts.
    fn scales(self) -> bool {
        matches!(self, Timestep::ScaleShift { .. })
    }

    /// The columns that a norm of so many channels reads.
    fn columns(self, channels: usize) -> Range<usize> {
        self.offset()..self.offset() + channels * (1 + usize::from(self.scales()))
    }
}

/// Dropout (Srivastava et al. 2014): an element becomes 0 with the given probability, else it is scaled by 1/(1 − probability).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of losing an element, in [0, 1).
    pub probability: f32,
    /// The run seed.
    pub seed: u64,
    /// Number of this layer among those with dropout.
    pub layer: u32,
}

/// y = dropout(SiLU(z)) with z = (γ·(u − mean)·rstd + β)·(1 + scale) + shift, u = \[x1, x2\] + term, and mean and variance (biased) of u
/// over the pixels of an image and the channels of a group. The [timestep](Timestep) gives the term, or scale and shift; what it does not
/// give is 0.
///
/// Inputs: x1 `[N, H, W, C1]`; x2 `[N, H, W, C2]` if C2 > 0; γ and β `[C]`, C = C1 + C2; with `timestep` the matrix `[N, total]`; with
/// `dropout` the clock, u32 `[4]`, of which element 0 is the step and 1 the global index of the batch's first sample.
/// Outputs: y `[N, H, W, C]`, and mean and rstd = 1/√(variance + ε) as `[N, groups, 2]`.
///
/// A group may have channels of both sources.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupNorm {
    /// N, H, W.
    pub size: [usize; 3],
    /// C1 and C2; C2 is 0 where there is one source.
    pub channels: [usize; 2],
    /// Number of groups, a divisor of C.
    pub groups: usize,
    /// ε, added to the variance.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
    /// What the timestep does, and where its columns stand.
    pub timestep: Option<Timestep>,
    /// Dropout after SiLU.
    pub dropout: Option<Dropout>,
}

/// Gradients of [`GroupNorm`] with respect to its sources, γ, β and the timestep's columns.
///
/// Inputs: dy, all inputs of the norm, and its statistics.
#[derive(Clone, Debug)]
pub struct GroupNormGradient {
    /// The norm.
    pub norm: GroupNorm,
}

/// How [`group_norm`] normalises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Number of groups.
    pub groups: usize,
    /// ε, added to the variance.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Puts a group normalisation of the concatenation of one or two `sources` `[N, H, W, C1]`, `[N, H, W, C2]` on the tape; `gamma` and
/// `beta` are `[C1 + C2]`.
///
/// `timestep` is the matrix of the timestep's columns, and what they do. `dropout` follows SiLU and needs the clock (see [`GroupNorm`]).
///
/// # Panics
/// If there are not one or two sources of the same size, the groups do not divide the channels, or the matrix has not these columns.
pub fn group_norm(
    tape: &mut Tape,
    norm: &Norm,
    sources: &[Var],
    [gamma, beta]: [Var; 2],
    timestep: Option<(Var, Timestep)>,
    dropout: Option<(Dropout, Var)>,
) -> Var {
    assert!(matches!(sources.len(), 1 | 2), "group_norm: one or two sources, found {}", sources.len());
    let [n, h, w, c1] = tape.shape(sources[0]).nhwc();
    let c2 = sources.get(1).map_or(0, |&x| tape.shape(x).nhwc()[3]);
    assert_eq!((c1 + c2) % norm.groups, 0, "group_norm: {} groups of {c1} + {c2} channels", norm.groups);
    if let Some((matrix, timestep)) = timestep {
        let (own, total) = (timestep.columns(c1 + c2), tape.shape(matrix).rows_and_columns().1);
        assert!(
            own.end <= total && total == timestep.total(),
            "group_norm: {timestep:?} reads {own:?} of {total} columns"
        );
    }
    let op = GroupNorm {
        size: [n, h, w],
        channels: [c1, c2],
        groups: norm.groups,
        eps: norm.eps,
        silu: norm.silu,
        timestep: timestep.map(|(_, timestep)| timestep),
        dropout: dropout.map(|(dropout, _)| dropout),
    };
    let mut inputs = sources.to_vec();
    inputs.extend([gamma, beta]);
    inputs.extend(timestep.map(|(matrix, _)| matrix));
    inputs.extend(dropout.map(|(_, clock)| clock));
    tape.push(op, &inputs)[0]
}

impl GroupNorm {
    /// C, the channels of all sources.
    fn total_channels(&self) -> usize {
        self.channels[0] + self.channels[1]
    }

    fn images(&self) -> usize {
        self.size[0]
    }

    fn pixels(&self) -> usize {
        self.size[1] * self.size[2]
    }

    fn elements(&self) -> u64 {
        (self.images() * self.pixels() * self.total_channels()) as u64
    }

    fn activations(&self, channels: usize) -> Spec {
        let [n, h, w] = self.size;
        Spec::computed([n, h, w, channels])
    }

    fn statistics(&self) -> Spec {
        Spec::f32([self.images(), self.groups, 2])
    }

    /// C1 and, where there is a second source, C2.
    fn sources(&self) -> &[usize] {
        &self.channels[..1 + usize::from(self.channels[1] > 0)]
    }

    /// Which input γ is; β follows, then the timestep matrix, then the clock.
    fn gamma_index(&self) -> usize {
        self.sources().len()
    }

    fn inputs(&self) -> Vec<Spec> {
        let per_channel = Spec::f32([self.total_channels()]);
        let mut inputs: Vec<Spec> = self.sources().iter().map(|&c| self.activations(c)).collect();
        inputs.extend([per_channel.clone(), per_channel]);
        inputs.extend(self.timestep.map(|timestep| Spec::computed([self.images(), timestep.total()])));
        inputs.extend(self.dropout.map(|_| Spec::u32([4])));
        inputs
    }
}

impl Op for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn signature(&self) -> Signature {
        let outputs = vec![self.activations(self.total_channels()), self.statistics()];
        Signature { inputs: self.inputs(), outputs }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: cpu::forward_scratch(self) }
    }

    fn flops(&self) -> u64 {
        // Statistics 4, normalisation 3, SiLU 4, dropout 1; the timestep is in what normalises a channel.
        (7 + 4 * u64::from(self.silu) + u64::from(self.dropout.is_some())) * self.elements()
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let gamma = self.gamma_index();
        let mut inputs = vec![gradient.of_output(0)];
        inputs.extend((0..self.inputs().len()).map(|i| gradient.input(i)));
        inputs.push(gradient.output(1));
        let mut of: Vec<Of> = (0..gamma + 2).map(Of::Input).collect();
        of.extend(self.timestep.map(|_| Of::ColumnsOf(gamma + 2)));
        gradient.emit(GroupNormGradient { norm: self.clone() }, &inputs, &of);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::group_norm(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        let scratch = cuda::workspace(self, cuda::forward_passes(self, form.precision));
        Work::kernels(cuda::launches(self, form.precision)).with_scratch(scratch)
    }
}

impl Op for GroupNormGradient {
    fn name(&self) -> &'static str {
        "group_norm_gradient"
    }

    fn signature(&self) -> Signature {
        let norm = &self.norm;
        let mut inputs = vec![norm.activations(norm.total_channels())];
        inputs.extend(norm.inputs());
        inputs.push(norm.statistics());
        // The gradients of all inputs but the clock, which is the last one.
        let mut outputs = norm.inputs();
        outputs.truncate(norm.gamma_index() + 2 + usize::from(norm.timestep.is_some()));
        Signature { inputs, outputs }
    }

    fn scratch(&self) -> Scratch {
        let arena = self.norm.images() * cpu::partial_sums(&self.norm);
        Scratch { arena, thread: cpu::backward_scratch(&self.norm) }
    }

    fn flops(&self) -> u64 {
        // Normalisation and SiLU' 11, dropout 1, the sums over pixels 5, dx 5.
        let norm = &self.norm;
        (10 + 11 * u64::from(norm.silu) + u64::from(norm.dropout.is_some())) * norm.elements()
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::group_norm_gradient(&self.norm, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        let scratch = cuda::gradient_workspace(self, cuda::backward_passes(self, form.precision));
        Work::kernels(cuda::gradient_launches(self, form.precision, form.updates)).with_scratch(scratch)
    }
}
