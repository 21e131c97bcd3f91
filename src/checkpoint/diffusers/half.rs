//! The 16-bit types in which weights are published, widened exactly.

/// bfloat16: the upper half of an f32.
pub(super) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// IEEE 754 binary16.
pub(super) fn from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let fraction = u32::from(bits) & 0x3ff;
    match exponent {
        // Zero and subnormals: fraction · 2⁻²⁴, exact in f32.
        0 => {
            let magnitude = fraction as f32 * f32::from_bits(0x3380_0000);
            f32::from_bits(sign | magnitude.to_bits())
        }
        0x1f => f32::from_bits(sign | 0x7f80_0000 | (fraction << 13)),
        // The exponents' biases are 15 and 127.
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_its_definition() {
        for bits in 0..=u16::MAX {
            let (sign, exponent, fraction) = (bits >> 15, i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => fraction / 1024.0 * 2f64.powi(-14),
                0x1f if fraction == 0.0 => f64::INFINITY,
                0x1f => f64::NAN,
                e => (1.0 + fraction / 1024.0) * 2f64.powi(e - 15),
            };
            let found = from_f16(bits);
            assert_eq!(found.is_sign_negative(), sign == 1);
            assert!(f64::from(found.abs()) == magnitude || (found.is_nan() && magnitude.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn bf16_is_a_truncated_f32() {
        for value in [0.0f32, -0.0, 1.0, -2.5, f32::INFINITY, 2f32.powi(-130)] {
            assert_eq!(from_bf16((value.to_bits() >> 16) as u16).to_bits(), value.to_bits());
        }
        assert!(from_bf16(0x7fc0).is_nan());
    }
}
