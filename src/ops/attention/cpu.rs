//! One task per image. Scores exist for a block of queries at a time, in the thread's workspace.

use super::Attention;
use crate::device::cpu::{Launch, gemm::serial};
use crate::multiversion;
use crate::simd::exp;
use std::array::from_fn;

/// Scores are worked on in groups of this many: a vector register, or two. Rows of scores are padded to a multiple.
const LANES: usize = 16;

/// Floats of a block of scores that stay in the second-level cache.
const BLOCK: usize = 1 << 16;

/// Fewest queries of a block, so that packing the keys for a matrix product does not count.
const MIN_QUERIES: usize = 64;

impl Attention {
    /// Distance between rows of scores.
    fn row(&self) -> usize {
        self.tokens().next_multiple_of(LANES)
    }

    /// Queries of a block, by shape alone.
    fn block_queries(&self) -> usize {
        (BLOCK / self.row()).max(MIN_QUERIES).min(self.tokens())
    }
}

pub(super) fn forward_scratch(op: &Attention) -> usize {
    op.block_queries() * op.row() + serial::SCRATCH
}

pub(super) fn backward_scratch(op: &Attention) -> usize {
    op.block_queries() * (2 * op.row() + 1) + serial::SCRATCH
}

pub(super) fn attention(op: &Attention, launch: &Launch<'_>) {
    let qkv = launch.input::<f32>(0);
    let (o, log_sums) = (launch.output::<f32>(0), launch.output::<f32>(1));
    let o_len = op.tokens() * op.channels();
    let log_sums_len = op.heads * op.tokens();
    launch.pool().for_chunks2((o, o_len), (log_sums, log_sums_len), |image, o, log_sums, scratch| {
        let qkv = &qkv[image * 3 * o_len..][..3 * o_len];
        for (head, log_sums) in log_sums.chunks_exact_mut(op.tokens()).enumerate() {
            head_forward(op, head, qkv, o, log_sums, scratch);
        }
    });
}

fn head_forward(op: &Attention, head: usize, qkv: &[f32], o: &mut [f32], log_sums: &mut [f32], scratch: &mut [f32]) {
    let (t, c, d, row) = (op.tokens(), op.channels(), op.head_channels(), op.row());
    let (q, k, v) = (&qkv[head * d..], &qkv[c + head * d..], &qkv[2 * c + head * d..]);
    let (scores, scratch) = scratch.split_at_mut(op.block_queries() * row);
    for (block, log_sums) in log_sums.chunks_mut(op.block_queries()).enumerate() {
        let (first, queries) = (block * op.block_queries(), log_sums.len());
        let scores = &mut scores[..queries * row];
        serial::gemm_nt(queries, t, d, op.scale(), &q[first * 3 * c..], 3 * c, k, 3 * c, 0.0, scores, row, scratch);
        softmax(scores, row, t, log_sums);
        let o = &mut o[first * c + head * d..];
        serial::gemm_nn(queries, d, t, 1.0, scores, row, v, 3 * c, 0.0, o, c, scratch);
    }
}

pub(super) fn attention_gradient(op: &Attention, launch: &Launch<'_>) {
    let (qkv, o, log_sums) = (launch.input::<f32>(0), launch.input::<f32>(1), launch.input::<f32>(2));
    let d_o = launch.input::<f32>(3);
    let adds = launch.updates(0);
    let o_len = op.tokens() * op.channels();
    let log_sums_len = op.heads * op.tokens();
    launch.pool().for_chunks(launch.output::<f32>(0), 3 * o_len, |image, d_qkv, scratch| {
        let log_sums = &log_sums[image * log_sums_len..][..log_sums_len];
        for (head, log_sums) in log_sums.chunks_exact(op.tokens()).enumerate() {
            let inputs = Backward {
                qkv: &qkv[image * 3 * o_len..][..3 * o_len],
                o: &o[image * o_len..][..o_len],
                log_sums,
                d_o: &d_o[image * o_len..][..o_len],
                adds,
            };
            head_backward(op, head, &inputs, d_qkv, scratch);
        }
    });
}

/// What the backward pass of one head of one image reads.
struct Backward<'a> {
    /// [T, 3C]
    qkv: &'a [f32],
    /// [T, C]
    o: &'a [f32],
    /// [T]
    log_sums: &'a [f32],
    /// [T, C]
    d_o: &'a [f32],
    /// Whether there is a gradient to add to.
    adds: bool,
}

/// With p = softmax(s), s = q·kᵀ/√d: dv = pᵀ·do, dp = do·vᵀ, ds = p·(dp − Σ dp·p), dq = ds·k/√d, dk = dsᵀ·q/√d; Σ dp·p = do·o.
fn head_backward(op: &Attention, head: usize, inputs: &Backward<'_>, d_qkv: &mut [f32], scratch: &mut [f32]) {
    let Backward { qkv, log_sums, adds, .. } = *inputs;
    let (t, c, d, row) = (op.tokens(), op.channels(), op.head_channels(), op.row());
    let starts = [head * d, c + head * d, 2 * c + head * d];
    let [q, k, v] = starts.map(|start| &qkv[start..]);
    let size = op.block_queries() * row;
    let (p, scratch) = scratch.split_at_mut(size);
    let (d_s, scratch) = scratch.split_at_mut(size);
    let (dots, scratch) = scratch.split_at_mut(op.block_queries());
    let beta = |first_write: bool| if first_write && !adds { 0.0 } else { 1.0 };
    for (block, log_sums) in log_sums.chunks(op.block_queries()).enumerate() {
        let (first, n) = (block * op.block_queries(), log_sums.len());
        let (p, d_s, dots) = (&mut p[..n * row], &mut d_s[..n * row], &mut dots[..n]);
        let q = &q[first * 3 * c..];
        let [o, d_o] = [inputs.o, inputs.d_o].map(|x| &x[first * c + head * d..]);
        serial::gemm_nt(n, t, d, op.scale(), q, 3 * c, k, 3 * c, 0.0, p, row, scratch);
        serial::gemm_nt(n, t, d, 1.0, d_o, c, v, 3 * c, 0.0, d_s, row, scratch);
        row_dots(o, d_o, c, d, dots);
        softmax_gradient(p, d_s, row, log_sums, dots);
        let [dq, dk, dv] = [starts[0] + first * 3 * c, starts[1], starts[2]];
        let keys = beta(block == 0);
        serial::gemm_tn(t, d, n, 1.0, p, row, d_o, c, keys, &mut d_qkv[dv..], 3 * c, scratch);
        serial::gemm_tn(t, d, n, op.scale(), d_s, row, q, 3 * c, keys, &mut d_qkv[dk..], 3 * c, scratch);
        serial::gemm_nn(n, d, t, op.scale(), d_s, row, k, 3 * c, beta(true), &mut d_qkv[dq..], 3 * c, scratch);
    }
}

/// The lanes of a sum or maximum as one, pairwise.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for l in 0..n {
            lanes[l] = f(lanes[l], lanes[l + n]);
        }
        n /= 2;
    }
    lanes[0]
}

multiversion! {
    /// Turns rows of scores, `columns` of which count, into probabilities; `log_sums` becomes ln Σ e^score of each row.
    fn softmax(scores: &mut [f32], row: usize, columns: usize, log_sums: &mut [f32]) {
        for (scores, log_sum) in scores.chunks_exact_mut(row).zip(log_sums) {
            // The padding adds e^−87 at most to a sum of at least 1: nothing.
            scores[columns..].fill(f32::MIN);
            let mut max = [f32::MIN; LANES];
            for x in scores.as_chunks::<LANES>().0 {
                let x = *x;
                max = from_fn(|l| if x[l] > max[l] { x[l] } else { max[l] });
            }
            let max = fold(max, |a, b| if a > b { a } else { b });
            for x in scores.iter_mut() {
                *x = exp(*x - max);
            }
            let mut sum = [0.0; LANES];
            for x in scores.as_chunks::<LANES>().0 {
                let x = *x;
                sum = from_fn(|l| sum[l] + x[l]);
            }
            let sum = fold(sum, |a, b| a + b);
            let factor = 1.0 / sum;
            for x in scores.iter_mut() {
                *x *= factor;
            }
            *log_sum = max + sum.ln();
        }
    }
}

multiversion! {
    /// Turns rows of scores into probabilities p, and dp into ds = p·(dp − dot).
    fn softmax_gradient(scores: &mut [f32], d_scores: &mut [f32], row: usize, log_sums: &[f32], dots: &[f32]) {
        let rows = scores.chunks_exact_mut(row).zip(d_scores.chunks_exact_mut(row));
        for ((scores, d_scores), (&log_sum, &dot)) in rows.zip(log_sums.iter().zip(dots)) {
            for (x, dx) in scores.iter_mut().zip(d_scores) {
                *x = exp(*x - log_sum);
                *dx = *x * (*dx - dot);
            }
        }
    }
}

multiversion! {
    /// dots[i] = Σ a[i]·b[i] over the first `columns` of rows that stand `row` apart.
    fn row_dots(a: &[f32], b: &[f32], row: usize, columns: usize, dots: &mut [f32]) {
        for (dot, (a, b)) in dots.iter_mut().zip(a.chunks(row).zip(b.chunks(row))) {
            let ((a, a_rest), (b, b_rest)) = (a[..columns].as_chunks::<LANES>(), b[..columns].as_chunks::<LANES>());
            let mut sum = [0.0; LANES];
            for (a, b) in a.iter().zip(b) {
                let (a, b) = (*a, *b);
                sum = from_fn(|l| sum[l] + a[l] * b[l]);
            }
            let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
            *dot = fold(sum, |a, b| a + b) + rest;
        }
    }
}
