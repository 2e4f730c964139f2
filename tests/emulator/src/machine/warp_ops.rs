//! Warp-level ops: shuffles, votes, matches, reductions, and the entry to matrix and
//! asynchronous instructions.

use super::block::Context;
use super::checks::lanes;
use super::registers::LANES;
use super::warp::{Flow, Stop, Warp};
use crate::ptx::ops::{AnyReg, AtomicOp, Op, Reg, ShuffleMode, VoteMode};
use crate::sanitize::{Checked, Fault, Kind};
use crate::{async_copy, tensor_core};

/// Whether the lanes an instruction needs are together.
enum Meeting {
    Complete,
    /// Others run first.
    Wait,
}

/// The register with the member mask of a `.sync` instruction.
fn member_register(op: &Op) -> Option<Reg> {
    match op {
        Op::Shuffle { members, .. }
        | Op::Vote { members, .. }
        | Op::Match { members, .. }
        | Op::Redux { members, .. }
        | Op::WarpSync { members }
        | Op::Elect { members, .. } => Some(*members),
        _ => None,
    }
}

impl Warp {
    pub(super) fn warp_level(
        &mut self,
        ctx: &mut Context<'_>,
        op: &Op,
        exec: u32,
    ) -> Checked<Flow> {
        if let Some(reg) = member_register(op) {
            return self.for_members(op, *self.regs.read32(reg), exec);
        }
        let needed = match op {
            Op::Mma(_) | Op::LoadMatrix(_) | Op::StoreMatrix(_) => u32::MAX,
            Op::Wgmma(_) | Op::WgmmaCommit | Op::WgmmaWait => u32::MAX,
            Op::ClusterArrive { .. } | Op::ClusterWait => self.live,
            _ => exec,
        };
        if let Meeting::Wait = self.meet(needed, exec)? {
            return Ok(Flow::Moved);
        }
        match op {
            Op::Activemask { d } => self.regs.write32(*d, &[exec; LANES], exec),
            Op::Mma(mma) => tensor_core::mma(&mut self.regs, ctx, mma),
            Op::LoadMatrix(m) => tensor_core::load_matrix(self, ctx, m)?,
            Op::StoreMatrix(m) => tensor_core::store_matrix(self, ctx, m)?,
            Op::WgmmaWait => return Ok(self.step_over(Stop::WarpgroupWait)),
            Op::ClusterArrive { relaxed } => {
                return Ok(self.step_over(Stop::ClusterArrive { relaxed: *relaxed }));
            }
            Op::ClusterWait => return Ok(self.step_over(Stop::ClusterWait)),
            other => return async_copy::execute(self, ctx, other, exec),
        }
        Ok(Flow::Next)
    }

    /// A `.sync` instruction: lanes that name the same members act together.
    fn for_members(&mut self, op: &Op, masks: [u32; LANES], exec: u32) -> Checked<Flow> {
        let mut parts = [(0, 0); LANES];
        let mut count = 0;
        let mut rest = exec;
        while rest != 0 {
            let named = masks[rest.trailing_zeros() as usize];
            let part = lanes(rest)
                .filter(|&l| masks[l] == named)
                .fold(0, |m, l| m | 1 << l);
            rest &= !part;
            if part & !named != 0 {
                let lane = (part & !named).trailing_zeros();
                let message =
                    format!("member mask {named:#010x} does not name the executing lane {lane}");
                return Err(Fault::new(Kind::WarpSync, lane, message));
            }
            if let Meeting::Wait = self.meet(named & self.live, part)? {
                return Ok(Flow::Moved);
            }
            parts[count] = (part, named);
            count += 1;
        }
        for &(part, named) in &parts[..count] {
            self.member_op(op, part, named);
        }
        Ok(Flow::Next)
    }

    fn member_op(&mut self, op: &Op, exec: u32, named: u32) {
        match op {
            Op::Shuffle {
                mode,
                d,
                p,
                a,
                b,
                c,
                ..
            } => self.shuffle(*mode, (*d, *p), [*a, *b, *c], exec, named),
            Op::Vote {
                mode,
                d,
                p,
                negated,
                ..
            } => self.vote(*mode, *d, *p, *negated, exec),
            Op::Match { all, d, p, a, .. } => self.match_lanes(*all, *d, *p, *a, exec),
            Op::Redux {
                op, signed, d, a, ..
            } => self.redux(*op, *signed, *d, *a, exec),
            Op::Elect { d, p, .. } => {
                let leader = exec.trailing_zeros();
                if let Some(d) = d {
                    self.regs.write32(*d, &[leader; LANES], exec);
                }
                self.regs.set_pred(*p, 1 << leader, exec);
            }
            // bar.warp.sync: meeting is all it does.
            _ => {}
        }
    }

    fn step_over(&mut self, stop: Stop) -> Flow {
        self.advance();
        Flow::Stop(stop)
    }

    /// Checks that all lanes of `needed` execute together, or lets others catch up.
    fn meet(&mut self, needed: u32, exec: u32) -> Checked<Meeting> {
        if needed & !exec == 0 {
            return Ok(Meeting::Complete);
        }
        let here = self.group();
        if needed & self.live & !here != 0 && self.wait_for_lanes() {
            return Ok(Meeting::Wait);
        }
        let missing = needed & !exec;
        let message =
            format!("instruction for lanes {needed:#010x} executed without lanes {missing:#010x}");
        Err(Fault::new(Kind::WarpSync, self.first_lane(), message))
    }

    fn shuffle(
        &mut self,
        mode: ShuffleMode,
        (d, p): (Reg, Option<Reg>),
        s: [Reg; 3],
        exec: u32,
        named: u32,
    ) {
        let (a, b, c) = (
            *self.regs.read32(s[0]),
            *self.regs.read32(s[1]),
            *self.regs.read32(s[2]),
        );
        let mut out = [0; LANES];
        let mut valid = 0;
        for lane in lanes(exec) {
            let (by, clamp, segment) = (b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31);
            let me = lane as u32;
            let max = me & segment | clamp & !segment;
            let min = me & segment;
            let (from, inside) = match mode {
                ShuffleMode::Up => (me.wrapping_sub(by), me as i32 - by as i32 >= max as i32),
                ShuffleMode::Down => (me + by, me + by <= max),
                ShuffleMode::Butterfly => (me ^ by, me ^ by <= max),
                ShuffleMode::Index => {
                    let from = min | by & !segment;
                    (from, from <= max)
                }
            };
            let from = if inside { from & 31 } else { me };
            // From a lane that takes no part the value is undefined; poison makes its use show.
            let defined = (named & self.live & exec) >> from & 1 == 1;
            out[lane] = if defined {
                a[from as usize]
            } else {
                0xdead_beef
            };
            valid |= u32::from(inside) << lane;
        }
        self.regs.write32(d, &out, exec);
        if let Some(p) = p {
            self.regs.set_pred(p, valid, exec);
        }
    }

    fn vote(&mut self, mode: VoteMode, d: Reg, p: Reg, negated: bool, exec: u32) {
        let value = if negated {
            !self.regs.pred(p)
        } else {
            self.regs.pred(p)
        } & exec;
        let holds = match mode {
            VoteMode::Ballot => return self.regs.write32(d, &[value; LANES], exec),
            VoteMode::All => value == exec,
            VoteMode::Any => value != 0,
            VoteMode::Uniform => value == exec || value == 0,
        };
        self.regs
            .set_pred(d, if holds { u32::MAX } else { 0 }, exec);
    }

    fn match_lanes(&mut self, all: bool, d: Reg, p: Option<Reg>, a: AnyReg, exec: u32) {
        let value = self.regs.read_any(a);
        let mut out = [0; LANES];
        for lane in lanes(exec) {
            out[lane] = lanes(exec)
                .filter(|&l| value[l] == value[lane])
                .fold(0, |m, l| m | 1 << l);
        }
        if all {
            let same = out[exec.trailing_zeros() as usize] == exec;
            out = [if same { exec } else { 0 }; LANES];
            if let Some(p) = p {
                self.regs.set_pred(p, if same { u32::MAX } else { 0 }, exec);
            }
        }
        self.regs.write32(d, &out, exec);
    }

    fn redux(&mut self, op: AtomicOp, signed: bool, d: Reg, a: Reg, exec: u32) {
        let value = *self.regs.read32(a);
        let combine = |x: u32, y: u32| match (op, signed) {
            (AtomicOp::Add, _) => x.wrapping_add(y),
            (AtomicOp::And, _) => x & y,
            (AtomicOp::Or, _) => x | y,
            (AtomicOp::Xor, _) => x ^ y,
            (AtomicOp::Min, true) => (x as i32).min(y as i32) as u32,
            (AtomicOp::Min, false) => x.min(y),
            (_, true) => (x as i32).max(y as i32) as u32,
            (_, false) => x.max(y),
        };
        let total = lanes(exec)
            .map(|lane| value[lane])
            .reduce(combine)
            .unwrap_or(0);
        self.regs.write32(d, &[total; LANES], exec);
    }
}
