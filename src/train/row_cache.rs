//! Results that depend on nothing but a row of tokens, kept from one epoch to the next.

use std::path::Path;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::data::cache::ActivationCache;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Computes tensors for groups of rows and keeps them by row.
///
/// A row is always computed together with the same other rows, whether it is missed because it
/// is new, because the cache had no room, or because the run was resumed: matrix products of
/// another height may round differently, and then a resumed run would not reach the same bits.
pub struct RowCache {
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    /// Rows of tokens x hidden size of each part of a row's result.
    seq_len: usize,
    width: usize,
    parts: usize,
    /// What the device computes in, and so keeps every bit of.
    dtype: DType,
    store: Option<ActivationCache>,
    /// The group computed last, for rows of it that the store does not hold.
    last: Option<(usize, Vec<Tensor>)>,
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
        let dtype = match device {
            Device::Cpu(_) => DType::F32,
            Device::Cuda(_) => DType::Bf16,
        };
        let bytes = parts * seq_len * width * dtype.size();
        let store = space.map(|s| ActivationCache::new(order.len(), bytes, s.memory, s.dir));
        let store = store.transpose()?;
        Ok(Self {
            groups,
            group_of,
            seq_len,
            width,
            parts,
            dtype,
            store,
            last: None,
        })
    }

    /// The results of `rows`, one tensor \[rows x seq_len, width\] a part, from the store or by
    /// `compute`, which gets the rows of a whole group and returns as many parts.
    pub fn get(
        &mut self,
        rows: &[usize],
        mut compute: impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let group = self.group_of[rows[0]];
        let is_new = |row: &usize| self.stored(*row).is_none();
        if self.groups[group] == rows && rows.iter().all(is_new) {
            let parts = compute(rows)?;
            self.keep(rows, &parts)?;
            return Ok(parts);
        }
        match self.dtype {
            DType::Bf16 => self.gather::<bf16>(rows, Tensor::from_bf16, compute),
            _ => self.gather::<f32>(rows, Tensor::from_vec, compute),
        }
    }

    fn stored(&self, row: usize) -> Option<&[u8]> {
        self.store.as_ref()?.get(row)
    }

    /// The parts of `rows` in host memory, as values of type T.
    fn gather<T: Pod + Zeroable>(
        &mut self,
        rows: &[usize],
        tensor: impl Fn(Vec<T>, [usize; 2]) -> Result<Tensor>,
        mut compute: impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let block = self.seq_len * self.width;
        let mut out = vec![vec![T::zeroed(); rows.len() * block]; self.parts];
        for (i, &row) in rows.iter().enumerate() {
            let recomputed;
            let bytes = match self.stored(row) {
                Some(bytes) => bytes,
                None => {
                    recomputed = self.recompute(row, &mut compute)?;
                    &recomputed
                }
            };
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
                parts
            }
        };
        let position = self.groups[group]
            .iter()
            .position(|&r| r == row)
            .unwrap_or(0);
        let bytes = self.row_bytes(&parts, position)?;
        self.last = Some((group, parts));
        Ok(bytes)
    }

    fn keep(&mut self, rows: &[usize], parts: &[Tensor]) -> Result<()> {
        if self.store.is_none() {
            return Ok(());
        }
        for (position, &row) in rows.iter().enumerate() {
            let bytes = self.row_bytes(parts, position)?;
            if let Some(store) = &mut self.store {
                store.put(row, &bytes)?;
            }
        }
        Ok(())
    }

    /// One row of each part, one part after the other.
    fn row_bytes(&self, parts: &[Tensor], position: usize) -> Result<Vec<u8>> {
        let block = self.seq_len * self.width;
        let mut bytes = Vec::with_capacity(parts.len() * block * self.dtype.size());
        for part in parts {
            match (self.dtype, part.cuda()) {
                (DType::Bf16, Some(buffer)) if buffer.dtype() == DType::Bf16 => {
                    bytes.extend(buffer.read(position * block, block)?);
                }
                (DType::F32, _) => {
                    let start = bytes.len();
                    bytes.resize(start + block * size_of::<f32>(), 0);
                    let mut values = vec![0.0f32; block];
                    part.read_f32(position * block, &mut values)?;
                    bytes[start..].copy_from_slice(bytemuck::cast_slice(&values));
                }
                _ => {
                    let expected = format!("a part in {}", self.dtype.name());
                    return Err(Error::operand("activation cache", expected, part.found()));
                }
            }
        }
        Ok(bytes)
    }
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
