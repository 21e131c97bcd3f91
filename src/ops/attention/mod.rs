//! Self-attention over the pixels of an image, without a matrix of all scores in memory: blocks of queries meet all keys, and the
//! backward pass computes the scores again (Dao et al. 2022).

mod cpu;
pub mod cuda;

#[cfg(test)]
mod tests;

use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::tape::{Gradient, Of, Op, Scratch, Shape, Signature, Spec, Tape, Var};

/// o = softmax(q·kᵀ/√d)·v for each head of d = C/heads channels.
///
/// Input: q, k and v side by side, `[N, …, 3C]`; the dimensions in the middle are the tokens T of one of N images. Head h has
/// channels h·d … of each. Outputs: o `[N, …, C]`, and the logarithm of each softmax's denominator, ln Σⱼ e^(qᵢ·kⱼ/√d), as
/// `[N, heads, T]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Shape of o.
    pub shape: Shape,
    /// Number of heads, a divisor of C.
    pub heads: usize,
}

/// Gradient of [`Attention`] with respect to q, k and v. Inputs: q, k, v; o; the logarithms; do.
#[derive(Clone, Debug)]
pub struct AttentionGradient {
    /// Whose gradient it is.
    pub attention: Attention,
}

/// Puts self-attention on the tape; `qkv` is `[N, …, 3C]`, the result `[N, …, C]`.
///
/// # Panics
/// If the last dimension of `qkv` is not three times a multiple of `heads`.
pub fn attention(tape: &mut Tape, qkv: Var, heads: usize) -> Var {
    let mut shape = tape.shape(qkv).dims().to_vec();
    let wide = shape.pop().unwrap_or(0);
    assert!(
        !shape.is_empty() && wide.is_multiple_of(3 * heads),
        "attention: {wide} channels for q, k and v of {heads} heads"
    );
    shape.push(wide / 3);
    tape.push(Attention { shape: Shape::from(shape.as_slice()), heads }, &[qkv])[0]
}

impl Attention {
    /// N
    fn images(&self) -> usize {
        self.shape.dims()[0]
    }

    /// T, the tokens of one image.
    fn tokens(&self) -> usize {
        self.shape.rows_and_columns().0 / self.images()
    }

    /// C
    fn channels(&self) -> usize {
        self.shape.rows_and_columns().1
    }

    /// Channels of a head.
    fn head_channels(&self) -> usize {
        self.channels() / self.heads
    }

    /// 1/√d
    fn scale(&self) -> f32 {
        (1.0 / (self.head_channels() as f64).sqrt()) as f32
    }

    /// Number of scores.
    fn scores(&self) -> u64 {
        (self.images() * self.heads * self.tokens() * self.tokens()) as u64
    }

    fn qkv(&self) -> Spec {
        let mut shape = self.shape.dims().to_vec();
        shape.pop();
        shape.push(3 * self.channels());
        Spec::computed(shape.as_slice())
    }

    fn o(&self) -> Spec {
        Spec::computed(self.shape.clone())
    }

    fn log_sums(&self) -> Spec {
        Spec::f32([self.images(), self.heads, self.tokens()])
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![self.qkv()], outputs: vec![self.o(), self.log_sums()] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: cpu::forward_scratch(self) }
    }

    fn flops(&self) -> u64 {
        // q·k and p·v with 2 for each channel of the head; the maximum, the difference, e^x as one, and the sum.
        self.scores() * (4 * self.head_channels() as u64 + 4)
    }

    fn products(&self) -> u64 {
        // q·kᵀ and p·v.
        self.scores() * 4 * self.head_channels() as u64
    }

    fn gradient(&self, gradient: &mut Gradient<'_>) {
        let (qkv, o, log_sums) = (gradient.input(0), gradient.output(0), gradient.output(1));
        let inputs = [qkv, o, log_sums, gradient.of_output(0)];
        gradient.emit(AttentionGradient { attention: self.clone() }, &inputs, &[Of::Input(0)]);
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::attention(self, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(self, form.precision)])
    }
}

impl Op for AttentionGradient {
    fn name(&self) -> &'static str {
        "attention_gradient"
    }

    fn signature(&self) -> Signature {
        let Attention { shape, .. } = &self.attention;
        let inputs =
            vec![self.attention.qkv(), self.attention.o(), self.attention.log_sums(), Spec::computed(shape.clone())];
        Signature { inputs, outputs: vec![self.attention.qkv()] }
    }

    fn scratch(&self) -> Scratch {
        Scratch { arena: 0, thread: cpu::backward_scratch(&self.attention) }
    }

    fn flops(&self) -> u64 {
        // The scores again, dp, dv, dk and dq with 2 for each channel of the head; difference, e^x, and dp's way through the softmax.
        let attention = &self.attention;
        let products = attention.scores() * (10 * attention.head_channels() as u64 + 4);
        products + 2 * attention.shape.len() as u64
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::attention_gradient(&self.attention, launch);
    }

    fn cuda(&self, form: &Form) -> Work {
        let launches = cuda::launches_gradient(self, form.precision, form.updates(0));
        Work::kernels(launches).with_scratch(size_of::<f32>() * cuda::dots(self))
    }
}
