//! A block: its warps, shared memory and barriers.

mod barriers;

use super::launch::Launch;
use super::shared::SharedMemory;
use super::warp::{Stop, Warp};
use crate::counters::Counters;
use crate::ptx::ops::BarrierKind;
use crate::sanitize::shared::{ACTORS, Clocks, MAX_WARPS, Times};
use crate::sanitize::{Fault, Finding, Kind};
use barriers::{Barrier, EMPTY};

/// Instructions a warp runs before others get a turn.
const SLICE: u32 = 1 << 14;
const COOPERATIVE_SLICE: u32 = 1 << 9;
/// Barrier number that stands for the cluster's barrier, and the first of those that stand for
/// the warpgroups' completion of wgmma.
const CLUSTER_BARRIER: u32 = 16;
const WARPGROUP_BARRIERS: u32 = 17;
const BARRIERS: usize = WARPGROUP_BARRIERS as usize + MAX_WARPS / 4;

/// What warps of a block share, and where they are.
#[derive(Debug)]
pub struct Context<'p> {
    pub launch: &'p Launch<'p>,
    /// Linear index of the block in the grid.
    pub block: u64,
    pub coordinates: [u32; 3],
    /// Rank of the block in its cluster.
    pub rank: u32,
    pub memory: SharedMemory,
    /// Shared memory of the other blocks of the cluster, by rank, while this block has its turn.
    pub peers: Vec<SharedMemory>,
    pub clocks: Clocks,
    pub counters: Counters,
    /// Allocation the last global access hit.
    pub cached: usize,
    /// A device-wide fence orders the writes before it and the next atomic.
    pub fenced: bool,
    /// When the block last executed a global atomic or an ordered load.
    pub acquired: u64,
    /// The block has passed a barrier of its cluster.
    pub in_step: bool,
    /// Events that may let a polling warp go on.
    pub progress: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Waiting(u32),
    Done,
}

/// Where a warp is with the cluster's barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClusterState {
    Away,
    /// Has arrived; it may wait already.
    Arrived,
    /// Everybody has arrived; the warp has not waited yet.
    Complete,
}

/// A running block.
#[derive(Debug)]
pub struct Block<'p> {
    pub ctx: Context<'p>,
    warps: Vec<Warp>,
    states: Vec<State>,
    barriers: [Barrier; BARRIERS],
    cluster: Vec<ClusterState>,
    /// What the arrivals at the cluster's barrier knew, and what those of its last complete
    /// phase did.
    cluster_known: Times,
    cluster_released: Times,
    steps: u64,
    random: Option<u64>,
}

impl<'p> Block<'p> {
    pub fn new(launch: &'p Launch<'p>) -> Self {
        let ctx = Context {
            launch,
            block: 0,
            coordinates: [0; 3],
            rank: 0,
            memory: SharedMemory::default(),
            peers: Vec::new(),
            clocks: Clocks::default(),
            counters: Counters::default(),
            cached: 0,
            fenced: false,
            acquired: 0,
            in_step: false,
            progress: 0,
        };
        let warps = launch.warps_per_block() as usize;
        Self {
            ctx,
            warps: (0..warps).map(|_| Warp::new()).collect(),
            states: vec![State::Ready; warps],
            barriers: [EMPTY; BARRIERS],
            cluster: vec![ClusterState::Away; warps],
            cluster_known: [0; ACTORS],
            cluster_released: [0; ACTORS],
            steps: 0,
            random: None,
        }
    }

    /// Starts the block at these coordinates of the grid, with its rank in the cluster.
    pub fn start(&mut self, coordinates: [u32; 3], rank: u32) {
        let launch = self.ctx.launch;
        let [gx, gy, _] = launch.grid.map(u64::from);
        let [x, y, z] = coordinates.map(u64::from);
        self.ctx.block = x + gx * (y + gy * z);
        (self.ctx.coordinates, self.ctx.rank) = (coordinates, rank);
        self.ctx.memory.reset(launch.shared_bytes as usize);
        self.ctx.clocks.reset(rank);
        (self.ctx.fenced, self.ctx.acquired, self.ctx.in_step) = (false, 0, false);
        self.ctx.counters.blocks += 1;
        self.barriers = [EMPTY; BARRIERS];
        self.cluster.fill(ClusterState::Away);
        self.cluster_known = [0; ACTORS];
        self.cluster_released = [0; ACTORS];
        self.steps = 0;
        let random = |seed: u64| splitmix(seed ^ splitmix(self.ctx.block));
        self.random = launch.schedule.map(random);
        let threads: u32 = launch.block_dim.iter().product();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - 32 * i as u32).min(32);
            warp.start(&self.ctx, i as u32, u32::MAX >> (32 - lanes));
            self.states[i] = State::Ready;
        }
    }

    /// Gives every ready warp a turn; false if all of them polled in vain.
    ///
    /// # Errors
    /// The first finding.
    pub fn turn(&mut self) -> Result<bool, Box<Finding>> {
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
        self.steps += self.ctx.counters.warp_instructions - instructions;
        if self.steps > self.ctx.launch.step_limit {
            return Err(self.timeout());
        }
        if self.finished() {
            self.leave()?;
        }
        Ok(!(polled && before == (self.ctx.progress, self.states.clone())))
    }

    /// All warps have exited.
    pub fn finished(&self) -> bool {
        self.states.iter().all(|s| *s == State::Done)
    }

    /// Some warp can run.
    pub fn ready(&self) -> bool {
        self.states.contains(&State::Ready)
    }

    /// The finding of a block that makes no end.
    pub fn timeout(&self) -> Box<Finding> {
        let ready = self.states.iter().position(|s| *s == State::Ready);
        let message = format!(
            "the block made no end after {} warp instructions",
            self.steps
        );
        self.finding(
            ready.unwrap_or(0),
            *Fault::new(Kind::Timeout, None, message),
        )
    }

    /// The block's last warp has exited: nobody may use its shared memory any more, nor may
    /// anybody have used it without the block knowing.
    fn leave(&mut self) -> Result<(), Box<Finding>> {
        self.ctx.memory.exited = true;
        let unknown = (0u32..)
            .zip(self.ctx.memory.visits)
            .find(|&(rank, time)| time > 0 && !self.ctx.clocks.knows(rank, time));
        let Some((rank, _)) = unknown else {
            return Ok(());
        };
        let message = format!(
            "the block exits and has not waited for block {rank} of the cluster, which uses its shared memory"
        );
        Err(self.finding(0, *Fault::new(Kind::ClusterExit, None, message)))
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
        // Blocks that take turns with all others wait for them in loops: give way sooner.
        let fixed = match self.ctx.launch.workspace {
            0 => SLICE,
            _ => COOPERATIVE_SLICE,
        };
        self.draw(200).map_or(fixed, |n| 64 + n as u32)
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
            Stop::ClusterArrive { relaxed } => return self.arrive_cluster(i, relaxed),
            Stop::ClusterWait => return self.wait_cluster(i),
        }
        Ok(())
    }

    /// The finding of a block none of whose warps can run; None if none waits.
    pub fn deadlock(&self) -> Option<Box<Finding>> {
        let (i, id) = self.states.iter().enumerate().find_map(|(i, s)| match s {
            State::Waiting(id) => Some((i, *id)),
            _ => None,
        })?;
        let name = barrier_name(id);
        let message = if id == CLUSTER_BARRIER {
            let warps = self.states.iter().zip(&self.cluster);
            let missing = warps.filter(|(s, c)| **s != State::Done && **c == ClusterState::Away);
            format!(
                "{name} waits for all threads: {} warps of this block have not arrived, the others wait",
                missing.count()
            )
        } else {
            let exited: u32 = self
                .warps
                .iter()
                .map(|w| (w.full & !w.live).count_ones())
                .sum();
            let arrived: u32 = self.barriers[id as usize].arrived.count_ones() * 32;
            let expected = self.barriers[id as usize]
                .threads
                .map_or("all threads".into(), |t| format!("{t} threads"));
            format!(
                "{name} waits for {expected}: {arrived} arrived, {exited} threads have exited, the rest wait elsewhere"
            )
        };
        Some(self.finding_at_barrier(i, message))
    }

    /// Completes a fault of warp `i` at a barrier, which it is one instruction past.
    fn finding_at_barrier(&self, i: usize, message: String) -> Box<Finding> {
        let fault = Fault::new(Kind::Barrier, None, message);
        self.finding_at(i, *fault, true)
    }

    /// Completes a fault of warp `i` with its place.
    fn finding(&self, i: usize, fault: Fault) -> Box<Finding> {
        self.finding_at(i, fault, false)
    }

    fn finding_at(&self, i: usize, fault: Fault, before: bool) -> Box<Finding> {
        let (warp, launch) = (&self.warps[i], self.ctx.launch);
        let program = launch.program;
        let inst = warp.instruction_at(&self.ctx, before);
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
