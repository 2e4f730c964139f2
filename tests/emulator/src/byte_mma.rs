//! `mma.sync` of 8-bit operands (integers and fp8) and of f64.
//!
//! Integer products are exact and wrap or saturate as asked; fp8 products are exact in f32 and
//! accumulated in f32 in ascending k.

use crate::fp8::{self, Format};
use crate::machine::block::Context;
use crate::machine::registers::{LANES, Registers};
use crate::ptx::ops::{ByteMma, ByteType, DoubleMma, MmaType};
use crate::tensor_core::{element16, pack_f16};

const M: usize = 16;
const N: usize = 8;
const K: usize = 32;

/// Row or column, and depth, of byte `i` of a lane's register. Registers 2 and up lie 16 deeper;
/// odd ones of A eight rows lower.
fn place_a(register: usize, lane: usize, byte: usize) -> (usize, usize) {
    let row = lane / 4 + 8 * (register % 2);
    (row, 4 * (lane % 4) + byte + 16 * (register / 2))
}

fn place_b(register: usize, lane: usize, byte: usize) -> (usize, usize) {
    (lane / 4, 4 * (lane % 4) + byte + 16 * register)
}

/// Place of accumulator `i` of a lane.
fn place_c(i: usize, lane: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2)
}

/// Executes the instruction for a whole warp.
pub fn mma(regs: &mut Registers, ctx: &mut Context<'_>, m: &ByteMma) {
    ctx.counters.mma_flop += 2 * (M * N) as u64 * u64::from(m.k);
    let (a, b) = (
        unpack(regs, &m.a[..usize::from(m.k) / 8], place_a),
        unpack(regs, &m.b[..usize::from(m.k) / 16], place_b),
    );
    match (m.a_type, m.b_type) {
        (ByteType::Fp8(fa), ByteType::Fp8(fb)) => floats(regs, m, &a, &b, (fa, fb)),
        _ => integers(regs, m, &a, &b),
    }
}

/// The bytes of a fragment by row (or column) and depth.
fn unpack(
    regs: &Registers,
    registers: &[u32],
    place: fn(usize, usize, usize) -> (usize, usize),
) -> [[u8; K]; M] {
    let mut out = [[0; K]; M];
    for (i, &reg) in registers.iter().enumerate() {
        let value = regs.read32(reg);
        for lane in 0..LANES {
            for (byte, bits) in value[lane].to_le_bytes().into_iter().enumerate() {
                let (outer, k) = place(i, lane, byte);
                out[outer][k] = bits;
            }
        }
    }
    out
}

fn integers(regs: &mut Registers, m: &ByteMma, a: &[[u8; K]; M], b: &[[u8; K]; M]) {
    let widen = |ty: ByteType, bits: u8| match ty {
        ByteType::Signed => i64::from(bits as i8),
        _ => i64::from(bits),
    };
    for i in 0..4 {
        let mut value = *regs.read32(m.c[i]);
        for lane in 0..LANES {
            let (row, column) = place_c(i, lane);
            let products = a[row].iter().zip(&b[column]).take(m.k.into());
            let sum: i64 = products
                .map(|(&x, &y)| widen(m.a_type, x) * widen(m.b_type, y))
                .sum();
            let exact = sum + i64::from(value[lane] as i32);
            value[lane] = if m.saturate {
                exact.clamp(i32::MIN.into(), i32::MAX.into()) as u32
            } else {
                exact as u32
            };
        }
        regs.write32(m.d[i], &value, u32::MAX);
    }
}

fn floats(
    regs: &mut Registers,
    m: &ByteMma,
    a: &[[u8; K]; M],
    b: &[[u8; K]; M],
    (fa, fb): (Format, Format),
) {
    let dot = |row: usize, column: usize, start: f32| {
        let products = a[row].iter().zip(&b[column]).take(m.k.into());
        products.fold(start, |sum, (&x, &y)| {
            fp8::decode(x, fa).mul_add(fp8::decode(y, fb), sum)
        })
    };
    if m.half_accumulate {
        for i in 0..2 {
            let mut value = *regs.read32(m.c[i]);
            for lane in 0..LANES {
                let (row, column) = place_c(2 * i, lane);
                let start = |bits: u32| element16(MmaType::F16, bits);
                value[lane] = pack_f16(
                    dot(row, column, start(value[lane] & 0xffff)),
                    dot(row, column + 1, start(value[lane] >> 16)),
                );
            }
            regs.write32(m.d[i], &value, u32::MAX);
        }
        return;
    }
    for i in 0..4 {
        let mut value = *regs.read32(m.c[i]);
        for lane in 0..LANES {
            let (row, column) = place_c(i, lane);
            value[lane] = dot(row, column, f32::from_bits(value[lane])).to_bits();
        }
        regs.write32(m.d[i], &value, u32::MAX);
    }
}

/// Executes an f64 m8n8k4 for a whole warp.
pub fn mma_double(regs: &mut Registers, ctx: &mut Context<'_>, m: &DoubleMma) {
    ctx.counters.mma_flop += 2 * 8 * 8 * 4;
    let (a, b) = (*regs.read64(m.a), *regs.read64(m.b));
    let out: [[u64; LANES]; 2] = std::array::from_fn(|i| {
        let c = regs.read64(m.c[i]);
        std::array::from_fn(|lane| {
            let (row, column) = (lane / 4, 2 * (lane % 4) + i);
            let sum = (0..4).fold(f64::from_bits(c[lane]), |sum, k| {
                let (x, y) = (a[4 * row + k], b[4 * column + k]);
                f64::from_bits(x).mul_add(f64::from_bits(y), sum)
            });
            sum.to_bits()
        })
    });
    for (reg, value) in m.d.into_iter().zip(out) {
        regs.write64(reg, &value, u32::MAX);
    }
}
