//! Activations kept from one epoch to the next.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// The share of a disk's free space that a cache may take, beside what is reserved.
const DISK_SHARE: f64 = 0.9;

/// Rows of bytes by index.
///
/// Rows live in memory if all of them fit into the limit, else in a memory-mapped file without a
/// name, which vanishes with the cache or the process. Where the disk has no room for all rows, as
/// many as fit are kept and the others are missed.
#[derive(Debug)]
pub struct ActivationCache {
    row_bytes: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<Option<Box<[u8]>>>),
    Disk(Disk),
}

#[derive(Debug)]
struct Disk {
    file: File,
    dir: PathBuf,
    map: Mmap,
    /// Place of each row in the file, where it is stored.
    slots: Vec<Option<usize>>,
    used: usize,
    capacity: usize,
}

impl ActivationCache {
    /// An empty cache for `rows` rows of `row_bytes` bytes. Up to `memory_limit` bytes they are
    /// kept in memory, above that in a file in `spill_dir`, on whose disk `reserve` bytes are left
    /// to others.
    ///
    /// # Errors
    /// When the sizes overflow, or the file cannot be made.
    pub fn new(
        rows: usize,
        row_bytes: usize,
        memory_limit: u64,
        spill_dir: &Path,
        reserve: u64,
    ) -> Result<Self> {
        let Some(bytes) = row_bytes.checked_mul(rows) else {
            let got = format!("{rows} x {row_bytes}");
            return Err(Error::operand(
                "activation cache",
                "a size that fits in memory",
                got,
            ));
        };
        let store = if bytes as u64 <= memory_limit {
            Store::Memory(vec![None; rows])
        } else {
            Store::Disk(Disk::new(rows, row_bytes, spill_dir, reserve)?)
        };
        Ok(Self { row_bytes, store })
    }

    /// Whether rows live in a file instead of memory.
    pub fn is_on_disk(&self) -> bool {
        matches!(self.store, Store::Disk(_))
    }

    /// The most bytes that it takes: of memory, and of the disk beyond what it has taken there.
    pub fn will_take(&self) -> [u64; 2] {
        match &self.store {
            Store::Memory(rows) => [(rows.len() * self.row_bytes) as u64, 0],
            Store::Disk(disk) => [0, ((disk.capacity - disk.used) * self.row_bytes) as u64],
        }
    }

    /// Row `i`, where it is stored.
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        match &self.store {
            Store::Memory(rows) => rows.get(i)?.as_deref(),
            Store::Disk(disk) => {
                let slot = (*disk.slots.get(i)?)?;
                Some(&disk.map[slot * self.row_bytes..][..self.row_bytes])
            }
        }
    }

    /// Stores row `i`, or replaces it. Does nothing where the disk has no room for it.
    ///
    /// # Errors
    /// When the row has a wrong index or length, or writing fails for another reason than space.
    pub fn put(&mut self, i: usize, row: Vec<u8>) -> Result<()> {
        let rows = match &self.store {
            Store::Memory(rows) => rows.len(),
            Store::Disk(disk) => disk.slots.len(),
        };
        if i >= rows || row.len() != self.row_bytes {
            return Err(Error::operand(
                "activation cache",
                format!("a row below {rows} of {} bytes", self.row_bytes),
                format!("row {i} of {}", row.len()),
            ));
        }
        match &mut self.store {
            Store::Memory(rows) => rows[i] = Some(row.into_boxed_slice()),
            Store::Disk(disk) => disk.put(i, &row)?,
        }
        Ok(())
    }
}

impl Disk {
    fn new(rows: usize, row_bytes: usize, dir: &Path, reserve: u64) -> Result<Self> {
        let error = |e| Error::io(dir, e);
        let free = free_space(dir)?.saturating_sub(reserve);
        let capacity = rows.min((free as f64 * DISK_SHARE) as usize / row_bytes);
        let file = tempfile::tempfile_in(dir).map_err(error)?;
        // The file is sparse: blocks are taken when rows are written. At least one byte, since an
        // empty file cannot be mapped everywhere.
        file.set_len((capacity * row_bytes).max(1) as u64)
            .map_err(error)?;
        // SAFETY: the file has no name, so nobody else changes or shortens it while it is mapped.
        let map = unsafe { Mmap::map(&file) }.map_err(error)?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            map,
            slots: vec![None; rows],
            used: 0,
            capacity,
        })
    }

    /// Writes through the file, not the map: a full disk is then an error, not a signal.
    fn put(&mut self, i: usize, bytes: &[u8]) -> Result<()> {
        let slot = self.slots[i].unwrap_or(self.used);
        if slot >= self.capacity {
            return Ok(());
        }
        self.slots[i] = None;
        let written = self
            .file
            .seek(SeekFrom::Start((slot * bytes.len()) as u64))
            .and_then(|_| self.file.write_all(bytes));
        match written {
            Ok(()) => {
                self.slots[i] = Some(slot);
                self.used = self.used.max(slot + 1);
                Ok(())
            }
            Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                self.capacity = self.used;
                Ok(())
            }
            Err(e) => Err(Error::io(&self.dir, e)),
        }
    }
}

/// Bytes that an unprivileged user may still write in `dir`.
#[cfg(unix)]
fn free_space(dir: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| Error::io(dir, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Unknown here, so only a failing write tells.
#[cfg(not(unix))]
fn free_space(_dir: &Path) -> Result<u64> {
    Ok(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_beyond_the_capacity_are_missed_and_stored_ones_can_still_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = ActivationCache::new(3, 2, 0, dir.path(), 0).unwrap();
        let Store::Disk(disk) = &mut cache.store else {
            panic!("above the memory limit");
        };
        disk.capacity = 1;
        cache.put(2, vec![1, 2]).unwrap();
        cache.put(0, vec![3, 4]).unwrap();
        cache.put(2, vec![5, 6]).unwrap();
        assert_eq!(cache.get(0), None);
        assert_eq!(cache.get(2), Some(&[5, 6][..]));
    }
}
