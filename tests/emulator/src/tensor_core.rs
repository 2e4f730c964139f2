//! Matrix instructions: `mma.sync`, `ldmatrix` and `stmatrix`.
//!
//! Fragment layouts follow the PTX ISA's figures. Products are exact in f32 (16-bit inputs) and
//! accumulated in f32 in ascending k; a GPU may add in another order and with other rounding.

use crate::machine::block::Context;
use crate::machine::registers::{LANES, Registers};
use crate::machine::rounding::to_f16;
use crate::machine::warp::Warp;
use crate::ptx::ops::{Matrix, Mma, MmaType, Rounding};
use crate::sanitize::{Checked, shared::Touch};

/// Rows of A and of the accumulators.
const M: usize = 16;
/// Columns of B and of the accumulators.
const N: usize = 8;
/// Largest depth.
const K: usize = 16;

/// A tile of A, of B, and of the accumulators.
pub type Rows = [[f32; K]; M];
pub type Columns = [[f32; N]; K];
pub type Accumulators = [[f32; N]; M];

/// The element in the low 16 bits, exactly.
#[inline(always)]
pub fn element16(ty: MmaType, bits: u32) -> f32 {
    if ty == MmaType::Bf16 {
        return f32::from_bits(bits << 16);
    }
    // Moving the exponent field and scaling by 2^(127 - 15) is exact, for subnormals too.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let infinite = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
}

/// A tf32 operand: the low 13 bits of the register are ignored.
pub fn element_tf32(bits: u32) -> f32 {
    f32::from_bits(bits & 0xffff_e000)
}

/// `c += a * b` for one 16 x 8 tile of depth `DEPTH`, eight rows at a time.
#[inline(always)]
fn multiply_tile<const DEPTH: usize>(a: &Rows, b: &Columns, c: &mut Accumulators) {
    for first in [0, 8] {
        let mut sum: [[f32; N]; 8] = std::array::from_fn(|row| c[first + row]);
        for depth in 0..DEPTH {
            for row in 0..8 {
                for column in 0..N {
                    sum[row][column] =
                        a[first + row][depth].mul_add(b[depth][column], sum[row][column]);
                }
            }
        }
        c[first..first + 8].copy_from_slice(&sum);
    }
}

#[inline(always)]
fn multiply_depth(a: &Rows, b: &Columns, c: &mut Accumulators, k: usize) {
    match k {
        16 => multiply_tile::<16>(a, b, c),
        8 => multiply_tile::<8>(a, b, c),
        _ => multiply_tile::<4>(a, b, c),
    }
}

/// `c += a * b` with the widest instructions the processor has; `k` is 16, 8 or 4.
pub fn multiply(a: &Rows, b: &Columns, c: &mut Accumulators, k: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        #[target_feature(enable = "avx2,fma")]
        fn wide(a: &Rows, b: &Columns, c: &mut Accumulators, k: usize) {
            multiply_depth(a, b, c, k);
        }
        // SAFETY: the features were detected just above.
        unsafe { wide(a, b, c, k) };
        return;
    }
    multiply_depth(a, b, c, k);
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

/// Executes an `mma.sync` of a whole warp.
pub fn mma(regs: &mut Registers, ctx: &mut Context<'_>, mma: &Mma) {
    ctx.counters.mma_flop += 2 * (M * N) as u64 * u64::from(mma.k);
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        #[target_feature(enable = "avx2,fma")]
        fn wide(regs: &mut Registers, mma: &Mma) {
            execute(regs, mma);
        }
        // SAFETY: the features were detected just above.
        unsafe { wide(regs, mma) };
        return;
    }
    execute(regs, mma);
}

#[inline(always)]
fn execute(regs: &mut Registers, mma: &Mma) {
    let (mut a, mut b, mut c) = ([[0.0; K]; M], [[0.0; N]; K], [[0.0; N]; M]);
    match mma.ty {
        MmaType::Tf32 => unpack_tf32(regs, mma, &mut a, &mut b),
        MmaType::Bf16 => unpack16(regs, mma, MmaType::Bf16, &mut a, &mut b),
        MmaType::F16 => unpack16(regs, mma, MmaType::F16, &mut a, &mut b),
    }
    if mma.half_accumulate {
        for i in 0..2 {
            let value = regs.read32(mma.c[i]);
            for lane in 0..LANES {
                let (row, column) = (lane / 4 + 8 * i, 2 * (lane % 4));
                c[row][column] = element16(MmaType::F16, value[lane] & 0xffff);
                c[row][column + 1] = element16(MmaType::F16, value[lane] >> 16);
            }
        }
    } else {
        for i in 0..4 {
            let value = regs.read32(mma.c[i]);
            for lane in 0..LANES {
                c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = f32::from_bits(value[lane]);
            }
        }
    }
    multiply_depth(&a, &b, &mut c, usize::from(mma.k));
    for i in 0..if mma.half_accumulate { 2 } else { 4 } {
        let mut value = [0; LANES];
        for (lane, slot) in value.iter_mut().enumerate() {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            *slot = if mma.half_accumulate {
                pack_f16(c[row + 8 * i][column], c[row + 8 * i][column + 1])
            } else {
                c[row + 8 * (i / 2)][column + i % 2].to_bits()
            };
        }
        regs.write32(mma.d[i], &value, u32::MAX);
    }
}

/// Two f32 as packed f16, the first in the low half.
pub fn pack_f16(low: f32, high: f32) -> u32 {
    let bits = |x: f32| u32::from(to_f16(f64::from(x), Rounding::Nearest).to_bits());
    bits(low) | bits(high) << 16
}

#[inline(always)]
fn unpack16(regs: &Registers, mma: &Mma, ty: MmaType, a: &mut Rows, b: &mut Columns) {
    let deep = usize::from(mma.k) / 8;
    for half in 0..deep {
        for upper in 0..2 {
            let value = regs.read32(mma.a[2 * half + upper]);
            for lane in 0..LANES {
                let (row, k) = (lane / 4 + 8 * upper, 2 * (lane % 4) + 8 * half);
                a[row][k] = element16(ty, value[lane] & 0xffff);
                a[row][k + 1] = element16(ty, value[lane] >> 16);
            }
        }
        let value = regs.read32(mma.b[half]);
        for lane in 0..LANES {
            let (column, k) = (lane / 4, 2 * (lane % 4) + 8 * half);
            b[k][column] = element16(ty, value[lane] & 0xffff);
            b[k + 1][column] = element16(ty, value[lane] >> 16);
        }
    }
}

fn unpack_tf32(regs: &Registers, mma: &Mma, a: &mut Rows, b: &mut Columns) {
    for half in 0..usize::from(mma.k) / 4 {
        for upper in 0..2 {
            let value = regs.read32(mma.a[2 * half + upper]);
            for lane in 0..LANES {
                a[lane / 4 + 8 * upper][lane % 4 + 4 * half] = element_tf32(value[lane]);
            }
        }
        let value = regs.read32(mma.b[half]);
        for lane in 0..LANES {
            b[lane % 4 + 4 * half][lane / 4] = element_tf32(value[lane]);
        }
    }
}

/// Offsets of the matrices' rows: lanes 8i to 8i + 7 hold those of matrix i.
fn rows(warp: &Warp, ctx: &mut Context<'_>, m: &Matrix, touch: Touch) -> Checked<[usize; LANES]> {
    let addresses = warp.addresses(&m.address);
    let count = 8 * usize::from(m.count);
    ctx.counters
        .shared_access(&addresses, 16, u32::MAX >> (32 - count));
    let mut out = [0; LANES];
    for lane in 0..count {
        out[lane] = ctx.shared_range(addresses[lane], 16, 16, touch, warp.index, lane)?;
    }
    Ok(out)
}

/// Shared-memory offset of each lane's element pair of matrix `i`: contiguous, or the two
/// offsets of a transposed pair.
fn pair(rows: &[usize; LANES], i: usize, lane: usize, transpose: bool) -> (usize, usize) {
    if transpose {
        let at = |k: usize| rows[8 * i + 2 * (lane % 4) + k] + 2 * (lane / 4);
        (at(0), at(1))
    } else {
        let at = rows[8 * i + lane / 4] + 4 * (lane % 4);
        (at, at + 2)
    }
}

/// `ldmatrix`.
pub fn load_matrix(warp: &mut Warp, ctx: &mut Context<'_>, m: &Matrix) -> Checked<()> {
    let rows = rows(warp, ctx, m, Touch::Read)?;
    for i in 0..usize::from(m.count) {
        let mut out = [0; LANES];
        if m.transpose {
            for (lane, slot) in out.iter_mut().enumerate() {
                let (low, high) = pair(&rows, i, lane, true);
                *slot = (ctx.shared_read(low, 2) | ctx.shared_read(high, 2) << 16) as u32;
            }
        } else {
            for (row, four) in rows[8 * i..8 * i + 8].iter().zip(out.chunks_exact_mut(4)) {
                let bytes = &ctx.memory.bytes[*row..*row + 16];
                for (slot, word) in four.iter_mut().zip(bytes.chunks_exact(4)) {
                    *slot = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                }
            }
        }
        warp.regs.write32(m.regs[i], &out, u32::MAX);
    }
    Ok(())
}

/// `stmatrix`.
pub fn store_matrix(warp: &mut Warp, ctx: &mut Context<'_>, m: &Matrix) -> Checked<()> {
    let rows = rows(warp, ctx, m, Touch::Write)?;
    for i in 0..usize::from(m.count) {
        let value = *warp.regs.read32(m.regs[i]);
        for (lane, value) in value.into_iter().enumerate() {
            let (low, high) = pair(&rows, i, lane, m.transpose);
            ctx.shared_write(low, 2, u64::from(value & 0xffff));
            ctx.shared_write(high, 2, u64::from(value >> 16));
        }
    }
    Ok(())
}
