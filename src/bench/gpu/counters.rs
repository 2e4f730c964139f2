//! What the CUDA emulator counts. A driver that is the emulator exports C functions of its own
//! beside those of NVIDIA's driver; that is how it is told apart.

use std::ffi::c_char;
use std::fmt;

use cudarc::driver::sys::culib;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// `size_t cuda_emulator_totals(char *to, size_t capacity)`: sums for each kernel, a line of JSON
/// each; returns the length of the text.
type Totals = unsafe extern "C" fn(*mut c_char, usize) -> usize;

/// The emulator that the process has loaded as its driver.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Emulator {
    totals: Totals,
}

/// What one run of an operator did on the emulator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counted {
    /// Kernels launched.
    pub launches: f64,
    /// Bytes that loads from and stores to global memory asked for.
    pub bytes: f64,
    /// Bytes of the 32-byte sectors that they touched: what the L2 cache gives and takes.
    pub sector_bytes: f64,
    /// These by the least bytes.
    pub bytes_of_least: f64,
    /// Passes over shared memory that bank conflicts added.
    pub bank_conflicts: f64,
    /// FLOP of matrix instructions.
    pub mma_flop: f64,
    /// FLOP of scalar instructions.
    pub scalar_flop: f64,
}

/// The counters of a kernel that matter here.
#[derive(Deserialize)]
struct Line {
    launches: f64,
    global_load_bytes: f64,
    global_store_bytes: f64,
    global_load_sectors: f64,
    global_store_sectors: f64,
    shared_bank_conflicts: f64,
    mma_flop: f64,
    flop: f64,
}

impl Emulator {
    /// The emulator, where the loaded driver is one.
    pub(in crate::bench) fn loaded() -> Option<Self> {
        // SAFETY: called for a device that exists, so the driver has been found and loaded.
        let driver = unsafe { culib() };
        // SAFETY: the emulator exports this name with this signature, and nothing else has it.
        let totals = unsafe { driver.get::<Totals>(b"cuda_emulator_totals\0") }.ok()?;
        Some(Self { totals: *totals })
    }

    /// Sums over all launches of the process so far.
    pub(super) fn totals(self) -> Result<Counted> {
        // SAFETY: a null buffer of no capacity asks for the length alone.
        let len = unsafe { (self.totals)(std::ptr::null_mut(), 0) };
        let mut text = vec![0u8; len + 1];
        // SAFETY: the buffer has the capacity that it is said to have.
        unsafe { (self.totals)(text.as_mut_ptr().cast(), text.len()) };
        text.truncate(len);
        let mut sum = Counted::default();
        for line in String::from_utf8_lossy(&text).lines() {
            let line: Line = serde_json::from_str(line).map_err(|e| {
                Error::operand("bench-kernels", "the emulator's counters", e.to_string())
            })?;
            sum.launches += line.launches;
            sum.bytes += line.global_load_bytes + line.global_store_bytes;
            sum.sector_bytes += 32.0 * (line.global_load_sectors + line.global_store_sectors);
            sum.bank_conflicts += line.shared_bank_conflicts;
            sum.mma_flop += line.mma_flop;
            sum.scalar_flop += line.flop;
        }
        Ok(sum)
    }
}

impl Counted {
    /// What was counted after `before`; `least` bytes would have been enough.
    pub(super) fn since(self, before: Self, least: f64) -> Self {
        let sector_bytes = self.sector_bytes - before.sector_bytes;
        Self {
            launches: self.launches - before.launches,
            bytes: self.bytes - before.bytes,
            sector_bytes,
            bytes_of_least: sector_bytes / least,
            bank_conflicts: self.bank_conflicts - before.bank_conflicts,
            mma_flop: self.mma_flop - before.mma_flop,
            scalar_flop: self.scalar_flop - before.scalar_flop,
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>9.3} MB ({:5.2} of least) {:>3} launches {:>6} conflicts",
            self.sector_bytes / 1e6,
            self.bytes_of_least,
            self.launches,
            self.bank_conflicts,
        )
    }
}
