use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;

use super::{CudaBuffer, DType};
use crate::error::{Error, Result};

/// Where a tensor's elements live.
#[derive(Debug)]
pub(super) enum Storage {
    F32(Buffer),
    Bf16(Buffer<bf16>),
    U32(Vec<u32>),
    Mapped(MappedBytes),
    Cuda(CudaBuffer),
}

impl Storage {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::U32(data) => data.len(),
            Self::Mapped(map) => map.bytes().len() / map.dtype.size(),
            Self::Cuda(buffer) => buffer.len(),
        }
    }

    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::U32(_) => DType::U32,
            Self::Mapped(map) => map.dtype,
            Self::Cuda(buffer) => buffer.dtype(),
        }
    }

    pub(super) fn is_writable(&self) -> bool {
        matches!(self, Self::F32(_) | Self::U32(_))
    }

    /// The elements where they are f32 in memory and aligned.
    pub(super) fn f32s(&self) -> Option<&[f32]> {
        match self {
            Self::F32(data) => Some(data),
            Self::Mapped(map) if map.dtype == DType::F32 => {
                bytemuck::try_cast_slice(map.bytes()).ok()
            }
            _ => None,
        }
    }

    /// The elements where they are bf16 in memory and aligned.
    pub(super) fn bf16s(&self) -> Option<&[bf16]> {
        match self {
            Self::Bf16(data) => Some(data),
            Self::Mapped(map) if map.dtype == DType::Bf16 => {
                bytemuck::try_cast_slice(map.bytes()).ok()
            }
            _ => None,
        }
    }

    pub(super) fn copied_f32(&self) -> Option<Buffer> {
        let mut copy = match self {
            Self::F32(data) => data.sibling(),
            Self::Mapped(map) if map.dtype == DType::F32 => Buffer::zeroed(self.len()),
            _ => return None,
        };
        self.read_f32(0, &mut copy).is_ok().then_some(copy)
    }

    /// Where the elements are in a mapped file, lets the system take its memory back.
    pub(super) fn release_pages(&self) {
        if let Self::Mapped(map) = self {
            map.release();
        }
    }

    /// Widens elements from `start` into `out`; the caller has checked the range.
    ///
    /// # Errors
    /// Elements of type u32, or a device that cannot be read.
    pub(super) fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[start..start + out.len()]),
            Self::Bf16(data) => data[start..start + out.len()].convert_to_f32_slice(out),
            Self::Mapped(map) => map.read_f32(start, out),
            Self::Cuda(buffer) if buffer.dtype() != DType::U32 => {
                let bytes = buffer.read(start, out.len())?;
                widen_all(buffer.dtype(), &bytes, out);
            }
            Self::U32(_) | Self::Cuda(_) => {
                return Err(Error::operand(
                    "tensor",
                    "a float tensor",
                    self.dtype().name(),
                ));
            }
        }
        Ok(())
    }
}

/// A range of a memory-mapped file holding elements of one float type.
#[derive(Clone, Debug)]
pub struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
    dtype: DType,
}

impl MappedBytes {
    /// `None` when the range is outside the file or not a whole number of elements.
    ///
    /// # Safety
    /// The map must be one of a file, shared and read-only as [`Mmap::map`] makes it: its pages
    /// are given back while it is in use, and read from the file again.
    pub unsafe fn new(map: Arc<Mmap>, range: Range<usize>, dtype: DType) -> Option<Self> {
        let inside = range.start <= range.end && range.end <= map.len();
        let whole = inside && (range.end - range.start).is_multiple_of(dtype.size());
        (whole && dtype != DType::U32).then_some(Self { map, range, dtype })
    }

    fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// Lets the system take back the memory that holds these pages of the file.
    fn release(&self) {
        #[cfg(unix)]
        {
            let (advice, len) = (memmap2::UncheckedAdvice::DontNeed, self.range.len());
            // SAFETY: the map is a shared, read-only one of a file (`new`): what is taken away is
            // read from there again when it is used next.
            let advised = unsafe {
                self.map
                    .unchecked_advise_range(advice, self.range.start, len)
            };
            // Where the system does not take advice, the memory stays in use.
            advised.unwrap_or_default();
        }
    }

    fn read_f32(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        widen_all(self.dtype, bytes, out);
    }
}

/// Widens the elements of a float type.
fn widen_all(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match (dtype, bytemuck::try_cast_slice::<u8, u16>(bytes)) {
        (DType::Bf16, Ok(words)) => {
            for (value, &word) in out.iter_mut().zip(words) {
                *value = f32::from_bits(u32::from(word) << 16);
            }
        }
        (DType::F16, Ok(words)) => {
            bytemuck::cast_slice::<u16, f16>(words).convert_to_f32_slice(out);
        }
        // Files may place tensors at odd offsets; then element by element.
        (DType::Bf16, Err(_)) => widen(bytes, out, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()),
        (DType::F16, Err(_)) => widen(bytes, out, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
        _ => widen(bytes, out, f32::from_le_bytes),
    }
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    let (chunks, _) = bytes.as_chunks::<N>();
    for (value, chunk) in out.iter_mut().zip(chunks) {
        *value = convert(*chunk);
    }
}

/// Values of a cache line.
const CACHE_LINE: usize = 16;

/// Memory for f32 values, or others of at most their size, that returns to its pool when dropped.
/// A training step asks for the same sizes over and over; handing the same memory out again spares
/// the page faults and the clearing that a fresh allocation of this size costs. What comes from a
/// pool begins a cache line, so that no vector that is read or written lies across two.
#[derive(Debug)]
pub struct Buffer<T = f32> {
    data: Vec<f32>,
    /// The part of `data` that is used.
    range: Range<usize>,
    /// Values in that part.
    len: usize,
    pool: Option<Arc<Pool>>,
    of: PhantomData<T>,
}

impl Buffer {
    /// A buffer of the same length from the same pool; its contents are unspecified.
    fn sibling(&self) -> Self {
        match &self.pool {
            Some(pool) => pool.take(self.len()),
            None => Self::zeroed(self.len()),
        }
    }
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros, of no pool.
    pub fn zeroed(len: usize) -> Self {
        let words = words::<T>(len);
        Self {
            data: vec![0.0; words],
            range: 0..words,
            len,
            pool: None,
            of: PhantomData,
        }
    }
}

/// f32 values in whose memory `len` values of another type have room.
fn words<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(size_of::<f32>())
}

impl From<Vec<f32>> for Buffer {
    fn from(data: Vec<f32>) -> Self {
        Self {
            range: 0..data.len(),
            len: data.len(),
            data,
            pool: None,
            of: PhantomData,
        }
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.data[self.range.clone()])[..self.len]
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.data[self.range.clone()])[..self.len]
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put(std::mem::take(&mut self.data));
        }
    }
}

/// Zeros, in huge pages where the system gives them to those who ask: their addresses are found in
/// less time.
fn fresh(words: usize) -> Vec<f32> {
    #[cfg_attr(not(target_os = "linux"), allow(unused_mut))] // Nobody is asked there.
    let mut data = vec![0.0; words];
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        /// Those of small pages, to which advice applies as a whole.
        const PAGE: usize = 4 << 10;
        /// Bytes from which on neighbours in memory make huge pages together.
        const LEAST: usize = 1 << 20;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
        let first = bytes.as_ptr().align_offset(PAGE);
        if bytes.len() >= LEAST && first < PAGE {
            let pages = &mut bytes[first..];
            let len = pages.len() / PAGE * PAGE;
            // SAFETY: the pages are of `data` alone, and this advice does not change what is read.
            let advised = unsafe { madvise(pages.as_mut_ptr().cast(), len, Advice::LinuxHugepage) };
            // Where the system does not take the advice, pages stay small.
            advised.unwrap_or_default();
        }
    }
    data
}

/// Values of the block that holds `words` of them. Eight sizes for every power of two: a block is
/// at most an eighth larger than asked, so that lengths that vary or grow share a few. The sizes
/// of training, which are mostly small multiples of large powers of two, are their own or nearly
/// (tokens of 8960 values take a thirty-fifth more), and what is too much is never touched where
/// they alone use it.
fn block_size(words: usize) -> usize {
    let words = words.max(CACHE_LINE);
    let step = (1usize << words.ilog2()) / 8;
    words.next_multiple_of(step.max(CACHE_LINE))
}

/// Free memory by its length in f32 values: that of a block, and what aligning it may take.
#[derive(Debug, Default)]
pub struct Pool {
    free: Mutex<HashMap<usize, Vec<Vec<f32>>>>,
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A buffer of `len` values **with unspecified contents** (zeros or what an earlier user left).
    pub fn take<T: Pod>(self: &Arc<Self>, len: usize) -> Buffer<T> {
        let words = words::<T>(len);
        let size = block_size(words) + CACHE_LINE;
        let reused = self.lock().get_mut(&size).and_then(Vec::pop);
        let data = reused.unwrap_or_else(|| fresh(size));
        let skip = data.as_ptr().align_offset(CACHE_LINE * size_of::<f32>());
        let skip = skip.min(CACHE_LINE);
        Buffer {
            data,
            range: skip..skip + words,
            len,
            pool: Some(self.clone()),
            of: PhantomData,
        }
    }

    /// Gives all free memory back to the system.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn put(&self, data: Vec<f32>) {
        self.lock().entry(data.len()).or_default().push(data);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<Vec<f32>>>> {
        // A panic elsewhere cannot leave the map half-changed: every use is one call on it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_at_most_an_eighth_larger_than_asked() {
        assert_eq!(block_size(0), CACHE_LINE);
        for words in (1..128).chain((128..1 << 22).step_by(4099)) {
            let size = block_size(words);
            let most = (words * 9 / 8).max(words.next_multiple_of(CACHE_LINE));
            assert!((words..=most).contains(&size), "{words}: {size}");
            assert_eq!(block_size(size), size, "a size is its own class");
        }
        for words in [2048 * 1536, 4096 * 896, 65_536 * 1536] {
            assert_eq!(block_size(words), words);
        }
    }

    #[test]
    fn buffers_of_growing_length_leave_little_memory_behind() {
        let (pool, longest) = (Pool::new(), 6 * 4096);
        for len in (6..=longest).step_by(6) {
            let buffer = pool.take::<f32>(len);
            assert_eq!(buffer.len(), len);
            assert!((buffer.as_ptr() as usize).is_multiple_of(64));
        }
        let free: usize = pool.lock().values().flatten().map(Vec::len).sum();
        assert!(free < 16 * longest, "{free}");
    }
}
