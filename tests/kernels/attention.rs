//! Attention and its gradient, on tensor cores and without.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, is_gpu, run_launch, run_with};
use crate::values::{bytes_of, bytes_of_f32, f32_of, normals, rounded};
use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::attention::{Attention, AttentionGradient, cuda};

/// Half a step of f32, relative.
const U32: f64 = 1.0 / (1 << 24) as f64;

/// One attention on random numbers.
#[derive(Clone, Copy, Debug)]
struct Case {
    images: usize,
    tokens: usize,
    heads: usize,
    /// Channels of a head.
    channels: usize,
    precision: Precision,
    adds: bool,
    /// Standard deviation of q, k and v.
    size: f32,
}

/// A number for each element of o, of the logarithms, and of dqkv.
struct Numbers<T> {
    o: Vec<T>,
    log_sums: Vec<T>,
    d_qkv: Vec<T>,
}

impl Case {
    fn bf16([images, tokens, heads, channels]: [usize; 4]) -> Case {
        Case { images, tokens, heads, channels, precision: Precision::Bf16, adds: false, size: 1.0 }
    }

    fn f32(shape: [usize; 4]) -> Case {
        Case { precision: Precision::F32, ..Case::bf16(shape) }
    }

    fn adding(self) -> Case {
        Case { adds: true, ..self }
    }

    /// Half a step of the activations' type, relative.
    fn unit(&self) -> f64 {
        match self.precision {
            Precision::F32 => U32,
            Precision::Bf16 => 1.0 / 256.0,
        }
    }

    fn op(&self) -> Attention {
        Attention { shape: [self.images, self.tokens, self.heads * self.channels].into(), heads: self.heads }
    }

    fn elements(&self) -> usize {
        self.images * self.tokens * self.heads * self.channels
    }

    fn activations(&self, seed: u64, len: usize, size: f32) -> Vec<f32> {
        normals(seed, len).into_iter().map(|x| rounded(x * size, self.precision)).collect()
    }

    /// Compares kernels and CPU: the gradient from the same o and logarithms.
    fn check(&self) {
        let op = self.op();
        let n = self.elements();
        let [qkv, d_o] = [self.activations(1, 3 * n, self.size), self.activations(2, n, 1.0)];
        let before = self.activations(3, 3 * n, 1.0);
        let bytes = |values: &[f32]| bytes_of(values, self.precision);

        let of_cpu = on_cpu(op.clone(), &[bytes_of_f32(&qkv)], &[]);
        let [o, log_sums] = [0, 1].map(|i| f32_of(&of_cpu[i], Precision::F32));
        let outputs = [n * self.precision.bytes(), 4 * log_sums.len()].map(Buffer::Output);
        let found = run_launch(&cuda::launch(&op, self.precision), &[Buffer::Input(bytes(&qkv))], &outputs);

        let o_in: Vec<f32> = o.iter().map(|x| rounded(*x, self.precision)).collect();
        let gradient = AttentionGradient { attention: op };
        let inputs = [&qkv, &o_in, &log_sums, &d_o];
        let updated = if self.adds { vec![bytes_of_f32(&before)] } else { vec![] };
        let of_cpu = on_cpu(gradient.clone(), &inputs.map(|x| bytes_of_f32(x)), &updated);
        let expected = Numbers { o, log_sums: log_sums.clone(), d_qkv: f32_of(&of_cpu[0], Precision::F32) };

        let inputs = [bytes(&qkv), bytes(&o_in), bytes_of_f32(&log_sums), bytes(&d_o)].map(Buffer::Input);
        let start = if self.adds { bytes(&before) } else { vec![0xFF; 3 * n * self.precision.bytes()] };
        let d_qkv = self.gradient(&gradient, &inputs, start);
        let found = Numbers {
            o: f32_of(&found[0], self.precision),
            log_sums: f32_of(&found[1], Precision::F32),
            d_qkv: f32_of(&d_qkv, self.precision),
        };
        let before = if self.adds { before } else { vec![0.0; 3 * n] };
        self.compare(&found, &expected, &self.bounds(&qkv, &o_in, &d_o), &before);
    }

    /// dqkv of the kernels: each leaves the others' parts as they are.
    fn gradient(&self, op: &AttentionGradient, inputs: &[Buffer], mut d_qkv: Vec<u8>) -> Vec<u8> {
        let [dots, of_q, of_k_and_v] = cuda::launches_gradient(op, self.precision, self.adds);
        let workspace = run_with(&dots, inputs, &[], &Buffer::Output(4 * cuda::dots(op))).remove(0);
        let workspace = Buffer::Input(workspace);
        for launch in [of_q, of_k_and_v] {
            d_qkv = run_with(&launch, inputs, &[Buffer::Updated(d_qkv)], &workspace).remove(0);
        }
        d_qkv
    }

    fn compare(&self, found: &Numbers<f32>, expected: &Numbers<f32>, bounds: &Numbers<f64>, before: &[f32]) {
        let close = |what: &str, found: &[f32], expected: &[f32], bound: &dyn Fn(usize) -> f64| {
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let error = (f64::from(*found) - f64::from(*expected)).abs();
                let bound = bound(i);
                assert!(error <= bound, "{self:?}: {what}[{i}] = {found}, expected {expected}: {error:e} > {bound:e}");
            }
        };
        // Stored once; what is added to is stored as a sum too.
        let stored = |x: f32| self.unit() * f64::from(x.abs());
        close("o", &found.o, &expected.o, &|i| bounds.o[i] + stored(expected.o[i]));
        close("log_sums", &found.log_sums, &expected.log_sums, &|i| bounds.log_sums[i]);
        close("dqkv", &found.d_qkv, &expected.d_qkv, &|i| {
            let (sum, before) = (expected.d_qkv[i], before[i]);
            bounds.d_qkv[i] + stored(sum) + if self.adds { stored(sum - before) } else { 0.0 }
        });
    }

    /// What rounding may change between two ways to compute the same, to first order: a sum of n products has an error of half a step of
    /// the sum of its terms' sizes for each product and √n of them for its additions, whose directions are random, on both sides.
    /// Probabilities and their gradients are rounded to bf16 by the one that has bf16 activations.
    fn bounds(&self, qkv: &[f32], o: &[f32], d_o: &[f32]) -> Numbers<f64> {
        let Case { images, tokens: t, heads, channels: d, .. } = *self;
        let c = heads * d;
        let of_sum = |terms: usize| 2.0 * U32 * ((terms as f64).sqrt() + 3.0);
        let factor = if self.precision == Precision::Bf16 { self.unit() } else { 0.0 };
        let scale = 1.0 / (d as f64).sqrt();
        let mut bounds =
            Numbers { o: vec![0.0; images * t * c], log_sums: Vec::new(), d_qkv: vec![0.0; 3 * images * t * c] };
        for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
            let of = |token: usize| (image * t + token) * c + head * d;
            let place = |token: usize, part: usize| 3 * (image * t + token) * c + part * c + head * d;
            let row = |token: usize, part: usize| &qkv[place(token, part)..][..d];
            for i in 0..t {
                let (q, d_o, o) = (row(i, 0), &d_o[of(i)..][..d], &o[of(i)..][..d]);
                let scores: Vec<[f64; 2]> = (0..t).map(|j| dot(q, row(j, 1)).map(|x| x * scale)).collect();
                let max = scores.iter().map(|s| s[0]).fold(f64::MIN, f64::max);
                let log_sum = max + scores.iter().map(|s| (s[0] - max).exp()).sum::<f64>().ln();
                // Of e^(score − logarithm), relative: the exponent's error, and a few of the function and of what is stored.
                let of_score = |s: &[f64; 2]| of_sum(d) * s[1] + 4.0 * U32 * (s[0].abs() + log_sum.abs() + 4.0);
                let p: Vec<f64> = scores.iter().map(|s| (s[0] - log_sum).exp()).collect();
                let of_log_sum: f64 = p.iter().zip(&scores).map(|(p, s)| p * of_score(s)).sum::<f64>() + of_sum(t);
                bounds.log_sums.push(of_log_sum);
                let [dot_o, dot_size] = dot(d_o, o);
                for j in 0..t {
                    let (k, v) = (row(j, 1), row(j, 2));
                    let relative = of_score(&scores[j]) + of_log_sum + factor + of_sum(t);
                    let [d_p, d_p_size] = dot(d_o, v);
                    let difference = (d_p - dot_o).abs();
                    let of_d_s = p[j] * (difference * relative + of_sum(d) * (d_p_size + dot_size)) * scale;
                    for e in 0..d {
                        bounds.o[of(i) + e] += p[j] * relative * f64::from(v[e].abs());
                        bounds.d_qkv[place(i, 0) + e] += of_d_s * f64::from(k[e].abs());
                        bounds.d_qkv[place(j, 1) + e] += of_d_s * f64::from(q[e].abs());
                        bounds.d_qkv[place(j, 2) + e] += p[j] * relative * f64::from(d_o[e].abs());
                    }
                }
            }
        }
        bounds
    }
}

/// Σ a·b and Σ |a·b|.
fn dot(a: &[f32], b: &[f32]) -> [f64; 2] {
    a.iter().zip(b).fold([0.0, 0.0], |[sum, size], (a, b)| {
        let product = f64::from(*a) * f64::from(*b);
        [sum + product, size + product.abs()]
    })
}

/// The models' heads on fewer tokens: quick-start's 7² of 64 channels, CIFAR-10's 256 on more than one tile, 512 of the pictures of 256².
#[test]
fn heads_of_the_models_on_tensor_cores() {
    for case in [
        Case::bf16([2, 49, 1, 64]),
        Case::bf16([1, 80, 1, 256]),
        Case::bf16([1, 40, 1, 512]).adding(),
        Case::bf16([1, 66, 1, 128]),
    ] {
        case.check();
    }
}

/// Sizes that no tile has: filled up with zeros, in tokens and in channels; many tiles of both.
#[test]
fn any_head_of_a_multiple_of_8_on_tensor_cores() {
    for case in [
        Case::bf16([1, 1, 2, 16]),
        Case::bf16([2, 16, 2, 40]).adding(),
        Case::bf16([2, 69, 3, 8]),
        Case::bf16([1, 200, 1, 16]).adding(),
        Case::bf16([1, 33, 1, 136]),
    ] {
        case.check();
    }
}

#[test]
fn any_head_in_f32() {
    for case in [
        Case::f32([1, 1, 2, 8]),
        Case::f32([2, 49, 1, 64]),
        Case::f32([1, 70, 3, 20]).adding(),
        Case::f32([1, 16, 1, 256]),
        Case::f32([2, 33, 2, 7]).adding(),
        // More than a slice of channels.
        Case::f32([1, 40, 1, 516]),
    ] {
        case.check();
    }
}

#[test]
fn other_heads_in_bf16() {
    for case in [Case::bf16([2, 33, 2, 12]), Case::bf16([1, 70, 1, 5]).adding(), Case::bf16([1, 40, 1, 520])] {
        case.check();
    }
}

/// Scores up to about 4σ = 4·5²: later tiles have higher maxima by far.
#[test]
fn large_scores() {
    for case in [Case::bf16([1, 150, 1, 32]), Case::f32([1, 100, 1, 24])] {
        Case { size: 5.0, ..case }.check();
    }
}

/// So many tokens as no model has; on the machine made of software, some tiles.
#[test]
fn many_tokens() {
    let tokens = if is_gpu() { 4096 } else { 530 };
    Case::bf16([1, tokens, 1, 16]).check();
    Case::f32([1, tokens, 1, 8]).check();
}
