//! A block: its warps, shared memory and barriers, run to completion on one thread.

use super::launch::Launch;
use super::warp::{Stop, Warp};
use crate::bulk_copy::Pending;
use crate::counters::Counters;
use crate::mbarrier::Mbarriers;
use crate::ptx::ops::{BarrierKind, Op};
use crate::sanitize::shared::{MAX_WARPS, Shadow};
use crate::sanitize::{Fault, Finding, Kind};

/// Instructions a warp runs before others get a turn.
const SLICE: u32 = 1 << 14;
/// Barrier number that stands for the cluster's barrier, and the first of those that stand for
/// the warpgroups' completion of wgmma.
const CLUSTER_BARRIER: u32 = 16;
const WARPGROUP_BARRIERS: u32 = 17;
const BARRIERS: usize = WARPGROUP_BARRIERS as usize + MAX_WARPS / 4;
/// Rounds in which all warps poll in vain before the block counts as stuck.
const MAX_IDLE_ROUNDS: u32 = 10_000;

/// What warps of a block share, and where they are.
#[derive(Debug)]
pub struct Context<'p> {
    pub launch: &'p Launch<'p>,
    /// Linear index of the block in the grid.
    pub block: u64,
    pub coordinates: [u32; 3],
    /// Rank of the block in its cluster.
    pub rank: u32,
    pub shared: Vec<u8>,
    pub shared_shadow: Shadow,
    pub counters: Counters,
    /// Allocation the last global access hit.
    pub cached: usize,
    /// The block has executed a global atomic.
    pub acquired: bool,
    /// Barrier objects in shared memory, and bulk copies that report to them.
    pub mbarriers: Mbarriers,
    pub bulk: Vec<Pending>,
    /// Events that may let a polling warp go on.
    pub progress: u64,
}

impl Context<'_> {
    /// Marks shared bytes as defined, if they exist.
    pub fn shared_shadow_define(&mut self, offset: u64, len: u64) {
        if offset + len <= self.shared.len() as u64 {
            self.shared_shadow.mark_defined(offset as u32, len as u32);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Waiting(u32),
    Done,
}

/// One of the 16 named barriers, or one of those the machine has for itself.
#[derive(Clone, Copy, Debug, Default)]
struct Barrier {
    /// Warps that arrived since it last completed, and those of them that wait.
    arrived: u32,
    waiting: u32,
    /// Threads to arrive, when the instruction says.
    threads: Option<u32>,
    /// What the arrived warps know of the others.
    known: [u32; MAX_WARPS],
    popc: u32,
    all: bool,
    any: bool,
}

/// A running block.
#[derive(Debug)]
pub struct Block<'p> {
    pub ctx: Context<'p>,
    warps: Vec<Warp>,
    states: Vec<State>,
    barriers: [Barrier; BARRIERS],
    idle_rounds: u32,
    steps: u64,
    random: Option<u64>,
}

/// How far a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Running,
    Finished,
}

impl<'p> Block<'p> {
    pub fn new(launch: &'p Launch<'p>) -> Self {
        let ctx = Context {
            launch,
            block: 0,
            coordinates: [0; 3],
            rank: 0,
            shared: Vec::new(),
            shared_shadow: Shadow::default(),
            counters: Counters::default(),
            cached: 0,
            acquired: false,
            mbarriers: Mbarriers::default(),
            bulk: Vec::new(),
            progress: 0,
        };
        let warps = launch.warps_per_block() as usize;
        Self {
            ctx,
            warps: (0..warps).map(|_| Warp::new()).collect(),
            states: vec![State::Ready; warps],
            barriers: [Barrier::default(); BARRIERS],
            idle_rounds: 0,
            steps: 0,
            random: None,
        }
    }

    /// Starts the block with this linear index.
    pub fn start(&mut self, index: u64) {
        let launch = self.ctx.launch;
        let [gx, gy, _] = launch.grid.map(u64::from);
        self.ctx.block = index;
        self.ctx.coordinates = [
            (index % gx) as u32,
            (index / gx % gy) as u32,
            (index / gx / gy) as u32,
        ];
        self.ctx.shared.clear();
        // A pattern that stands out where a fault slips through.
        self.ctx.shared.resize(launch.shared_bytes as usize, 0xcd);
        self.ctx.shared_shadow.reset(launch.shared_bytes as usize);
        self.ctx.acquired = false;
        self.ctx.mbarriers.clear();
        self.ctx.bulk.clear();
        self.ctx.counters.blocks += 1;
        self.barriers = [Barrier::default(); BARRIERS];
        (self.idle_rounds, self.steps) = (0, 0);
        self.random = launch.schedule.map(|seed| splitmix(seed ^ splitmix(index)));
        let threads: u32 = launch.block_dim.iter().product();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - 32 * i as u32).min(32);
            warp.start(&self.ctx, i as u32, u32::MAX >> (32 - lanes));
            self.states[i] = State::Ready;
        }
    }

    /// Gives every ready warp a turn.
    ///
    /// # Errors
    /// The first finding.
    pub fn round(&mut self) -> Result<Progress, Box<Finding>> {
        let before = (self.ctx.progress, self.states.clone());
        let instructions = self.ctx.counters.warp_instructions;
        let mut polled = true;
        for i in self.order() {
            if self.states[i] != State::Ready {
                continue;
            }
            let slice = self.slice();
            let stop = self.warps[i]
                .run(&mut self.ctx, slice)
                .map_err(|f| self.finding(i, *f))?;
            polled &= stop == Stop::Poll;
            self.stopped(i, stop)?;
        }
        if self.states.iter().all(|s| *s == State::Done) {
            return Ok(Progress::Finished);
        }
        self.check_deadlock()?;
        self.steps += self.ctx.counters.warp_instructions - instructions;
        let idle = polled && before == (self.ctx.progress, self.states.clone());
        self.idle_rounds = if idle { self.idle_rounds + 1 } else { 0 };
        if self.idle_rounds > MAX_IDLE_ROUNDS || self.steps > self.ctx.launch.step_limit {
            let i = self
                .states
                .iter()
                .position(|s| *s == State::Ready)
                .unwrap_or(0);
            let message = format!(
                "the block made no end after {} warp instructions",
                self.steps
            );
            return Err(self.finding(i, *Fault::new(Kind::Timeout, None, message)));
        }
        Ok(Progress::Running)
    }

    /// Order of the warps in this round.
    fn order(&mut self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.warps.len()).collect();
        for i in (1..order.len()).rev() {
            if let Some(pick) = self.draw(i as u64 + 1) {
                order.swap(i, pick as usize);
            }
        }
        order
    }

    fn slice(&mut self) -> u32 {
        self.draw(200).map_or(SLICE, |n| 64 + n as u32)
    }

    /// A random number below `bound`, when the schedule is random.
    fn draw(&mut self, bound: u64) -> Option<u64> {
        let state = self.random.as_mut()?;
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        Some(splitmix(*state) % bound)
    }

    fn stopped(&mut self, i: usize, stop: Stop) -> Result<(), Box<Finding>> {
        match stop {
            Stop::Yield | Stop::Poll => {}
            Stop::Exited => {
                self.states[i] = State::Done;
                self.ctx.progress += 1;
            }
            Stop::Barrier { kind, id, threads } => return self.arrive(i, kind, id, threads),
            Stop::WarpgroupWait => {
                let id = WARPGROUP_BARRIERS + i as u32 / 4;
                return self.arrive(i, BarrierKind::Sync, id, Some(128));
            }
            Stop::ClusterArrive => {}
            // Clusters have one block: waiting for the cluster is waiting for its warps.
            Stop::ClusterWait => {
                return self.arrive(i, BarrierKind::Sync, CLUSTER_BARRIER, None);
            }
        }
        Ok(())
    }

    fn arrive(
        &mut self,
        i: usize,
        kind: BarrierKind,
        id: u32,
        threads: Option<u32>,
    ) -> Result<(), Box<Finding>> {
        self.ctx.progress += 1;
        let known = self.ctx.shared_shadow.release(i as u32);
        let warp = &self.warps[i];
        let barrier = &mut self.barriers[id as usize];
        if barrier.arrived == 0 {
            *barrier = Barrier {
                threads,
                all: true,
                ..Barrier::default()
            };
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
            return Err(self.finding(i, *Fault::new(Kind::Barrier, None, message)));
        }
        barrier.arrived |= 1 << i;
        for (all, mine) in barrier.known.iter_mut().zip(known) {
            *all = (*all).max(mine);
        }
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
            self.ctx.shared_shadow.acquire(i as u32, &barrier.known);
            self.write_reduction(i, &barrier);
        }
        self.barriers[id as usize] = Barrier::default();
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

    /// Fails if no warp can run any more.
    fn check_deadlock(&self) -> Result<(), Box<Finding>> {
        if self.states.contains(&State::Ready) {
            return Ok(());
        }
        let Some((i, id)) = self.states.iter().enumerate().find_map(|(i, s)| match s {
            State::Waiting(id) => Some((i, *id)),
            _ => None,
        }) else {
            return Ok(());
        };
        let exited: u32 = self
            .warps
            .iter()
            .map(|w| (w.full & !w.live).count_ones())
            .sum();
        let arrived: u32 = self.barriers[id as usize].arrived.count_ones() * 32;
        let expected = self.barriers[id as usize]
            .threads
            .map_or("all threads".into(), |t| format!("{t} threads"));
        let name = barrier_name(id);
        let message = format!(
            "{name} waits for {expected}: {arrived} arrived, {exited} threads have exited, the rest wait elsewhere"
        );
        Err(self.finding(i, *Fault::new(Kind::Barrier, None, message)))
    }

    /// Completes a fault of warp `i` with its place.
    fn finding(&self, i: usize, fault: Fault) -> Box<Finding> {
        let (warp, launch) = (&self.warps[i], self.ctx.launch);
        let program = launch.program;
        // A warp that waits at a barrier is one instruction past it.
        let waiting = matches!(self.states[i], State::Waiting(_));
        let inst = warp.instruction_at(&self.ctx, waiting);
        let function = &program.functions[warp.function()];
        let lane = fault.lane.unwrap_or_else(|| warp.first_lane());
        let thread = warp.index * 32 + lane;
        let [bx, by, _] = launch.block_dim;
        Box::new(Finding {
            kind: fault.kind,
            message: fault.message,
            kernel: program.functions[launch.function].name.clone(),
            block: self.ctx.coordinates,
            thread: [thread % bx, thread / bx % by, thread / bx / by],
            ptx_line: inst.line,
            ptx_text: program
                .lines
                .get(inst.line as usize - 1)
                .cloned()
                .unwrap_or_default(),
            source: function
                .locations
                .get(inst.location as usize)
                .map(|l| program.describe(l)),
        })
    }
}

/// What a barrier is called in messages.
fn barrier_name(id: u32) -> String {
    match id {
        CLUSTER_BARRIER => "the cluster's barrier".into(),
        id if id >= WARPGROUP_BARRIERS => {
            format!("wgmma.wait_group of warpgroup {}", id - WARPGROUP_BARRIERS)
        }
        id => format!("barrier {id}"),
    }
}

/// SplitMix64's output function (Steele, Lea and Flood, 2014).
fn splitmix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
