//! Times of repeated runs on the host's cores.

use std::time::{Duration, Instant};

use super::runs::Run;
use super::stats::Times;
use crate::device::Device;
use crate::error::{Error, Result};

/// Fewest repetitions, however long they take.
pub(super) const FEWEST: usize = 3;
/// Most repetitions, however short.
pub(super) const MOST: usize = 400;

/// Times of a run: a round of warm-up over all sets of operands (as far as a third of the budget
/// goes), then repetitions until the budget is spent.
pub(super) fn host_times(
    device: &Device,
    run: &mut dyn Run,
    budget: Duration,
    sets: usize,
) -> Result<Times> {
    let began = Instant::now();
    for round in 0..sets + 1 {
        if round > 0 && began.elapsed() > budget / 3 {
            break;
        }
        once(device, run)?;
    }
    let began = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < FEWEST || (began.elapsed() < budget && seconds.len() < MOST) {
        seconds.push(once(device, run)?);
    }
    Times::of(seconds).ok_or_else(|| Error::operand("bench-kernels", "a time", "none"))
}

fn once(device: &Device, run: &mut dyn Run) -> Result<f64> {
    run.prepare(device)?;
    let began = Instant::now();
    run.run(device)?;
    Ok(began.elapsed().as_secs_f64())
}
