//! Asynchronous copies from global to shared memory (`cp.async`).
//!
//! A copy lands only when its thread waits for it, so that a missing wait shows: until then
//! the bytes are marked as in flight, and touching them is a finding.

use crate::bulk_copy;
use crate::bulk_store;
use crate::machine::block::Context;
use crate::machine::checks::{lanes, shared_conflict};
use crate::machine::registers::LANES;
use crate::machine::warp::{Flow, Warp};
use crate::mbarrier;
use crate::ptx::ops::{AnyReg, CopyAsync, Op, Reg};
use crate::ptx::program::{SHARED_WINDOW, WINDOW_MASK, WINDOW_SHIFT};
use crate::sanitize::global::Touch;
use crate::sanitize::{Checked, Fault, Kind};
use crate::wgmma;

/// Group of a copy that has not been committed.
const OPEN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Pending {
    lane: u8,
    size: u8,
    group: u32,
    offset: u32,
    /// The source's bytes, zero-filled beyond the source size.
    data: [u8; 16],
}

/// Copies of a warp's lanes that have not landed.
#[derive(Debug, Default)]
pub struct Copies {
    pending: Vec<Pending>,
    /// Groups each lane has committed.
    committed: [u32; LANES],
}

/// Executes an asynchronous instruction.
pub fn execute(warp: &mut Warp, ctx: &mut Context<'_>, op: &Op, exec: u32) -> Checked<Flow> {
    match op {
        Op::CopyAsync(copy) => start(warp, ctx, copy, exec)?,
        Op::CopyCommit => commit(&mut warp.copies, exec),
        Op::CopyWait { pending, all } => wait(warp, ctx, *pending, *all, exec)?,
        Op::Mbarrier { op, address, .. } => mbarrier::execute(warp, ctx, op, address, exec)?,
        Op::BulkCopy(copy) => bulk_copy::execute(warp, ctx, copy, exec)?,
        Op::StoreAsync { access, barrier } => {
            bulk_copy::store_async(warp, ctx, access, barrier, exec)?;
        }
        Op::Wgmma(w) => wgmma::execute(warp, ctx, w)?,
        Op::MapCluster { d, a, b, generic } => {
            map_cluster(warp, ctx, *d, (*a, *b), *generic, exec)?
        }
        Op::ClusterRank { d, a } => {
            let addresses = warp.regs.read_any(*a);
            let mut ranks = [0; LANES];
            for lane in lanes(exec) {
                ranks[lane] = ctx.place(addresses[lane], lane)?.rank;
            }
            warp.regs.write32(*d, &ranks, exec);
        }
        Op::ProxyFence => ctx.clocks.fence_proxy(warp.index),
        Op::WgmmaCommit => warp.products.commit(),
        Op::BulkCommit => warp.stores.commit(exec),
        Op::BulkWait { pending, read } => bulk_store::wait(warp, ctx, *pending, *read, exec),
        _ => {}
    }
    Ok(Flow::Next)
}

/// `mapa`.
fn map_cluster(
    warp: &mut Warp,
    ctx: &Context<'_>,
    d: AnyReg,
    (a, b): (AnyReg, Reg),
    generic: bool,
    exec: u32,
) -> Checked<()> {
    let mut addresses = warp.regs.read_any(a);
    let ranks = *warp.regs.read32(b);
    for lane in lanes(exec) {
        let (address, rank, size) = (addresses[lane], ranks[lane], ctx.cluster_size());
        let message = if rank >= size {
            format!("mapa to block {rank} of a cluster of {size} blocks")
        } else if generic && address >> WINDOW_SHIFT != SHARED_WINDOW >> WINDOW_SHIFT {
            format!("mapa of {address:#x}, which is not in shared memory")
        } else {
            addresses[lane] = ctx.map_shared(address, rank);
            continue;
        };
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    warp.regs.write_any(d, &addresses, exec);
    Ok(())
}

fn start(warp: &mut Warp, ctx: &mut Context<'_>, copy: &CopyAsync, exec: u32) -> Checked<()> {
    let (to, from) = (
        warp.addresses(&copy.destination),
        warp.addresses(&copy.source),
    );
    let size = u64::from(copy.size);
    let ignored = copy.ignore.map_or(0, |(p, negated)| {
        warp.regs.pred(p) ^ if negated { u32::MAX } else { 0 }
    });
    let source_sizes = copy.source_size.map(|r| *warp.regs.read32(r));
    let mut reading = 0;
    for lane in lanes(exec) {
        let wanted = source_sizes.map_or(size, |s| u64::from(s[lane]).min(size));
        let wanted = if ignored >> lane & 1 == 1 { 0 } else { wanted };
        let offset = to[lane] & WINDOW_MASK;
        check_destination(ctx, offset, size, lane)?;
        let by = ctx.clocks.accessor(warp.index);
        let shadow = &mut ctx.memory.shadow;
        if let Err(conflict) = shadow.begin_copy(offset as u32, size as u32, &by) {
            return Err(shared_conflict(
                conflict,
                "asynchronous copy",
                offset,
                size,
                lane,
            ));
        }
        let mut data = [0; 16];
        if wanted > 0 {
            reading |= 1 << lane;
            if from[lane] % size != 0 {
                let message = format!("asynchronous copy of {size} bytes from {:#x}", from[lane]);
                return Err(Fault::new(Kind::Misaligned, lane as u32, message));
            }
            let (allocation, at) = ctx.global(from[lane], wanted, 1, Touch::Read, lane)?;
            for i in 0..wanted {
                data[i as usize] = allocation.read(at + i, 1) as u8;
            }
        }
        let pending = Pending {
            lane: lane as u8,
            size: copy.size,
            group: OPEN,
            offset: offset as u32,
            data,
        };
        warp.copies.pending.push(pending);
    }
    ctx.counters.shared_access(&to, size, exec);
    if reading != 0 {
        ctx.counters.global_access(true, &from, size, reading);
    }
    Ok(())
}

fn check_destination(ctx: &Context<'_>, offset: u64, size: u64, lane: usize) -> Checked<()> {
    if !offset.is_multiple_of(size) {
        let message = format!("asynchronous copy of {size} bytes to shared offset {offset}");
        return Err(Fault::new(Kind::Misaligned, lane as u32, message));
    }
    if offset + size > ctx.memory.bytes.len() as u64 {
        let message = format!(
            "asynchronous copy of {size} bytes to shared offset {offset} of {}",
            ctx.memory.bytes.len()
        );
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    Ok(())
}

fn commit(copies: &mut Copies, exec: u32) {
    for p in &mut copies.pending {
        if p.group == OPEN && exec >> p.lane & 1 == 1 {
            p.group = copies.committed[usize::from(p.lane)];
        }
    }
    for lane in lanes(exec) {
        copies.committed[lane] += 1;
    }
}

/// Lands all copies of the lanes of `exec`.
pub fn land_all(warp: &mut Warp, ctx: &mut Context<'_>, exec: u32) -> Checked<()> {
    wait(warp, ctx, 0, true, exec)
}

/// Lands what the lanes of `exec` wait for: all groups but the last `keep`, or everything.
fn wait(warp: &mut Warp, ctx: &mut Context<'_>, keep: u32, all: bool, exec: u32) -> Checked<()> {
    let Copies { pending, committed } = &mut warp.copies;
    let mut kept = Vec::with_capacity(pending.len());
    for p in pending.drain(..) {
        let waited = exec >> p.lane & 1 == 1;
        let complete =
            all || p.group != OPEN && p.group.saturating_add(keep) < committed[usize::from(p.lane)];
        if !(waited && complete) {
            kept.push(p);
            continue;
        }
        let (offset, size) = (p.offset as usize, usize::from(p.size));
        ctx.memory.bytes[offset..offset + size].copy_from_slice(&p.data[..size]);
        let by = ctx.clocks.accessor(warp.index);
        let landed = ctx.memory.shadow.land_copy(p.offset, p.size.into(), &by);
        if let Err(conflict) = landed {
            let lane = usize::from(p.lane);
            return Err(shared_conflict(
                conflict,
                "landing copy",
                p.offset.into(),
                p.size.into(),
                lane,
            ));
        }
    }
    *pending = kept;
    Ok(())
}
