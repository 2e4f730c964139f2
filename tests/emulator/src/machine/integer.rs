//! Integer arithmetic on all lanes.

use super::registers::{LANES, Lane, Registers, map1, map2, map3};
use crate::ptx::ops::{CountOp, IntOp, IntType, PrmtMode, Reg};

/// Integer types of lanes.
pub trait Int: Lane {
    const BITS: u32;
    fn wide(self) -> i128;
    /// Truncates to the type's width.
    fn narrow(value: i128) -> Self;
    fn bits(self) -> u64;
}

macro_rules! int {
    ($($type:ty => $unsigned:ty),*) => { $(
        impl Int for $type {
            const BITS: u32 = <$type>::BITS;
            #[inline(always)]
            fn wide(self) -> i128 {
                self as i128
            }
            #[inline(always)]
            fn narrow(value: i128) -> Self {
                value as $type
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                self as $unsigned as u64
            }
        }
    )* };
}
int!(u16 => u16, i16 => u16, u32 => u32, i32 => u32, u64 => u64, i64 => u64);

/// Dispatches on the operand type.
#[inline(always)]
pub fn integer(r: &mut Registers, exec: u32, op: IntOp, ty: IntType, d: Reg, s: [Reg; 4]) {
    match ty {
        IntType::U32 | IntType::S32 if common_u32(r, exec, op, ty == IntType::S32, d, s) => {}
        IntType::U64 | IntType::S64 if common_u64(r, exec, op, d, s) => {}
        IntType::U16 => typed::<u16>(r, exec, op, d, s),
        IntType::S16 => typed::<i16>(r, exec, op, d, s),
        IntType::U32 => typed::<u32>(r, exec, op, d, s),
        IntType::S32 => typed::<i32>(r, exec, op, d, s),
        IntType::U64 => typed::<u64>(r, exec, op, d, s),
        IntType::S64 => typed::<i64>(r, exec, op, d, s),
    }
}

/// The frequent ops, kept free of wide arithmetic.
#[inline(always)]
fn common_u32(r: &mut Registers, exec: u32, op: IntOp, signed: bool, d: Reg, s: [Reg; 4]) -> bool {
    let two = [s[0], s[1]];
    match op {
        IntOp::Shr if signed => map2(r, exec, d, two, |a: i32, b: u32| a >> b.min(31)),
        IntOp::Shr => map2(r, exec, d, two, |a: u32, b: u32| {
            a.checked_shr(b).unwrap_or(0)
        }),
        IntOp::Min if signed => map2(r, exec, d, two, |a: i32, b: i32| a.min(b)),
        IntOp::Min => map2(r, exec, d, two, |a: u32, b: u32| a.min(b)),
        IntOp::Max if signed => map2(r, exec, d, two, |a: i32, b: i32| a.max(b)),
        IntOp::Max => map2(r, exec, d, two, |a: u32, b: u32| a.max(b)),
        IntOp::Add => map2(r, exec, d, two, u32::wrapping_add),
        IntOp::Sub => map2(r, exec, d, two, u32::wrapping_sub),
        IntOp::MulLo => map2(r, exec, d, two, u32::wrapping_mul),
        IntOp::MadLo => {
            map3(r, exec, d, [s[0], s[1], s[2]], |a: u32, b: u32, c: u32| {
                a.wrapping_mul(b).wrapping_add(c)
            });
        }
        IntOp::And => map2(r, exec, d, two, |a: u32, b: u32| a & b),
        IntOp::Or => map2(r, exec, d, two, |a: u32, b: u32| a | b),
        IntOp::Xor => map2(r, exec, d, two, |a: u32, b: u32| a ^ b),
        IntOp::Shl => map2(r, exec, d, two, |a: u32, b: u32| {
            a.checked_shl(b).unwrap_or(0)
        }),
        _ => return false,
    }
    true
}

#[inline(always)]
fn common_u64(r: &mut Registers, exec: u32, op: IntOp, d: Reg, s: [Reg; 4]) -> bool {
    let two = [s[0], s[1]];
    match op {
        IntOp::Add => map2(r, exec, d, two, u64::wrapping_add),
        IntOp::Sub => map2(r, exec, d, two, u64::wrapping_sub),
        IntOp::MulLo => map2(r, exec, d, two, u64::wrapping_mul),
        IntOp::And => map2(r, exec, d, two, |a: u64, b: u64| a & b),
        IntOp::Or => map2(r, exec, d, two, |a: u64, b: u64| a | b),
        IntOp::Xor => map2(r, exec, d, two, |a: u64, b: u64| a ^ b),
        IntOp::Shl => map2(r, exec, d, two, |a: u64, b: u32| {
            a.checked_shl(b).unwrap_or(0)
        }),
        _ => return false,
    }
    true
}

/// Every op in exact 128-bit arithmetic, then truncated: one definition for all types.
#[inline(never)]
fn typed<T: Int>(r: &mut Registers, exec: u32, op: IntOp, d: Reg, s: [Reg; 4]) {
    let (two, three) = ([s[0], s[1]], [s[0], s[1], s[2]]);
    let unary =
        |r: &mut Registers, f: fn(T) -> i128| map1(r, exec, d, s[0], |a: T| T::narrow(f(a)));
    let binary = |r: &mut Registers, f: fn(T, T) -> i128| {
        map2(r, exec, d, two, |a: T, b: T| T::narrow(f(a, b)))
    };
    let ternary = |r: &mut Registers, f: fn(T, T, T) -> i128| {
        map3(r, exec, d, three, |a: T, b: T, c: T| T::narrow(f(a, b, c)))
    };
    match op {
        IntOp::Add => binary(r, |a, b| a.wide() + b.wide()),
        IntOp::Sub => binary(r, |a, b| a.wide() - b.wide()),
        IntOp::MulLo => binary(r, |a, b| a.wide().wrapping_mul(b.wide())),
        IntOp::MulHi => binary(r, |a, b| a.wide().wrapping_mul(b.wide()) >> T::BITS),
        IntOp::MadLo => ternary(r, |a, b, c| {
            a.wide().wrapping_mul(b.wide()).wrapping_add(c.wide())
        }),
        IntOp::MadHi => ternary(r, |a, b, c| {
            (a.wide().wrapping_mul(b.wide()) >> T::BITS).wrapping_add(c.wide())
        }),
        IntOp::Sad => ternary(r, |a, b, c| (a.wide() - b.wide()).abs() + c.wide()),
        // Division by zero gives all ones, the remainder its dividend, as the hardware does.
        IntOp::Div => binary(r, |a, b| a.wide().checked_div(b.wide()).unwrap_or(-1)),
        IntOp::Rem => binary(r, |a, b| a.wide().checked_rem(b.wide()).unwrap_or(a.wide())),
        IntOp::Abs => unary(r, |a| a.wide().abs()),
        IntOp::Neg => unary(r, |a| -a.wide()),
        IntOp::Min => binary(r, |a, b| a.wide().min(b.wide())),
        IntOp::Max => binary(r, |a, b| a.wide().max(b.wide())),
        IntOp::And => binary(r, |a, b| a.wide() & b.wide()),
        IntOp::Or => binary(r, |a, b| a.wide() | b.wide()),
        IntOp::Xor => binary(r, |a, b| a.wide() ^ b.wide()),
        IntOp::Not => unary(r, |a| !a.wide()),
        IntOp::Cnot => unary(r, |a| i128::from(a.bits() == 0)),
        IntOp::Shl => map2(r, exec, d, two, |a: T, b: u32| T::narrow(shift_left(a, b))),
        IntOp::Shr => map2(r, exec, d, two, |a: T, b: u32| {
            T::narrow(a.wide() >> b.min(T::BITS))
        }),
        IntOp::Brev => unary(r, |a| i128::from(a.bits().reverse_bits() >> (64 - T::BITS))),
        IntOp::AddSat => binary(r, |a, b| clamp_s32(a.wide() + b.wide())),
        IntOp::SubSat => binary(r, |a, b| clamp_s32(a.wide() - b.wide())),
        IntOp::Bfe => map3(r, exec, d, three, extract::<T>),
        IntOp::Bfi => insert::<T>(r, exec, d, s),
        IntOp::AddCarry(..) | IntOp::SubCarry(..) | IntOp::MadCarry { .. } => {
            carrying::<T>(r, exec, op, d, three)
        }
        _ => only32(r, exec, op, d, s),
    }
}

fn shift_left<T: Int>(a: T, by: u32) -> i128 {
    if by >= T::BITS { 0 } else { a.wide() << by }
}

fn clamp_s32(value: i128) -> i128 {
    value.clamp(i32::MIN.into(), i32::MAX.into())
}

fn mask(len: u32) -> u64 {
    if len >= 64 { u64::MAX } else { (1 << len) - 1 }
}

/// `bfe`: position and length are taken modulo 256; a signed field is extended by its top bit,
/// which lies at the source's top bit when the field reaches beyond it.
fn extract<T: Int>(a: T, pos: u32, len: u32) -> T {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if len == 0 {
        return T::narrow(0);
    }
    let signed = T::narrow(-1).wide() < 0;
    let top = (pos + len - 1).min(T::BITS - 1);
    let sign = signed && a.bits() >> top & 1 == 1;
    let field = if pos >= T::BITS { 0 } else { a.bits() >> pos };
    let kept = (top + 1).saturating_sub(pos);
    let value = field & mask(kept) | if sign { !mask(kept) } else { 0 };
    T::narrow(i128::from(value))
}

fn insert<T: Int>(r: &mut Registers, exec: u32, d: Reg, s: [Reg; 4]) {
    let (pos, len) = (*r.read32(s[2]), *r.read32(s[3]));
    let mut out = [T::Bits::default(); LANES];
    for lane in 0..LANES {
        let a = T::from_bits(T::view(r, s[0])[lane]).bits();
        let b = T::from_bits(T::view(r, s[1])[lane]).bits();
        let (pos, len) = (pos[lane] & 0xff, len[lane] & 0xff);
        let field = if pos >= 64 { 0 } else { mask(len) << pos };
        let shifted = if pos >= 64 { 0 } else { a << pos };
        out[lane] = T::narrow(i128::from(b & !field | shifted & field)).to_bits();
    }
    T::write(r, d, &out, exec);
}

/// Multi-word arithmetic through the carry flag.
fn carrying<T: Int>(r: &mut Registers, exec: u32, op: IntOp, d: Reg, s: [Reg; 3]) {
    let unsigned = |v: T| i128::from(v.bits());
    let (reads, writes) = match op {
        IntOp::AddCarry(reads, writes) | IntOp::SubCarry(reads, writes) => (reads, writes),
        IntOp::MadCarry { reads, writes, .. } => (reads, writes),
        _ => (false, false),
    };
    let carry_in = if reads { r.carry } else { 0 };
    let mut carry_out = 0u32;
    let mut out = [T::Bits::default(); LANES];
    for lane in 0..LANES {
        let value = |n: usize| T::from_bits(T::view(r, s[n])[lane]);
        let carry = i128::from(carry_in >> lane & 1);
        let total = match op {
            IntOp::AddCarry(..) => unsigned(value(0)) + unsigned(value(1)) + carry,
            IntOp::SubCarry(..) => unsigned(value(0)) - unsigned(value(1)) - carry,
            IntOp::MadCarry { high, .. } => {
                let product = value(0).wide().wrapping_mul(value(1).wide());
                let part = T::narrow(if high { product >> T::BITS } else { product });
                unsigned(part) + unsigned(value(2)) + carry
            }
            _ => 0,
        };
        carry_out |= u32::from(total < 0 || total >> T::BITS != 0) << lane;
        out[lane] = T::narrow(total).to_bits();
    }
    T::write(r, d, &out, exec);
    if writes {
        r.carry = r.carry & !exec | carry_out & exec;
    }
}

/// Ops that exist for 32 bits alone.
fn only32(r: &mut Registers, exec: u32, op: IntOp, d: Reg, s: [Reg; 4]) {
    let (two, three) = ([s[0], s[1]], [s[0], s[1], s[2]]);
    match op {
        IntOp::Mul24Lo => map2(r, exec, d, two, |a: u32, b: u32| {
            low24(a).wrapping_mul(low24(b))
        }),
        IntOp::Mad24Lo => {
            map3(r, exec, d, three, |a: u32, b: u32, c: u32| {
                low24(a).wrapping_mul(low24(b)).wrapping_add(c)
            });
        }
        IntOp::Lop3(table) => map3(r, exec, d, three, |a, b, c| lop3(table, a, b, c)),
        IntOp::Prmt(mode) => map3(r, exec, d, three, |a, b, c| permute(mode, a, b, c)),
        IntOp::Shf { left, clamp } => {
            map3(r, exec, d, three, |a, b, c| funnel(left, clamp, a, b, c))
        }
        IntOp::Bmsk => map2(r, exec, d, two, |a: u32, b: u32| {
            let field = mask(b.min(32));
            if a >= 32 { 0 } else { (field << a) as u32 }
        }),
        IntOp::Szext => map2(r, exec, d, two, |a: u32, b: u32| {
            if b >= 32 { a } else { a & mask(b) as u32 }
        }),
        _ => {}
    }
}

fn low24(a: u32) -> u32 {
    a & 0xff_ffff
}

fn lop3(table: u8, a: u32, b: u32, c: u32) -> u32 {
    (0..8u32).filter(|i| table >> i & 1 == 1).fold(0, |out, i| {
        let pick = |v: u32, bit: u32| if i >> bit & 1 == 1 { v } else { !v };
        out | pick(a, 2) & pick(b, 1) & pick(c, 0)
    })
}

fn funnel(left: bool, clamp: bool, a: u32, b: u32, c: u32) -> u32 {
    let by = if clamp { c.min(32) } else { c & 31 };
    let both = u64::from(b) << 32 | u64::from(a);
    if left {
        ((u128::from(both) << by) >> 32) as u32
    } else {
        (u128::from(both) >> by) as u32
    }
}

fn permute(mode: PrmtMode, a: u32, b: u32, c: u32) -> u32 {
    let both = u64::from(b) << 32 | u64::from(a);
    let byte = |i: u32| (both >> (8 * (i & 7))) as u32 & 0xff;
    let select = |n: u32| -> u32 {
        let s = c & 3;
        match mode {
            PrmtMode::Index => {
                let nibble = c >> (4 * n) & 0xf;
                let value = byte(nibble);
                let replicate = nibble & 8 != 0;
                match (replicate, value & 0x80 != 0) {
                    (false, _) => value,
                    (true, true) => 0xff,
                    (true, false) => 0,
                }
            }
            PrmtMode::F4e => byte(s + n),
            PrmtMode::B4e => byte(s.wrapping_sub(n)),
            PrmtMode::Rc8 => byte(s),
            PrmtMode::Ecl => byte(n.max(s)),
            PrmtMode::Ecr => byte(n.min(s)),
            PrmtMode::Rc16 => byte((s & 1) * 2 + (n & 1)),
        }
    };
    (0..4).fold(0, |out, n| out | select(n) << (8 * n))
}

/// Products of twice the operands' width.
#[inline(always)]
pub fn wide_multiply(
    r: &mut Registers,
    exec: u32,
    ty: IntType,
    d: Reg,
    ab: [Reg; 2],
    c: Option<Reg>,
) {
    match (ty, c) {
        (IntType::S32, None) => map2(r, exec, d, ab, |a: i32, b: i32| i64::from(a) * i64::from(b)),
        (IntType::U32, None) => map2(r, exec, d, ab, |a: u32, b: u32| u64::from(a) * u64::from(b)),
        (IntType::S16, None) => map2(r, exec, d, ab, |a: i16, b: i16| i32::from(a) * i32::from(b)),
        (_, None) => map2(r, exec, d, ab, |a: u16, b: u16| u32::from(a) * u32::from(b)),
        (IntType::S32, Some(c)) => map3(r, exec, d, [ab[0], ab[1], c], |a: i32, b: i32, c: i64| {
            (i64::from(a) * i64::from(b)).wrapping_add(c)
        }),
        (IntType::U32, Some(c)) => map3(r, exec, d, [ab[0], ab[1], c], |a: u32, b: u32, c: u64| {
            (u64::from(a) * u64::from(b)).wrapping_add(c)
        }),
        (IntType::S16, Some(c)) => map3(r, exec, d, [ab[0], ab[1], c], |a: i16, b: i16, c: i32| {
            (i32::from(a) * i32::from(b)).wrapping_add(c)
        }),
        (_, Some(c)) => map3(r, exec, d, [ab[0], ab[1], c], |a: u16, b: u16, c: u32| {
            (u32::from(a) * u32::from(b)).wrapping_add(c)
        }),
    }
}

/// `popc`, `clz` and `bfind`.
pub fn count(r: &mut Registers, exec: u32, op: CountOp, ty: IntType, d: Reg, a: Reg) {
    match ty {
        IntType::S32 => map1(r, exec, d, a, |a: i32| count_one(op, a)),
        IntType::U64 => map1(r, exec, d, a, |a: u64| count_one(op, a)),
        IntType::S64 => map1(r, exec, d, a, |a: i64| count_one(op, a)),
        _ => map1(r, exec, d, a, |a: u32| count_one(op, a)),
    }
}

fn count_one<T: Int>(op: CountOp, a: T) -> u32 {
    let leading = |bits: u64| bits.leading_zeros() - (64 - T::BITS);
    match op {
        CountOp::Popc => a.bits().count_ones(),
        CountOp::Clz => leading(a.bits()),
        CountOp::Bfind { shift_amount } => {
            // Of a negative number the most significant zero counts.
            let bits = if a.wide() < 0 {
                T::narrow(!a.wide()).bits()
            } else {
                a.bits()
            };
            match (bits, shift_amount) {
                (0, _) => u32::MAX,
                (_, true) => leading(bits),
                (_, false) => T::BITS - 1 - leading(bits),
            }
        }
    }
}

/// `dp4a` and `dp2a`: dot products of bytes (with bytes, or with 16-bit halves).
pub fn dot(
    r: &mut Registers,
    exec: u32,
    lanes: u8,
    signed: [bool; 2],
    high: bool,
    d: Reg,
    s: [Reg; 3],
) {
    let byte = |v: u32, n: u32, signed: bool| {
        let b = (v >> (8 * n)) as u8;
        if signed {
            i64::from(b as i8)
        } else {
            i64::from(b)
        }
    };
    let half = |v: u32, n: u32, signed: bool| {
        let h = (v >> (16 * n)) as u16;
        if signed {
            i64::from(h as i16)
        } else {
            i64::from(h)
        }
    };
    map3(r, exec, d, s, |a: u32, b: u32, c: u32| {
        let sum: i64 = if lanes == 4 {
            (0..4)
                .map(|n| byte(a, n, signed[0]) * byte(b, n, signed[1]))
                .sum()
        } else {
            let first = if high { 2 } else { 0 };
            (0..2)
                .map(|n| half(a, n, signed[0]) * byte(b, first + n, signed[1]))
                .sum()
        };
        c.wrapping_add(sum as u32)
    });
}
