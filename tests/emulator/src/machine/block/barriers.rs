//! The barriers of a block: the named ones with their reductions, and its part in the cluster's.

use super::{Block, CLUSTER_BARRIER, ClusterState, State};
use crate::ptx::ops::{BarrierKind, Op};
use crate::sanitize::Finding;
use crate::sanitize::shared::{ACTORS, Times, raise};

/// One of the 16 named barriers, or one of those the machine has for itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Barrier {
    /// Warps that arrived since it last completed, and those of them that wait.
    pub(super) arrived: u32,
    waiting: u32,
    /// Threads to arrive, when the instruction says.
    pub(super) threads: Option<u32>,
    /// What the arrived warps know of the others.
    known: Times,
    popc: u32,
    all: bool,
    any: bool,
}

pub(super) const EMPTY: Barrier = Barrier {
    arrived: 0,
    waiting: 0,
    threads: None,
    known: [0; ACTORS],
    popc: 0,
    all: true,
    any: false,
};

impl Block<'_> {
    pub(super) fn arrive_cluster(&mut self, i: usize, relaxed: bool) -> Result<(), Box<Finding>> {
        self.ctx.progress += 1;
        if self.cluster[i] != ClusterState::Away {
            let message = format!("warp {i} arrives twice at the cluster's barrier");
            return Err(self.finding_at_barrier(i, message));
        }
        self.cluster[i] = ClusterState::Arrived;
        if !relaxed {
            let times = self.ctx.clocks.release(i as u32);
            raise(&mut self.cluster_known, &times);
        }
        Ok(())
    }

    pub(super) fn wait_cluster(&mut self, i: usize) -> Result<(), Box<Finding>> {
        match self.cluster[i] {
            ClusterState::Arrived => self.states[i] = State::Waiting(CLUSTER_BARRIER),
            ClusterState::Complete => self.pass_cluster(i),
            ClusterState::Away => {
                let message =
                    format!("warp {i} waits at the cluster's barrier and has not arrived");
                return Err(self.finding_at_barrier(i, message));
            }
        }
        Ok(())
    }

    fn pass_cluster(&mut self, i: usize) {
        self.ctx.progress += 1;
        self.cluster[i] = ClusterState::Away;
        self.states[i] = State::Ready;
        self.ctx.clocks.acquire(i as u32, &self.cluster_released);
        // Relaxed arrivals order nothing.
        self.ctx.in_step |= self.cluster_released != [0; ACTORS];
    }

    /// Whether all warps that have not exited have arrived at the cluster's barrier.
    pub fn all_arrived(&self) -> bool {
        let mut warps = self.states.iter().zip(&self.cluster);
        warps.all(|(s, c)| *s == State::Done || *c == ClusterState::Arrived)
    }

    /// What the arrivals at the cluster's barrier know, as the block with this rank understands it.
    pub fn cluster_known(&self, rank: u32) -> Times {
        if rank == self.ctx.rank {
            self.cluster_known
        } else {
            self.ctx.clocks.translate(&self.cluster_known, rank)
        }
    }

    /// What all arrivals at the cluster's barrier knew, for those that wait.
    pub fn release_cluster(&mut self, known: Times) {
        self.cluster_released = known;
    }

    /// Completes the cluster's barrier.
    pub fn complete_cluster(&mut self) {
        self.cluster_known = [0; ACTORS];
        for i in 0..self.warps.len() {
            if self.cluster[i] == ClusterState::Arrived {
                self.cluster[i] = ClusterState::Complete;
                if self.states[i] == State::Waiting(CLUSTER_BARRIER) {
                    self.pass_cluster(i);
                }
            }
        }
    }

    pub(super) fn arrive(
        &mut self,
        i: usize,
        kind: BarrierKind,
        id: u32,
        threads: Option<u32>,
    ) -> Result<(), Box<Finding>> {
        self.ctx.progress += 1;
        let known = self.ctx.clocks.release(i as u32);
        let warp = &self.warps[i];
        let barrier = &mut self.barriers[id as usize];
        if barrier.arrived == 0 {
            *barrier = Barrier { threads, ..EMPTY };
        }
        let message = if barrier.threads != threads {
            Some(format!(
                "barrier {id} for {threads:?} threads, but other warps said {:?}",
                barrier.threads
            ))
        } else if barrier.arrived >> i & 1 == 1 {
            Some(format!("warp {i} arrives twice at barrier {id}"))
        } else {
            None
        };
        if let Some(message) = message {
            return Err(self.finding_at_barrier(i, message));
        }
        barrier.arrived |= 1 << i;
        raise(&mut barrier.known, &known);
        match kind {
            BarrierKind::Popc { p, negated, .. }
            | BarrierKind::And { p, negated, .. }
            | BarrierKind::Or { p, negated, .. } => {
                let value = (warp.regs.pred(p) ^ if negated { u32::MAX } else { 0 }) & warp.live;
                barrier.popc += value.count_ones();
                barrier.all &= value == warp.live;
                barrier.any |= value != 0;
            }
            BarrierKind::Sync | BarrierKind::Arrive => {}
        }
        if kind != BarrierKind::Arrive {
            barrier.waiting |= 1 << i;
            self.states[i] = State::Waiting(id);
        }
        self.complete(id);
        Ok(())
    }

    /// Lets the waiting warps go if everybody has arrived.
    fn complete(&mut self, id: u32) {
        let barrier = self.barriers[id as usize];
        let arrived = barrier.arrived.count_ones() * 32;
        let everybody = self.warps.len() as u32 * 32;
        let partial = self.warps.iter().any(|w| w.live != w.full);
        let done = match barrier.threads {
            Some(threads) => arrived >= threads,
            None => arrived == everybody && !partial,
        };
        if !done {
            return;
        }
        for i in (0..self.warps.len()).filter(|i| barrier.waiting >> i & 1 == 1) {
            self.states[i] = State::Ready;
            self.ctx.clocks.acquire(i as u32, &barrier.known);
            self.write_reduction(i, &barrier);
        }
        self.barriers[id as usize] = EMPTY;
    }

    /// Result of `bar.red` for a warp that is one instruction past it.
    fn write_reduction(&mut self, i: usize, barrier: &Barrier) {
        let warp = &mut self.warps[i];
        let Some(Op::Barrier { kind, .. }) = warp.previous(&self.ctx) else {
            return;
        };
        let live = warp.live;
        let mask = |holds: bool| if holds { u32::MAX } else { 0 };
        match *kind {
            BarrierKind::Popc { d, .. } => warp.regs.write32(d, &[barrier.popc; 32], live),
            BarrierKind::And { d, .. } => warp.regs.set_pred(d, mask(barrier.all), live),
            BarrierKind::Or { d, .. } => warp.regs.set_pred(d, mask(barrier.any), live),
            BarrierKind::Sync | BarrierKind::Arrive => {}
        }
    }
}
