//! Floating-point arithmetic on all lanes: f32 and f64 directly, f16 and bf16 in f64 with one
//! correct rounding.

use half::{bf16, f16};

use super::exact::{self, subtracts};
use super::registers::{LANES, Lane, Registers, compare2, map1, map2, map3};
use super::rounding::{self, CANONICAL_NAN, add_to_odd};
use crate::ptx::ops::{Compare, FloatMods, FloatOp, FloatType, Reg, Rounding};

/// Dispatches on the operand type.
#[inline(always)]
pub fn float(
    r: &mut Registers,
    exec: u32,
    op: FloatOp,
    ty: FloatType,
    mods: &FloatMods,
    d: Reg,
    s: [Reg; 3],
) {
    match ty {
        FloatType::F32 if mods.is_plain() && plain_f32(r, exec, op, d, s) => {}
        FloatType::F32 => general::<f32>(r, exec, op, mods, d, s),
        FloatType::F64 => double(r, exec, op, mods, d, s),
        FloatType::F16 => general::<f16>(r, exec, op, mods, d, s),
        FloatType::Bf16 => general::<bf16>(r, exec, op, mods, d, s),
    }
}

#[inline(always)]
fn canonical(x: f32) -> f32 {
    if x.is_nan() { CANONICAL_NAN } else { x }
}

/// The frequent single-precision ops without modifiers.
#[inline(always)]
fn plain_f32(r: &mut Registers, exec: u32, op: FloatOp, d: Reg, s: [Reg; 3]) -> bool {
    let two = [s[0], s[1]];
    match op {
        FloatOp::Add => map2(r, exec, d, two, |a: f32, b: f32| canonical(a + b)),
        FloatOp::Sub => map2(r, exec, d, two, |a: f32, b: f32| canonical(a - b)),
        FloatOp::Mul => map2(r, exec, d, two, |a: f32, b: f32| canonical(a * b)),
        FloatOp::Fma => map3(r, exec, d, s, |a: f32, b: f32, c: f32| {
            canonical(a.mul_add(b, c))
        }),
        FloatOp::Div => map2(r, exec, d, two, |a: f32, b: f32| canonical(a / b)),
        FloatOp::Max => map2(r, exec, d, two, |a: f32, b: f32| max_f32(a, b)),
        FloatOp::Min => map2(r, exec, d, two, |a: f32, b: f32| -max_f32(-a, -b)),
        FloatOp::Abs => map1(r, exec, d, s[0], |a: u32| a & 0x7fff_ffff),
        FloatOp::Neg => map1(r, exec, d, s[0], |a: u32| a ^ 0x8000_0000),
        FloatOp::Rcp => map1(r, exec, d, s[0], |a: f32| canonical(1.0 / a)),
        FloatOp::Sqrt => map1(r, exec, d, s[0], |a: f32| canonical(a.sqrt())),
        FloatOp::Ex2 => map1(r, exec, d, s[0], |a: f32| canonical(a.exp2())),
        FloatOp::Lg2 => map1(r, exec, d, s[0], |a: f32| canonical(a.log2())),
        _ => return false,
    }
    true
}

/// The larger operand; a NaN loses against a number and -0 against +0.
#[inline(always)]
fn max_f32(a: f32, b: f32) -> f32 {
    let equal = f32::from_bits(a.to_bits() & b.to_bits());
    let ordered = if a > b {
        a
    } else if a == b {
        equal
    } else {
        b
    };
    let number = if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        ordered
    };
    canonical(number)
}

/// A format whose arithmetic is done in f64 and rounded once.
trait Narrow: Lane {
    fn exact(self) -> f64;
    fn rounded(x: f64, rounding: Rounding) -> Self;
    fn is_subnormal(self) -> bool;
    fn zero_like(self) -> Self;
    fn flip_sign(self, negate: bool, clear: bool) -> Self;
    fn negative(self) -> bool;
    fn is_nan_value(self) -> bool;
}

macro_rules! narrow {
    ($type:ty, $exact:expr, $rounded:expr, $sign:expr) => {
        impl Narrow for $type {
            #[inline(always)]
            fn exact(self) -> f64 {
                $exact(self)
            }
            #[inline(always)]
            fn rounded(x: f64, rounding: Rounding) -> Self {
                $rounded(x, rounding)
            }
            fn is_subnormal(self) -> bool {
                self.classify() == std::num::FpCategory::Subnormal
            }
            fn zero_like(self) -> Self {
                <$type>::from_bits(self.to_bits() & $sign)
            }
            fn flip_sign(self, negate: bool, clear: bool) -> Self {
                let bits = self.to_bits() & if clear { !$sign } else { !0 };
                <$type>::from_bits(bits ^ if negate { $sign } else { 0 })
            }
            fn negative(self) -> bool {
                self.to_bits() & $sign != 0
            }
            fn is_nan_value(self) -> bool {
                self.is_nan()
            }
        }
    };
}
narrow!(f32, f64::from, rounding::to_f32, 0x8000_0000);
narrow!(f16, |v: f16| v.to_f64(), rounding::to_f16, 0x8000);
narrow!(bf16, |v: bf16| v.to_f64(), rounding::to_bf16, 0x8000);

fn flush<T: Narrow>(x: T, ftz: bool) -> T {
    if ftz && x.is_subnormal() {
        x.zero_like()
    } else {
        x
    }
}

/// Result of an op in f64, exact or rounded to odd.
fn evaluate(op: FloatOp, a: f64, b: f64, c: f64) -> f64 {
    match op {
        FloatOp::Add => add_to_odd(a, b),
        FloatOp::Sub => add_to_odd(a, -b),
        // Products of two 24-bit significands are exact.
        FloatOp::Mul => a * b,
        FloatOp::Fma => add_to_odd(a * b, c),
        FloatOp::Div => a / b,
        FloatOp::Rcp => 1.0 / a,
        FloatOp::Sqrt => a.sqrt(),
        FloatOp::Rsqrt => 1.0 / a.sqrt(),
        FloatOp::Ex2 => a.exp2(),
        FloatOp::Lg2 => a.log2(),
        FloatOp::Sin => a.sin(),
        FloatOp::Cos => a.cos(),
        FloatOp::Tanh => a.tanh(),
        _ => a,
    }
}

fn one<T: Narrow>(op: FloatOp, mods: &FloatMods, a: T, b: T, c: T) -> T {
    let (a, b, c) = (flush(a, mods.ftz), flush(b, mods.ftz), flush(c, mods.ftz));
    let result = match op {
        FloatOp::Abs => return a.flip_sign(false, true),
        FloatOp::Neg => return a.flip_sign(true, false),
        // copysign d, a, b: b with the sign of a.
        FloatOp::Copysign => return b.flip_sign(a.negative(), true),
        FloatOp::Min | FloatOp::Max => return min_max(op, mods, a, b),
        _ => {
            let (a, b, c) = (a.exact(), b.exact(), c.exact());
            let value = evaluate(op, a, b, c);
            let down = mods.rounding == Rounding::Down && subtracts(op, a, b, c);
            let value = if down && value == 0.0 { -0.0 } else { value };
            T::rounded(value, mods.rounding)
        }
    };
    let result = flush(result, mods.ftz);
    if mods.sat {
        let x = result.exact();
        return T::rounded(
            if x.is_nan() {
                0.0
            } else {
                x.clamp(0.0, 1.0) + 0.0
            },
            Rounding::Nearest,
        );
    }
    if mods.relu && result.negative() && !result.is_nan_value() {
        return T::rounded(0.0, Rounding::Nearest);
    }
    result
}

fn min_max<T: Narrow>(op: FloatOp, mods: &FloatMods, a: T, b: T) -> T {
    let sign = a.negative() != b.negative();
    let (a, b) = if mods.xorsign_abs {
        (a.flip_sign(false, true), b.flip_sign(false, true))
    } else {
        (a, b)
    };
    let (x, y) = (a.exact(), b.exact());
    let nan = T::rounded(f64::NAN, Rounding::Nearest);
    let chosen = match (x.is_nan(), y.is_nan()) {
        (true, true) => nan,
        (true, false) | (false, true) if mods.nan => nan,
        (true, false) => b,
        (false, true) => a,
        _ => {
            // Equal zeros: -0 counts as the smaller.
            let a_less = x < y || x == y && a.negative();
            if a_less == (op == FloatOp::Min) { a } else { b }
        }
    };
    if mods.xorsign_abs {
        chosen.flip_sign(sign, false)
    } else {
        chosen
    }
}

fn general<T: Narrow>(
    r: &mut Registers,
    exec: u32,
    op: FloatOp,
    mods: &FloatMods,
    d: Reg,
    s: [Reg; 3],
) {
    if let Some(found) = test::<T>(r, op, s[0]) {
        return r.set_pred(d, found, exec);
    }
    map3(r, exec, d, s, |a: T, b: T, c: T| one(op, mods, a, b, c));
}

/// `testp`: None if the op is not a test.
fn test<T: Narrow>(r: &Registers, op: FloatOp, a: Reg) -> Option<u32> {
    let holds = |a: T, _: T| -> bool {
        let (x, subnormal) = (a.exact(), a.is_subnormal());
        match op {
            FloatOp::TestFinite => x.is_finite(),
            FloatOp::TestInfinite => x.is_infinite(),
            FloatOp::TestNan => x.is_nan(),
            FloatOp::TestNumber => !x.is_nan(),
            FloatOp::TestNormal => x.is_finite() && x != 0.0 && !subnormal,
            _ => subnormal,
        }
    };
    let is_test = matches!(
        op,
        FloatOp::TestFinite
            | FloatOp::TestInfinite
            | FloatOp::TestNan
            | FloatOp::TestNumber
            | FloatOp::TestNormal
            | FloatOp::TestSubnormal
    );
    is_test.then(|| compare2(r, a, a, holds))
}

fn double(r: &mut Registers, exec: u32, op: FloatOp, mods: &FloatMods, d: Reg, s: [Reg; 3]) {
    let holds = |f: fn(f64) -> bool| move |a: f64, _: f64| f(a);
    let test: Option<fn(f64) -> bool> = match op {
        FloatOp::TestFinite => Some(f64::is_finite),
        FloatOp::TestInfinite => Some(f64::is_infinite),
        FloatOp::TestNan => Some(f64::is_nan),
        FloatOp::TestNumber => Some(|a| !a.is_nan()),
        FloatOp::TestNormal => Some(f64::is_normal),
        FloatOp::TestSubnormal => Some(f64::is_subnormal),
        _ => None,
    };
    if let Some(test) = test {
        let found = compare2(r, s[0], s[0], holds(test));
        return r.set_pred(d, found, exec);
    }
    map3(r, exec, d, s, |a: f64, b: f64, c: f64| {
        let result = match op {
            FloatOp::Add
            | FloatOp::Sub
            | FloatOp::Mul
            | FloatOp::Fma
            | FloatOp::Div
            | FloatOp::Rcp
            | FloatOp::Sqrt => exact::arithmetic(op, mods.rounding, a, b, c),
            FloatOp::Abs => a.abs(),
            FloatOp::Neg => -a,
            FloatOp::Copysign => b.copysign(a),
            FloatOp::Min => min_max_f64(a, b, true),
            FloatOp::Max => min_max_f64(a, b, false),
            other => evaluate(other, a, b, c),
        };
        if mods.sat {
            if result.is_nan() {
                0.0
            } else {
                result.clamp(0.0, 1.0)
            }
        } else {
            result
        }
    });
}

fn min_max_f64(a: f64, b: f64, min: bool) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ => {
            let a_less = a < b || a == b && a.is_sign_negative();
            if a_less == min { a } else { b }
        }
    }
}

/// Both halves of a packed register.
pub fn packed(
    r: &mut Registers,
    exec: u32,
    op: FloatOp,
    ty: FloatType,
    mods: &FloatMods,
    d: Reg,
    s: [Reg; 3],
) {
    match ty {
        FloatType::F16 => packed_as::<f16>(r, exec, op, mods, d, s),
        _ => packed_as::<bf16>(r, exec, op, mods, d, s),
    }
}

fn packed_as<T: Narrow + Lane<Bits = u32>>(
    r: &mut Registers,
    exec: u32,
    op: FloatOp,
    mods: &FloatMods,
    d: Reg,
    s: [Reg; 3],
) {
    let half = |a: u32, b: u32, c: u32| {
        one(
            op,
            mods,
            T::from_bits(a & 0xffff),
            T::from_bits(b & 0xffff),
            T::from_bits(c & 0xffff),
        )
        .to_bits()
    };
    map3(r, exec, d, s, |a: u32, b: u32, c: u32| {
        half(a, b, c) | half(a >> 16, b >> 16, c >> 16) << 16
    });
}

#[inline(always)]
fn holds<T: PartialOrd>(compare: Compare, a: &T, b: &T) -> bool {
    let unordered = a.partial_cmp(b).is_none();
    match compare {
        Compare::Eq => a == b,
        Compare::Ne => a != b && !unordered,
        Compare::Lt => a < b,
        Compare::Le => a <= b,
        Compare::Gt => a > b,
        Compare::Ge => a >= b,
        Compare::Equ => a == b || unordered,
        Compare::Neu => a != b,
        Compare::Ltu => a < b || unordered,
        Compare::Leu => a <= b || unordered,
        Compare::Gtu => a > b || unordered,
        Compare::Geu => a >= b || unordered,
        Compare::Num => !unordered,
        Compare::Nan => unordered,
    }
}

/// Lanes for which the comparison holds.
#[inline(always)]
pub fn compare<T: Lane + PartialOrd>(r: &Registers, compare: Compare, a: Reg, b: Reg) -> u32 {
    // One loop per operator: the comparison is known outside it.
    match compare {
        Compare::Eq => compare2(r, a, b, |a: T, b: T| a == b),
        Compare::Lt => compare2(r, a, b, |a: T, b: T| a < b),
        Compare::Le => compare2(r, a, b, |a: T, b: T| a <= b),
        Compare::Gt => compare2(r, a, b, |a: T, b: T| a > b),
        Compare::Ge => compare2(r, a, b, |a: T, b: T| a >= b),
        other => compare2(r, a, b, |a: T, b: T| holds(other, &a, &b)),
    }
}

/// Lanes for which the comparison holds, subnormals counting as zero if `ftz`.
pub fn compare_float(r: &Registers, op: Compare, ty: FloatType, ftz: bool, a: Reg, b: Reg) -> u32 {
    match ty {
        FloatType::F32 if ftz => compare2(r, a, b, |a: f32, b: f32| {
            holds(op, &flush(a, true), &flush(b, true))
        }),
        FloatType::F32 => compare::<f32>(r, op, a, b),
        FloatType::F64 => compare::<f64>(r, op, a, b),
        FloatType::F16 => compare2(r, a, b, |a: f16, b: f16| {
            holds(op, &flush(a, ftz), &flush(b, ftz))
        }),
        FloatType::Bf16 => compare2(r, a, b, |a: bf16, b: bf16| {
            holds(op, &flush(a, ftz), &flush(b, ftz))
        }),
    }
}

/// Comparison of one half (0 or 1) of packed registers.
pub fn compare_packed(
    r: &Registers,
    op: Compare,
    ty: FloatType,
    ftz: bool,
    s: [Reg; 2],
    half: u32,
) -> u32 {
    let (a, b) = (r.read32(s[0]), r.read32(s[1]));
    let mut out = 0;
    for lane in 0..LANES {
        let (x, y) = (
            (a[lane] >> (16 * half)) as u16,
            (b[lane] >> (16 * half)) as u16,
        );
        let hit = match ty {
            FloatType::F16 => holds(
                op,
                &flush(f16::from_bits(x), ftz),
                &flush(f16::from_bits(y), ftz),
            ),
            _ => holds(
                op,
                &flush(bf16::from_bits(x), ftz),
                &flush(bf16::from_bits(y), ftz),
            ),
        };
        out |= u32::from(hit) << lane;
    }
    out
}
