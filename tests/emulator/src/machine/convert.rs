//! `cvt`: between integer and float types, with PTX's rounding, saturation and NaN rules.

use half::{bf16, f16};

use super::exact;
use super::registers::{LANES, Registers, map1, map2};
use super::rounding::{self, F32, TF32, bf16_bits, integer_to_odd, round};
use crate::fp8::{self, Format};
use crate::ptx::ast::Type;
use crate::ptx::ops::{Convert, Rounding};

/// Executes a conversion on the lanes of `exec`.
#[inline(always)]
pub fn convert(r: &mut Registers, exec: u32, c: &Convert) {
    if !frequent(r, exec, c) {
        general(r, exec, c);
    }
}

/// Conversions that loops are full of, vectorised.
#[inline(always)]
fn frequent(r: &mut Registers, exec: u32, c: &Convert) -> bool {
    if c.sat || c.relu || c.ftz {
        return false;
    }
    let (d, a) = (c.d.index, c.a.index);
    match (c.to, c.from, c.b) {
        (Type::Bf16x2, Type::F32, Some(b)) if c.rounding == Rounding::Nearest => {
            map2(r, exec, d, [a, b.index], |hi: f32, lo: f32| {
                bf16_bits(hi) << 16 | bf16_bits(lo)
            });
        }
        (Type::Bf16, Type::F32, _) if c.rounding == Rounding::Nearest => {
            map1(r, exec, d, a, bf16_bits)
        }
        (Type::F32, Type::Bf16, _) => map1(r, exec, d, a, |x: u32| x << 16),
        (Type::F32, Type::S32, _) if c.rounding == Rounding::Nearest => {
            map1(r, exec, d, a, |x: i32| x as f32)
        }
        (Type::F32, Type::U32, _) if c.rounding == Rounding::Nearest => {
            map1(r, exec, d, a, |x: u32| x as f32)
        }
        (Type::S32, Type::F32, _) if c.rounding == Rounding::Zero => {
            map1(r, exec, d, a, |x: f32| x as i32)
        }
        (Type::S64, Type::S32, _) if c.d.wide && !c.a.wide => {
            map1(r, exec, d, a, |x: i32| i64::from(x))
        }
        (Type::U64, Type::U32, _) if c.d.wide && !c.a.wide => {
            map1(r, exec, d, a, |x: u32| u64::from(x))
        }
        (Type::U32 | Type::S32, Type::U64 | Type::S64, _) if !c.d.wide && c.a.wide => {
            map1(r, exec, d, a, |x: u64| x as u32);
        }
        _ => return false,
    }
    true
}

/// A source value: an exact integer or a float.
enum Value {
    Int(i128),
    Float(f64),
}

#[inline(never)]
fn general(r: &mut Registers, exec: u32, c: &Convert) {
    let a = r.read_any(c.a);
    let b = c.b.map(|b| r.read_any(b));
    let mut out = [0u64; LANES];
    for lane in (0..LANES).filter(|lane| exec >> lane & 1 == 1) {
        out[lane] = match &b {
            _ if Format::of_pair(c.to).is_some() || Format::of_pair(c.from).is_some() => {
                fp8_pair(c, a[lane], b.map_or(0, |b| b[lane]))
            }
            Some(b) => {
                let half = if c.to == Type::F16x2 {
                    Type::F16
                } else {
                    Type::Bf16
                };
                one(c, half, a[lane]) << 16 | one(c, half, b[lane])
            }
            None => one(c, c.to, a[lane]),
        };
    }
    r.write_any(c.d, &out, exec);
}

/// Conversions of pairs to and from fp8.
fn fp8_pair(c: &Convert, a: u64, b: u64) -> u64 {
    if let Some(format) = Format::of_pair(c.from) {
        let half = |bits: u64| {
            let value = f64::from(fp8::decode(bits as u8, format));
            encode(c, Type::F16, value)
        };
        return half(a >> 8) << 16 | half(a);
    }
    let Some(format) = Format::of_pair(c.to) else {
        return 0;
    };
    let narrow = |value: Value| match value {
        Value::Float(x) if c.relu && x < 0.0 => 0,
        Value::Float(x) => u64::from(fp8::encode(x, format)),
        Value::Int(_) => 0,
    };
    let (high, low) = match c.from {
        Type::F32 => (decode(Type::F32, a, false), decode(Type::F32, b, false)),
        _ => (
            decode(Type::F16, a >> 16, false),
            decode(Type::F16, a & 0xffff, false),
        ),
    };
    narrow(high) << 8 | narrow(low)
}

fn decode(ty: Type, bits: u64, ftz: bool) -> Value {
    match ty {
        Type::F32 | Type::Tf32 => {
            let x = f32::from_bits(bits as u32);
            let flushed = if ftz && x.is_subnormal() {
                0.0f32.copysign(x)
            } else {
                x
            };
            Value::Float(f64::from(flushed))
        }
        Type::F64 => Value::Float(f64::from_bits(bits)),
        Type::F16 => Value::Float(f16::from_bits(bits as u16).to_f64()),
        Type::Bf16 => Value::Float(bf16::from_bits(bits as u16).to_f64()),
        signed if signed.is_signed() => {
            let shift = 64 - signed.bits();
            Value::Int(i128::from((bits << shift) as i64 >> shift))
        }
        unsigned => {
            let shift = 64 - unsigned.bits();
            Value::Int(i128::from(bits << shift >> shift))
        }
    }
}

/// Converts one value; the result is extended to 64 bits.
fn one(c: &Convert, to: Type, bits: u64) -> u64 {
    let value = decode(c.from, bits, c.ftz);
    if to.is_float() {
        let exact = match value {
            Value::Int(i) if to == Type::F64 => exact::integer(i, c.rounding),
            Value::Int(i) => integer_to_odd(i),
            Value::Float(x) => x,
        };
        return encode(c, to, exact);
    }
    match value {
        Value::Int(i) => integer(c, to, i),
        Value::Float(x) => float_to_integer(c.rounding, to, x),
    }
}

fn direction(rounding: Rounding, x: f64) -> f64 {
    match rounding {
        Rounding::Nearest => x.round_ties_even(),
        Rounding::NearestAway => x.round(),
        Rounding::Zero => x.trunc(),
        Rounding::Down => x.floor(),
        Rounding::Up => x.ceil(),
    }
}

fn encode(c: &Convert, to: Type, x: f64) -> u64 {
    let mut x = if c.integral {
        direction(c.rounding, x)
    } else {
        x
    };
    if c.sat {
        x = if x.is_nan() {
            0.0
        } else {
            x.clamp(0.0, 1.0) + 0.0
        };
    }
    if c.relu && x < 0.0 {
        x = 0.0;
    }
    match to {
        Type::F64 => x.to_bits(),
        Type::F16 => u64::from(rounding::to_f16(x, c.rounding).to_bits()),
        Type::Bf16 => u64::from(rounding::to_bf16(x, c.rounding).to_bits()),
        Type::Tf32 => {
            let y = if x.is_nan() {
                rounding::CANONICAL_NAN
            } else {
                round(x, TF32, c.rounding) as f32
            };
            u64::from(y.to_bits())
        }
        _ => {
            let y = if x.is_nan() {
                rounding::CANONICAL_NAN
            } else {
                round(x, F32, c.rounding) as f32
            };
            let flushed = if c.ftz && y.is_subnormal() {
                0.0f32.copysign(y)
            } else {
                y
            };
            u64::from(flushed.to_bits())
        }
    }
}

/// Smallest and largest value of an integer type.
fn range(to: Type) -> (i128, i128) {
    let bits = to.bits();
    if to.is_signed() {
        (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    }
}

fn integer(c: &Convert, to: Type, i: i128) -> u64 {
    let (low, high) = range(to);
    let value = if c.sat { i.clamp(low, high) } else { i };
    // Truncate to the destination type, then extend by its sign.
    let shift = 64 - to.bits();
    let bits = (value as u64) << shift;
    if to.is_signed() {
        (bits as i64 >> shift) as u64
    } else {
        bits >> shift
    }
}

/// Out-of-range values clamp to the type's range; NaN gives zero.
fn float_to_integer(rounding: Rounding, to: Type, x: f64) -> u64 {
    let (low, high) = range(to);
    if x.is_nan() {
        return 0;
    }
    (direction(rounding, x) as i128).clamp(low, high) as u64
}
