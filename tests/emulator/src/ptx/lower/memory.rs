//! Loads, stores, atomics, fences and prefetches.

use super::super::ast::{Instruction, Operand, Space, Type};
use super::super::ops::{Access, AnyReg, Atomic, AtomicOp, Class, Op};
use super::{FunctionLowering, Result, Symbol, last_type, operand};

/// Modifiers of loads and stores that change neither value nor checking.
fn is_hint(part: &str) -> bool {
    matches!(
        part,
        "nc" | "ca"
            | "cg"
            | "cs"
            | "lu"
            | "cv"
            | "wb"
            | "wt"
            | "weak"
            | "cta"
            | "cluster"
            | "gpu"
            | "sys"
    ) || part.starts_with("L1::")
        || part.starts_with("L2::")
        || part == "unified"
}

impl FunctionLowering<'_> {
    pub(super) fn memory_access(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        Ok(Some(match i.parts[0].as_str() {
            "ld" | "ldu" => self.load_store(i, true)?,
            "st" if !i.has("async") => self.load_store(i, false)?,
            "atom" => (self.atomic(i, true)?, Class::Atomic),
            "red" if !i.has("async") => (self.atomic(i, false)?, Class::Atomic),
            "membar" => (
                Op::Fence {
                    device: !i.has("cta"),
                },
                Class::Barrier,
            ),
            "fence" if i.has("async") && !i.has("global") => (Op::ProxyFence, Class::Barrier),
            "fence" => {
                let proxy = i.parts[1..]
                    .iter()
                    .any(|p| p.starts_with("proxy") || p.starts_with("mbarrier_init"));
                (
                    Op::Fence {
                        device: !proxy && !i.has("cta"),
                    },
                    Class::Barrier,
                )
            }
            "prefetch" | "prefetchu" | "applypriority" | "discard" => (Op::Nothing, Class::Other),
            "createpolicy" => {
                let d = self.dst(operand(i, 0)?, true)?;
                (
                    Op::Move {
                        wide: true,
                        d,
                        a: self.constant(0, true).index,
                    },
                    Class::Other,
                )
            }
            _ => return Ok(None),
        }))
    }

    /// The state space of an access; parameters of device functions lie in local memory.
    fn space(&self, i: &Instruction, address: &Operand) -> Space {
        let space = i.parts[1..]
            .iter()
            .find_map(|p| Space::parse(p))
            .unwrap_or(Space::Generic);
        let Operand::Address { base, .. } = address else {
            return space;
        };
        match &**base {
            Operand::Name(name) if space == Space::Param => match self.find(name) {
                Some(Symbol::Local(_)) => Space::Local,
                _ => space,
            },
            _ => space,
        }
    }

    pub(super) fn load_store(&mut self, i: &Instruction, load: bool) -> Result<(Op, Class)> {
        let ty = last_type(i)?;
        let (mut lanes, mut strong) = (1, false);
        for part in &i.parts[1..i.parts.len() - 1] {
            match part.as_str() {
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                "volatile" | "relaxed" | "acquire" | "release" | "mmio" => strong = true,
                p if is_hint(p) || Space::parse(p).is_some() => {}
                other => return Err(format!("unknown modifier `.{other}`")),
            }
        }
        let (data, address) = if load { (0, 1) } else { (1, 0) };
        let space = self.space(i, operand(i, address)?);
        let elements = Self::elements(operand(i, data)?);
        if elements.len() != lanes || ty.bits() > 64 || ty == Type::Pred {
            return Err(format!(
                "{} elements where {lanes} were expected",
                elements.len()
            ));
        }
        let mut regs = [AnyReg {
            index: 0,
            wide: false,
        }; 4];
        let mut discard = 0;
        for (n, (slot, element)) in regs.iter_mut().zip(elements).enumerate() {
            let wide = ty.bits() == 64;
            if load && matches!(element, Operand::Name(name) if name == "_") {
                discard |= 1 << n;
            } else {
                *slot = if load {
                    self.dest(element, wide)?
                } else {
                    self.source(element, wide)?
                };
            }
        }
        let access = Box::new(Access {
            space,
            size: ty.bytes() as u8,
            signed: ty.is_signed(),
            strong,
            release: releases(i),
            count: lanes as u8,
            regs,
            discard,
            address: self.address(operand(i, address)?)?,
        });
        let class = access_class(space, load);
        Ok((
            if load {
                Op::Load(access)
            } else {
                Op::Store(access)
            },
            class,
        ))
    }

    fn atomic(&mut self, i: &Instruction, returns: bool) -> Result<Op> {
        let ty = last_type(i)?;
        let mut op = None;
        for part in &i.parts[1..i.parts.len() - 1] {
            op = match part.as_str() {
                p if atomic_op(p).is_some() => atomic_op(p),
                "relaxed" | "acquire" | "release" | "acq_rel" | "noftz" => op,
                p if is_hint(p) || Space::parse(p).is_some() => op,
                other => return Err(format!("unknown modifier `.{other}`")),
            };
        }
        let op = op.ok_or("no atomic operation")?;
        let at = usize::from(returns);
        let wide = ty.bits() == 64;
        let d = if returns {
            Some(self.dest(operand(i, 0)?, wide)?)
        } else {
            None
        };
        let b = self.source(operand(i, at + 1)?, wide)?;
        let c = if op == AtomicOp::Cas {
            Some(self.source(operand(i, at + 2)?, wide)?)
        } else {
            None
        };
        let space = self.space(i, operand(i, at)?);
        let address = self.address(operand(i, at)?)?;
        Ok(Op::Atomic(Box::new(Atomic {
            space,
            op,
            ty,
            release: releases(i),
            d,
            address,
            b,
            c,
        })))
    }
}

/// Whether an access orders the block's earlier writes before it for the whole device.
fn releases(i: &Instruction) -> bool {
    (i.has("release") || i.has("acq_rel")) && (i.has("gpu") || i.has("sys"))
}

/// The operation that a modifier names.
pub fn atomic_op(name: &str) -> Option<AtomicOp> {
    Some(match name {
        "add" => AtomicOp::Add,
        "min" => AtomicOp::Min,
        "max" => AtomicOp::Max,
        "inc" => AtomicOp::Inc,
        "dec" => AtomicOp::Dec,
        "and" => AtomicOp::And,
        "or" => AtomicOp::Or,
        "xor" => AtomicOp::Xor,
        "exch" => AtomicOp::Exch,
        "cas" => AtomicOp::Cas,
        _ => return None,
    })
}

fn access_class(space: Space, load: bool) -> Class {
    match (space, load) {
        (Space::Shared | Space::Cluster, true) => Class::LoadShared,
        (Space::Shared | Space::Cluster, false) => Class::StoreShared,
        (Space::Local, true) => Class::LoadLocal,
        (Space::Local, false) => Class::StoreLocal,
        (Space::Param | Space::Const, _) => Class::Constant,
        (_, true) => Class::LoadGlobal,
        (_, false) => Class::StoreGlobal,
    }
}
