//! Copies from host memory to a CUDA device by way of page-locked memory.

use std::sync::Arc;

use cudarc::driver::result::memcpy_htod_async;
use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice};

/// Bytes of one of the two buffers.
const BUFFER: usize = 4 << 20;
/// The driver takes so many bytes from any memory at once, without waiting for the device
/// (CUDA driver API, "API synchronization behavior").
const AT_ONCE: usize = 64 << 10;

/// Two buffers of page-locked memory that take turns: while the device fetches from one, the host
/// fills the other. They are made at the first copy that is large enough.
#[derive(Debug, Default)]
pub(super) struct Staging {
    buffers: Vec<Locked>,
    next: usize,
}

#[derive(Debug)]
struct Locked {
    memory: PinnedHostSlice<u8>,
    /// When the device has fetched what was last put here.
    fetched: CudaEvent,
}

impl Staging {
    /// Copies bytes to the device in the stream's order; they may change as soon as this returns.
    ///
    /// # Safety
    /// As many bytes of the stream's device are at `address`.
    pub(super) unsafe fn copy(
        &mut self,
        stream: &Arc<CudaStream>,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        if bytes.len() <= AT_ONCE {
            // SAFETY: the caller's promise; the driver has read the bytes when this returns.
            return unsafe { memcpy_htod_async(address, bytes, stream.cu_stream()) };
        }
        let mut to = address;
        for part in bytes.chunks(BUFFER) {
            let buffer = self.buffer(stream)?;
            buffer.fetched.synchronize()?;
            let memory = &mut buffer.memory.as_mut_slice()?[..part.len()];
            memory.copy_from_slice(part);
            // SAFETY: the caller's promise; the memory is not written to before the event that
            // follows the copy.
            unsafe { memcpy_htod_async(to, &memory[..], stream.cu_stream()) }?;
            buffer.fetched.record(stream)?;
            to += part.len() as u64;
        }
        Ok(())
    }

    /// The buffer whose turn it is.
    fn buffer(&mut self, stream: &Arc<CudaStream>) -> Result<&mut Locked, DriverError> {
        let turn = self.next;
        self.next = (turn + 1) % 2;
        if self.buffers.len() <= turn {
            // SAFETY: bytes of any value are valid, and none is read that was not written.
            let memory = unsafe { stream.context().alloc_pinned::<u8>(BUFFER) }?;
            let fetched = stream.record_event(None)?;
            self.buffers.push(Locked { memory, fetched });
        }
        let last = self.buffers.len() - 1;
        Ok(&mut self.buffers[turn.min(last)])
    }
}
