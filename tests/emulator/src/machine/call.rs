//! Calls: frames, arguments in local memory, `printf` and assertions.

use super::block::Context;
use super::registers::{Base, LANES};
use super::warp::{Flow, Frame, Warp};
use crate::ptx::ops::{Call, FixedSpecial, Op, Target};
use crate::ptx::program::{FUNCTION_WINDOW, WINDOW_MASK, WINDOW_SHIFT};
use crate::sanitize::{Checked, Fault, Kind};

/// Nested calls allowed before a recursion counts as endless.
const MAX_DEPTH: u32 = 1024;
/// Bytes of a string that `printf` or an assertion reads.
const MAX_STRING: usize = 4096;

impl Warp {
    pub(super) fn call(&mut self, ctx: &mut Context<'_>, call: &Call, exec: u32) -> Checked<Flow> {
        let (function, exec) = match &call.target {
            Target::Function(index) => (*index, exec),
            Target::Pointer(reg) => self.indirect(ctx, *self.regs.read64(*reg), exec)?,
            Target::Printf => {
                self.printf(ctx, call, exec)?;
                return Ok(Flow::Next);
            }
            Target::AssertFail => return Err(self.assert_fail(ctx, call, exec)),
        };
        self.enter(ctx, call, function, exec)?;
        Ok(Flow::Moved)
    }

    /// The function that the first lane calls, and the lanes that call the same one; the others
    /// come back to the call.
    fn indirect(
        &self,
        ctx: &Context<'_>,
        pointers: [u64; LANES],
        exec: u32,
    ) -> Checked<(usize, u32)> {
        let lane = exec.trailing_zeros();
        let pointer = pointers[lane as usize];
        let index = ((pointer & WINDOW_MASK) >> 4).wrapping_sub(1) as usize;
        let tagged = pointer >> WINDOW_SHIFT == FUNCTION_WINDOW >> WINDOW_SHIFT;
        if !tagged || index >= ctx.launch.program.functions.len() {
            let message = format!("call of {pointer:#x}, which is not a function");
            return Err(Fault::new(Kind::IllegalInstruction, lane, message));
        }
        let same =
            (0..LANES as u32).filter(|&l| exec >> l & 1 == 1 && pointers[l as usize] == pointer);
        Ok((index, same.fold(0, |m, l| m | 1 << l)))
    }

    fn enter(&mut self, ctx: &Context<'_>, call: &Call, function: usize, exec: u32) -> Checked<()> {
        let callee = &ctx.launch.program.functions[function];
        let (caller, call_pc) = (self.current_frame(), self.pc());
        let depth = self.frame().depth + 1;
        if depth > MAX_DEPTH {
            return Err(Fault::new(
                Kind::IllegalInstruction,
                None,
                "call stack overflow",
            ));
        }
        if call.args.len() != callee.params.len() {
            let message = format!(
                "{} takes {} arguments, {} given",
                callee.name,
                callee.params.len(),
                call.args.len()
            );
            return Err(Fault::new(Kind::IllegalInstruction, None, message));
        }
        let caller_base = self.frame().local_base;
        let local_base = (self.local.len() * 4) as u32;
        self.local.resize(
            self.local.len() + callee.local_size as usize / 4,
            [0; LANES],
        );
        for (&(from, _), &(to, size)) in call.args.iter().zip(&callee.params) {
            self.copy_local(local_base + to, caller_base + from, size, exec);
        }
        let base = match self.frames.last() {
            Some(top) => top.base.after(&ctx.launch.program.functions[top.function]),
            None => Base::default(),
        };
        self.frames.push(Frame {
            function,
            base,
            local_base,
            depth,
            lanes: exec,
            caller: Some(caller),
            call_pc,
        });
        self.regs.enter(base, callee);
        let stay = if self.group() == exec || !matches!(call.target, Target::Pointer(_)) {
            call_pc + 1
        } else {
            call_pc
        };
        self.transfer(exec, self.frames.len() as u32 - 1, 0, stay);
        self.fill_specials(ctx, function);
        Ok(())
    }

    pub(super) fn return_from(&mut self, ctx: &Context<'_>, exec: u32) -> Checked<Flow> {
        let frame = self.frame().clone();
        let Some(caller) = frame.caller else {
            return Err(Fault::new(
                Kind::IllegalInstruction,
                None,
                "return without a caller",
            ));
        };
        let callee = &ctx.launch.program.functions[frame.function];
        let caller_frame = &self.frames[caller as usize];
        let code = &ctx.launch.program.functions[caller_frame.function].code;
        let caller_base = caller_frame.local_base;
        if let Op::Call(call) = &code[frame.call_pc as usize].op {
            for (&(to, _), &(from, size)) in call.results.iter().zip(&callee.returns) {
                self.copy_local(caller_base + to, frame.local_base + from, size, exec);
            }
        }
        let index = self.current_frame();
        let stay = self.pc() + 1;
        self.frames[index as usize].lanes &= !exec;
        self.transfer(exec, caller, frame.call_pc + 1, stay);
        self.drop_frames();
        self.trim_local(ctx);
        Ok(Flow::Moved)
    }

    /// Gives back the local memory of dropped frames.
    fn trim_local(&mut self, ctx: &Context<'_>) {
        if let Some(top) = self.frames.last() {
            let size = ctx.launch.program.functions[top.function].local_size;
            self.local.truncate(((top.local_base + size) / 4) as usize);
        }
    }

    /// Copies `size` bytes of local memory of the lanes in `exec`; parameters are word-aligned
    /// or smaller than a word.
    fn copy_local(&mut self, to: u32, from: u32, size: u32, exec: u32) {
        for byte in 0..size {
            let (to, from) = (to + byte, from + byte);
            let source = self.local[(from / 4) as usize];
            let target = &mut self.local[(to / 4) as usize];
            for lane in (0..LANES).filter(|l| exec >> l & 1 == 1) {
                let value = source[lane] >> (8 * (from % 4)) & 0xff;
                let shift = 8 * (to % 4);
                target[lane] = target[lane] & !(0xff << shift) | value << shift;
            }
        }
    }

    /// Registers that are constant over the warp's life.
    pub(super) fn fill_specials(&mut self, ctx: &Context<'_>, function: usize) {
        use FixedSpecial as S;
        let [bx, by, _] = ctx.launch.block_dim;
        let first = self.index * LANES as u32;
        for &(reg, special) in &ctx.launch.program.functions[function].specials {
            let value = std::array::from_fn(|lane| {
                let (lane, thread) = (lane as u32, first + lane as u32);
                let value = match special {
                    S::Tid(0) => thread % bx,
                    S::Tid(1) => thread / bx % by,
                    S::Tid(_) => thread / bx / by,
                    S::Ntid(axis) => ctx.launch.block_dim[usize::from(axis)],
                    S::Ctaid(axis) => ctx.coordinates[usize::from(axis)],
                    S::Nctaid(axis) => ctx.launch.grid[usize::from(axis)],
                    S::LaneId => lane,
                    S::WarpId => self.index,
                    S::NumWarps => ctx.launch.warps_per_block(),
                    S::SmId => (ctx.block % u64::from(ctx.launch.sm_count)) as u32,
                    S::NumSms => ctx.launch.sm_count,
                    S::GridId => ctx.launch.races.epoch as u32,
                    S::LanemaskEq => 1 << lane,
                    S::LanemaskLt => (1 << lane) - 1,
                    S::LanemaskLe => u32::MAX >> (31 - lane),
                    S::LanemaskGt => !(u32::MAX >> (31 - lane)),
                    S::LanemaskGe => u32::MAX << lane,
                    S::Env(1) => (ctx.launch.workspace >> 32) as u32,
                    S::Env(_) => ctx.launch.workspace as u32,
                    S::DynamicShared => ctx.launch.dynamic_shared,
                    S::TotalShared => ctx.launch.shared_bytes,
                    S::ClusterCtaid(axis) => {
                        ctx.coordinates[usize::from(axis)] % ctx.launch.cluster[usize::from(axis)]
                    }
                    S::ClusterNctaid(axis) => ctx.launch.cluster[usize::from(axis)],
                    S::ClusterId(axis) => {
                        ctx.coordinates[usize::from(axis)] / ctx.launch.cluster[usize::from(axis)]
                    }
                    S::NumClusters(axis) => {
                        ctx.launch.grid[usize::from(axis)] / ctx.launch.cluster[usize::from(axis)]
                    }
                    S::ClusterCtarank => ctx.rank,
                    S::ClusterNctarank => ctx.launch.cluster.iter().product(),
                };
                u64::from(value)
            });
            self.regs.write_any(reg, &value, u32::MAX);
        }
    }

    /// A frame-local 64-bit value of one lane.
    fn local64(&self, offset: u32, lane: usize) -> u64 {
        let at = ((self.frame().local_base + offset) / 4) as usize;
        u64::from(self.local[at][lane]) | u64::from(self.local[at + 1][lane]) << 32
    }

    fn argument(&self, call: &Call, n: usize, lane: usize) -> u64 {
        call.args
            .get(n)
            .map_or(0, |&(offset, _)| self.local64(offset, lane))
    }

    fn string(&self, ctx: &Context<'_>, address: u64, lane: usize) -> String {
        let mut bytes = Vec::new();
        for i in 0..MAX_STRING as u64 {
            match self.peek(ctx, address + i, 1, lane) {
                Some(0) | None => break,
                Some(byte) => bytes.push(byte as u8),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn printf(&mut self, ctx: &mut Context<'_>, call: &Call, exec: u32) -> Checked<()> {
        for lane in (0..LANES).filter(|l| exec >> l & 1 == 1) {
            let format = self.string(ctx, self.argument(call, 0, lane), lane);
            let mut at = self.argument(call, 1, lane);
            let text = crate::printf::format(
                &format,
                &mut |size| {
                    at = at.next_multiple_of(size);
                    let value = self.peek(ctx, at, size, lane).unwrap_or(0);
                    at += size;
                    value
                },
                &|address| self.string(ctx, address, lane),
            );
            ctx.launch.print(&text);
        }
        if let Some(&(offset, _)) = call.results.first() {
            let at = ((self.frame().local_base + offset) / 4) as usize;
            self.local[at] = [1; LANES];
        }
        Ok(())
    }

    fn assert_fail(&self, ctx: &Context<'_>, call: &Call, exec: u32) -> Box<Fault> {
        let lane = exec.trailing_zeros() as usize;
        let text = |n: usize| self.string(ctx, self.argument(call, n, lane), lane);
        let line = call.args.get(2).map_or(0, |&(offset, _)| {
            self.local[((self.frame().local_base + offset) / 4) as usize][lane]
        });
        let message = format!("`{}` in {} at {}:{line}", text(0), text(3), text(1));
        Fault::new(Kind::Assert, lane as u32, message)
    }
}
