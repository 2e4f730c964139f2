//! `wgmma.mma_async`: a warpgroup's matrix product with operands in shared memory.
//!
//! Each warp computes its 16 of the 64 rows when the instruction is issued, but the result lands
//! in its registers only at `wgmma.wait_group`, and until then nobody may write the operands in
//! shared memory: a missing wait shows. Shared-memory layouts are those of the PTX ISA's matrix descriptors; CUTLASS writes them down as layout
//! functions (mma_sm90_desc.hpp).

use crate::machine::block::Context;
use crate::machine::registers::{Base, LANES};
use crate::machine::warp::Warp;
use crate::ptx::ops::{Inst, MmaType, Op, Reg, ScaleD, Wgmma};
use crate::ptx::program::Function;
use crate::sanitize::{Checked, Fault, Kind};
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

/// Products of a warp that have not been waited for.
#[derive(Debug, Default)]
pub struct Products {
    batches: Vec<Batch>,
    /// Chunks of shared memory that they read, with the group.
    reads: Vec<(u32, u32)>,
    /// Registers that they read, with the group and the frame.
    sources: Vec<(u32, Base, Reg)>,
    committed: u32,
}

/// Accumulators under way; products that add to the same ones follow each other here.
#[derive(Debug)]
struct Batch {
    group: u32,
    base: Base,
    regs: Vec<Reg>,
    values: Vec<[u32; LANES]>,
}

impl Products {
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Closes the group of the products issued since the last one.
    pub fn commit(&mut self) {
        self.committed += 1;
    }
}

/// Waits until at most `pending` groups are under way: the results of the others land in their
/// registers, and their operands may be overwritten.
pub fn wait(warp: &mut Warp, ctx: &mut Context<'_>, pending: u32) {
    let products = &mut warp.products;
    let complete = |group: u32| group.saturating_add(pending) < products.committed;
    products.reads.retain(|&(group, chunk)| {
        if complete(group) {
            let by = ctx.clocks.accessor(warp.index);
            ctx.memory.shadow.end_read(chunk, CHUNK as u32, &by);
        }
        !complete(group)
    });
    products.sources.retain(|&(group, ..)| !complete(group));
    let current = warp.regs.base();
    products.batches.retain(|batch| {
        if complete(batch.group) {
            warp.regs.select(batch.base);
            for (&reg, value) in batch.regs.iter().zip(&batch.values) {
                warp.regs.write32(reg, value, u32::MAX);
            }
        }
        !complete(batch.group)
    });
    warp.regs.select(current);
}

/// Reports an instruction, other than a product, that names accumulators under way or writes
/// registers that a product reads.
pub fn check_registers(warp: &Warp, inst: &Inst, function: &Function) -> Checked<()> {
    if matches!(inst.op, Op::Wgmma(_)) {
        return Ok(());
    }
    let (start, end) = inst.uses;
    let named = &function.uses[start as usize..end as usize];
    let base = warp.regs.base();
    let under_way = |batch: &&Batch| batch.base == base;
    for batch in warp.products.batches.iter().filter(under_way) {
        if named.iter().any(|(reg, _)| batch.regs.contains(reg)) {
            let message = "accumulators of a wgmma that has not been waited for";
            return Err(Fault::new(Kind::AsyncCopy, None, message));
        }
    }
    let read = |reg: Reg| {
        let sources = &warp.products.sources;
        sources.iter().any(|&(_, b, r)| (b, r) == (base, reg))
    };
    if named.iter().any(|&(reg, written)| written && read(reg)) {
        let message = "write to registers of A that a wgmma not waited for reads";
        return Err(Fault::new(Kind::AsyncCopy, None, message));
    }
    Ok(())
}

/// Bytes of an operand that lie together whatever the layout.
const CHUNK: u64 = 16;

/// The elements in a chunk: eight, or four of tf32.
#[inline(always)]
fn elements(ty: MmaType, chunk: [u8; CHUNK as usize]) -> [f32; 8] {
    let half = |i: usize| u32::from(u16::from_le_bytes([chunk[2 * i], chunk[2 * i + 1]]));
    match ty {
        MmaType::Bf16 => std::array::from_fn(|i| element16(MmaType::Bf16, half(i))),
        MmaType::F16 => std::array::from_fn(|i| element16(MmaType::F16, half(i))),
        MmaType::Tf32 => std::array::from_fn(|i| {
            let word = |i: usize| half(2 * i) | half(2 * i + 1) << 16;
            if i < 4 { element_tf32(word(i)) } else { 0.0 }
        }),
    }
}

/// Reads `count` rows (or columns) of an operand in shared memory, 16 bytes at a time.
fn load_operand(
    warp: &mut Warp,
    ctx: &mut Context<'_>,
    (descriptor, major): (Descriptor, bool),
    ty: MmaType,
    (first, count): (u64, u64),
    mut set: impl FnMut(usize, usize, f32),
) -> Checked<()> {
    let size = if ty == MmaType::Tf32 { 4 } else { 2 };
    let (depth, per_chunk) = (2 * CHUNK / size, CHUNK / size);
    let (lines, chunks) = if major {
        (depth, count / per_chunk)
    } else {
        (count, depth / per_chunk)
    };
    for line in 0..lines {
        for chunk in 0..chunks {
            let (outer, k) = match major {
                true => (chunk * per_chunk, line),
                false => (line, chunk * per_chunk),
            };
            let at = descriptor.offset(first + outer, k, size, major);
            if ctx.begin_read(at, CHUNK, warp.index, (line % 32) as usize)? {
                let group = warp.products.committed;
                warp.products.reads.push((group, at as u32));
            }
            let values = elements(ty, ctx.memory.array(at as usize));
            for (i, &value) in (0..per_chunk).zip(&values) {
                match major {
                    true => set((outer + i) as usize, k as usize, value),
                    false => set(outer as usize, (k + i) as usize, value),
                }
            }
        }
    }
    Ok(())
}

/// Issues the instruction for one warp.
pub fn execute(warp: &mut Warp, ctx: &mut Context<'_>, w: &Wgmma) -> Checked<()> {
    let depth = if w.ty == MmaType::Tf32 { 8 } else { 16 };
    let first_row = u64::from(warp.index % 4) * 16;
    let mut a: Rows = [[0.0; 16]; 16];
    match w.a_descriptor {
        Some(reg) => {
            let descriptor = Descriptor::decode(warp.regs.read64(reg)[0]);
            let layout = (descriptor, w.transpose_a);
            load_operand(warp, ctx, layout, w.ty, (first_row, 16), |row, k, value| {
                a[row][k] = value;
            })?;
        }
        None => {
            register_rows(warp, w, &mut a);
            let (group, base) = (warp.products.committed, warp.regs.base());
            let read = w.a.iter().map(|&reg| (group, base, reg));
            warp.products.sources.extend(read);
        }
    }
    // The sign of a product is that of either factor.
    if w.negate_a != w.negate_b {
        a.iter_mut().flatten().for_each(|x| *x = -*x);
    }
    let keep = match w.scale_d {
        ScaleD::Constant(keep) => keep,
        ScaleD::Predicate(p, negated) => (warp.regs.pred(p) & 1 == 1) != negated,
    };
    let descriptor = Descriptor::decode(warp.regs.read64(w.b_descriptor)[0]);
    let mut b: Vec<Columns> = vec![[[0.0; 8]; 16]; usize::from(w.n) / 8];
    let layout = (descriptor, w.transpose_b);
    load_operand(
        warp,
        ctx,
        layout,
        w.ty,
        (0, w.n.into()),
        |column, k, value| {
            b[column / 8][k][column % 8] = value;
        },
    )?;
    let batch = batch(warp, w)?;
    for (tile, b) in b.iter().enumerate() {
        let registers = if w.half_accumulate { 2 } else { 4 };
        let values = &mut batch.values[registers * tile..registers * (tile + 1)];
        let mut c: Accumulators = [[0.0; 8]; 16];
        if keep {
            read_tile(values, w.half_accumulate, &mut c);
        }
        multiply(&a, b, &mut c, depth);
        write_tile(values, w.half_accumulate, &c);
    }
    ctx.counters.mma_flop += 2 * 16 * depth as u64 * u64::from(w.n);
    Ok(())
}

/// The batch of the product's accumulators, with a copy of their values if it is a new one.
fn batch<'w>(warp: &'w mut Warp, w: &Wgmma) -> Checked<&'w mut Batch> {
    let (base, group) = (warp.regs.base(), warp.products.committed);
    let batches = &mut warp.products.batches;
    let found = batches.iter().position(|b| b.base == base && b.regs == w.d);
    let index = match found {
        Some(index) => index,
        None => {
            let overlaps = |b: &Batch| b.base == base && b.regs.iter().any(|r| w.d.contains(r));
            if batches.iter().any(overlaps) {
                let message = "accumulators that a wgmma of another shape still writes";
                return Err(Fault::new(Kind::AsyncCopy, None, message));
            }
            let values = w.d.iter().map(|&reg| *warp.regs.read32(reg)).collect();
            let regs = w.d.clone();
            batches.push(Batch {
                group,
                base,
                regs,
                values,
            });
            batches.len() - 1
        }
    };
    batches[index].group = group;
    Ok(&mut batches[index])
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

/// Row and column of lane 0's value in register `i` of an 8-column tile.
fn tile_place(i: usize, half: bool) -> (usize, usize) {
    if half {
        (8 * i, 0)
    } else {
        (8 * (i / 2), i % 2)
    }
}

fn read_tile(values: &[[u32; LANES]], half: bool, c: &mut Accumulators) {
    for (i, value) in values.iter().enumerate() {
        let (row, column) = tile_place(i, half);
        for lane in 0..LANES {
            let (row, column) = (row + lane / 4, column + 2 * (lane % 4));
            if half {
                c[row][column] = element16(MmaType::F16, value[lane] & 0xffff);
                c[row][column + 1] = element16(MmaType::F16, value[lane] >> 16);
            } else {
                c[row][column] = f32::from_bits(value[lane]);
            }
        }
    }
}

fn write_tile(values: &mut [[u32; LANES]], half: bool, c: &Accumulators) {
    for (i, value) in values.iter_mut().enumerate() {
        let (row, column) = tile_place(i, half);
        *value = std::array::from_fn(|lane| {
            let (row, column) = (row + lane / 4, column + 2 * (lane % 4));
            if half {
                pack_f16(c[row][column], c[row][column + 1])
            } else {
                c[row][column].to_bits()
            }
        });
    }
}
