//! Asynchronous copies from global to shared memory (`cp.async`).
//!
//! A copy lands only when its thread waits for it, so that a missing wait shows: until then
//! the bytes are marked as in flight, and touching them is a finding.

use crate::bulk_copy;
use crate::machine::block::Context;
use crate::machine::checks::{lanes, shared_conflict};
use crate::machine::registers::LANES;
use crate::machine::warp::{Flow, Warp};
use crate::mbarrier;
use crate::ptx::ops::{CopyAsync, Op};
use crate::ptx::program::WINDOW_MASK;
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
        Op::Wgmma(w) => wgmma::execute(warp, ctx, w)?,
        // The only block of a cluster has rank 0.
        Op::MapCluster { d, a } => {
            let value = warp.regs.read_any(*a);
            warp.regs.write_any(*d, &value, exec);
        }
        // Bulk stores and wgmma are complete when issued.
        _ => {}
    }
    Ok(Flow::Next)
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
        if let Err(conflict) = ctx
            .shared_shadow
            .begin_copy(offset as u32, size as u32, warp.index)
        {
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
    if offset + size > ctx.shared.len() as u64 {
        let message = format!(
            "asynchronous copy of {size} bytes to shared offset {offset} of {}",
            ctx.shared.len()
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
        ctx.shared[offset..offset + size].copy_from_slice(&p.data[..size]);
        let landed = ctx
            .shared_shadow
            .land_copy(p.offset, p.size.into(), warp.index);
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
