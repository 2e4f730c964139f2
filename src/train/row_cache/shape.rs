//! Rows of results as bytes: between a device's memory and the store.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::data::cache::ActivationCache;
use crate::device::CudaDevice;
use crate::error::{Error, Result};
use crate::tensor::{CudaBuffer, DType, Tensor};

/// A row's results: `parts` tensors \[seq_len, width\].
#[derive(Clone, Copy)]
pub(super) struct RowShape {
    pub(super) parts: usize,
    pub(super) seq_len: usize,
    pub(super) width: usize,
    /// What the device computes in, and so keeps every bit of.
    pub(super) dtype: DType,
}

impl RowShape {
    fn part_values(self) -> usize {
        self.seq_len * self.width
    }

    pub(super) fn bytes(self) -> usize {
        self.parts * self.part_values() * self.dtype.size()
    }

    /// Memory of `gpu` for the parts of so many rows.
    pub(super) fn buffers(self, gpu: &CudaDevice, rows: usize) -> Result<Vec<CudaBuffer>> {
        let parts = (0..self.parts).map(|_| gpu.alloc(self.dtype, rows * self.part_values()));
        parts.collect()
    }

    /// The parts of so many rows.
    pub(super) fn tensors(self, parts: Vec<CudaBuffer>, rows: usize) -> Result<Vec<Tensor>> {
        let shape = [rows * self.seq_len, self.width];
        let parts = parts.into_iter();
        parts.map(|part| Tensor::from_cuda(part, shape)).collect()
    }

    /// One row of each part, one part after the other; `read` appends elements of a GPU's memory.
    pub(super) fn row(
        self,
        parts: &[Tensor],
        position: usize,
        read: impl Fn(&CudaBuffer, usize, usize, &mut Vec<u8>) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let block = self.part_values();
        let mut bytes = Vec::with_capacity(self.bytes());
        for part in parts {
            match (self.dtype, part.cuda()) {
                (DType::Bf16, Some(buffer)) if buffer.dtype() == DType::Bf16 => {
                    read(buffer, position * block, block, &mut bytes)?;
                }
                (DType::F32, _) => {
                    let mut values = vec![0.0f32; block];
                    part.read_f32(position * block, &mut values)?;
                    bytes.extend_from_slice(bytemuck::cast_slice(&values));
                }
                _ => {
                    let expected = format!("a part in {}", self.dtype.name());
                    return Err(Error::operand("activation cache", expected, part.found()));
                }
            }
        }
        Ok(bytes)
    }

    /// Stores rows on so many threads, this one included; those that the store has now.
    pub(super) fn keep(
        self,
        store: &Mutex<ActivationCache>,
        rows: &[usize],
        parts: &[Tensor],
        threads: usize,
        read: impl Fn(&CudaBuffer, usize, usize, &mut Vec<u8>) -> Result<()> + Sync,
    ) -> Result<Vec<usize>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut kept = Vec::new();
            loop {
                let position = next.fetch_add(1, Ordering::Relaxed);
                let Some(&row) = rows.get(position) else {
                    return Ok(kept);
                };
                let bytes = self.row(parts, position, &read)?;
                let mut store = lock(store);
                store.put(row, bytes)?;
                kept.extend(store.get(row).map(|_| row));
            }
        };
        thread::scope(|scope| {
            let others = 1..threads.min(rows.len());
            let others: Vec<_> = others.map(|_| scope.spawn(work)).collect();
            let mut kept = work();
            for other in others {
                let other = other.join();
                let other = other.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                match (&mut kept, other) {
                    (Ok(kept), Ok(more)) => kept.extend(more),
                    (Ok(_), Err(error)) => kept = Err(error),
                    (Err(_), _) => {}
                }
            }
            kept
        })
    }

    /// Gives `put` each part of `rows`, from the store or from `missed`: the part's number, the
    /// value at which the row begins there, and its bytes.
    pub(super) fn gather(
        self,
        store: Option<&Mutex<ActivationCache>>,
        rows: &[usize],
        missed: &[(usize, Vec<u8>)],
        mut put: impl FnMut(usize, usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let block = self.part_values();
        let store = store.map(lock);
        for (i, &row) in rows.iter().enumerate() {
            let computed = missed.iter().find(|(missed, _)| *missed == row);
            let bytes = match (computed, &store) {
                (Some((_, bytes)), _) => Some(&bytes[..]),
                (None, Some(store)) => store.get(row),
                (None, None) => None,
            };
            let bytes = bytes
                .ok_or_else(|| Error::operand("activation cache", format!("row {row}"), "none"))?;
            let parts = bytes.chunks_exact(block * self.dtype.size());
            for (part, bytes) in parts.enumerate() {
                put(part, i * block, bytes)?;
            }
        }
        Ok(())
    }

    /// The parts of `rows` in host memory, f32.
    pub(super) fn gather_on_host(
        self,
        store: Option<&Mutex<ActivationCache>>,
        rows: &[usize],
        missed: &[(usize, Vec<u8>)],
    ) -> Result<Vec<Tensor>> {
        let block = self.part_values();
        let mut out = vec![vec![0.0f32; rows.len() * block]; self.parts];
        self.gather(store, rows, missed, |part, at, bytes| {
            bytemuck::cast_slice_mut(&mut out[part][at..][..block]).copy_from_slice(bytes);
            Ok(())
        })?;
        let shape = [rows.len() * self.seq_len, self.width];
        let parts = out.into_iter();
        parts.map(|part| Tensor::from_vec(part, shape)).collect()
    }
}

pub(super) fn lock(store: &Mutex<ActivationCache>) -> MutexGuard<'_, ActivationCache> {
    // A row is put as a whole or not at all, also where a thread panicked.
    store.lock().unwrap_or_else(PoisonError::into_inner)
}
