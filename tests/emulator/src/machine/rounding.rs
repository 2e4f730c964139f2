//! Rounding of exact or sticky f64 values to narrower formats in every direction.

use half::{bf16, f16};

use crate::ptx::ops::Rounding;

/// A binary floating-point format narrower than f64.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Significant bits, the hidden one included.
    precision: i32,
    /// Smallest exponent of a normal number.
    min_exponent: i32,
    largest: f64,
}

pub const F32: Format = Format {
    precision: 24,
    min_exponent: -126,
    largest: f32::MAX as f64,
};
pub const F16: Format = Format {
    precision: 11,
    min_exponent: -14,
    largest: 65504.0,
};
pub const BF16: Format = Format {
    precision: 8,
    min_exponent: -126,
    largest: 3.389_531_389_251_535_5e38,
};
pub const E4M3: Format = Format {
    precision: 4,
    min_exponent: -6,
    largest: 448.0,
};
pub const E5M2: Format = Format {
    precision: 3,
    min_exponent: -14,
    largest: 57344.0,
};
pub const TF32: Format = Format {
    precision: 11,
    min_exponent: -126,
    largest: 3.401_162_134_214_653_5e38,
};

/// 2^e for exponents of normal f64 numbers.
fn power_of_two(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// Rounds `x` to `format`; the result is exactly representable in it, or infinite.
pub fn round(x: f64, format: Format, rounding: Rounding) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let quantum = exponent.max(format.min_exponent) - (format.precision - 1);
    let scaled = x * power_of_two(-quantum);
    let integral = match rounding {
        Rounding::Nearest => scaled.round_ties_even(),
        Rounding::NearestAway => scaled.round(),
        Rounding::Zero => scaled.trunc(),
        Rounding::Down => scaled.floor(),
        Rounding::Up => scaled.ceil(),
    };
    let result = integral * power_of_two(quantum);
    if result.abs() <= format.largest {
        return result.copysign(x);
    }
    let to_infinity = match rounding {
        Rounding::Nearest | Rounding::NearestAway => true,
        Rounding::Zero => false,
        Rounding::Down => x < 0.0,
        Rounding::Up => x > 0.0,
    };
    if to_infinity {
        f64::INFINITY.copysign(x)
    } else {
        format.largest.copysign(x)
    }
}

/// `a + b` rounded to odd: rounding it again to at most 51 bits equals rounding the exact sum
/// once (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
pub fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    let part = sum - a;
    let error = (a - (sum - part)) + (b - part);
    if error == 0.0 || sum.to_bits() & 1 == 1 {
        return sum;
    }
    let grows = (error > 0.0) == (sum > 0.0);
    f64::from_bits(if grows {
        sum.to_bits() + 1
    } else {
        sum.to_bits() - 1
    })
}

/// An integer as f64, rounded to odd when it has more than 53 bits.
pub fn integer_to_odd(x: i128) -> f64 {
    // Both halves are exact: |x| < 2^65 for every 64-bit source.
    let high = x >> 32;
    add_to_odd(high as f64 * 4_294_967_296.0, (x - (high << 32)) as f64)
}

/// The f16 nearest in the given direction.
pub fn to_f16(x: f64, rounding: Rounding) -> f16 {
    if x.is_nan() {
        f16::from_bits(0x7fff)
    } else {
        f16::from_f64(round(x, F16, rounding))
    }
}

/// The bf16 nearest in the given direction.
pub fn to_bf16(x: f64, rounding: Rounding) -> bf16 {
    if x.is_nan() {
        return bf16::from_bits(0x7fff);
    }
    // Exact: the rounded value has at most 8 significant bits within f32's range.
    bf16::from_bits(((round(x, BF16, rounding) as f32).to_bits() >> 16) as u16)
}

/// The f32 nearest in the given direction.
pub fn to_f32(x: f64, rounding: Rounding) -> f32 {
    if x.is_nan() {
        CANONICAL_NAN
    } else {
        round(x, F32, rounding) as f32
    }
}

/// The NaN that single-precision arithmetic produces.
pub const CANONICAL_NAN: f32 = f32::from_bits(0x7fff_ffff);

/// Round to nearest even of an f32 to bf16 bits; fast path of packed conversions.
#[inline(always)]
pub fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fff } else { rounded }
}
