//! Results that depend on nothing but a row of tokens, kept from one epoch to the next.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::data::cache::ActivationCache;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Computes tensors for groups of rows and keeps them by row.
///
/// A row is always computed together with the same other rows, whether it is missed because it
/// is new, because the cache had no room, or because the run was resumed: matrix products of
/// another height may round differently, and then a resumed run would not reach the same bits.
///
/// What a GPU computes goes to the store, and comes back, on a thread beside the one that keeps
/// the GPU busy.
pub struct RowCache {
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    shape: RowShape,
    /// Where there is one, what is computed comes from it and goes back to it.
    gpu: Option<CudaDevice>,
    store: Option<Arc<Mutex<ActivationCache>>>,
    /// The group computed last, for rows of it that the store does not hold.
    last: Option<(usize, Vec<Tensor>)>,
    beside: Option<Job>,
}

/// What a thread does beside.
enum Job {
    Keep(JoinHandle<Result<()>>),
    Fetch(Vec<usize>, JoinHandle<Result<Vec<Tensor>>>),
}

/// A row's results: `parts` tensors \[seq_len, width\].
#[derive(Clone, Copy)]
struct RowShape {
    parts: usize,
    seq_len: usize,
    width: usize,
    /// What the device computes in, and so keeps every bit of.
    dtype: DType,
}

/// Where and how much a [`RowCache`] may keep.
#[derive(Clone, Copy, Debug)]
pub struct CacheSpace<'a> {
    /// Bytes of memory; what needs more goes into a file.
    pub memory: u64,
    /// Folder of that file.
    pub dir: &'a Path,
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
        let store = space.map(|s| ActivationCache::new(order.len(), bytes, s.memory, s.dir));
        Ok(Self {
            groups,
            group_of,
            shape,
            gpu,
            store: store.transpose()?.map(|store| Arc::new(Mutex::new(store))),
            last: None,
            beside: None,
        })
    }

    /// The results of `rows`, one tensor \[rows x seq_len, width\] a part, from the store or by
    /// `compute`, which gets the rows of a whole group and returns as many parts.
    pub fn get(
        &mut self,
        rows: &[usize],
        mut compute: impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        match self.beside.take() {
            Some(Job::Fetch(fetched, job)) => {
                let parts = join(job)?;
                if fetched == rows {
                    return Ok(parts);
                }
            }
            Some(Job::Keep(job)) => join(job)?,
            None => {}
        }
        let group = self.group_of[rows[0]];
        if self.groups[group] == rows && rows.iter().all(|&row| !self.holds(row)) {
            let parts = compute(rows)?;
            self.keep(rows, &parts)?;
            return Ok(parts);
        }
        let mut missed = Vec::new();
        for &row in rows {
            if !self.holds(row) {
                missed.push((row, self.recompute(row, &mut compute)?));
            }
        }
        self.shape.gather(self.store.as_deref(), rows, &missed)
    }

    /// Begins to bring `rows`, which are asked for next, to the GPU, if all of them are stored.
    pub fn prefetch(&mut self, rows: &[usize]) {
        let (Some(gpu), Some(store), None) = (&self.gpu, &self.store, &self.beside) else {
            return;
        };
        if !rows.iter().all(|&row| self.holds(row)) {
            return;
        }
        let (shape, rows) = (self.shape, rows.to_vec());
        let (gpu, store, wanted) = (gpu.clone(), store.clone(), rows.clone());
        let job = thread::spawn(move || {
            let parts = shape.gather(Some(&store), &wanted, &[])?;
            parts.iter().map(|p| gpu.resident(p, shape.dtype)).collect()
        });
        self.beside = Some(Job::Fetch(rows, job));
    }

    fn holds(&self, row: usize) -> bool {
        let store = self.store.as_deref();
        store.is_some_and(|store| lock(store).get(row).is_some())
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
                if let Some(Job::Keep(job)) = self.beside.take() {
                    join(job)?;
                }
                parts
            }
        };
        let position = self.groups[group]
            .iter()
            .position(|&r| r == row)
            .unwrap_or(0);
        let bytes = self.shape.row(&parts, position, CudaBuffer::read)?;
        self.last = Some((group, parts));
        Ok(bytes)
    }

    /// Stores the results of `rows`.
    fn keep(&mut self, rows: &[usize], parts: &[Tensor]) -> Result<()> {
        let Some(store) = &self.store else {
            return Ok(());
        };
        let Some(gpu) = &self.gpu else {
            return self.shape.keep(store, rows, parts, CudaBuffer::read);
        };
        let (shape, done) = (self.shape, gpu.mark()?);
        let (store, rows, parts) = (store.clone(), rows.to_vec(), parts.to_vec());
        self.beside = Some(Job::Keep(thread::spawn(move || {
            let read = |part: &CudaBuffer, start, len| part.read_after(&done, start, len);
            shape.keep(&store, &rows, &parts, read)
        })));
        Ok(())
    }
}

impl Drop for RowCache {
    fn drop(&mut self) {
        // No thread may go on with the device when its owner is gone; what went wrong is lost
        // with the cache.
        match self.beside.take() {
            Some(Job::Keep(job)) => drop(job.join()),
            Some(Job::Fetch(_, job)) => drop(job.join()),
            None => {}
        }
    }
}

impl RowShape {
    fn part_values(self) -> usize {
        self.seq_len * self.width
    }

    fn bytes(self) -> usize {
        self.parts * self.part_values() * self.dtype.size()
    }

    /// One row of each part, one part after the other; `read` reads a GPU's memory.
    fn row(
        self,
        parts: &[Tensor],
        position: usize,
        read: impl Fn(&CudaBuffer, usize, usize) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let block = self.part_values();
        let mut bytes = Vec::new();
        for part in parts {
            match (self.dtype, part.cuda()) {
                (DType::Bf16, Some(buffer)) if buffer.dtype() == DType::Bf16 => {
                    let more = read(buffer, position * block, block)?;
                    // One part alone is not copied once more.
                    match bytes.is_empty() {
                        true => bytes = more,
                        false => bytes.extend_from_slice(&more),
                    }
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

    fn keep(
        self,
        store: &Mutex<ActivationCache>,
        rows: &[usize],
        parts: &[Tensor],
        read: impl Fn(&CudaBuffer, usize, usize) -> Result<Vec<u8>>,
    ) -> Result<()> {
        for (position, &row) in rows.iter().enumerate() {
            let bytes = self.row(parts, position, &read)?;
            lock(store).put(row, bytes)?;
        }
        Ok(())
    }

    /// The parts of `rows` in host memory, from the store or from `missed`.
    fn gather(
        self,
        store: Option<&Mutex<ActivationCache>>,
        rows: &[usize],
        missed: &[(usize, Vec<u8>)],
    ) -> Result<Vec<Tensor>> {
        match self.dtype {
            DType::Bf16 => self.gather_as::<bf16>(store, rows, missed, Tensor::from_bf16),
            _ => self.gather_as::<f32>(store, rows, missed, Tensor::from_vec),
        }
    }

    fn gather_as<T: Pod + Zeroable>(
        self,
        store: Option<&Mutex<ActivationCache>>,
        rows: &[usize],
        missed: &[(usize, Vec<u8>)],
        tensor: impl Fn(Vec<T>, [usize; 2]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let block = self.part_values();
        let mut out = vec![vec![T::zeroed(); rows.len() * block]; self.parts];
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
            for (out, part) in out
                .iter_mut()
                .zip(bytes.chunks_exact(block * size_of::<T>()))
            {
                bytemuck::cast_slice_mut(&mut out[i * block..][..block]).copy_from_slice(part);
            }
        }
        let shape = [rows.len() * self.seq_len, self.width];
        out.into_iter().map(|part| tensor(part, shape)).collect()
    }
}

fn lock(store: &Mutex<ActivationCache>) -> MutexGuard<'_, ActivationCache> {
    // A row is put as a whole or not at all, also where a thread panicked.
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread returns; its panic goes on here.
fn join<T>(job: JoinHandle<Result<T>>) -> Result<T> {
    job.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row r's parts hold r and r + 0.5; each call is counted.
    fn results(rows: &[usize], calls: &mut Vec<Vec<usize>>) -> Result<Vec<Tensor>> {
        calls.push(rows.to_vec());
        let part = |add: f32| {
            let data = rows.iter().flat_map(|&r| [r as f32 + add; 6]).collect();
            Tensor::from_vec(data, [rows.len() * 2, 3])
        };
        Ok(vec![part(0.0)?, part(0.5)?])
    }

    fn cache(memory: u64, dir: &Path) -> RowCache {
        let space = CacheSpace { memory, dir };
        let device = Device::cpu(1).unwrap();
        RowCache::new(&device, &[2, 0, 4, 1, 3], 2, [2, 2, 3], Some(space)).unwrap()
    }

    #[test]
    fn what_was_computed_once_is_not_computed_again() {
        let dir = tempfile::tempdir().unwrap();
        for memory in [0, 1 << 20] {
            let (mut cache, mut calls) = (cache(memory, dir.path()), Vec::new());
            for rows in [&[2, 0][..], &[4, 1], &[3]] {
                cache.get(rows, |r| results(r, &mut calls)).unwrap();
            }
            let parts = cache.get(&[1, 2, 3], |r| results(r, &mut calls)).unwrap();
            assert_eq!(calls, [vec![2, 0], vec![4, 1], vec![3]]);
            let first = parts[1].f32s().unwrap();
            assert_eq!((first[0], first[6], first[12]), (1.5, 2.5, 3.5));
        }
    }

    #[test]
    fn a_missed_row_is_computed_with_the_rows_of_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let (mut cache, mut calls) = (cache(1 << 20, dir.path()), Vec::new());
        let parts = cache.get(&[1], |r| results(r, &mut calls)).unwrap();
        assert_eq!(parts[0].f32s().unwrap(), &[1.0; 6]);
        assert_eq!(parts[0].shape(), &[2, 3]);
        cache.get(&[4], |r| results(r, &mut calls)).unwrap();
        assert_eq!(calls, [vec![4, 1]]);
    }
}
