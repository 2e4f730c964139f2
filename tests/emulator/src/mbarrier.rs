//! `mbarrier` objects: phases that complete when all arrivals and all announced bytes are in.

use std::collections::HashMap;

use crate::async_copy;
use crate::bulk_copy;
use crate::machine::block::Context;
use crate::machine::checks::lanes;
use crate::machine::registers::LANES;
use crate::machine::shared::Place;
use crate::machine::warp::Warp;
use crate::ptx::ops::{Address, MbarrierOp};
use crate::sanitize::shared::{ACTORS, Times, Touch, raise};
use crate::sanitize::{Checked, Fault, Kind};

/// Largest count of arrivals.
const MAX_COUNT: u32 = (1 << 20) - 1;

/// One barrier object.
#[derive(Clone, Debug)]
struct Mbarrier {
    /// Arrivals a phase needs, those of the current phase still missing, bytes still missing.
    count: u32,
    pending: u32,
    bytes: i64,
    /// Phases completed.
    phase: u64,
    /// What the arrived warps knew, and what those of the last complete phase did.
    known: Times,
    released: Times,
}

impl Mbarrier {
    fn complete_if_done(&mut self) -> bool {
        let done = self.pending == 0 && self.bytes == 0;
        if done {
            self.phase += 1;
            self.pending = self.count;
            raise(&mut self.released, &self.known);
        }
        done
    }
}

/// The barriers of a block, by shared-memory offset.
#[derive(Debug, Default)]
pub struct Mbarriers {
    objects: HashMap<u32, Mbarrier>,
}

impl Mbarriers {
    pub fn clear(&mut self) {
        self.objects.clear();
    }

    fn get(&mut self, offset: u32, lane: usize) -> Checked<&mut Mbarrier> {
        self.objects.get_mut(&offset).ok_or_else(|| {
            let message = format!("no mbarrier was initialised at shared offset {offset}");
            Fault::new(Kind::Uninitialized, lane as u32, message)
        })
    }
}

/// Executes an operation for each lane of `exec`.
pub fn execute(
    warp: &mut Warp,
    ctx: &mut Context<'_>,
    op: &MbarrierOp,
    address: &Address,
    exec: u32,
) -> Checked<()> {
    let addresses = warp.addresses(address);
    if let MbarrierOp::CopyArrive { no_increment } = op {
        async_copy::land_all(warp, ctx, exec)?;
        for lane in lanes(exec) {
            let at = own(ctx, addresses[lane], lane)?;
            if !no_increment {
                ctx.memory.mbarriers.get(at.offset, lane)?.pending += 1;
            }
            arrive(ctx, warp.index, at, 1, lane)?;
        }
        return Ok(());
    }
    let mut passed = 0u32;
    let mut states = [0u64; LANES];
    for lane in lanes(exec) {
        let place = location(ctx, addresses[lane], lane)?;
        match op {
            MbarrierOp::Init { count } => {
                let offset = own(ctx, addresses[lane], lane)?.offset;
                let count = warp.regs.read32(*count)[lane];
                initialize(ctx, warp.index, offset, count, lane)?;
            }
            MbarrierOp::Invalidate => {
                let offset = own(ctx, addresses[lane], lane)?.offset;
                ctx.memory.mbarriers.objects.remove(&offset);
            }
            MbarrierOp::Arrive {
                count,
                expect,
                drop,
                ..
            } => {
                touch(ctx, warp.index, place, lane)?;
                let barrier = barrier_at(ctx, place, lane)?;
                states[lane] = barrier.phase;
                if let Some(bytes) = expect {
                    barrier.bytes += i64::from(warp.regs.read32(*bytes)[lane]);
                }
                if *drop {
                    barrier.count = barrier.count.saturating_sub(1);
                }
                let count = count.map_or(1, |c| warp.regs.read32(c)[lane]);
                arrive(ctx, warp.index, place, count, lane)?;
            }
            MbarrierOp::ExpectTx { bytes } => {
                touch(ctx, warp.index, place, lane)?;
                let bytes = i64::from(warp.regs.read32(*bytes)[lane]);
                barrier_at(ctx, place, lane)?.bytes += bytes;
            }
            MbarrierOp::CompleteTx { bytes } => {
                touch(ctx, warp.index, place, lane)?;
                let bytes = warp.regs.read32(*bytes)[lane];
                complete_bytes(ctx, place, bytes, lane)?;
            }
            MbarrierOp::Test { parity, state, .. } => {
                let offset = own(ctx, addresses[lane], lane)?.offset;
                bulk_copy::land(ctx, offset, lane)?;
                let barrier = ctx.memory.mbarriers.get(offset, lane)?;
                let complete = match (parity, state) {
                    (Some(parity), _) => {
                        barrier.phase & 1 != u64::from(warp.regs.read32(*parity)[lane] & 1)
                    }
                    (_, Some(state)) => barrier.phase > warp.regs.read64(*state)[lane],
                    _ => false,
                };
                if complete {
                    passed |= 1 << lane;
                    let released = barrier.released;
                    ctx.clocks.acquire(warp.index, &released);
                }
            }
            MbarrierOp::CopyArrive { .. } => {}
        }
    }
    match op {
        MbarrierOp::Arrive { d: Some(d), .. } => warp.regs.write_any(*d, &states, exec),
        MbarrierOp::Test { p, .. } => {
            warp.regs.set_pred(*p, passed, exec);
            warp.polling = passed != exec;
        }
        _ => {}
    }
    Ok(())
}

/// Place of a barrier object in the cluster, checked for bounds and alignment.
pub fn location(ctx: &mut Context<'_>, address: u64, lane: usize) -> Checked<Place> {
    let place = ctx.place(address, lane)?;
    let (offset, size) = (
        u64::from(place.offset),
        ctx.memory_of(place.rank).bytes.len(),
    );
    if !offset.is_multiple_of(8) {
        let message = format!("mbarrier at shared offset {offset}, which is not a multiple of 8");
        return Err(Fault::new(Kind::Misaligned, lane as u32, message));
    }
    if offset + 8 > size as u64 {
        let message = format!("mbarrier at shared offset {offset} of {size}");
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    Ok(place)
}

/// Place of a barrier object that must be the block's own.
fn own(ctx: &mut Context<'_>, address: u64, lane: usize) -> Checked<Place> {
    let place = location(ctx, address, lane)?;
    if place.rank != ctx.rank {
        let message = format!(
            "mbarrier of block {} of the cluster: other blocks can arrive at it, not wait",
            place.rank
        );
        return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
    }
    Ok(place)
}

fn barrier_at<'a>(ctx: &'a mut Context<'_>, at: Place, lane: usize) -> Checked<&'a mut Mbarrier> {
    ctx.memory_of(at.rank).mbarriers.get(at.offset, lane)
}

/// Checks that another block's barrier object is there to be used: the block has not exited,
/// and the object's initialisation is ordered before.
fn touch(ctx: &mut Context<'_>, warp: u32, at: Place, lane: usize) -> Checked<()> {
    if at.rank != ctx.rank {
        barrier_at(ctx, at, lane)?;
        ctx.visit(at, 8, 8, Touch::Atomic, warp, lane)?;
    }
    Ok(())
}

fn initialize(
    ctx: &mut Context<'_>,
    warp: u32,
    offset: u32,
    count: u32,
    lane: usize,
) -> Checked<()> {
    if count == 0 || count > MAX_COUNT {
        let message = format!("mbarrier for {count} arrivals, allowed are 1 to {MAX_COUNT}");
        return Err(Fault::new(Kind::Barrier, lane as u32, message));
    }
    ctx.shared_range(u64::from(offset), 8, 8, Touch::Write, warp, lane)?;
    let (known, released) = ([0; ACTORS], [0; ACTORS]);
    let barrier = Mbarrier {
        count,
        pending: count,
        bytes: 0,
        phase: 0,
        known,
        released,
    };
    ctx.memory.mbarriers.objects.insert(offset, barrier);
    Ok(())
}

fn arrive(ctx: &mut Context<'_>, warp: u32, at: Place, count: u32, lane: usize) -> Checked<()> {
    let mut times = ctx.clocks.release(warp);
    if at.rank != ctx.rank {
        times = ctx.clocks.translate(&times, at.rank);
    }
    let barrier = barrier_at(ctx, at, lane)?;
    if count > barrier.pending {
        let message = format!(
            "{count} arrivals at an mbarrier that waits for {}",
            barrier.pending
        );
        return Err(Fault::new(Kind::Barrier, lane as u32, message));
    }
    barrier.pending -= count;
    raise(&mut barrier.known, &times);
    barrier.complete_if_done();
    ctx.progress += 1;
    Ok(())
}

/// Bytes of an asynchronous copy have landed.
pub fn complete_bytes(ctx: &mut Context<'_>, at: Place, bytes: u32, lane: usize) -> Checked<()> {
    let barrier = barrier_at(ctx, at, lane)?;
    barrier.bytes -= i64::from(bytes);
    barrier.complete_if_done();
    ctx.progress += 1;
    Ok(())
}
