//! The 8-bit floats of the Open Compute Project (OFP8): e4m3, which has no infinities, and e5m2.

use crate::machine::rounding::{E4M3, E5M2, round};
use crate::ptx::ast::Type;
use crate::ptx::ops::Rounding;

/// An 8-bit format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    E4m3,
    E5m2,
}

impl Format {
    /// The format of a packed pair's halves.
    pub fn of_pair(ty: Type) -> Option<Self> {
        match ty {
            Type::E4m3x2 => Some(Format::E4m3),
            Type::E5m2x2 => Some(Format::E5m2),
            _ => None,
        }
    }

    fn fraction_bits(self) -> u32 {
        match self {
            Format::E4m3 => 3,
            Format::E5m2 => 2,
        }
    }

    fn bias(self) -> i32 {
        match self {
            Format::E4m3 => 7,
            Format::E5m2 => 15,
        }
    }
}

/// The value of an 8-bit float, exactly.
pub fn decode(bits: u8, format: Format) -> f32 {
    let fraction_bits = format.fraction_bits();
    let magnitude = u32::from(bits & 0x7f);
    let value = match format {
        Format::E4m3 if magnitude == 0x7f => f32::NAN,
        Format::E5m2 if magnitude > 0x7c => f32::NAN,
        Format::E5m2 if magnitude == 0x7c => f32::INFINITY,
        _ => {
            let (field, fraction) = (
                magnitude >> fraction_bits,
                magnitude & ((1 << fraction_bits) - 1),
            );
            // Subnormals have the exponent of field 1 and no hidden bit.
            let hidden = u32::from(field > 0) << fraction_bits;
            let exponent = field.max(1) as i32 - format.bias() - fraction_bits as i32;
            (hidden | fraction) as f32 * 2f32.powi(exponent)
        }
    };
    if bits & 0x80 != 0 { -value } else { value }
}

/// The nearest 8-bit float, with values out of range made the largest one (`.satfinite`).
pub fn encode(x: f64, format: Format) -> u8 {
    let target = match format {
        Format::E4m3 => E4M3,
        Format::E5m2 => E5M2,
    };
    if x.is_nan() {
        return 0x7f;
    }
    let sign = u8::from(x.is_sign_negative()) << 7;
    let largest = match format {
        Format::E4m3 => 0x7e,
        Format::E5m2 => 0x7b,
    };
    let rounded = round(x.abs(), target, Rounding::Nearest);
    if rounded > f64::from(decode(largest, format)) {
        return sign | largest;
    }
    // In units of the smallest subnormal, exactly; larger values drop zeros from the end.
    let fraction_bits = format.fraction_bits();
    let mut units = (rounded * 2f64.powi(format.bias() - 1 + fraction_bits as i32)) as u64;
    let mut field = 0;
    while units >= 2 << fraction_bits {
        units >>= 1;
        field += 1;
    }
    sign | ((field << fraction_bits) + units as u32) as u8
}
