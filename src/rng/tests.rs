//! Streams as a whole: distributions, independence of purposes, equal bits however they are drawn.

use super::*;

const STREAM: Stream = Stream { seed: 0x0123_4567_89ab_cdef, kind: Kind::Noise, layer: 5, sample: 77, step: 123_456 };

fn normals(stream: Stream, n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n];
    stream.fill_normal(0, &mut out);
    out
}

/// Φ(x) by the Taylor series of the integral (|x| ≤ 3) or the continued fraction of its tail (Abramowitz & Stegun
/// 26.2.10, 26.2.14).
fn normal_cdf(x: f64) -> f64 {
    let density = (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
    if x.abs() <= 3.0 {
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-18 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        return 0.5 + density * sum;
    }
    let mut fraction = x.abs();
    for k in (1..60).rev() {
        fraction = x.abs() + k as f64 / fraction;
    }
    let tail = density / fraction;
    if x > 0.0 { 1.0 - tail } else { tail }
}

#[test]
fn the_oracle_is_the_normal_distribution() {
    for (x, expected) in
        [(0.0, 0.5), (1.0, 0.841_344_746_068_543), (-2.0, 0.022_750_131_948_179), (3.5, 0.999_767_370_920_964)]
    {
        assert!((normal_cdf(x) - expected).abs() < 1e-13, "{x}: {}", normal_cdf(x));
    }
}

#[test]
fn normals_have_the_moments_of_the_normal_distribution() {
    let n = 1_000_000;
    let x = normals(STREAM, n);
    let moment = |k: i32| x.iter().map(|&x| (x as f64).powi(k)).sum::<f64>() / n as f64;
    // Moments 0, 1, 0, 3, 0, 15; the variance of a k-th moment's mean is (E x^2k − (E x^k)²)/n. Four standard deviations.
    for (k, expected, variance) in
        [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0), (5, 0.0, 945.0), (6, 15.0, 10170.0)]
    {
        let bound = 4.0 * f64::sqrt(variance / n as f64);
        assert!((moment(k) - expected).abs() < bound, "moment {k}: {} (expected {expected} ± {bound})", moment(k));
    }
    // The two results of a Box–Muller, and neighbours that are not, are uncorrelated: also in magnitude.
    for lag in 1..=8 {
        let correlation = x.windows(lag + 1).map(|w| w[0] as f64 * w[lag] as f64).sum::<f64>() / n as f64;
        let squares =
            x.windows(lag + 1).map(|w| (w[0] as f64).powi(2) * (w[lag] as f64).powi(2) - 1.0).sum::<f64>() / n as f64;
        assert!(correlation.abs() < 4.0 / f64::sqrt(n as f64), "lag {lag}: {correlation}");
        // x²y² has the variance 9 − 1, and the covariance 3 − 1 with each of the two windows that share a number with it.
        assert!(squares.abs() < 4.0 * f64::sqrt(12.0 / n as f64), "lag {lag}: {squares}");
    }
}

#[test]
fn normals_pass_kolmogorov_smirnov() {
    let n = 1_000_000;
    let mut x = normals(STREAM, n);
    x.sort_by(f32::total_cmp);
    let distance = x
        .iter()
        .enumerate()
        .map(|(i, &x)| {
            let cdf = normal_cdf(x as f64);
            (cdf - i as f64 / n as f64).abs().max((cdf - (i + 1) as f64 / n as f64).abs())
        })
        .fold(0.0, f64::max);
    // 1.95/√n is exceeded with probability 0.001.
    assert!(distance < 1.95 / f64::sqrt(n as f64), "{distance}");
}

/// FNV-1a over bits.
fn digest(bits: impl Iterator<Item = u32>) -> u64 {
    bits.flat_map(u32::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

/// The bits that CUDA and every later version must draw: changing them changes the trajectory of every run.
#[test]
fn pinned_bits() {
    let mut bits = vec![0; 4099];
    STREAM.fill_bits(3, &mut bits);
    let mut normal = vec![0.0; 4099];
    STREAM.fill_normal(3, &mut normal);
    let mut uniform = vec![0.0; 4099];
    STREAM.fill_uniform(3, &mut uniform);
    let mut keep = vec![0.0; 4099];
    STREAM.fill_keep(3, 0.9, &mut keep);
    let floats = |x: &[f32]| digest(x.iter().map(|x| x.to_bits()));
    let found = [digest(bits.iter().copied()), floats(&normal), floats(&uniform), floats(&keep)];
    println!("level {}: {found:#018x?}", crate::simd::level().name());
    assert_eq!(found, PINNED);
}

const PINNED: [u64; 4] = [0x4d36_a697_a75d_7d8c, 0x56b3_8b09_edae_ff1b, 0xaab1_9fbe_76f3_aa52, 0xe8cb_de24_d090_2239];

/// [`pinned_bits`] again in a process of its own for each instruction set.
#[test]
fn every_simd_level_draws_the_same_bits() {
    let this = std::env::current_exe().unwrap();
    for level in ["portable", "avx2", "avx512"] {
        let output = std::process::Command::new(&this)
            .args(["--exact", "rng::tests::pinned_bits", "--nocapture"])
            .env("DDPM_DIST_SIMD", level)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{level}: {text}");
    }
}

#[test]
fn the_portable_body_draws_what_the_dispatched_one_draws() {
    let mut portable = vec![0.0; 10_001];
    fill::normal_body(STREAM.key(), STREAM.counter_tail(), 2, &mut portable);
    let mut dispatched = vec![0.0; 10_001];
    STREAM.fill_normal(2, &mut dispatched);
    assert!(portable.iter().zip(&dispatched).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn filling_in_pieces_equals_filling_at_once_and_single_draws() {
    let n = 2000;
    let mut bits = vec![0; n];
    STREAM.fill_bits(0, &mut bits);
    for (element, &bits) in bits.iter().enumerate() {
        assert_eq!(bits, STREAM.bits(element as u64), "element {element}");
    }
    let (normal, keep) = (normals(STREAM, n), Keep::new(0.7));
    let (a, b) = box_muller(bits[42 * 4 + 2], bits[42 * 4 + 3]);
    assert_eq!((normal[42 * 4 + 2], normal[42 * 4 + 3]), (a, b));
    for piece in [1, 2, 3, 5, 7, 64, 255, 256, 257, 259, 1023] {
        let (mut p_bits, mut p_normal, mut p_uniform, mut p_keep) =
            (vec![0; n], vec![f32::NAN; n], vec![f32::NAN; n], vec![f32::NAN; n]);
        for start in (0..n).step_by(piece) {
            let range = start..(start + piece).min(n);
            STREAM.fill_bits(start as u64, &mut p_bits[range.clone()]);
            STREAM.fill_normal(start as u64, &mut p_normal[range.clone()]);
            STREAM.fill_uniform(start as u64, &mut p_uniform[range.clone()]);
            STREAM.fill_keep(start as u64, 0.7, &mut p_keep[range]);
        }
        assert_eq!(p_bits, bits, "piece {piece}");
        assert_eq!(p_normal, normal, "piece {piece}");
        for i in 0..n {
            assert_eq!(p_uniform[i], STREAM.uniform(i as u64));
            assert_eq!(p_keep[i], keep.factor(bits[i]));
        }
    }
    STREAM.fill_normal(0, &mut []);
}

#[test]
fn every_part_of_a_purpose_changes_the_draws() {
    let first = |stream: Stream| {
        let mut bits = [0; 8];
        stream.fill_bits(0, &mut bits);
        bits
    };
    let kinds = [
        Kind::Timestep,
        Kind::Noise,
        Kind::Flip,
        Kind::Dropout,
        Kind::Init,
        Kind::Sample,
        Kind::SampleNoise,
        Kind::Order,
    ];
    let mut streams: Vec<Stream> = kinds.map(|kind| Stream { kind, ..STREAM }).to_vec();
    for i in 0..50 {
        streams.push(Stream { layer: 100 + i, ..STREAM });
        streams.push(Stream { sample: 100 + i, ..STREAM });
        streams.push(Stream { step: 100 + i, ..STREAM });
        streams.push(Stream { seed: 100 + i as u64, ..STREAM });
        streams.push(Stream { seed: STREAM.seed ^ 1 << (i + 8), ..STREAM });
    }
    let draws: std::collections::HashSet<[u32; 8]> = streams.iter().map(|&stream| first(stream)).collect();
    assert_eq!(draws.len(), streams.len());
}

#[test]
fn below_is_uniform_and_in_range() {
    let n = 10;
    let mut counts = [0f64; 10];
    for sample in 0..100_000 {
        counts[Stream { sample, ..STREAM }.below(0, n) as usize] += 1.0;
    }
    let chi: f64 = counts.iter().map(|c| (c - 10_000.0).powi(2) / 10_000.0).sum();
    assert!(chi < 27.9, "{chi}: exceeded with probability 0.001 at 9 degrees of freedom");
    assert_eq!(STREAM.below(0, 1), 0);
}

#[test]
fn dropout_keeps_its_share_exactly_at_the_ends() {
    let n = 1_000_000;
    let mut mask = vec![f32::NAN; n];
    STREAM.fill_keep(0, 0.9, &mut mask);
    let kept = mask.iter().filter(|&&m| m != 0.0).count() as f64 / n as f64;
    assert!((kept - 0.9).abs() < 4.0 * f64::sqrt(0.09 / n as f64), "{kept}");
    assert!(mask.iter().all(|&m| m == 0.0 || m == 1.0 / 0.9));
    assert_eq!(Keep::new(1.0), Keep { limit: u32::MAX, scale: 1.0 });
    assert_eq!(Keep::new(0.5).limit, 0x7FFF_FFFF);
    STREAM.fill_keep(0, 1.0, &mut mask);
    assert!(mask.iter().all(|&m| m == 1.0));
    STREAM.fill_keep(0, 0.0, &mut mask);
    assert!(mask.iter().all(|&m| m == 0.0));
}
