//! Box–Muller (1958) on polynomials: two random words to two independent standard normals.
//!
//! Only integer operations, conversions, +, ×, fused multiply-add and square root are used. IEEE 754 defines each of them to
//! the last bit, so a kernel that writes the same operations in the same order draws **equal bits** on any device; a
//! library's `ln`, `sin` and `cos` would not. In CUDA: `__uint2float_rn`, `__int2float_rn`, `__fmaf_rn`, `__fmul_rn`,
//! `__fadd_rn` and `__fsqrt_rn`, for contraction of the rest must not be left to the compiler.
//!
//! Given words b₀, b₁: u = (b₀ + ½)/2³², r = √(−2 ln u), θ = 2π b₁/2³², normals r cos θ and r sin θ. The smallest u is 2⁻³³,
//! so |normal| ≤ 6.7639; the largest is 1 (after rounding to f32), where r = 0. There is no infinity and no NaN.
//!
//! The coefficients are minimax in relative error over the reduced range, each rounded to f32 with the later ones fitted
//! again around it; `box_muller_coefficients.py` derives them. Polynomial error relative to the function, in exact
//! arithmetic: ln 5.9e-9, sin 2.8e-8 (the rounding of π/2), cos 4.4e-10. Measured with f32 arithmetic against f64 (the tests
//! below repeat it): −2 ln u within 8.1e-8 relative, sin and cos within 9.4e-8 absolute, that is at most about one and a half ulp.

/// (ln(1+f) − f + f²/2)/f³ on √½ ≤ 1+f < √2, lowest power first.
const LN: [f32; 8] =
    [0.333_333_3, -0.250_008_2, 0.200_012_42, -0.166_234_09, 0.142_015_8, -0.131_596_1, 0.127_622_17, -0.076_364_39];
/// sin(π/2·z)/z in powers of z² on |z| ≤ ½.
const SIN: [f32; 4] = [1.570_796_4, -0.645_966_65, 0.079_712_525, -0.004_685_971_4];
/// (cos(π/2·z) − 1)/z² in powers of z² on |z| ≤ ½.
const COS: [f32; 4] = [-1.233_700_5, 0.253_668_55, -0.020_855_593, 0.000_894_460_54];

const SQRT_HALF_BITS: u32 = 0x3F35_04F3;
const ONE_BITS: u32 = 0x3F80_0000;
const SIGN_BIT: u32 = 0x8000_0000;

/// −2 ln u of u = (bits + ½)/2³²; in [0, 45.75].
#[inline(always)]
fn radius_squared(bits: u32) -> f32 {
    // 2³² u = 2^e · (1 + f) with 1 + f in [√½, √2): e and f are cut out of the float's own bits.
    let scaled = bits as f32 + 0.5;
    let shifted = scaled.to_bits() + (ONE_BITS - SQRT_HALF_BITS);
    let exponent = (shifted >> 23) as i32 - (127 + 32);
    let f = f32::from_bits((shifted & 0x007F_FFFF) + SQRT_HALF_BITS) - 1.0;
    let mut p = LN[7];
    p = p.mul_add(f, LN[6]);
    p = p.mul_add(f, LN[5]);
    p = p.mul_add(f, LN[4]);
    p = p.mul_add(f, LN[3]);
    p = p.mul_add(f, LN[2]);
    p = p.mul_add(f, LN[1]);
    p = p.mul_add(f, LN[0]);
    p = p.mul_add(f, -0.5);
    let ln_mantissa = (f * f).mul_add(p, f);
    let ln = (exponent as f32).mul_add(std::f32::consts::LN_2, ln_mantissa);
    ln * -2.0
}

/// (cos, sin) of 2π·bits/2³².
#[inline(always)]
fn cos_sin(bits: u32) -> (f32, f32) {
    // The nearest quarter turn, and what is left of it: z in [−½, ½) quarter turns.
    let quadrant = bits.wrapping_add(1 << 29) >> 30;
    let z = bits.wrapping_sub(quadrant << 30) as i32 as f32 * (1.0 / (1u32 << 30) as f32);
    let zz = z * z;
    let mut s = SIN[3];
    s = s.mul_add(zz, SIN[2]);
    s = s.mul_add(zz, SIN[1]);
    s = s.mul_add(zz, SIN[0]);
    let s = s * z;
    let mut c = COS[3];
    c = c.mul_add(zz, COS[2]);
    c = c.mul_add(zz, COS[1]);
    c = c.mul_add(zz, COS[0]);
    let c = c.mul_add(zz, 1.0);
    // Quadrants 0 … 3 turn (c, s) into (c, s), (−s, c), (−c, −s), (s, −c).
    let (cos, sin) = if quadrant & 1 == 0 { (c, s) } else { (s, c) };
    let cos_sign = (quadrant.wrapping_add(1) << 30) & SIGN_BIT;
    let sin_sign = (quadrant << 30) & SIGN_BIT;
    (f32::from_bits(cos.to_bits() ^ cos_sign), f32::from_bits(sin.to_bits() ^ sin_sign))
}

/// Two independent standard normals from two random words.
#[inline(always)]
pub fn box_muller(radius_bits: u32, angle_bits: u32) -> (f32, f32) {
    let radius = radius_squared(radius_bits).sqrt();
    let (cos, sin) = cos_sin(angle_bits);
    (radius * cos, radius * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every word around each power of two, both ends, and an even sweep between.
    fn words() -> impl Iterator<Item = u32> {
        let near_powers =
            (0..32).flat_map(|e| (0..=200u32).map(move |d| (1u32 << e).wrapping_add(d).wrapping_sub(100)));
        let ends = (0..1000).chain(u32::MAX - 1000..=u32::MAX);
        near_powers.chain(ends).chain((0..=u32::MAX).step_by(1021))
    }

    #[test]
    fn radius_is_accurate_in_relative_error() {
        let mut worst: f64 = 0.0;
        for bits in words() {
            // The rounding of u to f32 is no error of the logarithm.
            let u = (bits as f32 + 0.5) as f64 / 4294967296.0;
            let expected = -2.0 * u.ln();
            let found = radius_squared(bits) as f64;
            assert!((0.0..45.76).contains(&found), "{bits:#x}: {found}");
            if expected == 0.0 {
                assert_eq!(found, 0.0, "{bits:#x}");
            } else {
                worst = worst.max((found / expected - 1.0).abs());
            }
        }
        println!("-2 ln u: {worst:.3e}");
        assert!(worst < 8.5e-8, "{worst:e}");
    }

    #[test]
    fn cos_and_sin_are_accurate() {
        let mut worst: f64 = 0.0;
        for bits in words() {
            let (sin, cos) = (bits as f64 * (std::f64::consts::TAU / 4294967296.0)).sin_cos();
            let (c, s) = cos_sin(bits);
            worst = worst.max((c as f64 - cos).abs()).max((s as f64 - sin).abs());
        }
        println!("cos, sin: {worst:.3e}");
        assert!(worst < 9.6e-8, "{worst:e}");
    }

    #[test]
    fn no_word_gives_an_infinity_or_nan() {
        let extreme: Vec<u32> = (0..32)
            .flat_map(|e| [1u32 << e, (1 << e) - 1, (1 << e) + 1, !(1 << e), u32::MAX << e])
            .chain([0, 1, u32::MAX, u32::MAX - 1, u32::MAX - 127, u32::MAX - 128, 0x7FFF_FFFF, 0x8000_0000])
            .collect();
        for &radius in &extreme {
            for &angle in &extreme {
                let (a, b) = box_muller(radius, angle);
                assert!(a.abs() <= 6.764 && b.abs() <= 6.764, "{radius:#x} {angle:#x}: {a} {b}");
            }
        }
    }
}
