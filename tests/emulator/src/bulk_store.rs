//! Bulk stores and reductions from shared to global memory.
//!
//! The bytes are read when the instruction is issued and reach global memory only when its
//! thread waits for the group or exits; until the wait, of either kind, nobody may write the
//! source. So a missing wait shows, either way.

use crate::machine::atomic::apply;
use crate::machine::block::Context;
use crate::machine::checks::lanes;
use crate::machine::registers::LANES;
use crate::machine::warp::Warp;
use crate::ptx::ast::Type;
use crate::ptx::ops::AtomicOp;
use crate::sanitize::global::Touch;
use crate::sanitize::{Checked, Fault, Kind};

/// Group of a store that has not been committed.
const OPEN: u32 = u32::MAX;

/// A store that has not reached global memory.
#[derive(Debug)]
struct Pending {
    lane: usize,
    group: u32,
    /// Shared offset and bytes of sources that must stay as they are.
    reading: Vec<(u32, u32)>,
    writes: Vec<(u64, Vec<u8>)>,
    reduce: Option<(AtomicOp, Type)>,
}

/// Stores of a warp's lanes under way.
#[derive(Debug, Default)]
pub struct Stores {
    pending: Vec<Pending>,
    /// Groups each lane has committed.
    committed: [u32; LANES],
}

impl Stores {
    /// Closes the group of the stores that the lanes of `exec` have issued since the last one.
    pub fn commit(&mut self, exec: u32) {
        for p in &mut self.pending {
            if p.group == OPEN && exec >> p.lane & 1 == 1 {
                p.group = self.committed[p.lane];
            }
        }
        for lane in lanes(exec) {
            self.committed[lane] += 1;
        }
    }
}

/// Issues a store of pieces of shared memory (offset, global address or None, bytes).
pub fn begin(
    warp: &mut Warp,
    ctx: &mut Context<'_>,
    pieces: &[(u32, Option<u64>, u32)],
    reduce: Option<(AtomicOp, Type)>,
    lane: usize,
) -> Checked<()> {
    let touch = match reduce {
        Some(_) => Touch::Atomic,
        None => Touch::Write,
    };
    let (mut reading, mut writes) = (Vec::new(), Vec::new());
    for &(offset, to, len) in pieces {
        if ctx.begin_read(offset.into(), len.into(), warp.index, lane)? {
            reading.push((offset, len));
        }
        if let Some(to) = to {
            ctx.global(to, len.into(), 1, touch, lane)?;
            let from = offset as usize;
            writes.push((to, ctx.memory.bytes[from..from + len as usize].to_vec()));
        }
    }
    warp.stores.pending.push(Pending {
        lane,
        group: OPEN,
        reading,
        writes,
        reduce,
    });
    Ok(())
}

/// Waits until at most `keep` groups of each lane of `exec` are under way, or only until the
/// others have read shared memory.
pub fn wait(warp: &mut Warp, ctx: &mut Context<'_>, keep: u32, read: bool, exec: u32) {
    let Stores { pending, committed } = &mut warp.stores;
    pending.retain_mut(|p| {
        let complete = exec >> p.lane & 1 == 1
            && p.group != OPEN
            && p.group.saturating_add(keep) < committed[p.lane];
        if complete {
            for (offset, len) in p.reading.drain(..) {
                let by = ctx.clocks.accessor(warp.index);
                ctx.memory.shadow.end_read(offset, len, &by);
            }
            if !read {
                land(ctx, p);
            }
        }
        !complete || read
    });
}

/// The lanes of `exec` exit: their stores reach memory. They must have waited for the reads,
/// since the block's shared memory may be given to another one.
pub fn exit(warp: &mut Warp, ctx: &Context<'_>, exec: u32) -> Checked<()> {
    let mut unread = None;
    warp.stores.pending.retain(|p| {
        let leaves = exec >> p.lane & 1 == 1;
        if leaves {
            land(ctx, p);
            unread = unread.or((!p.reading.is_empty()).then_some(p.lane));
        }
        !leaves
    });
    let Some(lane) = unread else { return Ok(()) };
    let message = "exit before a bulk store has read its source: no cp.async.bulk.wait_group";
    Err(Fault::new(Kind::AsyncCopy, lane as u32, message))
}

/// Writes the bytes, whose range was checked when the store was issued.
fn land(ctx: &Context<'_>, store: &Pending) {
    for (to, data) in &store.writes {
        let view = &ctx.launch.view;
        let Some(allocation) = view.find(*to).and_then(|index| view.get(index)) else {
            continue;
        };
        let at = to - allocation.base;
        match store.reduce {
            None => {
                for (i, &byte) in data.iter().enumerate() {
                    allocation.write(at + i as u64, 1, byte.into());
                }
            }
            Some((op, ty)) => {
                let size = ty.bytes() as usize;
                for (i, element) in data.chunks_exact(size).enumerate() {
                    let value = little_endian(element);
                    let at = at + (i * size) as u64;
                    allocation.update(at, size as u64, |old| apply(op, ty, old, value, 0));
                }
            }
        }
    }
}

/// The number in up to eight bytes.
pub fn little_endian(bytes: &[u8]) -> u64 {
    let mut out = [0; 8];
    out[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(out)
}
