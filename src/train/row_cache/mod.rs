//! Results that depend on nothing but a row of tokens, kept from one epoch to the next.

mod shape;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::data::cache::ActivationCache;
use crate::device::{CudaDevice, Device};
use crate::error::Result;
use crate::tensor::{CudaBuffer, DType, Tensor};
use shape::RowShape;

/// Threads that store what a GPU computed. One is not enough: new memory is cleared by the system
/// page by page, which takes longer than the copy.
const KEEPERS: usize = 4;

/// Computes tensors for groups of rows and keeps them by row.
///
/// A row is always computed together with the same other rows, whether it is missed because it
/// is new, because the cache had no room, or because the run was resumed: matrix products of
/// another height may round differently, and then a resumed run would not reach the same bits.
///
/// What a GPU computes goes to the store, and comes back, on threads beside the one that keeps
/// the GPU busy: one group is stored while the next is computed. What goes wrong there is told by
/// a later call.
pub struct RowCache {
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    shape: RowShape,
    /// Where there is one, what is computed comes from it and goes back to it.
    gpu: Option<CudaDevice>,
    keepers: usize,
    store: Option<Arc<Mutex<ActivationCache>>>,
    /// The rows that the store holds, but for those that are being stored.
    held: Vec<bool>,
    /// The group computed last, for rows of it that the store does not hold.
    last: Option<(usize, Vec<Tensor>)>,
    /// Stores rows; leaves those that there was room for.
    keeping: Option<Job<Vec<usize>>>,
    /// Brings rows to the GPU.
    fetching: Option<Job<Vec<Tensor>>>,
}

/// What a thread does with rows.
struct Job<T> {
    rows: Vec<usize>,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Job<T> {
    fn new(rows: &[usize], work: impl FnOnce(&[usize]) -> Result<T> + Send + 'static) -> Self {
        let own = rows.to_vec();
        Self {
            rows: rows.to_vec(),
            thread: thread::spawn(move || work(&own)),
        }
    }

    /// What the thread returns; its panic goes on here.
    fn join(self) -> Result<T> {
        let joined = self.thread.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Where and how much a [`RowCache`] may keep.
#[derive(Clone, Copy, Debug)]
pub struct CacheSpace<'a> {
    /// Bytes of memory; what needs more goes into a file.
    pub memory: u64,
    /// Folder of that file.
    pub dir: &'a Path,
    /// Bytes of the disk that are left to others.
    pub reserve: u64,
}

impl<'a> CacheSpace<'a> {
    /// What is left of it beside `cache`.
    pub fn beside(self, cache: &RowCache) -> Self {
        let [memory, disk] = cache.will_take();
        Self {
            memory: self.memory.saturating_sub(memory),
            reserve: self.reserve.saturating_add(disk),
            ..self
        }
    }
}

impl RowCache {
    /// A cache of what `device` computes. Its groups are `order` cut into pieces of `group` rows.
    /// A row's result is `parts` tensors of shape \[seq_len, width\]. Without `space` nothing is
    /// kept.
    pub fn new(
        device: &Device,
        order: &[usize],
        group: usize,
        [parts, seq_len, width]: [usize; 3],
        space: Option<CacheSpace>,
    ) -> Result<Self> {
        let groups: Vec<Vec<usize>> = order.chunks(group).map(<[usize]>::to_vec).collect();
        let mut group_of = vec![0; order.len()];
        for (g, rows) in groups.iter().enumerate() {
            rows.iter().for_each(|&row| group_of[row] = g);
        }
        let (gpu, dtype) = match device {
            Device::Cpu(_) => (None, DType::F32),
            Device::Cuda(cuda) => (Some(cuda.clone()), DType::Bf16),
        };
        let shape = RowShape {
            parts,
            seq_len,
            width,
            dtype,
        };
        let bytes = shape.bytes();
        let keepers = device.threads().clamp(1, KEEPERS);
        let store =
            space.map(|s| ActivationCache::new(order.len(), bytes, s.memory, s.dir, s.reserve));
        Ok(Self {
            groups,
            group_of,
            shape,
            gpu,
            keepers,
            held: vec![false; order.len()],
            store: store.transpose()?.map(|store| Arc::new(Mutex::new(store))),
            last: None,
            keeping: None,
            fetching: None,
        })
    }

    /// The results of `rows`, one tensor \[rows x seq_len, width\] a part, from the store or by
    /// `compute`, which gets the rows of a whole group and returns as many parts.
    pub fn get(
        &mut self,
        rows: &[usize],
        mut compute: impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        if let Some(job) = self.fetching.take() {
            let wanted = job.rows == rows;
            let parts = job.join()?;
            if wanted {
                return Ok(parts);
            }
        }
        // Only rows that are being stored are waited for, unless there is an error to tell.
        if self.keeping.as_ref().is_some_and(|job| {
            job.thread.is_finished() || rows.iter().any(|row| job.rows.contains(row))
        }) {
            self.settle()?;
        }
        let group = self.group_of[rows[0]];
        if self.groups[group] == rows && rows.iter().all(|&row| !self.held[row]) {
            let parts = compute(rows)?;
            self.keep(rows, &parts)?;
            return Ok(parts);
        }
        let mut missed = Vec::new();
        for &row in rows {
            if !self.held[row] {
                missed.push((row, self.recompute(row, &mut compute)?));
            }
        }
        let store = self.store.as_deref();
        let Some(gpu) = &self.gpu else {
            return self.shape.gather_on_host(store, rows, &missed);
        };
        let mut parts = self.shape.buffers(gpu, rows.len())?;
        self.shape.gather(store, rows, &missed, |part, at, bytes| {
            parts[part].write(at, bytes)
        })?;
        self.shape.tensors(parts, rows.len())
    }

    /// Begins to bring `rows`, which are asked for next, to the GPU, if all of them are stored.
    ///
    /// # Errors
    /// Out of memory.
    pub fn prefetch(&mut self, rows: &[usize]) -> Result<()> {
        let (Some(gpu), Some(store), None) = (&self.gpu, &self.store, &self.fetching) else {
            return Ok(());
        };
        if !rows.iter().all(|&row| self.held[row]) {
            return Ok(());
        }
        let (shape, store) = (self.shape, store.clone());
        let mut parts = shape.buffers(gpu, rows.len())?;
        // What used that memory before may be under way until here.
        let free = gpu.mark()?;
        self.fetching = Some(Job::new(rows, move |rows| {
            let beside = free.wait()?;
            shape.gather(Some(&store), rows, &[], |part, at, bytes| {
                parts[part].write_beside(&beside, at, bytes)
            })?;
            beside.finish()?;
            shape.tensors(parts, rows.len())
        }));
        Ok(())
    }

    /// Whether every row is stored, so that nothing will be computed again.
    ///
    /// # Errors
    /// What went wrong where rows were stored.
    pub fn is_complete(&mut self) -> Result<bool> {
        if self
            .keeping
            .as_ref()
            .is_some_and(|job| job.thread.is_finished())
        {
            self.settle()?;
        }
        Ok(self.held.iter().all(|&held| held))
    }

    /// As [`ActivationCache::will_take`].
    fn will_take(&self) -> [u64; 2] {
        let store = self.store.as_deref();
        store.map_or([0; 2], |store| shape::lock(store).will_take())
    }

    /// Waits until what is being stored is.
    fn settle(&mut self) -> Result<()> {
        if let Some(job) = self.keeping.take() {
            for row in job.join()? {
                self.held[row] = true;
            }
        }
        Ok(())
    }

    fn recompute(
        &mut self,
        row: usize,
        compute: &mut impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<u8>> {
        let group = self.group_of[row];
        let parts = match self.last.take() {
            Some((last, parts)) if last == group => parts,
            _ => {
                let parts = compute(&self.groups[group])?;
                self.keep(&self.groups[group].clone(), &parts)?;
                self.settle()?;
                parts
            }
        };
        let position = self.groups[group]
            .iter()
            .position(|&r| r == row)
            .unwrap_or(0);
        let bytes = self.shape.row(&parts, position, read)?;
        self.last = Some((group, parts));
        Ok(bytes)
    }

    /// Stores the results of `rows`, on a GPU when the rows before are stored.
    fn keep(&mut self, rows: &[usize], parts: &[Tensor]) -> Result<()> {
        self.settle()?;
        let Some(store) = &self.store else {
            return Ok(());
        };
        let shape = self.shape;
        let Some(gpu) = &self.gpu else {
            let kept = shape.keep(store, rows, parts, 1, read)?;
            kept.into_iter().for_each(|row| self.held[row] = true);
            return Ok(());
        };
        let (done, keepers) = (gpu.mark()?, self.keepers);
        let (store, parts) = (store.clone(), parts.to_vec());
        self.keeping = Some(Job::new(rows, move |rows| {
            // The job's own share of the parts keeps their memory from being used again before
            // it is read.
            let beside = done.wait()?;
            shape.keep(&store, rows, &parts, keepers, |part, start, len, out| {
                part.read_beside(&beside, start, len, out)
            })
        }));
        Ok(())
    }
}

/// Appends elements of a GPU's memory, when all that was launched is done.
fn read(part: &CudaBuffer, start: usize, len: usize, out: &mut Vec<u8>) -> Result<()> {
    out.extend(part.read(start, len)?);
    Ok(())
}

impl Drop for RowCache {
    fn drop(&mut self) {
        // No thread may go on with the device when its owner is gone; what went wrong is lost
        // with the cache.
        if let Some(job) = self.keeping.take() {
            drop(job.thread.join());
        }
        if let Some(job) = self.fetching.take() {
            drop(job.thread.join());
        }
    }
}
