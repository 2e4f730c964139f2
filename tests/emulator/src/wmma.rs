//! `wmma`: matrix fragments that a warp loads, multiplies and stores as a whole.
//!
//! PTX leaves open which thread holds which element. Here element `e` of a matrix, row by row,
//! lies in lane `e / slots`, slot `e % slots`; where a fragment has room for more elements than
//! the matrix has, the matrix is repeated.

use crate::machine::block::Context;
use crate::machine::registers::LANES;
use crate::machine::warp::Warp;
use crate::ptx::ast::Space;
use crate::ptx::ops::{Access, AnyReg, ByteType, MmaType, Reg, WmmaAccess, WmmaProduct, WmmaType};
use crate::sanitize::Checked;
use crate::tensor_core::{element_tf32, element16, pack_f16};

/// Elements in a register.
fn per_register(bytes: u8) -> usize {
    4 / usize::from(bytes)
}

/// Executes a load or store of a fragment.
pub fn access(warp: &mut Warp, ctx: &mut Context<'_>, w: &WmmaAccess) -> Checked<()> {
    let per = per_register(w.bytes);
    let slots = per * w.regs.len();
    let base = warp.addresses(&w.address)[0];
    let leading = match w.stride {
        Some(stride) => u64::from(warp.regs.read32(stride)[0]),
        None if w.row_major => w.columns.into(),
        None => w.rows.into(),
    };
    let size = u64::from(w.bytes);
    let mut words = vec![[0u32; LANES]; w.regs.len()];
    if !w.load {
        for (word, &reg) in words.iter_mut().zip(&w.regs) {
            *word = *warp.regs.read32(reg);
        }
    }
    let one = Access {
        space: w.space,
        size: w.bytes,
        signed: false,
        strong: false,
        release: false,
        count: 1,
        regs: [AnyReg {
            index: 0,
            wide: false,
        }; 4],
        discard: 0,
        address: w.address,
    };
    for slot in 0..slots {
        let addresses = std::array::from_fn(|lane| {
            let e = (lane * slots + slot) % (usize::from(w.rows) * usize::from(w.columns));
            let (row, column) = (e / usize::from(w.columns), e % usize::from(w.columns));
            let (outer, inner) = match w.row_major {
                true => (row, column),
                false => (column, row),
            };
            base + (outer as u64 * leading + inner as u64) * size
        });
        let (word, shift) = (slot / per, 8 * u32::from(w.bytes) * (slot % per) as u32);
        if w.load {
            let values = warp.load_lanes(ctx, &one, &addresses)?;
            for lane in 0..LANES {
                words[word][lane] |= (values[lane] as u32) << shift;
            }
        } else {
            let values = words[word].map(|bits| u64::from(bits >> shift));
            warp.store_lanes(ctx, &one, &addresses, &values)?;
        }
    }
    if w.load {
        for (word, &reg) in words.iter().zip(&w.regs) {
            warp.regs.write32(reg, word, u32::MAX);
        }
    }
    Ok(())
}

/// The elements of a fragment, row by row, as their bits.
fn gather(warp: &Warp, regs: &[Reg], bytes: u8, count: usize) -> Vec<u32> {
    let per = per_register(bytes);
    let slots = per * regs.len();
    let mask = u32::MAX >> (32 - 8 * u32::from(bytes));
    (0..count)
        .map(|e| {
            let (lane, slot) = (e / slots, e % slots);
            let shift = 8 * u32::from(bytes) * (slot % per) as u32;
            warp.regs.read32(regs[slot / per])[lane] >> shift & mask
        })
        .collect()
}

/// A float of an operand, exactly.
fn float(ty: WmmaType, bits: u32) -> f32 {
    match ty {
        WmmaType::Float(MmaType::Tf32) => element_tf32(bits),
        WmmaType::Float(ty) => element16(ty, bits),
        WmmaType::Byte(_) => 0.0,
    }
}

fn integer(ty: WmmaType, bits: u32) -> i64 {
    match ty {
        WmmaType::Byte(ByteType::Signed) => i64::from(bits as u8 as i8),
        _ => i64::from(bits as u8),
    }
}

/// Executes `wmma.mma`.
pub fn multiply(warp: &mut Warp, ctx: &mut Context<'_>, w: &WmmaProduct) {
    let [m, n, k] = w.shape.map(usize::from);
    ctx.counters.mma_flop += 2 * (m * n * k) as u64;
    let a = gather(warp, &w.a, w.a_type.bytes(), m * k);
    let b = gather(warp, &w.b, w.b_type.bytes(), k * n);
    let c = gather(warp, &w.c, if w.half_c { 2 } else { 4 }, m * n);
    let element = |row: usize, column: usize| -> u32 {
        let start = c[row * n + column];
        if let (WmmaType::Byte(_), _) | (_, WmmaType::Byte(_)) = (w.a_type, w.b_type) {
            let products = (0..k)
                .map(|i| integer(w.a_type, a[row * k + i]) * integer(w.b_type, b[i * n + column]));
            let exact = products.sum::<i64>() + i64::from(start as i32);
            return match w.saturate {
                true => exact.clamp(i32::MIN.into(), i32::MAX.into()) as u32,
                false => exact as u32,
            };
        }
        let start = match w.half_c {
            true => element16(MmaType::F16, start),
            false => f32::from_bits(start),
        };
        let sum = (0..k).fold(start, |sum, i| {
            float(w.a_type, a[row * k + i]).mul_add(float(w.b_type, b[i * n + column]), sum)
        });
        match w.half_d {
            true => pack_f16(sum, 0.0) & 0xffff,
            false => sum.to_bits(),
        }
    };
    let per = if w.half_d { 2 } else { 1 };
    let slots = per * w.d.len();
    for (i, &reg) in w.d.iter().enumerate() {
        let value = std::array::from_fn(|lane| {
            (0..per).fold(0, |bits, part| {
                let e = lane * slots + i * per + part;
                bits | element(e / n, e % n) << (16 * part)
            })
        });
        warp.regs.write32(reg, &value, u32::MAX);
    }
}

impl WmmaType {
    /// Bytes of an element.
    pub fn bytes(self) -> u8 {
        match self {
            WmmaType::Float(MmaType::Tf32) => 4,
            WmmaType::Float(_) => 2,
            WmmaType::Byte(_) => 1,
        }
    }
}

/// State spaces that fragments may lie in.
pub fn known_space(space: Space) -> bool {
    matches!(space, Space::Generic | Space::Global | Space::Shared)
}
