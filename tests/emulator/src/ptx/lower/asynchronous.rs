//! `cp.async`, bulk copies, `mbarrier` and cluster opcodes.

use super::super::ast::{Instruction, Operand};
use super::super::ops::{BulkCopy, BulkKind, Class, CopyAsync, MbarrierOp, Op};
use super::memory::atomic_op;
use super::{FunctionLowering, Result, immediate, last_type, operand};

impl FunctionLowering<'_> {
    pub(super) fn asynchronous(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        let op = match i.parts[0].as_str() {
            "cp" if i.has("bulk") => self.bulk(i)?,
            "cp" if i.has("mbarrier") => {
                let kind = MbarrierOp::CopyArrive {
                    no_increment: i.has("noinc"),
                };
                let address = self.address(operand(i, 0)?)?;
                Op::Mbarrier {
                    op: Box::new(kind),
                    address,
                }
            }
            "cp" if i.has("async") => self.copy_async(i)?,
            "st" if i.has("async") => self.store_async(i)?,
            "mbarrier" => self.mbarrier(i)?,
            "mapa" => {
                let wide = i.parts.last().is_some_and(|p| p == "u64");
                let d = self.dest(operand(i, 0)?, wide)?;
                let a = self.source(operand(i, 1)?, wide)?;
                Op::MapCluster {
                    d,
                    a,
                    b: self.src32(operand(i, 2)?)?,
                    generic: !i.has("shared::cluster"),
                }
            }
            "getctarank" => {
                let wide = i.parts.last().is_some_and(|p| p == "u64");
                Op::ClusterRank {
                    d: self.dst(operand(i, 0)?, false)?,
                    a: self.source(operand(i, 1)?, wide)?,
                }
            }
            _ => return Ok(None),
        };
        Ok(Some((op, Class::Async)))
    }

    fn copy_async(&mut self, i: &Instruction) -> Result<Op> {
        if i.has("commit_group") {
            return Ok(Op::CopyCommit);
        }
        if i.has("wait_all") {
            return Ok(Op::CopyWait {
                pending: 0,
                all: true,
            });
        }
        if i.has("wait_group") {
            return Ok(Op::CopyWait {
                pending: Self::constant_operand(i, 0)?,
                all: false,
            });
        }
        let destination = self.address(operand(i, 0)?)?;
        let source = self.address(operand(i, 1)?)?;
        let size = immediate(operand(i, 2)?)?;
        let allowed: &[u64] = if i.has("cg") { &[16] } else { &[4, 8, 16] };
        if !allowed.contains(&size) {
            return Err(format!("a copy of {size} bytes does not exist"));
        }
        let (mut source_size, mut ignore) = (None, None);
        // A predicate is the ignore flag; a number or register the source size, a second one the cache policy.
        let policy = usize::from(i.has("L2::cache_hint"));
        for o in &i.operands[3..i.operands.len().saturating_sub(policy).max(3)] {
            if let Ok(p) = self.signed_pred(o)
                && !matches!(o, Operand::Int(_))
            {
                ignore = Some(p);
            } else {
                source_size = Some(self.src32(o)?);
            }
        }
        let size = size as u8;
        Ok(Op::CopyAsync(Box::new(CopyAsync {
            destination,
            source,
            size,
            source_size,
            ignore,
        })))
    }

    fn bulk(&mut self, i: &Instruction) -> Result<Op> {
        if i.has("commit_group") {
            return Ok(Op::BulkCommit);
        }
        if i.has("wait_group") {
            return Ok(Op::BulkWait {
                pending: Self::constant_operand(i, 0)?,
                read: i.has("read"),
            });
        }
        let spaces: Vec<&str> = i
            .parts
            .iter()
            .map(String::as_str)
            .filter(|p| p.starts_with("shared::") || *p == "global")
            .collect();
        if i.has("prefetch") {
            return Ok(Op::Nothing);
        }
        let mut kind = match spaces[..] {
            ["shared::cluster" | "shared::cta", "global"] => BulkKind::Load { multicast: None },
            ["global", "shared::cta"] => BulkKind::Store,
            ["shared::cluster", "shared::cta"] => BulkKind::Share,
            _ => return Err("unknown opcode: direction of a bulk copy".into()),
        };
        if i.parts.iter().any(|p| p.starts_with("im2col")) {
            return Err("im2col copies are not supported".into());
        }
        let tensor = i.has("tensor");
        let reduce = match i.has("reduce") {
            true => Some(
                i.parts
                    .iter()
                    .find_map(|p| atomic_op(p))
                    .ok_or("no reduction")?,
            ),
            false => None,
        };
        let ty = match reduce {
            Some(_) if !tensor => Some(last_type(i)?),
            _ => None,
        };
        let (to, from) = (operand(i, 0)?, operand(i, 1)?);
        let (shared, other) = if kind == BulkKind::Store {
            (from, to)
        } else {
            (to, from)
        };
        let Operand::Address { coordinates, .. } = other else {
            return Err("expected an address".into());
        };
        let coordinates = coordinates
            .iter()
            .map(|c| self.src32(c))
            .collect::<Result<Vec<_>>>()?;
        if tensor && !(1..=5).contains(&coordinates.len()) {
            return Err(format!("{} tensor coordinates", coordinates.len()));
        }
        let bytes = if tensor {
            None
        } else {
            Some(self.src32(operand(i, 2)?)?)
        };
        let barrier_at = if tensor { 2 } else { 3 };
        let barrier = if kind == BulkKind::Store {
            None
        } else {
            Some(self.address(operand(i, barrier_at)?)?)
        };
        if i.has("multicast::cluster") {
            let mask = self.src32(operand(i, barrier_at + 1)?)?;
            kind = BulkKind::Load {
                multicast: Some(mask),
            };
        }
        let (shared, other) = (self.address(shared)?, self.address(other)?);
        Ok(Op::BulkCopy(Box::new(BulkCopy {
            kind,
            shared,
            other,
            bytes,
            coordinates,
            barrier,
            reduce,
            ty,
        })))
    }

    fn store_async(&mut self, i: &Instruction) -> Result<Op> {
        let own = ["async", "weak", "mbarrier::complete_tx::bytes"];
        let mut plain = i.clone();
        plain.parts.retain(|p| !own.contains(&p.as_str()));
        let known = own.iter().filter(|p| i.has(p)).count() >= 2 && i.has("shared::cluster");
        match self.load_store(&plain, false)? {
            (Op::Store(access), _) if known => Ok(Op::StoreAsync {
                access,
                barrier: self.address(operand(i, 2)?)?,
            }),
            _ => Err("unknown opcode: form of an asynchronous store".into()),
        }
    }

    fn mbarrier(&mut self, i: &Instruction) -> Result<Op> {
        let kind = i.parts.get(1).map_or("", String::as_str);
        let (op, at) = match kind {
            "init" => (
                MbarrierOp::Init {
                    count: self.src32(operand(i, 1)?)?,
                },
                0,
            ),
            "inval" => (MbarrierOp::Invalidate, 0),
            "arrive" | "arrive_drop" => (self.mbarrier_arrive(i, kind == "arrive_drop")?, 1),
            "expect_tx" => (
                MbarrierOp::ExpectTx {
                    bytes: self.src32(operand(i, 1)?)?,
                },
                0,
            ),
            "complete_tx" => (
                MbarrierOp::CompleteTx {
                    bytes: self.src32(operand(i, 1)?)?,
                },
                0,
            ),
            "try_wait" | "test_wait" => {
                let p = self.pred(operand(i, 0)?)?;
                let op = if i.has("parity") {
                    let parity = Some(self.src32(operand(i, 2)?)?);
                    MbarrierOp::Test {
                        p,
                        parity,
                        state: None,
                    }
                } else {
                    let state = Some(self.src(operand(i, 2)?, true)?);
                    MbarrierOp::Test {
                        p,
                        parity: None,
                        state,
                    }
                };
                (op, 1)
            }
            _ => return Err("unknown opcode".into()),
        };
        let address = self.address(operand(i, at)?)?;
        Ok(Op::Mbarrier {
            op: Box::new(op),
            address,
        })
    }

    fn mbarrier_arrive(&mut self, i: &Instruction, drop: bool) -> Result<MbarrierOp> {
        let d = match operand(i, 0)? {
            Operand::Name(name) if name == "_" => None,
            other => Some(self.dest(other, true)?),
        };
        let extra = i.operands.get(2).map(|o| self.src32(o)).transpose()?;
        let (count, expect) = if i.has("expect_tx") {
            (None, extra)
        } else {
            (extra, None)
        };
        Ok(MbarrierOp::Arrive {
            d,
            count,
            expect,
            drop,
        })
    }
}
