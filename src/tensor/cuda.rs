//! Memory of a CUDA device, as tensors use it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUevent_flags, CUresult, CUstreamCaptureStatus};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError};

use super::DType;
use super::staging::Staging;
use crate::error::{Error, Result};

/// The smallest block: also the alignment of every block.
const SMALLEST: usize = 512;

/// The device's memory: blocks that were freed wait in lists by size, so that a training step,
/// which asks for the same sizes as the one before, allocates nothing. A block may go to its
/// next user at once, because all users run in the order of one stream, or have waited for it and
/// are waited for ([`Mark::wait`], [`Beside::finish`]).
#[derive(Debug)]
pub(crate) struct Memory {
    stream: Arc<CudaStream>,
    free: Mutex<HashMap<usize, Vec<CudaSlice<u8>>>>,
    /// Bytes of all blocks, in use or free, of all memories of the stream.
    reserved: Arc<AtomicUsize>,
    staging: Arc<Staging>,
    /// The memory that this is beside.
    origin: Option<Arc<Memory>>,
}

impl Memory {
    pub(crate) fn new(stream: Arc<CudaStream>) -> Self {
        Self {
            stream,
            free: Mutex::default(),
            reserved: Arc::default(),
            staging: Arc::default(),
            origin: None,
        }
    }

    /// Other memory of the same stream, which shares no blocks with this.
    pub(crate) fn beside(self: &Arc<Self>) -> Self {
        Self {
            stream: self.stream.clone(),
            free: Mutex::default(),
            reserved: self.reserved.clone(),
            staging: self.staging.clone(),
            origin: Some(self.clone()),
        }
    }

    /// Bytes taken from the driver, in use or kept for reuse.
    pub(crate) fn reserved(&self) -> usize {
        self.reserved.load(Ordering::Relaxed)
    }

    /// A block of at least `bytes`, with unspecified contents.
    fn take(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        let size = block_size(bytes).ok_or_else(|| self.exhausted(bytes))?;
        if let Some(block) = self.lock().get_mut(&size).and_then(Vec::pop) {
            return Ok(block);
        }
        self.expect_unrecorded("more memory than the first time")?;
        let is_exhausted = |error: &DriverError| error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let block = self.allocate(size).or_else(|error| {
            if !is_exhausted(&error) {
                return Err(error);
            }
            self.release();
            if let Some(origin) = &self.origin {
                origin.release();
            }
            self.allocate(size)
        });
        block.map_err(|error| match is_exhausted(&error) {
            true => self.exhausted(size),
            false => self.failed("allocating memory", error),
        })
    }

    fn allocate(&self, size: usize) -> std::result::Result<CudaSlice<u8>, DriverError> {
        // SAFETY: bytes of any value are valid, and buffers are documented as unspecified.
        let block = unsafe { self.stream.alloc::<u8>(size) }?;
        self.reserved.fetch_add(size, Ordering::Relaxed);
        Ok(block)
    }

    /// Gives all free blocks back to the driver.
    pub(crate) fn release(&self) {
        // Freeing needs the context, which this thread may not have used yet.
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        for (size, blocks) in self.lock().drain() {
            self.reserved
                .fetch_sub(size * blocks.len(), Ordering::Relaxed);
        }
        // What is freed in the stream's order is free once the stream is through; an error of
        // earlier work shows again at the next call that can report it.
        if let Err(error) = self.stream.synchronize() {
            context.record_err::<()>(Err(error));
        }
    }

    fn exhausted(&self, asked: usize) -> Error {
        let (free, total) = self.stream.context().mem_get_info().unwrap_or((0, 0));
        let what = format!(
            "out of memory: asked for {asked} bytes, {free} of {total} bytes are free and {} \
             are in use here; a smaller --sae-batch, --sft-batch or --seq-len needs less, a \
             smaller --batch where text is written",
            self.reserved()
        );
        Error::cuda(self.stream.context().ordinal(), what)
    }

    /// An error where the stream is recorded as a graph: a graph would repeat the copy of the same
    /// host memory, which may be gone, and own what it allocates.
    fn expect_unrecorded(&self, what: &str) -> Result<()> {
        let status = self.stream.capture_status();
        match status.map_err(|e| self.failed("asking for the stream's state", e))? {
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => {
                let what = format!("work that is recorded as a graph asks for {what}");
                Err(Error::cuda(self.stream.context().ordinal(), what))
            }
        }
    }

    fn failed(&self, what: &str, error: DriverError) -> Error {
        let ordinal = self.stream.context().ordinal();
        Error::cuda(ordinal, format!("{what}: {}", error_name(error)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Vec<CudaSlice<u8>>>> {
        // A panic elsewhere cannot leave the map half-changed: every use is one call on it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The driver's name of an error and what it says about it.
pub(crate) fn error_name(error: DriverError) -> String {
    // Names are constants of the driver; an error it does not know has none.
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// Four sizes for every power of two: a block is at most a quarter larger than asked.
fn block_size(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(SMALLEST);
    let step = (1usize << bytes.ilog2()) / 4;
    bytes.checked_next_multiple_of(step.max(SMALLEST))
}

/// Elements of one dtype in device memory, returned to the device when dropped.
#[derive(Debug)]
pub struct CudaBuffer {
    /// There until the drop.
    block: Option<CudaSlice<u8>>,
    len: usize,
    dtype: DType,
    memory: Arc<Memory>,
}

impl CudaBuffer {
    pub(crate) fn new(memory: &Arc<Memory>, len: usize, dtype: DType) -> Result<Self> {
        let bytes = len.checked_mul(dtype.size());
        let bytes = bytes.ok_or_else(|| memory.exhausted(usize::MAX))?;
        Ok(Self {
            block: Some(memory.take(bytes)?),
            len,
            dtype,
            memory: memory.clone(),
        })
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The element type.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The GPU's number.
    pub(crate) fn ordinal(&self) -> usize {
        self.memory.stream.context().ordinal()
    }

    /// Whether a stream's work may use it without more ado.
    pub(crate) fn is_of(&self, stream: &Arc<CudaStream>) -> bool {
        Arc::ptr_eq(&self.memory.stream, stream)
    }

    /// The device address, aligned to 512 bytes.
    pub(crate) fn address(&self) -> u64 {
        // Event tracking is off: nothing happens when the guard is dropped.
        let address = |block: &CudaSlice<u8>| block.device_ptr(&self.memory.stream).0;
        self.block.as_ref().map_or(0, address)
    }

    /// Copies bytes to the elements from `start` on; they may change as soon as this returns.
    pub(crate) fn write(&mut self, start: usize, bytes: &[u8]) -> Result<()> {
        self.memory.expect_unrecorded("a copy from the host")?;
        self.write_on(&self.memory.stream, start, bytes)
    }

    /// The same beside what the stream does meanwhile. Only for buffers that nothing has used
    /// since the work that was waited for, and nothing uses before [`Beside::finish`].
    pub(crate) fn write_beside(
        &mut self,
        beside: &Beside,
        start: usize,
        bytes: &[u8],
    ) -> Result<()> {
        self.write_on(&beside.stream, start, bytes)
    }

    fn write_on(&self, stream: &Arc<CudaStream>, start: usize, bytes: &[u8]) -> Result<()> {
        let size = self.dtype.size();
        if bytes.len().is_multiple_of(size) {
            let address = self.address_of(start, bytes.len() / size)?;
            // SAFETY: as many bytes are at the address; what comes after in the stream's order
            // comes after the copy.
            let copied = unsafe { self.memory.staging.send(stream, address, bytes) };
            return copied.map_err(|e| self.memory.failed("copying to the device", e));
        }
        let expected = format!("whole elements of {size} bytes");
        let found = format!("{} bytes", bytes.len());
        Err(Error::operand("tensor", expected, found))
    }

    /// The address of element `start`; an error unless `len` elements are there.
    fn address_of(&self, start: usize, len: usize) -> Result<u64> {
        match start.checked_add(len).filter(|&end| end <= self.len) {
            Some(_) => Ok(self.address() + (start * self.dtype.size()) as u64),
            None => Err(Error::operand(
                "tensor",
                format!("a range within {} elements", self.len),
                format!("{start}..{start}+{len}"),
            )),
        }
    }

    /// Sets all bytes to zero.
    pub(crate) fn clear(&mut self) -> Result<()> {
        let Some(block) = &mut self.block else {
            return Ok(());
        };
        let cleared = self.memory.stream.memset_zeros(block);
        cleared.map_err(|e| self.memory.failed("clearing memory", e))
    }

    /// Copies elements `range` of `source`, of the same dtype, to those from `start`.
    pub(crate) fn copy_from(
        &mut self,
        start: usize,
        source: &Self,
        range: Range<usize>,
    ) -> Result<()> {
        let (size, len) = (self.dtype.size(), self.len);
        let fits = self.dtype == source.dtype
            && range.start <= range.end
            && range.end <= source.len
            && start <= len
            && range.len() <= len - start;
        let bytes = |range: Range<usize>| range.start * size..range.end * size;
        let from = source.block.as_ref().filter(|_| fits);
        let views = from.zip(self.block.as_mut()).and_then(|(from, to)| {
            let to = to.try_slice_mut(bytes(start..start + range.len()))?;
            Some((from.try_slice(bytes(range.clone()))?, to))
        });
        let Some((from, mut to)) = views else {
            let what = format!(
                "{} of {} elements of {}",
                self.dtype.name(),
                len,
                source.len
            );
            let found = format!("{range:?} of {} to {start}", source.dtype.name());
            return Err(Error::operand("copy", what, found));
        };
        let copied = self.memory.stream.memcpy_dtod(&from, &mut to);
        copied.map_err(|e| self.memory.failed("copying on the device", e))
    }

    /// The bytes of elements `start..start + len`, once all that was launched before is done.
    pub(crate) fn read(&self, start: usize, len: usize) -> Result<Vec<u8>> {
        self.memory.expect_unrecorded("a copy to the host")?;
        let mut bytes = Vec::new();
        self.read_on(&self.memory.stream, start, len, &mut bytes)?;
        Ok(bytes)
    }

    /// Appends the bytes of elements `start..start + len` to `out`, beside what the stream does
    /// meanwhile. Only for buffers that nothing has written to since the work that was waited for.
    pub(crate) fn read_beside(
        &self,
        beside: &Beside,
        start: usize,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.read_on(&beside.stream, start, len, out)
    }

    fn read_on(
        &self,
        stream: &Arc<CudaStream>,
        start: usize,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let address = self.address_of(start, len)?;
        let bytes = len * self.dtype.size();
        // SAFETY: as many bytes are at the address.
        unsafe { self.memory.staging.fetch(stream, address, bytes, out) }
            .and_then(|()| stream.context().check_err())
            .map_err(|e| self.memory.failed("a kernel or a copy from the device", e))
    }
}

/// A point in the work of a device's stream, and a stream for copies beside it.
#[derive(Debug)]
pub(crate) struct Mark {
    event: CudaEvent,
    beside: Arc<CudaStream>,
}

impl Mark {
    /// All that was launched on `stream` until now.
    pub(crate) fn new(stream: &CudaStream, beside: Arc<CudaStream>) -> Result<Self> {
        // A thread that waits for it leaves its core to others.
        let flags = CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        let event = stream.record_event(Some(flags)).map_err(|e| {
            let ordinal = stream.context().ordinal();
            Error::cuda(ordinal, format!("no event: {}", error_name(e)))
        })?;
        Ok(Self { event, beside })
    }

    /// Waits until the work is done.
    ///
    /// # Errors
    /// Those of the work.
    pub(crate) fn wait(self) -> Result<Beside> {
        let waited = self.event.synchronize();
        waited.map_err(|e| failed_beside(&self.beside, e))?;
        let stream = self.beside;
        Ok(Beside { stream })
    }
}

/// A stream that copies beside a device's own, once what was launched there until a [`Mark`] is
/// done.
#[derive(Debug)]
pub(crate) struct Beside {
    stream: Arc<CudaStream>,
}

impl Beside {
    /// Waits until all copies are done.
    pub(crate) fn finish(&self) -> Result<()> {
        let done = self.stream.synchronize();
        done.map_err(|e| failed_beside(&self.stream, e))
    }
}

fn failed_beside(stream: &CudaStream, error: DriverError) -> Error {
    let what = format!("a kernel or a copy: {}", error_name(error));
    Error::cuda(stream.context().ordinal(), what)
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            let size = block.len();
            self.memory.lock().entry(size).or_default().push(block);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::{SMALLEST, block_size};

    #[test]
    fn blocks_are_at_most_a_quarter_larger_than_asked() {
        assert_eq!(block_size(0), Some(SMALLEST));
        assert_eq!(block_size(513), Some(1024));
        for bytes in (4096..1 << 22).step_by(4099) {
            let size = block_size(bytes).unwrap();
            assert!(size >= bytes && size * 4 <= bytes * 5, "{bytes}: {size}");
            assert_eq!(block_size(size), Some(size), "a size is its own class");
        }
        assert_eq!(block_size(usize::MAX), None);
    }
}
