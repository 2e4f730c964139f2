//! Checks of single accesses: bounds, alignment, definedness and races.

use std::sync::Arc;

use super::block::Context;
use super::memory::Allocation;
use super::registers::LANES;
use crate::ptx::program::{CLUSTER_SHIFT, WINDOW_MASK};
use crate::sanitize::global::{Conflict, Touch, Toucher};
use crate::sanitize::{Checked, Fault, Kind, shared};

/// Lanes of a mask.
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros();
        rest &= rest.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

/// Whether all 32 lanes access consecutive elements of `len` bytes.
#[inline]
pub fn is_row(addresses: &[u64; LANES], len: u64, mask: u32) -> bool {
    let mut gaps = 0;
    for lane in 1..LANES {
        gaps |= addresses[lane].wrapping_sub(addresses[lane - 1]) ^ len;
    }
    gaps == 0 && mask == u32::MAX
}

/// Whether all lanes of a mask access the same place.
#[inline]
fn is_one(addresses: &[u64; LANES], mask: u32) -> bool {
    let first = addresses[mask.trailing_zeros() as usize % LANES];
    let mut different = 0;
    for lane in 0..LANES {
        different |= u32::from(addresses[lane] != first) << lane;
    }
    different & mask == 0
}

fn touch_name(touch: Touch) -> &'static str {
    match touch {
        Touch::Read => "read",
        Touch::Write | Touch::AtomicWrite => "write",
        Touch::Atomic => "atomic access",
    }
}

impl<'p> Context<'p> {
    /// To be called before a global atomic or ordered store: it publishes what the block wrote
    /// before its last fence.
    pub fn publish(&mut self) {
        if std::mem::take(&mut self.fenced) {
            self.launch.races.publish(self.block);
        }
    }

    /// To be called after a global atomic or ordered load: it sees what others have published.
    pub fn acquire(&mut self) {
        self.acquired = self.launch.races.acquire();
    }

    fn toucher(&self) -> Toucher<'p> {
        Toucher {
            launch: &self.launch.races,
            block: self.block,
            acquired: self.acquired,
            in_step: self.in_step,
        }
    }

    /// The allocation that holds `len` bytes at a device address, checked for everything.
    #[inline]
    pub fn global(
        &mut self,
        address: u64,
        len: u64,
        align: u64,
        touch: Touch,
        lane: usize,
    ) -> Checked<(&'p Allocation, u64)> {
        let launch = self.launch;
        if address & (align - 1) != 0 {
            return Err(misaligned(
                "global",
                touch_name(touch),
                address,
                align,
                lane,
            ));
        }
        let mut found = launch.view.get(self.cached);
        if found.is_none_or(|a| address < a.base || address - a.base >= a.size) {
            found = launch.view.find(address).and_then(|index| {
                self.cached = index;
                launch.view.get(index)
            });
        }
        let Some(allocation) = found.filter(|a| len <= a.size - (address - a.base)) else {
            let freed = launch.view.was_freed(address);
            let kind = if freed {
                Kind::UseAfterFree
            } else {
                Kind::OutOfBounds
            };
            let place = launch.view.describe(address);
            let message = format!(
                "global {} of {len} bytes at {address:#x}: {place}",
                touch_name(touch)
            );
            return Err(Fault::new(kind, lane as u32, message));
        };
        Ok((
            allocation,
            self.touch(allocation, address, len, touch, lane)?,
        ))
    }

    #[cold]
    fn global_conflict(
        &self,
        conflict: Conflict,
        touch: Touch,
        address: u64,
        len: u64,
        lane: usize,
    ) -> Box<Fault> {
        let access = format!(
            "global {} of {len} bytes at {address:#x}",
            touch_name(touch)
        );
        let (kind, why) = match conflict {
            Conflict::Uninitialized => {
                (Kind::Uninitialized, "nothing wrote these bytes".to_string())
            }
            Conflict::Written { by } => (
                Kind::GlobalRace,
                format!("block {by} wrote there in this launch"),
            ),
            Conflict::ReadBy { by: Some(by) } => (
                Kind::GlobalRace,
                format!("block {by} read there in this launch"),
            ),
            Conflict::ReadBy { by: None } => (
                Kind::GlobalRace,
                "other blocks read there in this launch".to_string(),
            ),
        };
        Fault::new(kind, lane as u32, format!("{access}: {why}"))
    }

    /// The allocation that holds all lanes' accesses, if there is one and they are aligned.
    /// The checks left to do are those of [`Self::touch`].
    #[inline]
    pub fn common_allocation(
        &mut self,
        addresses: &[u64; LANES],
        len: u64,
        mask: u32,
    ) -> Option<&'p Arc<Allocation>> {
        let (mut low, mut high, mut bits) = (u64::MAX, 0, 0);
        for (lane, &address) in addresses.iter().enumerate() {
            let active = mask >> lane & 1 == 1;
            low = low.min(if active { address } else { u64::MAX });
            high = high.max(if active { address } else { 0 });
            bits |= if active { address } else { 0 };
        }
        let view = &self.launch.view;
        let holds = |a: &Arc<Allocation>| {
            low >= a.base
                && high
                    .checked_add(len)
                    .is_some_and(|end| end - a.base <= a.size)
        };
        if bits & (len - 1) != 0 {
            return None;
        }
        if view.get(self.cached).is_none_or(|a| !holds(a)) {
            self.cached = view.find(low)?;
        }
        view.get(self.cached).filter(|a| holds(a))
    }

    /// Records the accesses of all lanes at once if they form one row of memory; false if they
    /// do not, or if something is wrong with them that the lane-wise path will name.
    #[inline]
    pub fn touch_row(
        &self,
        allocation: &Allocation,
        addresses: &[u64; LANES],
        len: u64,
        touch: Touch,
        mask: u32,
    ) -> bool {
        if !is_row(addresses, len, mask) {
            return false;
        }
        let by = self.toucher();
        allocation
            .shadow
            .touch(
                addresses[0] - allocation.base,
                len * LANES as u64,
                touch,
                &by,
            )
            .is_ok()
    }

    /// Records a lane's access to an allocation.
    #[inline(always)]
    pub fn touch(
        &self,
        allocation: &Allocation,
        address: u64,
        len: u64,
        touch: Touch,
        lane: usize,
    ) -> Checked<u64> {
        let offset = address - allocation.base;
        let by = self.toucher();
        match allocation.shadow.touch(offset, len, touch, &by) {
            Ok(()) => Ok(offset),
            Err(conflict) => Err(self.global_conflict(conflict, touch, address, len, lane)),
        }
    }

    /// Checks the accesses of a warp's lanes to shared memory at once if they form a row or are
    /// the same; false if they are neither, or if something is wrong with them that
    /// [`Self::shared_range`] will name.
    #[inline]
    pub fn shared_together(
        &mut self,
        addresses: &[u64; LANES],
        len: u64,
        mask: u32,
        touch: shared::Touch,
        warp: u32,
    ) -> bool {
        let first = addresses[mask.trailing_zeros() as usize % LANES] & WINDOW_MASK;
        let total = if is_row(addresses, len, mask) {
            len * LANES as u64
        } else if touch == shared::Touch::Read && is_one(addresses, mask) {
            len
        } else {
            return false;
        };
        if first & (len - 1) != 0 || first + total > self.memory.bytes.len() as u64 {
            return false;
        }
        let by = self.clocks.accessor(warp);
        let shadow = &mut self.memory.shadow;
        shadow.touch(first as u32, total as u32, touch, &by).is_ok()
    }

    /// Checks the beginning of an asynchronous read of whole words, and keeps track of it;
    /// false if too many are under way for that.
    pub fn begin_read(&mut self, offset: u64, len: u64, warp: u32, lane: usize) -> Checked<bool> {
        let size = self.memory.bytes.len() as u64;
        if offset + len > size {
            let message = format!("shared read of {len} bytes at offset {offset} of {size}");
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        }
        let by = self.clocks.accessor(warp);
        let shadow = &mut self.memory.shadow;
        let begun = shadow.begin_read(offset as u32, len as u32, &by);
        let counted =
            begun.map_err(|c| shared_conflict(c, "asynchronous read", offset, len, lane))?;
        if let Some(writer) = shadow.unfenced(offset as u32, len as u32, warp, &self.clocks) {
            let message = format!(
                "asynchronous read of {len} bytes at shared offset {offset}: warp {writer} wrote there with no fence.proxy.async since"
            );
            return Err(Fault::new(Kind::AsyncCopy, lane as u32, message));
        }
        Ok(counted)
    }

    /// Checks a shared access of one lane; returns its offset.
    #[inline]
    pub fn shared_range(
        &mut self,
        address: u64,
        len: u64,
        align: u64,
        touch: shared::Touch,
        warp: u32,
        lane: usize,
    ) -> Checked<usize> {
        let offset = address & WINDOW_MASK;
        if offset & (align - 1) != 0 {
            return Err(misaligned(
                "shared",
                shared_name(touch),
                offset,
                align,
                lane,
            ));
        }
        if offset + len > self.memory.bytes.len() as u64 {
            let (name, size) = (shared_name(touch), self.memory.bytes.len());
            let message = if offset >> CLUSTER_SHIFT == 0 {
                format!("shared {name} of {len} bytes at offset {offset} of {size}")
            } else {
                format!("shared {name} with the address of another block's memory")
            };
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        }
        match self.memory.shadow.touch(
            offset as u32,
            len as u32,
            touch,
            &self.clocks.accessor(warp),
        ) {
            Ok(()) => Ok(offset as usize),
            Err(conflict) => Err(shared_conflict(
                conflict,
                shared_name(touch),
                offset,
                len,
                lane,
            )),
        }
    }
}

pub fn shared_name(touch: shared::Touch) -> &'static str {
    match touch {
        shared::Touch::Read => "read",
        shared::Touch::Write => "write",
        shared::Touch::Atomic => "atomic access",
    }
}

#[cold]
pub fn misaligned(space: &str, what: &str, address: u64, align: u64, lane: usize) -> Box<Fault> {
    let message =
        format!("{space} {what} at {address:#x}, which is not a multiple of {align} bytes");
    Fault::new(Kind::Misaligned, lane as u32, message)
}

/// A warp of the block, or another block of the cluster.
fn actor_name(actor: u32) -> String {
    match actor.checked_sub(shared::MAX_WARPS as u32) {
        None => format!("warp {actor}"),
        Some(rank) => format!("block {rank} of the cluster"),
    }
}

/// A conflict in shared memory as a fault.
#[cold]
pub fn shared_conflict(
    conflict: shared::Conflict,
    what: &str,
    offset: u64,
    len: u64,
    lane: usize,
) -> Box<Fault> {
    let (kind, why) = match conflict {
        shared::Conflict::Uninitialized => {
            (Kind::Uninitialized, "nothing wrote these bytes".to_string())
        }
        shared::Conflict::InFlight => (
            Kind::AsyncCopy,
            "an asynchronous copy to these bytes has not been waited for".to_string(),
        ),
        shared::Conflict::BeingRead => (
            Kind::AsyncCopy,
            "an asynchronous operation that reads these bytes has not been waited for".to_string(),
        ),
        shared::Conflict::WrittenBy(actor) => (
            Kind::SharedRace,
            format!(
                "{} wrote there with no barrier in between",
                actor_name(actor)
            ),
        ),
        shared::Conflict::ReadBy(actor) => (
            Kind::SharedRace,
            format!(
                "{} read there with no barrier in between",
                actor_name(actor)
            ),
        ),
        shared::Conflict::Atomic => (
            Kind::SharedRace,
            "others did atomics there with no barrier in between".to_string(),
        ),
    };
    Fault::new(
        kind,
        lane as u32,
        format!("shared {what} of {len} bytes at offset {offset}: {why}"),
    )
}
