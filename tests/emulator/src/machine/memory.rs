//! Device memory: allocations with addresses of their own, so that a stale or wild pointer
//! never hits another allocation by accident.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sanitize::global::{EPOCHS, Shadow};

/// Where device addresses start; the range below and the gaps between allocations stay unmapped.
const FIRST_ADDRESS: u64 = 0x10_0000_0000;
/// Alignment of allocations, as `cuMemAlloc` guarantees.
const ALIGNMENT: u64 = 512;
/// Unmapped bytes behind each allocation.
const GUARD: u64 = 4096;
/// Freed ranges remembered for messages.
const MAX_FREED: usize = 1 << 16;

/// Bytes of host memory that stand for device memory.
#[derive(Debug)]
struct Buffer {
    start: NonNull<u8>,
    len: usize,
    /// Freed on drop; false for memory that belongs to somebody else.
    owned: bool,
}

// SAFETY: the buffer is plain bytes; concurrent access goes through relaxed atomics.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.max(1).checked_next_multiple_of(16)?, 256).ok()
    }

    fn new(len: usize) -> Option<Self> {
        let layout = Self::layout(len)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self {
            start,
            len,
            owned: true,
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (true, Some(layout)) = (self.owned, Self::layout(self.len)) {
            // SAFETY: `start` came from alloc_zeroed with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// One live allocation.
#[derive(Debug)]
pub struct Allocation {
    pub base: u64,
    pub size: u64,
    buffer: Buffer,
    pub shadow: Shadow,
}

impl Allocation {
    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        debug_assert!(
            offset + len <= self.size,
            "bounds are checked by the caller"
        );
        self.buffer.start.as_ptr().wrapping_add(offset as usize)
    }

    /// Little-endian value of 1, 2, 4 or 8 bytes; `offset` is in bounds and aligned to `len`.
    #[inline(always)]
    pub fn read(&self, offset: u64, len: u64) -> u64 {
        let at = self.at(offset, len);
        // SAFETY: in bounds and aligned (see above), and all access to the bytes is atomic.
        unsafe {
            match len {
                1 => u64::from(AtomicU8::from_ptr(at).load(Relaxed)),
                2 => u64::from(AtomicU16::from_ptr(at.cast()).load(Relaxed)),
                4 => u64::from(AtomicU32::from_ptr(at.cast()).load(Relaxed)),
                _ => AtomicU64::from_ptr(at.cast()).load(Relaxed),
            }
        }
    }

    /// Stores the low `len` bytes (1, 2, 4 or 8); `offset` is in bounds and aligned to `len`.
    #[inline(always)]
    pub fn write(&self, offset: u64, len: u64, value: u64) {
        let at = self.at(offset, len);
        // SAFETY: as in `read`.
        unsafe {
            match len {
                1 => AtomicU8::from_ptr(at).store(value as u8, Relaxed),
                2 => AtomicU16::from_ptr(at.cast()).store(value as u16, Relaxed),
                4 => AtomicU32::from_ptr(at.cast()).store(value as u32, Relaxed),
                _ => AtomicU64::from_ptr(at.cast()).store(value, Relaxed),
            }
        }
    }

    /// Replaces a value of 2, 4 or 8 bytes atomically by `f` of it; returns the old one.
    pub fn update(&self, offset: u64, len: u64, f: impl Fn(u64) -> u64) -> u64 {
        let at = self.at(offset, len);
        // SAFETY: as in `read`.
        unsafe {
            // The closure never declines, so both variants hold the old value.
            match len {
                2 => either(
                    AtomicU16::from_ptr(at.cast())
                        .fetch_update(Relaxed, Relaxed, |v| Some(f(u64::from(v)) as u16))
                        .map(u64::from)
                        .map_err(u64::from),
                ),
                4 => either(
                    AtomicU32::from_ptr(at.cast())
                        .fetch_update(Relaxed, Relaxed, |v| Some(f(u64::from(v)) as u32))
                        .map(u64::from)
                        .map_err(u64::from),
                ),
                _ => either(
                    AtomicU64::from_ptr(at.cast()).fetch_update(Relaxed, Relaxed, |v| Some(f(v))),
                ),
            }
        }
    }
}

fn either(result: Result<u64, u64>) -> u64 {
    match result {
        Ok(value) | Err(value) => value,
    }
}

/// Why a host-side operation on device memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// Outside every live allocation.
    InvalidAddress,
    /// More than the device has left, or than the host can give.
    OutOfMemory,
}

#[derive(Debug, Default)]
struct State {
    live: BTreeMap<u64, Arc<Allocation>>,
    freed: BTreeMap<u64, u64>,
    next: u64,
    used: u64,
    launches: u64,
}

/// The memory of a device.
#[derive(Debug)]
pub struct Memory {
    capacity: u64,
    state: Mutex<State>,
}

impl Memory {
    /// Memory of `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        let state = State {
            next: FIRST_ADDRESS,
            ..State::default()
        };
        Self {
            capacity,
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every update leaves the state consistent, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes free and in all.
    pub fn info(&self) -> (u64, u64) {
        (self.capacity - self.lock().used, self.capacity)
    }

    /// Number of live allocations and their bytes.
    pub fn live(&self) -> (usize, u64) {
        let state = self.lock();
        (state.live.len(), state.used)
    }

    /// Sizes of the live allocations by address, which is the order they were made in.
    pub fn live_sizes(&self) -> Vec<u64> {
        self.lock().live.values().map(|a| a.size).collect()
    }

    /// Reserves `size` bytes, undefined at first.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`] beyond the device's capacity.
    pub fn allocate(&self, size: u64) -> Result<u64, MemoryError> {
        let mut state = self.lock();
        if size > self.capacity - state.used {
            return Err(MemoryError::OutOfMemory);
        }
        let buffer = Buffer::new(size as usize).ok_or(MemoryError::OutOfMemory)?;
        let base = state.next;
        state.next = (base + size + GUARD).next_multiple_of(ALIGNMENT);
        state.used += size;
        let shadow = Shadow::new(size as usize);
        state.live.insert(
            base,
            Arc::new(Allocation {
                base,
                size,
                buffer,
                shadow,
            }),
        );
        Ok(base)
    }

    /// Makes host memory visible to kernels at its own address; all of it counts as defined.
    pub fn register_host(&self, start: NonNull<u8>, size: u64) {
        let base = start.as_ptr() as u64;
        let buffer = Buffer {
            start,
            len: size as usize,
            owned: false,
        };
        let shadow = Shadow::new(size as usize);
        shadow.define(0, size);
        self.lock().live.insert(
            base,
            Arc::new(Allocation {
                base,
                size,
                buffer,
                shadow,
            }),
        );
    }

    /// Ends what [`Self::register_host`] began; false if the address is not registered.
    pub fn unregister_host(&self, base: u64) -> bool {
        self.lock().live.remove(&base).is_some()
    }

    /// Frees an allocation by its base address.
    ///
    /// # Errors
    /// [`MemoryError::InvalidAddress`] if it is not the base of a live allocation.
    pub fn free(&self, base: u64) -> Result<(), MemoryError> {
        let mut state = self.lock();
        let allocation = state
            .live
            .remove(&base)
            .ok_or(MemoryError::InvalidAddress)?;
        state.used -= allocation.size;
        if state.freed.len() < MAX_FREED {
            state.freed.insert(base, allocation.size);
        }
        Ok(())
    }

    fn find(&self, address: u64, len: u64) -> Result<(Arc<Allocation>, u64), MemoryError> {
        let state = self.lock();
        let found = state
            .live
            .range(..=address)
            .next_back()
            .map(|(_, a)| a.clone());
        let allocation = found.ok_or(MemoryError::InvalidAddress)?;
        let offset = address - allocation.base;
        match offset.checked_add(len) {
            Some(end) if end <= allocation.size => Ok((allocation, offset)),
            _ => Err(MemoryError::InvalidAddress),
        }
    }

    /// Copies host bytes to the device.
    ///
    /// # Errors
    /// [`MemoryError::InvalidAddress`] for a range that is not inside one allocation.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let (allocation, offset) = self.find(address, bytes.len() as u64)?;
        // SAFETY: the range lies inside the live buffer, which `allocation` keeps alive.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                allocation.at(offset, bytes.len() as u64),
                bytes.len(),
            );
        }
        allocation.shadow.define(offset, bytes.len() as u64);
        Ok(())
    }

    /// Copies device bytes to the host.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let (allocation, offset) = self.find(address, bytes.len() as u64)?;
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                allocation.at(offset, bytes.len() as u64),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
        Ok(())
    }

    /// Fills `count` elements with a pattern of 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn fill(&self, address: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let len = count
            .checked_mul(pattern.len() as u64)
            .ok_or(MemoryError::InvalidAddress)?;
        let (allocation, offset) = self.find(address, len)?;
        let start = allocation.at(offset, len);
        if let [byte] = pattern {
            // SAFETY: as in `write`.
            unsafe { std::ptr::write_bytes(start, *byte, len as usize) };
        } else {
            for i in 0..count as usize {
                let at = start.wrapping_add(i * pattern.len());
                // SAFETY: as in `write`; element `i` lies inside the range.
                unsafe { std::ptr::copy_nonoverlapping(pattern.as_ptr(), at, pattern.len()) };
            }
        }
        allocation.shadow.define(offset, len);
        Ok(())
    }

    /// Copies between device ranges, which may overlap; undefined bytes stay undefined.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn copy(&self, to: u64, from: u64, len: u64) -> Result<(), MemoryError> {
        let (source, from) = self.find(from, len)?;
        let (target, to) = self.find(to, len)?;
        // SAFETY: both ranges are inside live buffers; `copy` allows overlap.
        unsafe { std::ptr::copy(source.at(from, len), target.at(to, len), len as usize) };
        if source.shadow.is_defined(from, len) {
            target.shadow.define(to, len);
        } else {
            target.shadow.define_from(to, &source.shadow, from, len);
        }
        Ok(())
    }

    /// The live allocations as a launch sees them, and the launch's epoch.
    pub fn snapshot(&self) -> (View, u64) {
        let mut state = self.lock();
        state.launches += 1;
        let mut epoch = state.launches % EPOCHS;
        if epoch == 0 {
            state.live.values().for_each(|a| a.shadow.clear_epochs());
            state.launches += 1;
            epoch = 1;
        }
        let view = View {
            live: state.live.values().cloned().collect(),
            freed: state.freed.clone(),
        };
        (view, epoch)
    }
}

/// Live allocations, ordered by address.
#[derive(Debug)]
pub struct View {
    live: Vec<Arc<Allocation>>,
    freed: BTreeMap<u64, u64>,
}

impl View {
    /// Index of the allocation that `address` falls into or behind.
    pub fn find(&self, address: u64) -> Option<usize> {
        let index = self
            .live
            .partition_point(|a| a.base <= address)
            .checked_sub(1)?;
        (address - self.live[index].base < self.live[index].size).then_some(index)
    }

    pub fn get(&self, index: usize) -> Option<&Arc<Allocation>> {
        self.live.get(index)
    }

    /// Whether an address lies in memory that was freed.
    pub fn was_freed(&self, address: u64) -> bool {
        self.freed
            .range(..=address)
            .next_back()
            .is_some_and(|(base, size)| address - base < *size)
    }

    /// Describes where an address lies, for messages.
    pub fn describe(&self, address: u64) -> String {
        if self.was_freed(address) {
            return "memory that was freed".into();
        }
        let index = self.live.partition_point(|a| a.base <= address);
        match index.checked_sub(1).and_then(|i| self.live.get(i)) {
            Some(a) if address >= a.base => {
                let past = (address - a.base).saturating_sub(a.size);
                format!(
                    "{past} bytes past the end of the {}-byte allocation at {:#x}",
                    a.size, a.base
                )
            }
            _ => "no allocation".into(),
        }
    }
}
