//! Copies between host memory and a CUDA device by way of page-locked memory, which the device
//! reaches by itself while the host does something else.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice};

/// Bytes of one of the two buffers.
const BUFFER: usize = 4 << 20;
/// The driver takes so many bytes from any memory at once, without waiting for the device
/// (CUDA driver API, "API synchronization behavior").
const AT_ONCE: usize = 64 << 10;

/// Pairs of buffers, one for each copy that is under way.
#[derive(Debug, Default)]
pub(super) struct Staging {
    free: Mutex<Vec<Pair>>,
}

/// Two buffers of page-locked memory that take turns: while the device is at one, the host is at
/// the other. They are made at the first copy that needs them.
#[derive(Debug, Default)]
struct Pair {
    buffers: Vec<Locked>,
    next: usize,
}

#[derive(Debug)]
struct Locked {
    memory: PinnedHostSlice<u8>,
    /// When the device is through with what it was last asked to do here.
    done: CudaEvent,
}

impl Staging {
    /// Copies bytes to the device in the stream's order; they may change as soon as this returns.
    ///
    /// # Safety
    /// As many bytes of the stream's device are at `address`, and nothing else writes to them
    /// before the stream has.
    pub(super) unsafe fn send(
        &self,
        stream: &Arc<CudaStream>,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        if bytes.len() <= AT_ONCE {
            // SAFETY: the caller's promise; the driver has read the bytes when this returns.
            return unsafe { memcpy_htod_async(address, bytes, stream.cu_stream()) };
        }
        // SAFETY: the caller's promise.
        self.with_pair(|pair| unsafe { pair.send(stream, address, bytes) })
    }

    /// Appends `len` bytes of the device to `out`, as they are when the stream has come to it.
    ///
    /// # Safety
    /// As many bytes of the stream's device are at `address`.
    pub(super) unsafe fn fetch(
        &self,
        stream: &Arc<CudaStream>,
        address: u64,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        if len <= AT_ONCE {
            let start = out.len();
            out.resize(start + len, 0);
            // SAFETY: the caller's promise; the bytes are not touched before the stream is through.
            unsafe { memcpy_dtoh_async(&mut out[start..], address, stream.cu_stream()) }?;
            return stream.synchronize();
        }
        out.reserve(len);
        // SAFETY: the caller's promise.
        self.with_pair(|pair| unsafe { pair.fetch(stream, address, len, out) })
    }

    /// Does a copy with a pair that no other copy uses meanwhile.
    fn with_pair<T>(&self, copy: impl FnOnce(&mut Pair) -> T) -> T {
        // A panic elsewhere cannot leave the list half-changed: every use is one call on it.
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pair = free().pop().unwrap_or_default();
        let copied = copy(&mut pair);
        free().push(pair);
        copied
    }
}

impl Pair {
    /// # Safety
    /// As for [`Staging::send`].
    unsafe fn send(
        &mut self,
        stream: &Arc<CudaStream>,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        let mut to = address;
        for part in bytes.chunks(BUFFER) {
            let turn = self.turn(stream)?;
            let memory = self.buffers[turn].through(part.len())?;
            memory.copy_from_slice(part);
            // SAFETY: the caller's promise; the memory is not written to before the event that
            // follows the copy.
            unsafe { memcpy_htod_async(to, memory, stream.cu_stream()) }?;
            self.buffers[turn].done.record(stream)?;
            to += part.len() as u64;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Staging::fetch`].
    unsafe fn fetch(
        &mut self,
        stream: &Arc<CudaStream>,
        address: u64,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DriverError> {
        let mut under_way = None;
        for start in (0..len).step_by(BUFFER) {
            let (turn, part) = (self.turn(stream)?, BUFFER.min(len - start));
            let memory = self.buffers[turn].through(part)?;
            // SAFETY: the caller's promise; the memory is not touched before the event that
            // follows the copy.
            unsafe { memcpy_dtoh_async(memory, address + start as u64, stream.cu_stream()) }?;
            self.buffers[turn].done.record(stream)?;
            if let Some((turn, part)) = under_way.replace((turn, part)) {
                out.extend_from_slice(self.buffers[turn].through(part)?);
            }
        }
        if let Some((turn, part)) = under_way {
            out.extend_from_slice(self.buffers[turn].through(part)?);
        }
        Ok(())
    }

    /// The number of the buffer whose turn it is.
    fn turn(&mut self, stream: &Arc<CudaStream>) -> Result<usize, DriverError> {
        let turn = self.next;
        if self.buffers.len() <= turn {
            // Not write-combined, as cudarc has it by default: the host reads it too.
            // SAFETY: bytes of any value are valid, and none is read that was not written.
            let memory = unsafe { stream.context().alloc_pinned_with_flags::<u8>(BUFFER, 0) }?;
            let done = stream.record_event(None)?;
            self.buffers.push(Locked { memory, done });
        }
        self.next = (turn + 1) % 2;
        Ok(turn)
    }
}

impl Locked {
    /// The first bytes, once the device is through with them.
    fn through(&mut self, len: usize) -> Result<&mut [u8], DriverError> {
        self.done.synchronize()?;
        Ok(&mut self.memory.as_mut_slice()?[..len])
    }
}
