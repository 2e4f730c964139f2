//! Measuring on a CUDA device: times by events on a GPU, counters on the emulator.

mod counters;
mod cublas;
mod published;
mod timer;

use std::fmt;
use std::time::Duration;

use serde::Serialize;

pub use counters::Counted;
pub(super) use counters::Emulator;
pub use published::Estimate;
pub(super) use published::SOURCE;

use super::report::{Bound, Peer, Roof, Row};
use super::runs::Run;
use super::work::{Pass, Work};
use crate::device::{CudaDevice, Device};
use crate::error::Result;
use cublas::Cublas;
use timer::Timer;

/// What a GPU can do at most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuCeilings {
    /// FLOP a second of bf16 products in tensor cores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flop_per_s: Option<f64>,
    /// Where that rate is from.
    pub flop_source: String,
    /// Bytes a second of copies within the device, read and written bytes both counted.
    pub copy_bytes_per_s: f64,
}

/// Extent of the product and bytes of the copy that the ceilings are measured with.
const PRODUCT: usize = 8192;
const COPY: usize = 1 << 29;

/// A GPU that is measured with events.
pub(super) struct Gpu {
    timer: Timer,
    cublas: Option<Cublas>,
    pub(super) ceilings: GpuCeilings,
}

impl Gpu {
    pub(super) fn new(cuda: &CudaDevice, name: &str, budget: Duration) -> Result<Self> {
        let mut timer = Timer::new(cuda, budget)?;
        let cublas = Cublas::load(cuda.stream());
        let copy = timer.copy_times(COPY)?.median;
        let (flop_per_s, flop_source) = match &cublas {
            Some(cublas) => {
                let times = cublas.times(&mut timer, Pass::Forward, [PRODUCT; 3])?;
                let flop = 2.0 * (PRODUCT as f64).powi(3);
                let source = format!("cuBLASLt, {PRODUCT} x {PRODUCT} x {PRODUCT}, measured");
                (Some(flop / times.median), source)
            }
            None => match published::tensor_rate(name) {
                Some(rate) => (Some(rate), "published; cuBLASLt was not found".to_owned()),
                None => (None, "unknown; cuBLASLt was not found".to_owned()),
            },
        };
        Ok(Self {
            timer,
            cublas,
            ceilings: GpuCeilings {
                flop_per_s,
                flop_source,
                copy_bytes_per_s: 2.0 * COPY as f64 / copy,
            },
        })
    }

    /// Fills in times, how they compare with the ceilings, and the peer of a row.
    pub(super) fn measure(&mut self, run: &mut dyn Run, work: Work, row: &mut Row) -> Result<()> {
        let times = self.timer.times(true, run)?;
        row.seconds_warm = Some(self.timer.times(false, run)?);
        row.set_times(times);
        let bandwidth = self.ceilings.copy_bytes_per_s;
        // Without a known rate of arithmetic, memory is the only ceiling.
        let flop_per_s = self.ceilings.flop_per_s.unwrap_or(f64::INFINITY);
        let roof = Roof::of(row.flop, row.bytes, times.median, flop_per_s, bandwidth);
        row.roof = Some(roof);
        row.peer = self.peer(work, row, roof, times.median)?;
        Ok(())
    }

    fn peer(&mut self, work: Work, row: &Row, roof: Roof, median: f64) -> Result<Option<Peer>> {
        let (name, seconds) = match (work, &self.cublas) {
            (Work::Gemm { tokens, inner, out }, Some(cublas)) => {
                let times = cublas.times(&mut self.timer, row.pass, [tokens, inner, out])?;
                ("cuBLASLt", times)
            }
            _ if roof.bound == Bound::Memory => {
                // Half of the bytes in, half of them out.
                (
                    "device copy",
                    self.timer.copy_times(row.bytes as usize / 2)?,
                )
            }
            _ => return Ok(None),
        };
        Ok(Some(Peer {
            name,
            ratio: seconds.median / median,
            seconds,
        }))
    }
}

/// Fills in what the emulator counts of one run of a row.
pub(super) fn count(
    emulator: Emulator,
    device: &Device,
    run: &mut dyn Run,
    row: &mut Row,
) -> Result<()> {
    run.prepare(device)?;
    let before = emulator.totals()?;
    run.run(device)?;
    let counted = emulator.totals()?.since(before, row.bytes);
    row.estimates = published::estimates(&counted, row.bytes);
    row.counters = Some(counted);
    Ok(())
}

/// Size of the device's L2 cache in bytes.
pub(super) fn cache_bytes(cuda: &CudaDevice) -> usize {
    timer::l2_bytes(cuda.stream())
}

impl fmt::Display for GpuCeilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let copy = self.copy_bytes_per_s / 1e9;
        match self.flop_per_s {
            Some(rate) => writeln!(
                f,
                "  bf16 products {:.1} TFLOP/s ({})",
                rate / 1e12,
                self.flop_source
            )?,
            None => writeln!(f, "  bf16 products: {}", self.flop_source)?,
        }
        writeln!(f, "  copy within the device, read + written {copy:.1} GB/s")
    }
}
