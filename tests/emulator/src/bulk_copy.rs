//! Bulk copies between global memory and the shared memory of a cluster (`cp.async.bulk`), plain
//! and by tensor map.
//!
//! A copy into shared memory lands when a thread tests the mbarrier it reports to; until then
//! its bytes are in flight.

use crate::bulk_store::{self, little_endian};
use crate::machine::atomic::apply;
use crate::machine::block::Context;
use crate::machine::checks::{lanes, shared_conflict};
use crate::machine::registers::LANES;
use crate::machine::shared::Place;
use crate::machine::warp::Warp;
use crate::mbarrier::{self, complete_bytes};
use crate::ptx::ast::Type;
use crate::ptx::ops::{Access, Address, AtomicOp, BulkCopy, BulkKind};
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
    /// Combined with what is there instead of replacing it.
    reduce: Option<(AtomicOp, Type)>,
}

/// Executes a bulk copy for each lane of `exec`.
pub fn execute(warp: &mut Warp, ctx: &mut Context<'_>, copy: &BulkCopy, exec: u32) -> Checked<()> {
    let (shared, other) = (warp.addresses(&copy.shared), warp.addresses(&copy.other));
    let barrier = copy.barrier.map(|b| warp.addresses(&b));
    for lane in lanes(exec) {
        let at = ctx.place(shared[lane], lane)?;
        let barrier = barrier
            .map(|b| mbarrier::location(ctx, b[lane], lane))
            .transpose()?;
        let bytes = copy.bytes.map(|b| warp.regs.read32(b)[lane]);
        match (copy.kind, barrier) {
            (BulkKind::Share, Some(barrier)) => {
                let from = ctx.place(other[lane], lane)?;
                let reduce = copy.reduce.zip(copy.ty);
                let places = (from, at, barrier);
                share(warp.index, ctx, places, bytes.unwrap_or(0), reduce, lane)?;
            }
            (BulkKind::Load { multicast }, Some(barrier)) => {
                let plan = plan(warp, ctx, copy, at, (other[lane], bytes), lane)?;
                let all = match multicast {
                    Some(mask) => warp.regs.read32(mask)[lane] & 0xffff,
                    None => 1 << at.rank,
                };
                load(warp.index, ctx, &plan, (at, barrier), all, lane)?;
            }
            _ => {
                let plan = plan(warp, ctx, copy, at, (other[lane], bytes), lane)?;
                check_range(ctx, at, plan.bytes, lane)?;
                let reduce = copy.reduce.map(|op| (op, copy.ty.unwrap_or(plan.ty)));
                bulk_store::begin(warp, ctx, &plan.pieces, reduce, lane)?;
                count(ctx, &plan, false);
            }
        }
    }
    Ok(())
}

/// `st.async`: as a bulk copy of each lane's vector.
pub fn store_async(
    warp: &mut Warp,
    ctx: &mut Context<'_>,
    access: &Access,
    barrier: &Address,
    exec: u32,
) -> Checked<()> {
    let (to, barriers) = (warp.addresses(&access.address), warp.addresses(barrier));
    let (size, count) = (usize::from(access.size), usize::from(access.count));
    let values: Vec<_> = access.regs[..count]
        .iter()
        .map(|&reg| warp.regs.read_any(reg))
        .collect();
    for lane in lanes(exec) {
        let at = ctx.place(to[lane], lane)?;
        let barrier = mbarrier::location(ctx, barriers[lane], lane)?;
        let element = |value: &[u64; LANES]| value[lane].to_le_bytes()[..size].to_vec();
        let data: Vec<u8> = values.iter().flat_map(element).collect();
        let bytes = data.len() as u32;
        if !at.offset.is_multiple_of(bytes) {
            let message = format!("st.async of {bytes} bytes to shared offset {}", at.offset);
            return Err(misaligned(lane, message));
        }
        check_owner(at, barrier, lane)?;
        check_range(ctx, at, bytes.into(), lane)?;
        let pending = Pending {
            pieces: vec![(at.offset, data)],
            mbarrier: barrier.offset,
            bytes,
            reduce: None,
        };
        begin(warp.index, ctx, at.rank, pending, lane)?;
        ctx.counters.remote_access(bytes.into(), 1 << lane);
    }
    Ok(())
}

fn plan(
    warp: &Warp,
    ctx: &Context<'_>,
    copy: &BulkCopy,
    at: Place,
    (global, bytes): (u64, Option<u32>),
    lane: usize,
) -> Checked<Plan> {
    match bytes {
        Some(bytes) => contiguous(at.offset.into(), global, bytes, lane),
        None => tiled(warp, ctx, copy, at.offset.into(), global, lane),
    }
}

/// What a copy moves: shared offset, global address (None outside the tensor) and length.
struct Plan {
    pieces: Vec<(u32, Option<u64>, u32)>,
    bytes: u64,
    /// Element type, if a tensor map says it.
    ty: Type,
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
        ty: Type::B32,
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
        ty: map.element_type(),
    })
}

/// A copy reports to an mbarrier beside its destination.
fn check_owner(at: Place, barrier: Place, lane: usize) -> Checked<()> {
    if at.rank == barrier.rank {
        return Ok(());
    }
    let message = format!(
        "asynchronous copy into block {} of the cluster with an mbarrier of block {}",
        at.rank, barrier.rank
    );
    Err(Fault::new(Kind::IllegalInstruction, lane as u32, message))
}

fn check_range(ctx: &mut Context<'_>, at: Place, bytes: u64, lane: usize) -> Checked<()> {
    if at.rank != ctx.rank {
        return ctx.check_peer(at, bytes, "bulk copy", lane);
    }
    let size = ctx.memory.bytes.len();
    if u64::from(at.offset) + bytes > size as u64 {
        let message = format!(
            "bulk copy of {bytes} bytes at shared offset {} of {size}",
            at.offset
        );
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    Ok(())
}

/// A copy from global memory to the same place of each block whose bit is set in `blocks`; each
/// block's own barrier object hears of it.
fn load(
    warp: u32,
    ctx: &mut Context<'_>,
    plan: &Plan,
    (at, barrier): (Place, Place),
    blocks: u32,
    lane: usize,
) -> Checked<()> {
    check_owner(at, barrier, lane)?;
    let outside = blocks >> ctx.cluster_size();
    if outside != 0 || blocks == 0 {
        let size = ctx.cluster_size();
        let message = format!("multicast to blocks {blocks:#b} of a cluster of {size} blocks");
        return Err(Fault::new(Kind::IllegalInstruction, lane as u32, message));
    }
    let mut pieces = Vec::with_capacity(plan.pieces.len());
    for &(offset, from, len) in &plan.pieces {
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
    for rank in lanes(blocks) {
        let rank = rank as u32;
        check_range(ctx, Place { rank, ..at }, plan.bytes, lane)?;
        let pending = Pending {
            pieces: pieces.clone(),
            mbarrier: barrier.offset,
            bytes: plan.bytes as u32,
            reduce: None,
        };
        begin(warp, ctx, rank, pending, lane)?;
    }
    Ok(())
}

/// Puts a copy into the shared memory of a block in flight.
fn begin(warp: u32, ctx: &mut Context<'_>, rank: u32, copy: Pending, lane: usize) -> Checked<()> {
    let visitor = ctx.clocks.visitor(warp, rank);
    let by = if rank == ctx.rank {
        ctx.clocks.accessor(warp)
    } else {
        visitor.accessor()
    };
    let memory = match rank == ctx.rank {
        true => &mut ctx.memory,
        false => &mut ctx.peers[rank as usize],
    };
    for (offset, data) in &copy.pieces {
        let len = data.len() as u32;
        let begun = match copy.reduce {
            Some(_) => memory
                .shadow
                .touch(*offset, len, shared::Touch::Atomic, &by),
            None => memory.shadow.begin_copy(*offset, len, &by),
        };
        if let Err(conflict) = begun {
            let (offset, len) = (u64::from(*offset), u64::from(len));
            return Err(shared_conflict(conflict, "bulk copy", offset, len, lane));
        }
    }
    memory.bulk.push(copy);
    Ok(())
}

/// A copy from this block's shared memory to that of a block of the cluster.
fn share(
    warp: u32,
    ctx: &mut Context<'_>,
    (from, to, barrier): (Place, Place, Place),
    bytes: u32,
    reduce: Option<(AtomicOp, Type)>,
    lane: usize,
) -> Checked<()> {
    let aligned = [bytes, from.offset, to.offset];
    if aligned.iter().any(|n| !n.is_multiple_of(16)) {
        let message = format!(
            "bulk copy of {bytes} bytes from shared offset {} to {}",
            from.offset, to.offset
        );
        return Err(misaligned(lane, message));
    }
    if from.rank != ctx.rank || barrier.rank != to.rank {
        let message = "bulk copy within the cluster from another block's memory, or with an mbarrier that is not the destination's";
        return Err(Fault::new(Kind::IllegalInstruction, lane as u32, message));
    }
    let len = u64::from(bytes);
    let start = ctx.shared_range(from.offset.into(), len, 16, shared::Touch::Read, warp, lane)?;
    check_range(ctx, to, len, lane)?;
    let data = ctx.memory.bytes[start..start + bytes as usize].to_vec();
    let pending = Pending {
        pieces: vec![(to.offset, data)],
        mbarrier: barrier.offset,
        bytes,
        reduce,
    };
    begin(warp, ctx, to.rank, pending, lane)
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
    let (landing, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut ctx.memory.bulk)
        .into_iter()
        .partition(|p| p.mbarrier == mbarrier);
    ctx.memory.bulk = rest;
    for pending in landing {
        for (offset, data) in pending.pieces {
            let at = offset as usize;
            let target = &mut ctx.memory.bytes[at..at + data.len()];
            match pending.reduce {
                None => target.copy_from_slice(&data),
                Some((op, ty)) => combine(target, &data, op, ty),
            }
            ctx.memory.shadow.define(offset, data.len() as u32);
        }
        let at = Place {
            rank: ctx.rank,
            offset: mbarrier,
        };
        complete_bytes(ctx, at, pending.bytes, lane)?;
    }
    Ok(())
}

/// Reduces the elements of `data` into those of `target`.
fn combine(target: &mut [u8], data: &[u8], op: AtomicOp, ty: Type) {
    let size = ty.bytes() as usize;
    let elements = target.chunks_exact_mut(size).zip(data.chunks_exact(size));
    for (old, new) in elements {
        let value = apply(op, ty, little_endian(old), little_endian(new), 0);
        old.copy_from_slice(&value.to_le_bytes()[..size]);
    }
}
