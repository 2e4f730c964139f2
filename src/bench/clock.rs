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

/// Seconds that a run took each time: first all sets of operands once (as far as the budget goes),
/// which are new in each round and whose memory the system may not have given out yet, then
/// repetitions until one round's share of the budget is spent.
pub(super) fn host_seconds(
    device: &Device,
    run: &mut dyn Run,
    budget: Duration,
    sets: usize,
) -> Result<Vec<f64>> {
    let began = Instant::now();
    for set in 0..sets + 1 {
        if set > 0 && began.elapsed() > budget {
            break;
        }
        once(device, run)?;
    }
    let (share, most) = (budget / ROUNDS as u32, MOST / ROUNDS);
    let began = Instant::now();
    let mut seconds = Vec::new();
    while seconds.is_empty() || (began.elapsed() < share && seconds.len() < most) {
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
