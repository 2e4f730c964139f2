//! A cluster: blocks that run together on one thread and reach each other's shared memory.
//! Without clusters a launch has clusters of one block.

use super::block::Block;
use super::launch::Launch;
use super::shared::SharedMemory;
use crate::counters::Counters;
use crate::sanitize::Finding;
use crate::sanitize::shared::{ACTORS, raise};

/// Rounds in which all warps poll in vain before the cluster counts as stuck.
const MAX_IDLE_ROUNDS: u32 = 10_000;

/// How far a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Running,
    Finished,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster<'p> {
    launch: &'p Launch<'p>,
    blocks: Vec<Block<'p>>,
    /// Places that the memory of all blocks but one is lent from, to that one.
    lent: Vec<SharedMemory>,
    now: u32,
    idle_rounds: u32,
}

impl<'p> Cluster<'p> {
    pub fn new(launch: &'p Launch<'p>) -> Self {
        let size = launch.cluster.iter().product::<u32>() as usize;
        Self {
            launch,
            blocks: (0..size).map(|_| Block::new(launch)).collect(),
            lent: (0..size).map(|_| SharedMemory::default()).collect(),
            now: 1,
            idle_rounds: 0,
        }
    }

    /// Starts the cluster with this linear index in the grid of clusters.
    pub fn start(&mut self, index: u64) {
        let [cx, cy, cz] = self.launch.cluster;
        let [gx, gy, _] =
            [0, 1, 2].map(|i| u64::from(self.launch.grid[i] / self.launch.cluster[i]));
        let first = [
            (index % gx) as u32 * cx,
            (index / gx % gy) as u32 * cy,
            (index / gx / gy) as u32 * cz,
        ];
        for (rank, block) in (0u32..).zip(&mut self.blocks) {
            let within = [rank % cx, rank / cx % cy, rank / cx / cy];
            block.start([0, 1, 2].map(|i| first[i] + within[i]), rank);
        }
        (self.now, self.idle_rounds) = (1, 0);
    }

    /// Gives every ready warp of every block a turn.
    ///
    /// # Errors
    /// The first finding.
    pub fn round(&mut self) -> Result<Progress, Box<Finding>> {
        let mut idle = true;
        for rank in 0..self.blocks.len() {
            if self.blocks[rank].finished() {
                continue;
            }
            self.lend(rank);
            let progressed = self.blocks[rank].turn();
            self.take_back(rank);
            idle &= !progressed?;
            self.complete_barrier();
        }
        if self.blocks.iter().all(Block::finished) {
            return Ok(Progress::Finished);
        }
        if !self.blocks.iter().any(Block::ready)
            && let Some(finding) = self.blocks.iter().find_map(Block::deadlock)
        {
            return Err(finding);
        }
        self.idle_rounds = if idle { self.idle_rounds + 1 } else { 0 };
        match self.blocks.iter().find(|b| b.ready()) {
            Some(block) if self.idle_rounds > MAX_IDLE_ROUNDS => Err(block.timeout()),
            _ => Ok(Progress::Running),
        }
    }

    /// Lends the other blocks' memory and the time to a block.
    fn lend(&mut self, to: usize) {
        self.swap_memory(to);
        let ctx = &mut self.blocks[to].ctx;
        std::mem::swap(&mut ctx.peers, &mut self.lent);
        ctx.clocks.now = self.now;
    }

    /// Takes back what [`Self::lend`] lent.
    fn take_back(&mut self, from: usize) {
        let ctx = &mut self.blocks[from].ctx;
        std::mem::swap(&mut ctx.peers, &mut self.lent);
        self.now = ctx.clocks.now;
        self.swap_memory(from);
    }

    fn swap_memory(&mut self, except: usize) {
        let places = self.blocks.iter_mut().zip(&mut self.lent).enumerate();
        for (_, (block, place)) in places.filter(|(rank, _)| *rank != except) {
            std::mem::swap(&mut block.ctx.memory, place);
        }
    }

    /// Completes the cluster's barrier if all threads that have not exited have arrived.
    fn complete_barrier(&mut self) {
        let arrived = self.blocks.iter().all(Block::all_arrived);
        if !arrived || self.blocks.iter().all(Block::finished) {
            return;
        }
        for rank in 0..self.blocks.len() {
            let mut known = [0; ACTORS];
            for block in &self.blocks {
                raise(&mut known, &block.cluster_known(rank as u32));
            }
            self.blocks[rank].release_cluster(known);
        }
        self.blocks.iter_mut().for_each(Block::complete_cluster);
    }

    /// What the cluster's blocks counted.
    pub fn counters(&self) -> Counters {
        let mut total = Counters::default();
        for block in &self.blocks {
            total.add(&block.ctx.counters);
        }
        total
    }
}
