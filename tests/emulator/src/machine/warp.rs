//! A warp: 32 lanes in lockstep, groups of lanes while diverged, frames while in calls.
//!
//! Of diverged groups the one deepest in calls runs first, then the one at the lowest program
//! counter; groups that meet at one instruction merge, and one that spins gives way. A group that waits for lanes at a
//! warp-level instruction lets the others catch up.

use super::block::Context;
use super::registers::{Base, LANES, Registers};
use crate::async_copy::Copies;
use crate::ptx::ops::{Address, BarrierKind, Class, FloatOp, Inst, Op, Reg, Special};
use crate::sanitize::{Checked, Fault, Kind};

/// Lanes that run together.
#[derive(Clone, Copy, Debug)]
struct Group {
    pc: u32,
    mask: u32,
    frame: u32,
    /// Cannot go on before other lanes arrive.
    waiting: bool,
    /// Had its turn: polls in vain, or ran a whole slice; others go first.
    yielded: bool,
}

/// An activation of a function.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub function: usize,
    pub base: Base,
    /// Start of the frame's local memory.
    pub local_base: u32,
    pub depth: u32,
    /// Lanes that have not returned yet.
    pub lanes: u32,
    pub caller: Option<u32>,
    /// Index of the call instruction in the caller.
    pub call_pc: u32,
}

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Exited,
    /// Used up its slice.
    Yield,
    /// Polls in vain for something.
    Poll,
    Barrier {
        kind: BarrierKind,
        id: u32,
        threads: Option<u32>,
    },
    /// At the end of the warpgroup's matrix products.
    WarpgroupWait,
    ClusterArrive {
        relaxed: bool,
    },
    ClusterWait,
}

/// What executing one instruction led to.
pub enum Flow {
    Next,
    /// Control moved: the program counter is already set.
    Moved,
    Stop(Stop),
}

/// A warp's state.
#[derive(Debug)]
pub struct Warp {
    pub regs: Registers,
    pub index: u32,
    /// Lanes that exist and have not exited.
    pub live: u32,
    /// Lanes that exist.
    pub full: u32,
    current: Group,
    others: Vec<Group>,
    pub(super) frames: Vec<Frame>,
    /// Local memory, word by word.
    pub local: Vec<[u32; LANES]>,
    pub copies: Copies,
    /// An instruction polled in vain; the warp gives way after it.
    pub polling: bool,
}

impl Warp {
    pub fn new() -> Self {
        Self {
            regs: Registers::default(),
            index: 0,
            live: 0,
            full: 0,
            current: Group {
                pc: 0,
                mask: 0,
                frame: 0,
                waiting: false,
                yielded: false,
            },
            others: Vec::new(),
            frames: Vec::new(),
            local: Vec::new(),
            copies: Copies::default(),
            polling: false,
        }
    }

    /// Starts the kernel with the lanes of `mask`.
    pub fn start(&mut self, ctx: &Context<'_>, index: u32, mask: u32) {
        let function = &ctx.launch.program.functions[ctx.launch.function];
        self.regs.reset(function);
        self.index = index;
        (self.live, self.full) = (mask, mask);
        self.current = Group {
            pc: 0,
            mask,
            frame: 0,
            waiting: false,
            yielded: false,
        };
        self.others.clear();
        self.frames.clear();
        self.frames.push(Frame {
            function: ctx.launch.function,
            base: Base::default(),
            local_base: 0,
            depth: 0,
            lanes: mask,
            caller: None,
            call_pc: 0,
        });
        self.local.clear();
        self.local
            .resize(function.local_size as usize / 4, [0; LANES]);
        self.copies = Copies::default();
        self.polling = false;
        self.fill_specials(ctx, ctx.launch.function);
    }

    /// The instruction the warp is at.
    pub fn instruction<'p>(&self, ctx: &Context<'p>) -> &'p Inst {
        let frame = &self.frames[self.current.frame as usize];
        &ctx.launch.program.functions[frame.function].code[self.current.pc as usize]
    }

    /// The instruction the warp is at, or the one before it.
    pub fn instruction_at<'p>(&self, ctx: &Context<'p>, before: bool) -> &'p Inst {
        let function = self.frames[self.current.frame as usize].function;
        let pc = self.current.pc - u32::from(before);
        &ctx.launch.program.functions[function].code[pc as usize]
    }

    /// The op before the one the warp is at.
    pub fn previous<'p>(&self, ctx: &Context<'p>) -> Option<&'p Op> {
        (self.current.pc > 0).then(|| &self.instruction_at(ctx, true).op)
    }

    /// Function the warp is in.
    pub fn function(&self) -> usize {
        self.frames[self.current.frame as usize].function
    }

    /// First lane of the running group.
    pub fn first_lane(&self) -> u32 {
        self.current.mask.trailing_zeros().min(31)
    }

    /// Lanes of the running group.
    pub fn group(&self) -> u32 {
        self.current.mask
    }

    pub(super) fn frame(&self) -> &Frame {
        &self.frames[self.current.frame as usize]
    }

    /// Moves the running group to the next instruction.
    pub(super) fn advance(&mut self) {
        self.current.pc += 1;
    }

    pub(super) fn current_frame(&self) -> u32 {
        self.current.frame
    }

    pub(super) fn pc(&self) -> u32 {
        self.current.pc
    }

    /// Runs until the warp stops, for at most `slice` instructions.
    pub fn run(&mut self, ctx: &mut Context<'_>, slice: u32) -> Checked<Stop> {
        let program = ctx.launch.program;
        for _ in 0..slice {
            if !self.others.is_empty() {
                self.schedule(ctx)?;
            }
            let function = self.frames[self.current.frame as usize].function;
            let inst = &program.functions[function].code[self.current.pc as usize];
            let exec = match inst.guard {
                None => self.current.mask,
                Some((p, false)) => self.current.mask & self.regs.pred(p),
                Some((p, true)) => self.current.mask & !self.regs.pred(p),
            };
            count(ctx, inst, exec);
            if exec == 0 {
                self.current.pc += 1;
                continue;
            }
            if (ctx.launch.alu)(&inst.op, &mut self.regs, exec) {
                self.current.pc += 1;
                continue;
            }
            match self.execute(ctx, &inst.op, exec)? {
                Flow::Next => self.current.pc += 1,
                Flow::Moved => {}
                Flow::Stop(stop) => return Ok(stop),
            }
            if self.polling {
                self.polling = false;
                self.current.yielded = true;
                return Ok(Stop::Poll);
            }
        }
        self.current.yielded = true;
        Ok(Stop::Yield)
    }

    /// Picks the group to run next and merges those that meet it.
    fn schedule(&mut self, ctx: &Context<'_>) -> Checked<()> {
        let ready = |g: &Group| !g.waiting && !g.yielded;
        if !ready(&self.current) && !self.others.iter().any(ready) {
            self.current.yielded = false;
            self.others.iter_mut().for_each(|g| g.yielded = false);
        }
        let frames = &self.frames;
        let rank = |g: &Group| {
            (
                g.waiting,
                g.yielded,
                u32::MAX - frames[g.frame as usize].depth,
                g.pc,
            )
        };
        let mut best = rank(&self.current);
        for i in 0..self.others.len() {
            let candidate = rank(&self.others[i]);
            if candidate < best {
                best = candidate;
                std::mem::swap(&mut self.current, &mut self.others[i]);
            }
        }
        let here = self.current;
        let mut merged = here.mask;
        self.others.retain(|g| {
            let meets = g.pc == here.pc && g.frame == here.frame;
            if meets {
                merged |= g.mask;
            }
            !meets
        });
        if merged != here.mask {
            self.current.mask = merged;
            self.current.waiting = false;
            self.current.yielded = false;
        }
        if self.current.waiting {
            return Err(self.stuck(ctx));
        }
        self.regs.select(frames[self.current.frame as usize].base);
        Ok(())
    }

    /// All groups wait for each other.
    fn stuck(&self, ctx: &Context<'_>) -> Box<Fault> {
        let inst = self.instruction(ctx);
        let missing = self.live & !self.current.mask;
        let (kind, what) = match inst.op {
            Op::Barrier { .. } => (Kind::Barrier, "barrier reached by a diverged warp"),
            _ => (
                Kind::WarpSync,
                "warp-level instruction that not all named lanes reach together",
            ),
        };
        let message = format!(
            "{what}: lanes {:#010x} are here, lanes {missing:#010x} are not",
            self.current.mask
        );
        Fault::new(kind, self.first_lane(), message)
    }

    /// Makes the running group wait for other lanes; false if there is nobody to wait for.
    pub(super) fn wait_for_lanes(&mut self) -> bool {
        self.current.waiting = true;
        !self.others.is_empty()
    }

    fn execute(&mut self, ctx: &mut Context<'_>, op: &Op, exec: u32) -> Checked<Flow> {
        match op {
            Op::Load(access) => self.load(ctx, access, exec)?,
            Op::Store(access) => self.store(ctx, access, exec)?,
            Op::Branch { to } => return Ok(self.branch(ctx, *to, exec)),
            Op::Atomic(atomic) => self.atomic(ctx, atomic, exec)?,
            Op::BranchIndex { targets, a } => return self.branch_index(targets, *a, exec),
            Op::Return if self.frame().caller.is_some() => return self.return_from(ctx, exec),
            Op::Exit | Op::Return => return Ok(self.exit(exec)),
            Op::Call(call) => return self.call(ctx, call, exec),
            Op::Barrier {
                kind,
                id,
                threads,
                aligned,
            } => {
                return self.barrier(*kind, *id, *threads, *aligned, exec);
            }
            Op::LocalAddress { d, offset } => {
                let address = u64::from(self.frame().local_base + offset);
                self.regs.write64(*d, &[address; LANES], exec);
            }
            Op::Special { which, d } => {
                let value = self.special(ctx, *which);
                self.regs.write_any(*d, &[value; LANES], exec);
            }
            Op::Fence { device } => {
                if *device {
                    ctx.launch.races.fence(ctx.block);
                }
            }
            Op::Trap => {
                return Err(Fault::new(
                    Kind::IllegalInstruction,
                    None,
                    "trap instruction executed",
                ));
            }
            Op::Breakpoint => {
                return Err(Fault::new(
                    Kind::IllegalInstruction,
                    None,
                    "breakpoint executed",
                ));
            }
            other => return self.warp_level(ctx, other, exec),
        }
        Ok(Flow::Next)
    }

    fn special(&self, ctx: &Context<'_>, which: Special) -> u64 {
        match which {
            // No time is simulated: the clock counts executed instructions.
            Special::Clock | Special::Clock64 => ctx.counters.warp_instructions,
            Special::GlobalTimer => ctx.launch.started.elapsed().as_nanos() as u64,
        }
    }

    fn branch(&mut self, ctx: &mut Context<'_>, to: u32, exec: u32) -> Flow {
        let staying = self.current.mask & !exec;
        if staying == 0 {
            self.current.pc = to;
        } else {
            ctx.counters.divergent_branches += 1;
            self.others.push(Group {
                pc: to,
                mask: exec,
                ..self.current
            });
            self.current.mask = staying;
            self.current.pc += 1;
        }
        Flow::Moved
    }

    fn branch_index(&mut self, targets: &[u32], a: Reg, exec: u32) -> Checked<Flow> {
        let index = *self.regs.read32(a);
        let mut rest = exec;
        while rest != 0 {
            let lane = rest.trailing_zeros();
            let chosen = index[lane as usize];
            let Some(&to) = targets.get(chosen as usize) else {
                let message = format!("branch index {chosen} of {} targets", targets.len());
                return Err(Fault::new(Kind::IllegalInstruction, lane, message));
            };
            let same =
                (0..LANES as u32).filter(|&l| rest >> l & 1 == 1 && index[l as usize] == chosen);
            let mask = same.fold(0, |m, l| m | 1 << l);
            rest &= !mask;
            self.others.push(Group {
                pc: to,
                mask,
                ..self.current
            });
        }
        let staying = self.current.mask & !exec;
        Ok(self.leave(staying))
    }

    /// Keeps `staying` lanes in the running group, one instruction on, or hands over to another.
    fn leave(&mut self, staying: u32) -> Flow {
        self.current.mask = staying;
        self.current.pc += 1;
        if staying == 0 {
            match self.others.pop() {
                Some(group) => {
                    self.current = group;
                    self.regs.select(self.frames[group.frame as usize].base);
                }
                None => return Flow::Stop(Stop::Exited),
            }
        }
        Flow::Moved
    }

    fn exit(&mut self, exec: u32) -> Flow {
        self.live &= !exec;
        for frame in &mut self.frames {
            frame.lanes &= !exec;
        }
        let staying = self.current.mask & !exec;
        // Lanes that waited for these may go on now.
        self.others.iter_mut().for_each(|g| g.waiting = false);
        self.leave(staying)
    }

    /// Moves the lanes of `exec` to another frame or instruction; the rest of the group stays
    /// at the next instruction.
    pub(super) fn transfer(&mut self, exec: u32, frame: u32, pc: u32, stay_pc: u32) {
        let staying = self.current.mask & !exec;
        if staying != 0 {
            self.others.push(Group {
                pc: stay_pc,
                mask: staying,
                ..self.current
            });
        }
        self.current = Group {
            pc,
            mask: exec,
            frame,
            waiting: false,
            yielded: false,
        };
        self.regs.select(self.frames[frame as usize].base);
    }

    /// Drops frames that no lane is in any more.
    pub(super) fn drop_frames(&mut self) {
        while self.frames.len() > 1 && self.frames.last().is_some_and(|f| f.lanes == 0) {
            self.frames.pop();
        }
    }

    fn barrier(
        &mut self,
        kind: BarrierKind,
        id: Reg,
        threads: Option<Reg>,
        aligned: bool,
        exec: u32,
    ) -> Checked<Flow> {
        if exec != self.live {
            if exec == self.current.mask && self.wait_for_lanes() {
                return Ok(Flow::Moved);
            }
            let missing = self.live & !exec;
            let form = if aligned {
                "aligned barrier"
            } else {
                "barrier"
            };
            let message =
                format!("{form} reached by lanes {exec:#010x} only, not by lanes {missing:#010x}");
            return Err(Fault::new(Kind::Barrier, self.first_lane(), message));
        }
        let lane = exec.trailing_zeros() as usize;
        let id = self.regs.read32(id)[lane];
        let threads = threads.map(|t| self.regs.read32(t)[lane]);
        if id >= 16 {
            return Err(Fault::new(
                Kind::Barrier,
                None,
                format!("barrier {id} does not exist, only 0 to 15"),
            ));
        }
        if let Some(count) = threads.filter(|t| t % 32 != 0 || *t == 0) {
            let message = format!("barrier for {count} threads, which is not a multiple of 32");
            return Err(Fault::new(Kind::Barrier, None, message));
        }
        self.current.pc += 1;
        Ok(Flow::Stop(Stop::Barrier { kind, id, threads }))
    }

    /// Lane addresses of an operand.
    pub fn addresses(&self, address: &Address) -> [u64; LANES] {
        if address.base.wide {
            self.regs
                .read64(address.base.index)
                .map(|a| a.wrapping_add_signed(address.offset))
        } else {
            let offset = address.offset as u32;
            self.regs
                .read32(address.base.index)
                .map(|a| u64::from(a.wrapping_add(offset)))
        }
    }
}

impl Default for Warp {
    fn default() -> Self {
        Self::new()
    }
}

#[inline(always)]
fn count(ctx: &mut Context<'_>, inst: &Inst, exec: u32) {
    let lanes = u64::from(exec.count_ones());
    let counters = &mut ctx.counters;
    counters.warp_instructions += 1;
    counters.lane_instructions += lanes;
    counters.by_class[inst.class as usize] += 1;
    match &inst.op {
        Op::Float {
            op: FloatOp::Fma, ..
        } => counters.flop += 2 * lanes,
        Op::Float {
            op: FloatOp::Add | FloatOp::Sub | FloatOp::Mul,
            ..
        } => counters.flop += lanes,
        Op::Packed {
            op: FloatOp::Fma, ..
        } => counters.flop += 4 * lanes,
        Op::Packed {
            op: FloatOp::Add | FloatOp::Sub | FloatOp::Mul,
            ..
        } => counters.flop += 2 * lanes,
        _ if inst.class == Class::Barrier => {
            counters.barriers += u64::from(matches!(inst.op, Op::Barrier { .. }))
        }
        _ => {}
    }
}
