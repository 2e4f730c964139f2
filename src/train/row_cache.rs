//! Results that depend on nothing but a row of tokens, kept from one epoch to the next.

use std::path::Path;

use crate::data::cache::ActivationCache;
use crate::error::Result;
use crate::tensor::Tensor;

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
    /// A cache whose groups are `order` cut into pieces of `group` rows. A row's result is
    /// `parts` tensors of shape \[seq_len, width\]. Without `space` nothing is kept.
    pub fn new(
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
        let row_len = parts * seq_len * width;
        let store = space.map(|s| ActivationCache::new(order.len(), row_len, s.memory, s.dir));
        let store = store.transpose()?;
        Ok(Self {
            groups,
            group_of,
            seq_len,
            width,
            parts,
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
        let new = |row: &usize| !self.store.as_ref().is_some_and(|s| s.contains(*row));
        if self.groups[group] == rows && rows.iter().all(new) {
            let parts = compute(rows)?;
            self.keep(rows, &parts)?;
            return Ok(parts);
        }
        let block = self.seq_len * self.width;
        let mut scratch = vec![0.0; self.parts * block];
        let mut out = vec![Vec::with_capacity(rows.len() * block); self.parts];
        for &row in rows {
            if !self
                .store
                .as_ref()
                .is_some_and(|s| s.get(row, &mut scratch))
            {
                self.recompute(row, &mut scratch, &mut compute)?;
            }
            for (out, part) in out.iter_mut().zip(scratch.chunks_exact(block)) {
                out.extend_from_slice(part);
            }
        }
        let shape = [rows.len() * self.seq_len, self.width];
        out.into_iter()
            .map(|part| Tensor::from_vec(part, shape))
            .collect()
    }

    fn recompute(
        &mut self,
        row: usize,
        scratch: &mut [f32],
        compute: &mut impl FnMut(&[usize]) -> Result<Vec<Tensor>>,
    ) -> Result<()> {
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
        self.copy_row(&parts, position, scratch)?;
        self.last = Some((group, parts));
        Ok(())
    }

    fn keep(&mut self, rows: &[usize], parts: &[Tensor]) -> Result<()> {
        if self.store.is_none() {
            return Ok(());
        }
        let mut scratch = vec![0.0; self.parts * self.seq_len * self.width];
        for (position, &row) in rows.iter().enumerate() {
            self.copy_row(parts, position, &mut scratch)?;
            if let Some(store) = &mut self.store {
                store.put(row, &scratch)?;
            }
        }
        Ok(())
    }

    fn copy_row(&self, parts: &[Tensor], position: usize, out: &mut [f32]) -> Result<()> {
        let block = self.seq_len * self.width;
        for (out, part) in out.chunks_exact_mut(block).zip(parts) {
            part.read_f32(position * block, out)?;
        }
        Ok(())
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
        RowCache::new(&[2, 0, 4, 1, 3], 2, [2, 2, 3], Some(space)).unwrap()
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
