//! Bulk copies between global and shared memory (`cp.async.bulk`), plain and by tensor map.
//!
//! A copy into shared memory lands when a thread tests the mbarrier it reports to; until then
//! its bytes are in flight. Copies to global memory are done when issued.

use crate::machine::block::Context;
use crate::machine::checks::{lanes, shared_conflict};
use crate::machine::warp::Warp;
use crate::mbarrier::complete_bytes;
use crate::ptx::ops::BulkCopy;
use crate::ptx::program::WINDOW_MASK;
use crate::sanitize::global::Touch;
use crate::sanitize::{Checked, Fault, Kind, shared};
use crate::tensor_map::{self, TensorMap};

/// A copy into shared memory that has not landed.
#[derive(Debug)]
pub struct Pending {
    /// Shared offset and bytes of its pieces.
    pieces: Vec<(u32, Vec<u8>)>,
    mbarrier: u32,
    bytes: u32,
}

/// Executes a bulk copy for each lane of `exec`.
pub fn execute(warp: &mut Warp, ctx: &mut Context<'_>, copy: &BulkCopy, exec: u32) -> Checked<()> {
    let (to_shared, global) = (warp.addresses(&copy.shared), warp.addresses(&copy.global));
    let barrier = copy.barrier.map(|b| warp.addresses(&b));
    for lane in lanes(exec) {
        let shared = to_shared[lane] & WINDOW_MASK;
        let plan = match copy.bytes {
            Some(bytes) => contiguous(shared, global[lane], warp.regs.read32(bytes)[lane], lane)?,
            None => tiled(warp, ctx, copy, shared, global[lane], lane)?,
        };
        check_range(ctx, shared, plan.bytes, lane)?;
        match &barrier {
            Some(barrier) => load(
                warp.index,
                ctx,
                &plan,
                (barrier[lane] & WINDOW_MASK) as u32,
                lane,
            )?,
            None => store(warp.index, ctx, &plan, lane)?,
        }
    }
    Ok(())
}

/// What a copy moves: shared offset, global address (None outside the tensor) and length.
struct Plan {
    pieces: Vec<(u32, Option<u64>, u32)>,
    bytes: u64,
}

fn misaligned(lane: usize, message: String) -> Box<Fault> {
    Fault::new(Kind::Misaligned, lane as u32, message)
}

fn contiguous(shared: u64, global: u64, bytes: u32, lane: usize) -> Checked<Plan> {
    if !bytes.is_multiple_of(16) || !shared.is_multiple_of(16) || !global.is_multiple_of(16) {
        let message =
            format!("bulk copy of {bytes} bytes between {global:#x} and shared offset {shared}");
        return Err(misaligned(lane, message));
    }
    Ok(Plan {
        pieces: vec![(shared as u32, Some(global), bytes)],
        bytes: bytes.into(),
    })
}

fn tiled(
    warp: &Warp,
    ctx: &Context<'_>,
    copy: &BulkCopy,
    shared: u64,
    map: u64,
    lane: usize,
) -> Checked<Plan> {
    let mut words = [0; tensor_map::BYTES / 8];
    for (i, word) in words.iter_mut().enumerate() {
        *word = warp.peek(ctx, map + 8 * i as u64, 8, lane).unwrap_or(0);
    }
    let invalid = |message: String| Fault::new(Kind::IllegalInstruction, lane as u32, message);
    let map =
        TensorMap::decode(&words).ok_or_else(|| invalid(format!("no tensor map at {map:#x}")))?;
    if map.rank != copy.coordinates.len() {
        return Err(invalid(format!(
            "{} coordinates for a tensor map of rank {}",
            copy.coordinates.len(),
            map.rank
        )));
    }
    if !shared.is_multiple_of(128) {
        return Err(misaligned(
            lane,
            format!("tensor copy at shared offset {shared}, which is not a multiple of 128"),
        ));
    }
    let coordinates: Vec<i32> = copy
        .coordinates
        .iter()
        .map(|&c| warp.regs.read32(c)[lane] as i32)
        .collect();
    let mut pieces: Vec<(u32, Option<u64>, u32)> = Vec::new();
    let size = map.element_bytes;
    map.each_element(&coordinates, |at, address| {
        let offset = map.swizzle.apply(shared + at) as u32;
        // Neighbours on both sides make one piece.
        if let Some((start, from, len)) = pieces.last_mut()
            && *start + *len == offset
            && from.map(|f| f + u64::from(*len)) == address
        {
            *len += size;
            return;
        }
        pieces.push((offset, address, size));
    });
    Ok(Plan {
        pieces,
        bytes: map.box_bytes(),
    })
}

fn check_range(ctx: &Context<'_>, shared: u64, bytes: u64, lane: usize) -> Checked<()> {
    if shared + bytes > ctx.shared.len() as u64 {
        let message = format!(
            "bulk copy of {bytes} bytes at shared offset {shared} of {}",
            ctx.shared.len()
        );
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    Ok(())
}

fn load(warp: u32, ctx: &mut Context<'_>, plan: &Plan, mbarrier: u32, lane: usize) -> Checked<()> {
    let mut pieces = Vec::with_capacity(plan.pieces.len());
    for &(offset, from, len) in &plan.pieces {
        if let Err(conflict) = ctx.shared_shadow.begin_copy(offset, len, warp) {
            return Err(shared_conflict(
                conflict,
                "bulk copy",
                offset.into(),
                len.into(),
                lane,
            ));
        }
        let mut data = vec![0; len as usize];
        if let Some(from) = from {
            let (allocation, at) = ctx.global(from, len.into(), 1, Touch::Read, lane)?;
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = allocation.read(at + i as u64, 1) as u8;
            }
        }
        pieces.push((offset, data));
    }
    count(ctx, plan, true);
    ctx.bulk.push(Pending {
        pieces,
        mbarrier,
        bytes: plan.bytes as u32,
    });
    Ok(())
}

fn store(warp: u32, ctx: &mut Context<'_>, plan: &Plan, lane: usize) -> Checked<()> {
    for &(offset, to, len) in &plan.pieces {
        let from = ctx.shared_range(
            offset.into(),
            len.into(),
            1,
            shared::Touch::Read,
            warp,
            lane,
        )?;
        let Some(to) = to else { continue };
        let (allocation, at) = ctx.global(to, len.into(), 1, Touch::Write, lane)?;
        for i in 0..len as usize {
            allocation.write(at + i as u64, 1, ctx.shared_read(from + i, 1));
        }
    }
    count(ctx, plan, false);
    Ok(())
}

/// Counts a copy as one request of as many bytes and sectors as it moves in global memory.
fn count(ctx: &mut Context<'_>, plan: &Plan, load: bool) {
    let inside = plan
        .pieces
        .iter()
        .filter_map(|&(_, at, len)| Some((at?, u64::from(len))));
    let mut sectors: Vec<u64> = Vec::new();
    let mut bytes = 0;
    for (at, len) in inside {
        bytes += len;
        sectors.extend(at / 32..=(at + len - 1) / 32);
    }
    sectors.sort_unstable();
    sectors.dedup();
    let c = &mut ctx.counters;
    if load {
        c.global_load_requests += 1;
        c.global_load_bytes += bytes;
        c.global_load_sectors += sectors.len() as u64;
    } else {
        c.global_store_requests += 1;
        c.global_store_bytes += bytes;
        c.global_store_sectors += sectors.len() as u64;
    }
}

/// Lands the copies that report to an mbarrier.
pub fn land(ctx: &mut Context<'_>, mbarrier: u32, lane: usize) -> Checked<()> {
    let (landing, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut ctx.bulk)
        .into_iter()
        .partition(|p| p.mbarrier == mbarrier);
    ctx.bulk = rest;
    for pending in landing {
        for (offset, data) in pending.pieces {
            let at = offset as usize;
            ctx.shared[at..at + data.len()].copy_from_slice(&data);
            ctx.shared_shadow.define(offset, data.len() as u32);
        }
        complete_bytes(ctx, mbarrier, pending.bytes, lane)?;
    }
    Ok(())
}
