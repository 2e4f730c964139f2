//! Double-precision arithmetic in directed rounding: exact results as 128-bit integers, rounded
//! once.

use crate::ptx::ops::{FloatOp, Rounding};

/// A finite value, `significand` times 2^`exponent`. The lowest bit may stand for everything
/// below it.
#[derive(Clone, Copy, Debug)]
struct Exact {
    negative: bool,
    significand: u128,
    exponent: i32,
}

impl Exact {
    fn of(x: f64) -> Self {
        let (bits, hidden) = (x.to_bits(), 1 << 52);
        let fraction = bits & (hidden - 1);
        let (significand, exponent) = match (bits >> 52) as i32 & 0x7ff {
            0 => (fraction, -1074),
            field => (fraction | hidden, field - 1075),
        };
        Self {
            negative: x.is_sign_negative(),
            significand: significand.into(),
            exponent,
        }
    }

    /// The same nonzero value with its highest bit at `bit`, which is not below where it was.
    fn aligned(self, bit: u32) -> Self {
        let shift = self.significand.leading_zeros() - (127 - bit);
        Self {
            significand: self.significand << shift,
            exponent: self.exponent - shift as i32,
            ..self
        }
    }

    fn product(self, by: Self) -> Self {
        Self {
            negative: self.negative != by.negative,
            significand: self.significand * by.significand,
            exponent: self.exponent + by.exponent,
        }
    }

    fn sum(self, other: Self) -> Self {
        if self.significand == 0 {
            return other;
        }
        if other.significand == 0 {
            return self;
        }
        let (x, y) = (self.aligned(125), other.aligned(125));
        let (x, y) = if x.exponent < y.exponent {
            (y, x)
        } else {
            (x, y)
        };
        let distance = (x.exponent - y.exponent) as u32;
        let low = y.significand.checked_shr(distance).unwrap_or(0);
        // Bits are lost at distances of 20 and more, where the difference keeps 124 bits.
        let lost = low.checked_shl(distance).unwrap_or(0) != y.significand;
        let signed = |negative: bool, n: u128| if negative { -(n as i128) } else { n as i128 };
        let sum = signed(x.negative, x.significand) + signed(y.negative, low | u128::from(lost));
        Self {
            negative: sum < 0,
            significand: sum.unsigned_abs(),
            exponent: x.exponent,
        }
    }

    /// The quotient of nonzero values, of at least 74 bits.
    fn quotient(self, by: Self) -> Self {
        let x = self.aligned(126);
        let rest = !x.significand.is_multiple_of(by.significand);
        Self {
            negative: self.negative != by.negative,
            significand: (x.significand / by.significand) | u128::from(rest),
            exponent: x.exponent - by.exponent,
        }
    }

    /// The root of a positive value, of 63 bits.
    fn root(self) -> Self {
        let mut x = self.aligned(125);
        if x.exponent % 2 != 0 {
            (x.significand, x.exponent) = (x.significand << 1, x.exponent - 1);
        }
        let root = x.significand.isqrt();
        let rest = root * root != x.significand;
        Self {
            negative: false,
            significand: root | u128::from(rest),
            exponent: x.exponent / 2,
        }
    }

    fn round(self, rounding: Rounding) -> f64 {
        let sign = u64::from(self.negative) << 63;
        if self.significand == 0 {
            return f64::from_bits(sign);
        }
        let away = match rounding {
            Rounding::Nearest | Rounding::NearestAway => None,
            Rounding::Zero => Some(false),
            Rounding::Down => Some(self.negative),
            Rounding::Up => Some(!self.negative),
        };
        let exponent = 127 - self.significand.leading_zeros() as i32 + self.exponent;
        if exponent > 1023 {
            let largest = away == Some(false);
            let magnitude = if largest { f64::MAX } else { f64::INFINITY };
            return f64::from_bits(magnitude.to_bits() | sign);
        }
        // Unit of the last place of the result, and the bits below it.
        let quantum = exponent.max(-1022) - 52;
        let shift = quantum - self.exponent;
        let integer = if shift <= 0 {
            (self.significand << -shift) as u64
        } else {
            let integer = self.significand.checked_shr(shift as u32).unwrap_or(0) as u64;
            let rest = self.significand & u128::MAX >> (128 - shift.min(128));
            let half = 1u128.checked_shl(shift as u32 - 1).unwrap_or(u128::MAX);
            let up = match (away, rounding) {
                (Some(away), _) => away && rest != 0,
                (_, Rounding::NearestAway) => rest >= half,
                _ => rest > half || rest == half && integer & 1 == 1,
            };
            integer + u64::from(up)
        };
        // A carry out of the fraction makes the next exponent, or infinity.
        let bits = if integer < 1 << 52 {
            integer
        } else {
            (((quantum + 1075) as u64) << 52) + (integer - (1 << 52))
        };
        f64::from_bits(bits | sign)
    }
}

/// Whether an op adds two values of opposite signs; if they are equal, the sum is -0 when rounding
/// down (IEEE 754-2019, 6.3).
pub fn subtracts(op: FloatOp, a: f64, b: f64, c: f64) -> bool {
    let (a, b, c) = (
        a.is_sign_negative(),
        b.is_sign_negative(),
        c.is_sign_negative(),
    );
    match op {
        FloatOp::Add => a != b,
        FloatOp::Sub => a == b,
        FloatOp::Fma => (a != b) != c,
        _ => false,
    }
}

/// Addition, subtraction, multiplication, fused multiply-add, division, reciprocal or square root
/// in any direction.
pub fn arithmetic(op: FloatOp, rounding: Rounding, a: f64, b: f64, c: f64) -> f64 {
    let (nearest, operands): (f64, &[f64]) = match op {
        FloatOp::Add => (a + b, &[a, b]),
        FloatOp::Sub => (a - b, &[a, b]),
        FloatOp::Mul => (a * b, &[a, b]),
        FloatOp::Fma => (a.mul_add(b, c), &[a, b, c]),
        FloatOp::Div => (a / b, &[a, b]),
        FloatOp::Rcp => (1.0 / a, &[a]),
        _ => (a.sqrt(), &[a]),
    };
    let divisor = if op == FloatOp::Rcp { a } else { b };
    let by_zero = matches!(op, FloatOp::Div | FloatOp::Rcp) && divisor == 0.0;
    if rounding == Rounding::Nearest
        || nearest.is_nan()
        || by_zero
        || operands.iter().any(|x| !x.is_finite())
    {
        return nearest;
    }
    let (x, y, z) = (Exact::of(a), Exact::of(b), Exact::of(c));
    let exact = match op {
        FloatOp::Add => x.sum(y),
        FloatOp::Sub => x.sum(Exact::of(-b)),
        FloatOp::Mul => x.product(y),
        FloatOp::Fma => x.product(y).sum(z),
        FloatOp::Div if a == 0.0 => return nearest,
        FloatOp::Div => x.quotient(y),
        FloatOp::Rcp => Exact::of(1.0).quotient(x),
        _ if a == 0.0 => return nearest,
        _ => x.root(),
    };
    if exact.significand == 0 {
        let down = rounding == Rounding::Down && subtracts(op, a, b, c);
        return if down { -0.0 } else { nearest };
    }
    exact.round(rounding)
}

/// An integer of at most 127 bits as a double.
pub fn integer(x: i128, rounding: Rounding) -> f64 {
    let exact = Exact {
        negative: x < 0,
        significand: x.unsigned_abs(),
        exponent: 0,
    };
    exact.round(rounding)
}
