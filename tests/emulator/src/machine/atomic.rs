//! Atomic operations on global and shared memory.

use half::{bf16, f16};

use super::access::window_space;
use super::block::Context;
use super::checks::lanes;
use super::registers::LANES;
use super::rounding;
use super::warp::Warp;
use crate::ptx::ast::{Space, Type};
use crate::ptx::ops::{Atomic, AtomicOp, Rounding};
use crate::ptx::program::WINDOW_SHIFT;
use crate::sanitize::global::Touch;
use crate::sanitize::{Checked, Fault, Kind, shared};

impl Warp {
    pub(super) fn atomic(&mut self, ctx: &mut Context<'_>, a: &Atomic, exec: u32) -> Checked<()> {
        let addresses = self.addresses(&a.address);
        let b = self.regs.read_any(a.b);
        let c = a.c.map_or([0; LANES], |c| self.regs.read_any(c));
        let len = u64::from(a.ty.bytes());
        ctx.fenced |= a.release;
        let mut out = [0; LANES];
        for lane in lanes(exec) {
            let address = addresses[lane];
            let space = match a.space {
                Space::Generic => window_space(address),
                other => other,
            };
            let f = |old: u64| apply(a.op, a.ty, old, b[lane], c[lane]);
            if space == Space::Cluster {
                let place = ctx.place(address, lane)?;
                let at = ctx.visit(place, len, len, shared::Touch::Atomic, self.index, lane)?;
                let memory = ctx.memory_of(place.rank);
                out[lane] = memory.read(at, len as usize);
                memory.write(at, len as usize, f(out[lane]));
                ctx.counters.shared_atomics += 1;
                ctx.counters.remote_access(len, 1 << lane);
            } else if space == Space::Shared {
                let at =
                    ctx.shared_range(address, len, len, shared::Touch::Atomic, self.index, lane)?;
                out[lane] = ctx.shared_read(at, len as usize);
                ctx.shared_write(at, len as usize, f(out[lane]));
                ctx.counters.shared_atomics += 1;
            } else if address >> WINDOW_SHIFT != 0 {
                return Err(Fault::new(
                    Kind::IllegalInstruction,
                    lane as u32,
                    "atomic on local memory",
                ));
            } else {
                let (allocation, at) = ctx.global(address, len, len, Touch::Atomic, lane)?;
                ctx.publish();
                out[lane] = allocation.update(at, len, f);
                ctx.acquire();
                ctx.counters.global_atomics += 1;
            }
        }
        if let Some(d) = a.d {
            self.regs.write_any(d, &out, exec);
        }
        Ok(())
    }
}

/// The value an atomic leaves in memory.
pub fn apply(op: AtomicOp, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    match (op, ty) {
        (AtomicOp::Exch, _) => b,
        (AtomicOp::Cas, _) => {
            let mask = if ty.bits() == 64 {
                u64::MAX
            } else {
                (1 << ty.bits()) - 1
            };
            if old & mask == b & mask { c } else { old }
        }
        (AtomicOp::And, _) => old & b,
        (AtomicOp::Or, _) => old | b,
        (AtomicOp::Xor, _) => old ^ b,
        (AtomicOp::Inc, _) => {
            if old as u32 >= b as u32 {
                0
            } else {
                old + 1
            }
        }
        (AtomicOp::Dec, _) => {
            let (value, limit) = (old as u32, b as u32);
            u64::from(if value == 0 || value > limit {
                limit
            } else {
                value - 1
            })
        }
        (_, Type::F32) => {
            let (x, y) = (f32::from_bits(old as u32), f32::from_bits(b as u32));
            u64::from(float(op, x.into(), y.into(), |v| (v as f32).to_bits()))
        }
        (_, Type::F64) => {
            let (x, y) = (f64::from_bits(old), f64::from_bits(b));
            if op == AtomicOp::Add {
                (x + y).to_bits()
            } else {
                float(op, x, y, f64::to_bits)
            }
        }
        (_, Type::F16 | Type::Bf16) => half(op, ty, old as u16, b as u16).into(),
        (_, Type::F16x2 | Type::Bf16x2) => {
            let element = if ty == Type::F16x2 {
                Type::F16
            } else {
                Type::Bf16
            };
            let low = half(op, element, old as u16, b as u16);
            let high = half(op, element, (old >> 16) as u16, (b >> 16) as u16);
            u64::from(low) | u64::from(high) << 16
        }
        (AtomicOp::Add, _) => old.wrapping_add(b),
        (AtomicOp::Min | AtomicOp::Max, _) => {
            let take_b = match ty {
                Type::S32 => (b as i32) < (old as i32),
                Type::S64 => (b as i64) < (old as i64),
                Type::U32 | Type::B32 => (b as u32) < (old as u32),
                _ => b < old,
            };
            if take_b == (op == AtomicOp::Min) {
                b
            } else {
                old
            }
        }
    }
}

fn float<T>(op: AtomicOp, x: f64, y: f64, encode: impl Fn(f64) -> T) -> T {
    encode(match op {
        AtomicOp::Min => x.min(y),
        AtomicOp::Max => x.max(y),
        _ => x + y,
    })
}

fn half(op: AtomicOp, ty: Type, x: u16, y: u16) -> u16 {
    if ty == Type::F16 {
        let exact = |v| f16::from_bits(v).to_f64();
        float(op, exact(x), exact(y), |v| {
            rounding::to_f16(v, Rounding::Nearest).to_bits()
        })
    } else {
        let exact = |v| bf16::from_bits(v).to_f64();
        float(op, exact(x), exact(y), |v| {
            rounding::to_bf16(v, Rounding::Nearest).to_bits()
        })
    }
}
