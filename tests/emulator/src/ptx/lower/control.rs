//! Branches, calls, barriers, votes and shuffles.

use super::super::ast::{Instruction, Operand};
use super::super::ops::{
    AtomicOp, BarrierKind, Call, Class, Op, Reg, ShuffleMode, Target, VoteMode,
};
use super::{FunctionLowering, Result, Symbol, immediate, last_type, operand};

impl FunctionLowering<'_> {
    pub(super) fn control_flow(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        Ok(Some(match i.parts[0].as_str() {
            "bra" => (self.branch(i)?, Class::Control),
            "brx" => (self.branch_index(i)?, Class::Control),
            "call" => (self.call(i)?, Class::Control),
            "ret" => (Op::Return, Class::Control),
            "exit" => (Op::Exit, Class::Control),
            "trap" => (Op::Trap, Class::Control),
            "brkpt" => (Op::Breakpoint, Class::Control),
            "nanosleep" => (Op::Nanosleep, Class::Other),
            "setmaxnreg" | "griddepcontrol" | "pmevent" => (Op::Nothing, Class::Other),
            "bar" | "barrier" if i.has("cluster") => {
                let op = if i.has("arrive") {
                    Op::ClusterArrive {
                        relaxed: i.has("relaxed"),
                    }
                } else {
                    Op::ClusterWait
                };
                (op, Class::Barrier)
            }
            "bar" if i.has("warp") => (
                Op::WarpSync {
                    members: self.src32(operand(i, 0)?)?,
                },
                Class::Barrier,
            ),
            "bar" | "barrier" => (self.barrier(i)?, Class::Barrier),
            "shfl" => (self.shuffle(i)?, Class::Warp),
            "vote" => (self.vote(i)?, Class::Warp),
            "match" => (self.match_lanes(i)?, Class::Warp),
            "redux" => (self.redux(i)?, Class::Warp),
            "activemask" => (
                Op::Activemask {
                    d: self.dst(operand(i, 0)?, false)?,
                },
                Class::Warp,
            ),
            "elect" => (self.elect(i)?, Class::Warp),
            _ => return Ok(None),
        }))
    }

    fn label(operand: &Operand) -> Result<String> {
        match operand {
            Operand::Name(name) => Ok(name.clone()),
            other => Err(format!("expected a label, found {other:?}")),
        }
    }

    fn branch(&mut self, i: &Instruction) -> Result<Op> {
        let label = Self::label(operand(i, 0)?)?;
        self.fixups.push((self.out.code.len(), vec![label], i.line));
        Ok(Op::Branch { to: 0 })
    }

    fn branch_index(&mut self, i: &Instruction) -> Result<Op> {
        let a = self.src32(operand(i, 0)?)?;
        let list = Self::label(operand(i, 1)?)?;
        let targets = self.branch_targets.get(&list).cloned();
        let targets = targets.ok_or_else(|| format!("undefined branch targets {list}"))?;
        self.fixups.push((self.out.code.len(), targets, i.line));
        Ok(Op::BranchIndex {
            targets: Vec::new(),
            a,
        })
    }

    /// Offset and size of the frame-local variables a call passes.
    fn call_slots(&self, list: &[Operand]) -> Result<Vec<(u32, u32)>> {
        let mut out = Vec::with_capacity(list.len());
        for item in list {
            let name = Self::label(item)?;
            match self.find(&name) {
                // The callee's own declaration says how many bytes are meant.
                Some(Symbol::Local(offset)) => out.push((offset, 0)),
                _ => return Err(format!("call argument {name} is not a .param variable")),
            }
        }
        Ok(out)
    }

    fn call(&mut self, i: &Instruction) -> Result<Op> {
        let mut operands = i.operands.as_slice();
        let results = match operands.split_first() {
            Some((Operand::Group(list), rest)) => {
                operands = rest;
                self.call_slots(list)?
            }
            _ => Vec::new(),
        };
        let (callee, rest) = operands.split_first().ok_or("no function to call")?;
        let args = match rest.first() {
            Some(Operand::Group(list)) => self.call_slots(list)?,
            _ => Vec::new(),
        };
        let name = Self::label(callee)?;
        let target = if let Some(&index) = self.shared.function_index.get(name.as_str()) {
            Target::Function(index)
        } else if matches!(self.find(&name), Some(Symbol::Register(_))) {
            Target::Pointer(self.src(callee, true)?)
        } else {
            match name.as_str() {
                "vprintf" => Target::Printf,
                "__assertfail" => Target::AssertFail,
                _ => return Err(format!("call of the undefined function {name}")),
            }
        };
        Ok(Op::Call(Box::new(Call {
            target,
            args,
            results,
        })))
    }

    fn barrier(&mut self, i: &Instruction) -> Result<Op> {
        let aligned = i.parts[0] == "bar" || i.has("aligned");
        if i.has("red") {
            let d = operand(i, 0)?;
            let id = self.src32(operand(i, 1)?)?;
            let has_threads = i.operands.len() == 4;
            let threads = if has_threads {
                Some(self.src32(operand(i, 2)?)?)
            } else {
                None
            };
            let (p, negated) = self.signed_pred(operand(i, if has_threads { 3 } else { 2 })?)?;
            let kind = if i.has("popc") {
                BarrierKind::Popc {
                    d: self.dst(d, false)?,
                    p,
                    negated,
                }
            } else if i.has("and") {
                BarrierKind::And {
                    d: self.pred(d)?,
                    p,
                    negated,
                }
            } else {
                BarrierKind::Or {
                    d: self.pred(d)?,
                    p,
                    negated,
                }
            };
            return Ok(Op::Barrier {
                kind,
                id,
                threads,
                aligned,
            });
        }
        let kind = if i.has("arrive") {
            BarrierKind::Arrive
        } else {
            BarrierKind::Sync
        };
        let id = self.src32(operand(i, 0)?)?;
        let threads = match i.operands.get(1) {
            Some(count) => Some(self.src32(count)?),
            None if kind == BarrierKind::Arrive => {
                return Err("an arrival without a thread count".into());
            }
            None => None,
        };
        Ok(Op::Barrier {
            kind,
            id,
            threads,
            aligned,
        })
    }

    fn shuffle(&mut self, i: &Instruction) -> Result<Op> {
        let mode = match i.parts.get(2).map_or("", String::as_str) {
            "up" => ShuffleMode::Up,
            "down" => ShuffleMode::Down,
            "bfly" => ShuffleMode::Butterfly,
            "idx" => ShuffleMode::Index,
            other => return Err(format!("unknown shuffle mode `.{other}`")),
        };
        let (d, p) = match operand(i, 0)? {
            Operand::Pair(d, p) => (self.dst(d, false)?, Some(self.pred(p)?)),
            d => (self.dst(d, false)?, None),
        };
        let mut s = [0; 4];
        for (n, slot) in s.iter_mut().enumerate() {
            *slot = self.src32(operand(i, n + 1)?)?;
        }
        Ok(Op::Shuffle {
            mode,
            d,
            p,
            a: s[0],
            b: s[1],
            c: s[2],
            members: s[3],
        })
    }

    fn vote(&mut self, i: &Instruction) -> Result<Op> {
        let (mode, d): (_, Reg) = match i.parts.get(2).map_or("", String::as_str) {
            "ballot" => (VoteMode::Ballot, self.dst(operand(i, 0)?, false)?),
            "all" => (VoteMode::All, self.pred(operand(i, 0)?)?),
            "any" => (VoteMode::Any, self.pred(operand(i, 0)?)?),
            "uni" => (VoteMode::Uniform, self.pred(operand(i, 0)?)?),
            other => return Err(format!("unknown vote mode `.{other}`")),
        };
        let (p, negated) = self.signed_pred(operand(i, 1)?)?;
        Ok(Op::Vote {
            mode,
            d,
            p,
            negated,
            members: self.src32(operand(i, 2)?)?,
        })
    }

    fn match_lanes(&mut self, i: &Instruction) -> Result<Op> {
        let (d, p) = match operand(i, 0)? {
            Operand::Pair(d, p) => (self.dst(d, false)?, Some(self.pred(p)?)),
            d => (self.dst(d, false)?, None),
        };
        let a = self.source(operand(i, 1)?, last_type(i)?.bits() == 64)?;
        Ok(Op::Match {
            all: i.has("all"),
            d,
            p,
            a,
            members: self.src32(operand(i, 2)?)?,
        })
    }

    fn redux(&mut self, i: &Instruction) -> Result<Op> {
        let ty = last_type(i)?;
        let op = match i.parts.get(2).map_or("", String::as_str) {
            "add" => AtomicOp::Add,
            "min" => AtomicOp::Min,
            "max" => AtomicOp::Max,
            "and" => AtomicOp::And,
            "or" => AtomicOp::Or,
            "xor" => AtomicOp::Xor,
            other => return Err(format!("unknown reduction `.{other}`")),
        };
        if ty.is_float() {
            return Err("unknown reduction of floats".into());
        }
        let d = self.dst(operand(i, 0)?, false)?;
        let a = self.src32(operand(i, 1)?)?;
        Ok(Op::Redux {
            op,
            signed: ty.is_signed(),
            d,
            a,
            members: self.src32(operand(i, 2)?)?,
        })
    }

    fn elect(&mut self, i: &Instruction) -> Result<Op> {
        let Operand::Pair(d, p) = operand(i, 0)? else {
            return Err("expected a register and a predicate".into());
        };
        let d = match &**d {
            Operand::Name(name) if name == "_" => None,
            other => Some(self.dst(other, false)?),
        };
        Ok(Op::Elect {
            d,
            p: self.pred(p)?,
            members: self.src32(operand(i, 1)?)?,
        })
    }

    /// An immediate, for operands that must be one.
    pub(super) fn constant_operand(i: &Instruction, n: usize) -> Result<u32> {
        u32::try_from(immediate(operand(i, n)?)?).map_err(|_| "constant out of range".to_string())
    }
}
