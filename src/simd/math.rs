//! Elementary functions in plain arithmetic, to be inlined into the loops of [`multiversion!`](crate::multiversion) functions, where
//! they become vector code.

/// e^x to less than 1 ulp on [−87, 88], clamped outside; NaN stays NaN.
///
/// e^x = 2^n·e^r with n = round(x/ln 2) and |r| ≤ ln 2/2, ln 2 being taken off in two parts (Cody & Waite 1980). e^r is
/// 1 + r + r²·p(r), where p has the degree 4 and the smallest largest relative error on that interval: 0.03 ε for the exact
/// coefficients (a least-squares fit at 4001 Chebyshev nodes, its weights multiplied by the errors until these level out: Lawson
/// 1961), which are then rounded to f32. What is left is the rounding of the arithmetic.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512: exact products with n
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.381_454e-3;
    p = p * r + 8.368_745e-3;
    p = p * r + 4.166_839e-2;
    p = p * r + 0.166_665_2;
    p = p * r + 0.499_999_94;
    let e = p * (r * r) + r + 1.0;
    // n stands in the low bits of `shifted`; moved to the exponent it is 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    e * scale
}

/// σ(x) = 1/(1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use crate::{multiversion, simd};

    multiversion! {
        fn exp_all(y: &mut [f32], x: &[f32]) {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = super::exp(x);
            }
        }
    }

    fn exp(x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        exp_all(&mut y, x);
        y
    }

    #[test]
    fn exp_is_within_one_ulp_and_equal_at_every_level() {
        let x: Vec<f32> = (-860_000..=870_000).map(|i| i as f32 * 1e-4).collect();
        let portable = simd::at(simd::Level::Portable, || exp(&x));
        for (x, found) in x.iter().zip(&portable) {
            let exact = f64::from(*x).exp();
            let error = (f64::from(*found) - exact).abs() / exact;
            assert!(error < f64::from(f32::EPSILON), "exp({x}) = {found} is off by {error:e}");
        }
        for level in simd::levels() {
            assert!(simd::at(level, || exp(&x)) == portable, "{}", level.name());
        }
    }

    #[test]
    fn exp_is_clamped_where_f32_ends_and_keeps_nan() {
        let (low, high) = ((-87.0f64).exp(), 88.0f64.exp());
        // As many as fill a vector and leave some over.
        let x = [-87.0, -88.0, -1000.0, f32::NEG_INFINITY, 88.0, 89.0, 1000.0, f32::INFINITY, f32::NAN, -f32::NAN]
            .repeat(5);
        for level in simd::levels() {
            for (i, y) in simd::at(level, || exp(&x)).into_iter().enumerate() {
                let expected = match i % 10 {
                    0..4 => low,
                    4..8 => high,
                    _ => {
                        assert!(y.is_nan(), "{}: exp({}) = {y}", level.name(), x[i]);
                        continue;
                    }
                };
                let error = (f64::from(y) - expected).abs() / expected;
                assert!(error < f64::from(f32::EPSILON), "{}: exp({}) = {y}", level.name(), x[i]);
            }
        }
    }

    #[test]
    fn sigmoid_stays_between_0_and_1() {
        for (x, expected) in [(f32::NEG_INFINITY, 0.0), (-200.0, 0.0), (0.0, 0.5), (200.0, 1.0), (f32::INFINITY, 1.0)] {
            // e^88, where e^−x is clamped, is 1.7e38.
            assert!((super::sigmoid(x) - expected).abs() < 1e-38, "σ({x})");
        }
        assert!(super::sigmoid(f32::NAN).is_nan());
    }
}
