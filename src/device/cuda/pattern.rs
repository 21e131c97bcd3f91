//! Numbers with which libraries are tried, and how far their sums may be from those in f64.

use super::Precision;

/// Random numbers in (-1, 1), over and over: those of a tensor of any size, known without keeping it.
pub(super) struct Pattern {
    numbers: Vec<f32>,
}

/// A prime: neighbours in no dimension of a tensor have the same numbers.
const PERIOD: usize = 65_537;

/// splitmix64's finalizer.
pub(super) fn mixed(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Pattern {
    /// Numbers of a tensor of that type.
    pub fn new(seed: u64, precision: Precision) -> Pattern {
        let number = |i: u64| {
            let bits = (mixed(seed << 32 | i) >> 40) as f32;
            let number = bits / f32::from_bits(0x4B00_0000) - 1.0;
            match precision {
                Precision::F32 => number,
                Precision::Bf16 => f32::from_bits(number.to_bits() & 0xFFFF_0000),
            }
        };
        Pattern { numbers: (0..PERIOD as u64).map(number).collect() }
    }

    pub fn at(&self, i: usize) -> f64 {
        self.numbers[i % PERIOD].into()
    }

    /// The first `len` elements as a device holds them.
    pub fn bytes(&self, len: usize, precision: Precision) -> Vec<u8> {
        let of = |numbers: &[f32]| -> Vec<u8> {
            match precision {
                Precision::F32 => numbers.iter().flat_map(|number| number.to_ne_bytes()).collect(),
                Precision::Bf16 => {
                    numbers.iter().flat_map(|number| ((number.to_bits() >> 16) as u16).to_ne_bytes()).collect()
                }
            }
        };
        let (period, bytes) = (of(&self.numbers), len * precision.bytes());
        let mut all = Vec::with_capacity(bytes);
        while all.len() < bytes {
            all.extend_from_slice(&period[..period.len().min(bytes - all.len())]);
        }
        all
    }
}

/// Element `i` of a tensor of that type; not a number where it ends before.
pub(super) fn number(tensor: &[u8], i: usize, precision: Precision) -> f64 {
    match *tensor.get(i * precision.bytes()..).unwrap_or_default() {
        [a, b, c, d, ..] if precision == Precision::F32 => f32::from_ne_bytes([a, b, c, d]).into(),
        [a, b, ..] if precision == Precision::Bf16 => {
            f32::from_bits(u32::from(u16::from_ne_bytes([a, b])) << 16).into()
        }
        _ => f64::NAN,
    }
}

/// A sum with what bounds its rounding.
#[derive(Default)]
pub(super) struct Sum {
    pub value: f64,
    squares: f64,
    terms: usize,
}

impl Sum {
    pub fn add(&mut self, term: f64) {
        self.value += term;
        self.squares += term * term;
        self.terms += 1;
    }

    /// How far from it a GPU's sum may be that is rounded to that type.
    pub fn bound(&self, precision: Precision) -> f64 {
        // K terms one after another, each sum rounded towards zero as tensor cores do, make an error of about ε K^1.5 times a term's
        // size, and K times the root of their squares is that; the result is rounded once more.
        let half = match precision {
            Precision::F32 => f64::from(f32::EPSILON) / 2.0,
            Precision::Bf16 => 1.0 / 256.0,
        };
        f64::from(f32::EPSILON) * self.terms as f64 * self.squares.sqrt() + 1.01 * half * self.value.abs()
    }
}
