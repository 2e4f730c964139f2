//! A warp: 32 lanes in lockstep, groups of lanes while diverged, frames while in calls.
//!
//! Of diverged groups the one deepest in calls runs first, then the one at the lowest program
//! counter; groups that meet at one instruction merge, and one that spins gives way. A group that waits for lanes at a
//! warp-level instruction lets the others catch up.

mod divergence;

use super::block::Context;
use super::registers::{Base, LANES, Registers};
use crate::async_copy::Copies;
use crate::bulk_store::{self, Stores};
use crate::ptx::ops::{Address, BarrierKind, Class, FloatOp, Inst, Op, Reg, Special};
use crate::sanitize::{Checked, Fault, Kind};
use crate::wgmma::{self, Products};

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
    /// Bulk stores and matrix products under way.
    pub stores: Stores,
    pub products: Products,
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
            stores: Stores::default(),
            products: Products::default(),
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
        self.stores = Stores::default();
        self.products = Products::default();
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
            if !self.products.is_empty() {
                wgmma::check_registers(self, inst, &program.functions[function])?;
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

    fn execute(&mut self, ctx: &mut Context<'_>, op: &Op, exec: u32) -> Checked<Flow> {
        match op {
            Op::Load(access) => self.load(ctx, access, exec)?,
            Op::Store(access) => self.store(ctx, access, exec)?,
            Op::Branch { to } => return Ok(self.branch(ctx, *to, exec)),
            Op::Atomic(atomic) => self.atomic(ctx, atomic, exec)?,
            Op::BranchIndex { targets, a } => return self.branch_index(targets, *a, exec),
            Op::Return if self.frame().caller.is_some() => return self.return_from(ctx, exec),
            Op::Exit | Op::Return => {
                bulk_store::exit(self, ctx, exec)?;
                return Ok(self.exit(exec));
            }
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
                ctx.fenced |= *device;
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
