//! Numbers as bytes, in both precisions.

use ddpm_dist::device::cuda::Precision;
use ddpm_dist::ops::adam_ema::{Hyper, bias_correction};
use ddpm_dist::rng::{Kind, Stream};

/// The scalars of Adam's update `step` (from 1), with what is usual.
pub fn hyper(step: u64) -> Hyper {
    let (beta1, beta2) = (0.9, 0.999);
    Hyper {
        lr: 2e-4,
        beta1,
        beta2,
        eps: 1e-8,
        weight_decay: 0.01,
        bias_correction1: bias_correction(beta1, step),
        bias_correction2: bias_correction(beta2, step),
        max_grad_norm: 1.0,
        ema_decay: 0.9999,
    }
}

pub fn bytes_of_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

pub fn bytes_of_u32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Activations as f32.
pub fn f32_of(bytes: &[u8], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(),
        Precision::Bf16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_bits(u32::from(u16::from_ne_bytes(*bytes)) << 16))
            .collect(),
    }
}

/// The nearest bf16, ties to even: what a kernel must give that computes in f32 and rounds once.
pub fn rounded(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => value,
        // The quiet one that hardware gives; rounding could carry another's bits into the sign.
        Precision::Bf16 if value.is_nan() => f32::from_bits(0x7FFF_0000),
        Precision::Bf16 => {
            let bits = value.to_bits();
            f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000)
        }
    }
}

/// Bytes that depend on `seed` alone.
pub fn pixels(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 16) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Standard normal numbers that depend on `seed` alone.
pub fn normals(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Stream { seed, kind: Kind::Init, layer: 0, sample: 0, step: 0 }.fill_normal(0, &mut values);
    values
}

/// Activations as a device holds them.
pub fn bytes_of(values: &[f32], precision: Precision) -> Vec<u8> {
    match precision {
        Precision::F32 => bytes_of_f32(values),
        Precision::Bf16 => {
            values.iter().flat_map(|&x| ((rounded(x, precision).to_bits() >> 16) as u16).to_ne_bytes()).collect()
        }
    }
}

/// Standard normal activations that depend on `seed` alone, as both a device and the CPU hold them.
pub fn activations(seed: u64, len: usize, precision: Precision) -> [Vec<u8>; 2] {
    let values: Vec<f32> = normals(seed, len).into_iter().map(|x| rounded(x, precision)).collect();
    [bytes_of(&values, precision), bytes_of_f32(&values)]
}

/// Pixels of `channels` as a kernel has them, with `with` channels: what is beyond holds what must not matter.
pub fn padded(pixels: &[u8], channels: usize, with: usize, precision: Precision) -> Vec<u8> {
    let rest = vec![0x7Bu8; (with - channels) * precision.bytes()];
    pixels.chunks_exact(channels * precision.bytes()).flat_map(|pixel| [pixel, &rest].concat()).collect()
}
