//! Ops that touch registers alone, compiled once for the baseline and once for AVX2 with FMA.

use super::convert::convert;
use super::float::{self, compare, compare_float, compare_packed};
use super::integer;
use super::registers::{LANES, Registers, map1, map2};
use crate::ptx::ast::{Space, Type};
use crate::ptx::lower::window;
use crate::ptx::ops::{AnyReg, BoolOp, CompareType, Comparison, FloatType, IntType, Op, Reg};
use crate::ptx::program::{
    CLUSTER_SHIFT, FUNCTION_WINDOW, SHARED_WINDOW, WINDOW_MASK, WINDOW_SHIFT,
};

/// Executes a register op on the lanes of `exec`; false if the op is not one.
pub type Alu = fn(&Op, &mut Registers, u32) -> bool;

/// The fastest variant this processor runs.
pub fn select() -> Alu {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("f16c")
        && std::is_x86_feature_detected!("bmi2")
    {
        return execute_avx2;
    }
    execute
}

#[cfg(target_arch = "x86_64")]
fn execute_avx2(op: &Op, r: &mut Registers, exec: u32) -> bool {
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
    fn inner(op: &Op, r: &mut Registers, exec: u32) -> bool {
        execute(op, r, exec)
    }
    // SAFETY: `select` hands this function out only when the processor has these features.
    unsafe { inner(op, r, exec) }
}

#[inline(always)]
fn execute(op: &Op, r: &mut Registers, exec: u32) -> bool {
    match op {
        Op::Int { op, ty, d, s } => integer::integer(r, exec, *op, *ty, *d, *s),
        Op::Float { op, ty, mods, d, s } => float::float(r, exec, *op, *ty, mods, *d, *s),
        Op::Wide { ty, d, a, b, c } => integer::wide_multiply(r, exec, *ty, *d, [*a, *b], *c),
        Op::Move { wide: false, d, a } => map1(r, exec, *d, *a, |x: u32| x),
        Op::Move { wide: true, d, a } => map1(r, exec, *d, *a, |x: u64| x),
        Op::Convert(c) => convert(r, exec, c),
        Op::Setp { c, p, q } => {
            let (yes, no) = comparison(r, c);
            if let Some(p) = p {
                r.set_pred(*p, yes, exec);
            }
            if let Some(q) = q {
                r.set_pred(*q, no, exec);
            }
        }
        Op::Select {
            wide: false,
            d,
            a,
            b,
            p,
        } => {
            let mask = r.pred(*p);
            let (a, b) = (r.read32(*a), r.read32(*b));
            let mut out = [0; LANES];
            for lane in 0..LANES {
                let keep = ((mask >> lane) & 1).wrapping_sub(1);
                out[lane] = a[lane] & !keep | b[lane] & keep;
            }
            r.write32(*d, &out, exec);
        }
        Op::Select {
            wide: true,
            d,
            a,
            b,
            p,
        } => {
            let mask = r.pred(*p);
            let (a, b) = (r.read64(*a), r.read64(*b));
            let mut out = [0; LANES];
            for lane in 0..LANES {
                out[lane] = if mask >> lane & 1 == 1 {
                    a[lane]
                } else {
                    b[lane]
                };
            }
            r.write64(*d, &out, exec);
        }
        Op::PredLogic { op, d, a, b } => {
            let value = combine(*op, r.pred(*a), r.pred(*b));
            r.set_pred(*d, value, exec);
        }
        Op::PredNot { d, a } => r.set_pred(*d, !r.pred(*a), exec),
        Op::PredMove { d, a } => r.set_pred(*d, r.pred(*a), exec),
        other => return rare(other, r, exec),
    }
    true
}

#[inline(never)]
fn rare(op: &Op, r: &mut Registers, exec: u32) -> bool {
    match op {
        Op::Packed { op, ty, mods, d, s } => float::packed(r, exec, *op, *ty, mods, *d, *s),
        Op::Count { op, ty, d, a } => integer::count(r, exec, *op, *ty, *d, *a),
        Op::Dot {
            lanes,
            a_signed,
            b_signed,
            high,
            d,
            s,
        } => {
            integer::dot(r, exec, *lanes, [*a_signed, *b_signed], *high, *d, *s);
        }
        Op::Set { c, d, to } => set(r, exec, c, *d, *to),
        Op::SelectSign {
            wide,
            float,
            d,
            a,
            b,
            c,
        } => select_sign(r, exec, *wide, *float, *d, [*a, *b, *c]),
        Op::Pack {
            d,
            parts,
            count,
            bits,
        } => pack(r, exec, *d, &parts[..usize::from(*count)], *bits),
        Op::Unpack {
            parts,
            count,
            bits,
            a,
        } => unpack(r, exec, &parts[..usize::from(*count)], *bits, *a),
        Op::Convaddr {
            d,
            a,
            space,
            to_generic,
        } => convert_address(r, exec, *d, *a, *space, *to_generic),
        Op::IsSpace { p, a, space } => {
            let addresses = *r.read64(*a);
            let holds = |address: u64| match space {
                Space::Global | Space::Const | Space::Generic => address >> WINDOW_SHIFT == 0,
                Space::Shared => address >> CLUSTER_SHIFT == SHARED_WINDOW >> CLUSTER_SHIFT,
                other => address >> WINDOW_SHIFT == window(*other) >> WINDOW_SHIFT,
            };
            let mask = addresses
                .iter()
                .enumerate()
                .fold(0, |m, (lane, &a)| m | u32::from(holds(a)) << lane);
            r.set_pred(*p, mask, exec);
        }
        Op::Nothing | Op::Nanosleep => {}
        _ => return false,
    }
    true
}

fn combine(op: BoolOp, a: u32, b: u32) -> u32 {
    match op {
        BoolOp::And => a & b,
        BoolOp::Or => a | b,
        BoolOp::Xor => a ^ b,
    }
}

/// The lanes where a comparison holds and those where it does not, each combined with the
/// optional predicate; for packed types the two are the halves' results.
#[inline(always)]
fn comparison(r: &Registers, c: &Comparison) -> (u32, u32) {
    let (yes, no) = match c.ty {
        CompareType::Int(IntType::U32) => both(compare::<u32>(r, c.compare, c.a, c.b)),
        CompareType::Int(IntType::S32) => both(compare::<i32>(r, c.compare, c.a, c.b)),
        CompareType::Int(IntType::U64) => both(compare::<u64>(r, c.compare, c.a, c.b)),
        CompareType::Int(IntType::S64) => both(compare::<i64>(r, c.compare, c.a, c.b)),
        CompareType::Int(IntType::U16) => both(compare::<u16>(r, c.compare, c.a, c.b)),
        CompareType::Int(IntType::S16) => both(compare::<i16>(r, c.compare, c.a, c.b)),
        CompareType::Float(FloatType::F32) if !c.ftz => {
            both(compare::<f32>(r, c.compare, c.a, c.b))
        }
        CompareType::Float(ty) => both(compare_float(r, c.compare, ty, c.ftz, c.a, c.b)),
        CompareType::Packed(ty) => {
            let half = |h| compare_packed(r, c.compare, ty, c.ftz, [c.a, c.b], h);
            (half(0), half(1))
        }
    };
    match c.combine {
        None => (yes, no),
        Some((op, p, negated)) => {
            let other = if negated { !r.pred(p) } else { r.pred(p) };
            (combine(op, yes, other), combine(op, no, other))
        }
    }
}

fn both(yes: u32) -> (u32, u32) {
    (yes, !yes)
}

/// `set`: true is 1.0 for float destinations, all ones for integers.
fn set(r: &mut Registers, exec: u32, c: &Comparison, d: Reg, to: Type) {
    let (yes, high) = comparison(r, c);
    let packed = matches!(c.ty, CompareType::Packed(_));
    let one = match to {
        Type::F32 => 1.0f32.to_bits(),
        Type::F16 | Type::F16x2 => 0x3c00,
        Type::Bf16 | Type::Bf16x2 => 0x3f80,
        _ if packed => 0xffff,
        Type::U16 | Type::S16 => 0xffff,
        _ => u32::MAX,
    };
    let mut out = [0; LANES];
    for (lane, slot) in out.iter_mut().enumerate() {
        *slot = if yes >> lane & 1 == 1 { one } else { 0 };
        if packed && high >> lane & 1 == 1 {
            *slot |= one << 16;
        }
    }
    r.write32(d, &out, exec);
}

fn select_sign(r: &mut Registers, exec: u32, wide: bool, float: bool, d: Reg, s: [Reg; 3]) {
    let control = *r.read32(s[2]);
    let first = |c: u32| {
        if float {
            f32::from_bits(c) >= 0.0
        } else {
            c as i32 >= 0
        }
    };
    let (a, b) = (AnyReg { index: s[0], wide }, AnyReg { index: s[1], wide });
    let (a, b) = (r.read_any(a), r.read_any(b));
    let mut out = [0; LANES];
    for lane in 0..LANES {
        out[lane] = if first(control[lane]) {
            a[lane]
        } else {
            b[lane]
        };
    }
    r.write_any(AnyReg { index: d, wide }, &out, exec);
}

fn part_mask(bits: u8) -> u64 {
    (1 << bits) - 1
}

fn pack(r: &mut Registers, exec: u32, d: AnyReg, parts: &[AnyReg], bits: u8) {
    if let ([lo, hi], 16, false) = (parts, bits, d.wide) {
        return map2(
            r,
            exec,
            d.index,
            [lo.index, hi.index],
            |lo: u32, hi: u32| lo & 0xffff | hi << 16,
        );
    }
    let mut out = [0; LANES];
    for (n, part) in parts.iter().enumerate() {
        let value = r.read_any(*part);
        for lane in 0..LANES {
            out[lane] |= (value[lane] & part_mask(bits)) << (n as u32 * u32::from(bits));
        }
    }
    r.write_any(d, &out, exec);
}

fn unpack(r: &mut Registers, exec: u32, parts: &[Option<AnyReg>], bits: u8, a: AnyReg) {
    let value = r.read_any(a);
    for (n, part) in parts.iter().enumerate() {
        if let Some(part) = part {
            let shift = n as u32 * u32::from(bits);
            r.write_any(*part, &value.map(|v| v >> shift & part_mask(bits)), exec);
        }
    }
}

fn convert_address(
    r: &mut Registers,
    exec: u32,
    d: AnyReg,
    a: AnyReg,
    space: Space,
    to_generic: bool,
) {
    let base = window(space);
    let value = r.read_any(a).map(|v| match (to_generic, base) {
        (true, _) => v | base,
        // Device pointers carry no window; parameters keep theirs, their space is uniform.
        (false, 0) => v,
        (false, _) if v >> WINDOW_SHIFT == FUNCTION_WINDOW >> WINDOW_SHIFT => v,
        (false, _) => v & WINDOW_MASK,
    });
    r.write_any(d, &value, exec);
}
