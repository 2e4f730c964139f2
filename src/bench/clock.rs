//! Times of repeated runs on the host's cores.

use std::time::{Duration, Instant};

use super::runs::Run;
use crate::device::Device;
use crate::error::Result;

/// Fewest repetitions, however long they take, where a row is measured in one go.
pub(super) const FEWEST: usize = 3;
/// Most repetitions, however short.
pub(super) const MOST: usize = 400;
/// Rounds over all rows on the host: what the machine's speed wanders by between minutes lies in
/// the times of a row then.
pub(super) const ROUNDS: usize = 3;

/// Seconds that a run took each time: a round of warm-up over all sets of operands (as far as a
/// third of the budget goes), then repetitions until one round's share of the budget is spent.
pub(super) fn host_seconds(
    device: &Device,
    run: &mut dyn Run,
    budget: Duration,
    sets: usize,
) -> Result<Vec<f64>> {
    let budget = budget / ROUNDS as u32;
    let began = Instant::now();
    for round in 0..sets + 1 {
        if round > 0 && began.elapsed() > budget / 3 {
            break;
        }
        once(device, run)?;
    }
    let began = Instant::now();
    let mut seconds = Vec::new();
    while seconds.is_empty() || (began.elapsed() < budget && seconds.len() < MOST / ROUNDS) {
        seconds.push(once(device, run)?);
    }
    Ok(seconds)
}

fn once(device: &Device, run: &mut dyn Run) -> Result<f64> {
    run.prepare(device)?;
    let began = Instant::now();
    run.run(device)?;
    Ok(began.elapsed().as_secs_f64())
}
