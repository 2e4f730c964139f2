//! A launch: its blocks spread over the host's threads.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use rayon::prelude::*;

use super::alu::Alu;
use super::cluster::{Cluster, Progress};
use super::memory::View;
use crate::counters::Counters;
use crate::ptx::program::Program;
use crate::sanitize::global::LaunchState;
use crate::sanitize::{Checked, Fault, Finding, Kind};

/// Everything the blocks of a launch have in common.
#[derive(Debug)]
pub struct Launch<'p> {
    pub program: &'p Program,
    /// Index of the kernel.
    pub function: usize,
    pub grid: [u32; 3],
    pub block_dim: [u32; 3],
    /// Blocks per cluster; 1 in each direction without clusters.
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// Static and dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The kernel's parameters.
    pub params: Vec<u8>,
    pub view: View,
    pub races: LaunchState,
    pub alu: Alu,
    pub sm_count: u32,
    pub started: Instant,
    /// Seed of a random warp schedule.
    pub schedule: Option<u64>,
    /// Warp instructions a block may execute.
    pub step_limit: u64,
}

impl Launch<'_> {
    pub fn warps_per_block(&self) -> u32 {
        self.block_dim.iter().product::<u32>().div_ceil(32)
    }

    /// A value of the parameter bank.
    pub fn param(&self, at: u64, size: u64, lane: usize) -> Checked<u64> {
        let range = at as usize..(at + size) as usize;
        let Some(bytes) = self.params.get(range) else {
            let message = format!(
                "parameter read of {size} bytes at {at} of {}",
                self.params.len()
            );
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        };
        let mut out = [0; 8];
        out[..bytes.len()].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(out))
    }

    /// Output of a device `printf`.
    pub fn print(&self, text: &str) {
        // A closed standard output is no reason to stop a kernel.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
    }

    /// Runs all blocks.
    ///
    /// # Errors
    /// The first finding; blocks that had not started then do not run.
    pub fn run(&self) -> Result<Counters, Box<Finding>> {
        let sizes = self.grid.iter().zip(self.cluster);
        let clusters: u64 = sizes.map(|(&g, c)| u64::from(g / c)).product();
        let workers = (rayon::current_num_threads() as u64).min(clusters).max(1);
        let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let total = Mutex::new(Counters {
            launches: 1,
            ..Counters::default()
        });
        (0..workers).into_par_iter().try_for_each(|_| {
            let mut cluster = Cluster::new(self);
            while !stop.load(Relaxed) {
                let index = next.fetch_add(1, Relaxed);
                if index >= clusters {
                    break;
                }
                cluster.start(index);
                loop {
                    match cluster.round() {
                        Ok(Progress::Running) => {}
                        Ok(Progress::Finished) => break,
                        Err(finding) => {
                            stop.store(true, Relaxed);
                            return Err(finding);
                        }
                    }
                }
            }
            if let Ok(mut total) = total.lock() {
                total.add(&cluster.counters());
            }
            Ok(())
        })?;
        Ok(total.into_inner().unwrap_or_else(|e| e.into_inner()))
    }
}
