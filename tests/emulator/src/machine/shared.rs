//! A block's shared memory, and how the other blocks of its cluster reach it.

use super::block::Context;
use super::checks::{misaligned, shared_conflict, shared_name};
use crate::bulk_copy::Pending;
use crate::mbarrier::Mbarriers;
use crate::ptx::program::{CLUSTER_SHIFT, WINDOW_MASK};
use crate::sanitize::shared::{MAX_CLUSTER, Shadow, Touch};
use crate::sanitize::{Checked, Fault, Kind};

/// Offset part of a shared address; the byte above it names a block of the cluster.
const OFFSET_MASK: u64 = (1 << CLUSTER_SHIFT) - 1;

/// Shared memory with everything that lives in it.
#[derive(Debug, Default)]
pub struct SharedMemory {
    pub bytes: Vec<u8>,
    pub shadow: Shadow,
    /// Barrier objects, and bulk copies that report to them.
    pub mbarriers: Mbarriers,
    pub bulk: Vec<Pending>,
    /// All threads of the block have exited.
    pub exited: bool,
    /// Time of the last access of each other block of the cluster.
    pub visits: [u32; MAX_CLUSTER],
}

impl SharedMemory {
    /// Starts a block with `bytes` of undefined memory.
    pub fn reset(&mut self, bytes: usize) {
        self.bytes.clear();
        // A pattern that stands out where a fault slips through.
        self.bytes.resize(bytes, 0xcd);
        self.shadow.reset(bytes);
        self.mbarriers.clear();
        self.bulk.clear();
        self.exited = false;
        self.visits = [0; MAX_CLUSTER];
    }

    /// Little-endian value of 1, 2, 4 or 8 bytes; the range was checked.
    #[inline(always)]
    pub fn read(&self, offset: usize, len: usize) -> u64 {
        match len {
            1 => u64::from(self.bytes[offset]),
            2 => u64::from(u16::from_le_bytes(self.array(offset))),
            4 => u64::from(u32::from_le_bytes(self.array(offset))),
            _ => u64::from_le_bytes(self.array(offset)),
        }
    }

    /// Bytes of a range that was checked.
    #[inline(always)]
    pub fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes[offset..offset + N]);
        bytes
    }

    /// Stores the low 1, 2, 4 or 8 bytes of a value; the range was checked.
    #[inline(always)]
    pub fn write(&mut self, offset: usize, len: usize, value: u64) {
        match len {
            1 => self.bytes[offset] = value as u8,
            2 => self.bytes[offset..offset + 2].copy_from_slice(&(value as u16).to_le_bytes()),
            4 => self.bytes[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes()),
            _ => self.bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// A checked place in the shared memory of a block of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: u32,
    pub offset: u32,
}

impl Context<'_> {
    /// Blocks of the cluster.
    pub fn cluster_size(&self) -> u32 {
        self.launch.cluster.iter().product()
    }

    /// The shared memory of a block of the cluster.
    pub fn memory_of(&mut self, rank: u32) -> &mut SharedMemory {
        if rank == self.rank {
            &mut self.memory
        } else {
            &mut self.peers[rank as usize]
        }
    }

    /// Block and offset that a `shared::cluster` address names; without a block it is this one's.
    pub fn place(&self, address: u64, lane: usize) -> Checked<Place> {
        let (block, offset) = (
            (address & WINDOW_MASK) >> CLUSTER_SHIFT,
            address & OFFSET_MASK,
        );
        if block > u64::from(self.cluster_size()) {
            let message = format!("shared::cluster address {address:#x} is in no block's memory");
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        }
        let rank = if block == 0 {
            self.rank
        } else {
            block as u32 - 1
        };
        Ok(Place {
            rank,
            offset: offset as u32,
        })
    }

    /// `address` in the shared memory of the block with this rank (`mapa`).
    pub fn map_shared(&self, address: u64, rank: u32) -> u64 {
        let plain = address & !(0xff << CLUSTER_SHIFT);
        if rank == self.rank {
            plain
        } else {
            plain | u64::from(rank + 1) << CLUSTER_SHIFT
        }
    }

    /// Checks and records an access of one lane to the shared memory of any block of the cluster.
    pub fn visit(
        &mut self,
        at: Place,
        len: u64,
        align: u64,
        touch: Touch,
        warp: u32,
        lane: usize,
    ) -> Checked<usize> {
        let offset = u64::from(at.offset);
        if at.rank == self.rank {
            return self.shared_range(offset, len, align, touch, warp, lane);
        }
        let name = shared_name(touch);
        if offset & (align - 1) != 0 {
            return Err(misaligned("shared", name, offset, align, lane));
        }
        self.check_peer(at, len, name, lane)?;
        let visitor = self.clocks.visitor(warp, at.rank);
        let touched = self.peers[at.rank as usize].shadow.touch(
            at.offset,
            len as u32,
            touch,
            &visitor.accessor(),
        );
        match touched {
            Ok(()) => Ok(at.offset as usize),
            Err(conflict) => Err(shared_conflict(conflict, name, offset, len, lane)),
        }
    }

    /// Checks that `len` bytes at a place of another block exist, and notes the visit.
    pub fn check_peer(&mut self, at: Place, len: u64, what: &str, lane: usize) -> Checked<()> {
        let (me, now) = (self.rank as usize, self.clocks.now);
        let peer = self.memory_of(at.rank);
        let size = peer.bytes.len() as u64;
        if u64::from(at.offset) + len > size {
            let message = format!(
                "shared {what} of {len} bytes at offset {} of {size} of block {} of the cluster",
                at.offset, at.rank
            );
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        }
        if peer.exited {
            let message = format!(
                "shared {what} of {len} bytes of block {} of the cluster, which has exited",
                at.rank
            );
            return Err(Fault::new(Kind::ClusterExit, lane as u32, message));
        }
        peer.visits[me] = now;
        Ok(())
    }

    /// Marks bytes of this block's shared memory as defined, if they exist.
    pub fn shared_define(&mut self, offset: u64, len: u64) {
        if offset + len <= self.memory.bytes.len() as u64 {
            self.memory.shadow.mark_defined(offset as u32, len as u32);
        }
    }

    /// Marks bytes at a place as defined, if they exist.
    pub fn define_place(&mut self, at: Place, len: u64) {
        let memory = self.memory_of(at.rank);
        if u64::from(at.offset) + len <= memory.bytes.len() as u64 {
            memory.shadow.mark_defined(at.offset, len as u32);
        }
    }

    /// See [`SharedMemory::read`].
    #[inline(always)]
    pub fn shared_read(&self, offset: usize, len: usize) -> u64 {
        self.memory.read(offset, len)
    }

    /// See [`SharedMemory::write`].
    #[inline(always)]
    pub fn shared_write(&mut self, offset: usize, len: usize, value: u64) {
        self.memory.write(offset, len, value);
    }
}
