//! Divergence: groups of lanes that branch, wait for each other, meet again and exit.

use super::{Flow, Group, Stop, Warp};
use crate::machine::block::Context;
use crate::machine::registers::LANES;
use crate::ptx::ops::{Op, Reg};
use crate::sanitize::{Checked, Fault, Kind};

impl Warp {
    /// Picks the group to run next and merges those that meet it.
    pub(super) fn schedule(&mut self, ctx: &Context<'_>) -> Checked<()> {
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
    pub(in crate::machine) fn wait_for_lanes(&mut self) -> bool {
        self.current.waiting = true;
        !self.others.is_empty()
    }

    pub(super) fn branch(&mut self, ctx: &mut Context<'_>, to: u32, exec: u32) -> Flow {
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

    pub(super) fn branch_index(&mut self, targets: &[u32], a: Reg, exec: u32) -> Checked<Flow> {
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

    pub(super) fn exit(&mut self, exec: u32) -> Flow {
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
    pub(in crate::machine) fn transfer(&mut self, exec: u32, frame: u32, pc: u32, stay_pc: u32) {
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
    pub(in crate::machine) fn drop_frames(&mut self) {
        while self.frames.len() > 1 && self.frames.last().is_some_and(|f| f.lanes == 0) {
            self.frames.pop();
        }
    }
}
