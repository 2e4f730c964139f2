//! `wgmma.mma_async`: a warpgroup's matrix product with operands in shared memory.
//!
//! Each warp computes its 16 of the 64 rows when the instruction is issued. Shared-memory
//! layouts are those of the PTX ISA's matrix descriptors; CUTLASS writes them down as layout
//! functions (mma_sm90_desc.hpp).

use crate::machine::block::Context;
use crate::machine::registers::LANES;
use crate::machine::warp::Warp;
use crate::ptx::ops::{MmaType, Reg, ScaleD, Wgmma};
use crate::sanitize::Checked;
use crate::sanitize::shared::Touch;
use crate::tensor_core::{
    Accumulators, Columns, Rows, element_tf32, element16, multiply, pack_f16,
};
use crate::tensor_map::Swizzle;

/// A decoded matrix descriptor; all in bytes.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    swizzle: Swizzle,
}

impl Descriptor {
    fn decode(bits: u64) -> Self {
        let field = |shift: u32| (bits >> shift & 0x3fff) << 4;
        let swizzle = match bits >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::Bytes128,
            2 => Swizzle::Bytes64,
            _ => Swizzle::Bytes32,
        };
        Self {
            start: field(0),
            leading: field(16),
            stride: field(32),
            swizzle,
        }
    }

    /// Offset of the element in row (or column) `outer` and depth `k`; `major` says that the
    /// outer index runs along memory instead of the depth.
    fn offset(&self, outer: u64, k: u64, size: u64, major: bool) -> u64 {
        let row = self.swizzle.row_bytes().map_or(16, u64::from);
        let at = match (major, self.swizzle) {
            // Rows of the swizzle's width, eight to an atom.
            (false, Swizzle::None) => {
                let byte = k * size;
                outer / 8 * self.stride + outer % 8 * 16 + byte / 16 * self.leading + byte % 16
            }
            (false, _) => outer / 8 * self.stride + outer % 8 * row + k * size,
            (true, Swizzle::None) => {
                let byte = outer * size;
                byte / 16 * self.stride + byte % 16 + k % 8 * 16 + k / 8 * self.leading
            }
            (true, _) => {
                let byte = outer * size;
                byte / row * self.leading + byte % row + k % 8 * row + k / 8 * self.stride
            }
        };
        self.swizzle.apply(self.start + at)
    }
}

/// Element of an operand in shared memory.
fn element(ctx: &Context<'_>, ty: MmaType, offset: u64) -> f32 {
    match ty {
        MmaType::Tf32 => element_tf32(ctx.shared_read(offset as usize, 4) as u32),
        _ => element16(ty, ctx.shared_read(offset as usize, 2) as u32),
    }
}

/// Executes the instruction for one warp.
pub fn execute(warp: &mut Warp, ctx: &mut Context<'_>, w: &Wgmma) -> Checked<()> {
    let depth = if w.ty == MmaType::Tf32 { 8 } else { 16 };
    let size = if w.ty == MmaType::Tf32 { 4 } else { 2 };
    let first_row = u64::from(warp.index % 4) * 16;
    let mut a: Rows = [[0.0; 16]; 16];
    match w.a_descriptor {
        Some(reg) => {
            let descriptor = Descriptor::decode(warp.regs.read64(reg)[0]);
            for (row, slots) in a.iter_mut().enumerate() {
                for (k, slot) in slots.iter_mut().enumerate().take(depth) {
                    let at =
                        descriptor.offset(first_row + row as u64, k as u64, size, w.transpose_a);
                    ctx.shared_range(at, size, size, Touch::Read, warp.index, row)?;
                    *slot = element(ctx, w.ty, at);
                }
            }
        }
        None => register_rows(warp, w, &mut a),
    }
    if w.negate_a {
        a.iter_mut().flatten().for_each(|x| *x = -*x);
    }
    let keep = match w.scale_d {
        ScaleD::Constant(keep) => keep,
        ScaleD::Predicate(p, negated) => (warp.regs.pred(p) & 1 == 1) != negated,
    };
    let descriptor = Descriptor::decode(warp.regs.read64(w.b_descriptor)[0]);
    for tile in 0..usize::from(w.n) / 8 {
        let mut b: Columns = [[0.0; 8]; 16];
        for (k, slots) in b.iter_mut().enumerate().take(depth) {
            for (column, slot) in slots.iter_mut().enumerate() {
                let at =
                    descriptor.offset((tile * 8 + column) as u64, k as u64, size, w.transpose_b);
                ctx.shared_range(at, size, size, Touch::Read, warp.index, column)?;
                let value = element(ctx, w.ty, at);
                *slot = if w.negate_b { -value } else { value };
            }
        }
        let mut c: Accumulators = [[0.0; 8]; 16];
        if keep {
            read_tile(warp, w, tile, &mut c);
        }
        multiply(&a, &b, &mut c, depth);
        write_tile(warp, w, tile, &c);
    }
    ctx.counters.mma_flop += 2 * 16 * depth as u64 * u64::from(w.n);
    Ok(())
}

/// A's fragment from registers, laid out as for `mma.sync`.
fn register_rows(warp: &Warp, w: &Wgmma, a: &mut Rows) {
    for (i, &reg) in w.a.iter().enumerate() {
        let value = warp.regs.read32(reg);
        for lane in 0..LANES {
            let row = lane / 4 + 8 * (i % 2);
            if w.ty == MmaType::Tf32 {
                a[row][lane % 4 + 4 * (i / 2)] = element_tf32(value[lane]);
            } else {
                let k = 2 * (lane % 4) + 8 * (i / 2);
                a[row][k] = element16(w.ty, value[lane] & 0xffff);
                a[row][k + 1] = element16(w.ty, value[lane] >> 16);
            }
        }
    }
}

/// Registers of an 8-column tile of the accumulators, with the row and column of lane 0's value.
fn tile_registers(w: &Wgmma, tile: usize) -> Vec<(Reg, usize, usize)> {
    if w.half_accumulate {
        (0..2).map(|i| (w.d[2 * tile + i], 8 * i, 0)).collect()
    } else {
        (0..4)
            .map(|i| (w.d[4 * tile + i], 8 * (i / 2), i % 2))
            .collect()
    }
}

fn read_tile(warp: &Warp, w: &Wgmma, tile: usize, c: &mut Accumulators) {
    for (reg, row, column) in tile_registers(w, tile) {
        let value = warp.regs.read32(reg);
        for lane in 0..LANES {
            let (row, column) = (row + lane / 4, column + 2 * (lane % 4));
            if w.half_accumulate {
                c[row][column] = element16(MmaType::F16, value[lane] & 0xffff);
                c[row][column + 1] = element16(MmaType::F16, value[lane] >> 16);
            } else {
                c[row][column] = f32::from_bits(value[lane]);
            }
        }
    }
}

fn write_tile(warp: &mut Warp, w: &Wgmma, tile: usize, c: &Accumulators) {
    for (reg, row, column) in tile_registers(w, tile) {
        let value = std::array::from_fn(|lane| {
            let (row, column) = (row + lane / 4, column + 2 * (lane % 4));
            if w.half_accumulate {
                pack_f16(c[row][column], c[row][column + 1])
            } else {
                c[row][column].to_bits()
            }
        });
        warp.regs.write32(reg, &value, u32::MAX);
    }
}
