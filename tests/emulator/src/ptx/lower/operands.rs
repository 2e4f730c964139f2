//! Operands: names and immediates to register indices.

use super::super::ast::Operand;
use super::super::ops::{Address, AnyReg, Class, FixedSpecial, Op, Reg};
use super::super::program::PARAM_WINDOW;
use super::{FunctionLowering, Result, Symbol, function_address};

impl FunctionLowering<'_> {
    pub(super) fn find(&self, name: &str) -> Option<Symbol> {
        self.scopes.iter().rev().find_map(|s| s.get(name).copied())
    }

    fn note_use(&mut self, reg: AnyReg, written: bool) -> AnyReg {
        if !reg.wide {
            self.out.uses.push((reg.index, written));
        }
        reg
    }

    pub(super) fn constant(&mut self, value: u64, wide: bool) -> AnyReg {
        if wide {
            if let Some(&index) = self.constants64.get(&value) {
                return AnyReg { index, wide };
            }
            let reg = self.new_reg(true);
            self.constants64.insert(value, reg.index);
            self.out.constants64.push((reg.index, value));
            return reg;
        }
        let value = value as u32;
        if let Some(&index) = self.constants32.get(&value) {
            return AnyReg { index, wide };
        }
        let reg = self.new_reg(false);
        self.constants32.insert(value, reg.index);
        self.out.constants32.push((reg.index, value));
        reg
    }

    /// A value that has no register of its own: a symbol's address or a special register.
    pub(super) fn named_value(&mut self, name: &str, wide: bool) -> Result<AnyReg> {
        if let Some(special) = fixed_special(name) {
            if let Some(&reg) = self.specials.get(&(special, wide)) {
                return Ok(reg);
            }
            let reg = self.new_reg(wide);
            self.specials.insert((special, wide), reg);
            self.out.specials.push((reg, special));
            return Ok(reg);
        }
        if name == "WARP_SZ" {
            return Ok(self.constant(32, wide));
        }
        let value = match self.find(name) {
            Some(Symbol::Shared(offset)) => u64::from(offset),
            Some(Symbol::Param(offset)) => u64::from(offset) | PARAM_WINDOW,
            Some(Symbol::Local(offset)) => {
                let d = self.new_reg(true);
                self.emit(Op::LocalAddress { d: d.index, offset }, None, Class::Move);
                return Ok(d);
            }
            _ => self
                .module_symbol(name)
                .ok_or_else(|| format!("undefined name `{name}`"))?,
        };
        Ok(self.constant(value, wide))
    }

    pub(super) fn module_symbol(&self, name: &str) -> Option<u64> {
        if let Some(&(address, _)) = self.shared.globals.get(name) {
            return Some(address);
        }
        if let Some(&offset) = self.shared.shared.get(name) {
            return Some(u64::from(offset));
        }
        function_address(self.shared.module, name)
    }

    /// A source of either width; immediates take the width asked for.
    pub(super) fn source(&mut self, operand: &Operand, wide: bool) -> Result<AnyReg> {
        match operand {
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Register(reg)) => Ok(self.note_use(reg, false)),
                Some(Symbol::Predicate(_)) => Err(format!("{name} is a predicate")),
                _ => self.named_value(name, wide),
            },
            Operand::Offset(name, offset) => {
                let address = match self.find(name) {
                    Some(Symbol::Shared(base)) => u64::from(base),
                    Some(Symbol::Local(base)) => {
                        let d = self.new_reg(true);
                        let offset = base.wrapping_add(*offset as u32);
                        self.emit(Op::LocalAddress { d: d.index, offset }, None, Class::Move);
                        return Ok(d);
                    }
                    _ => self
                        .module_symbol(name)
                        .ok_or_else(|| format!("undefined name `{name}`"))?,
                };
                Ok(self.constant(address.wrapping_add_signed(*offset), wide))
            }
            Operand::Int(v) => Ok(self.constant(*v, wide)),
            Operand::Float32(bits) if wide => {
                Ok(self.constant(f64::from(f32::from_bits(*bits)).to_bits(), true))
            }
            Operand::Float32(bits) => Ok(self.constant(u64::from(*bits), false)),
            Operand::Float64(bits) if wide => Ok(self.constant(*bits, true)),
            Operand::Float64(bits) => {
                Ok(self.constant(u64::from((f64::from_bits(*bits) as f32).to_bits()), false))
            }
            other => Err(format!("unexpected operand {other:?}")),
        }
    }

    /// A source of exactly this width.
    pub(super) fn src(&mut self, operand: &Operand, wide: bool) -> Result<Reg> {
        let reg = self.source(operand, wide)?;
        if reg.wide != wide {
            let width = if wide { 64 } else { 32 };
            return Err(format!("operand {operand:?} is not {width} bits wide"));
        }
        Ok(reg.index)
    }

    pub(super) fn src32(&mut self, operand: &Operand) -> Result<Reg> {
        self.src(operand, false)
    }

    /// A destination of either width; `_` gets a register nobody reads.
    pub(super) fn dest(&mut self, operand: &Operand, wide: bool) -> Result<AnyReg> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(self.new_reg(wide)),
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Register(reg)) => Ok(self.note_use(reg, true)),
                _ => Err(format!("`{name}` is not a register")),
            },
            other => Err(format!("unexpected destination {other:?}")),
        }
    }

    pub(super) fn dst(&mut self, operand: &Operand, wide: bool) -> Result<Reg> {
        let reg = self.dest(operand, wide)?;
        if reg.wide != wide {
            let width = if wide { 64 } else { 32 };
            return Err(format!("destination {operand:?} is not {width} bits wide"));
        }
        Ok(reg.index)
    }

    /// A predicate register; the constants 0 and 1 are allowed.
    pub(super) fn pred(&mut self, operand: &Operand) -> Result<Reg> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(self.new_pred()),
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Predicate(p)) => Ok(p),
                _ => Err(format!("`{name}` is not a predicate")),
            },
            Operand::Int(value) => {
                let p = self.new_pred();
                if *value != 0 {
                    self.out.true_preds.push(p);
                }
                Ok(p)
            }
            other => Err(format!("unexpected predicate {other:?}")),
        }
    }

    /// A predicate that may be negated.
    pub(super) fn signed_pred(&mut self, operand: &Operand) -> Result<(Reg, bool)> {
        match operand {
            Operand::Not(name) => Ok((self.pred(&Operand::Name(name.clone()))?, true)),
            other => Ok((self.pred(other)?, false)),
        }
    }

    pub(super) fn address(&mut self, operand: &Operand) -> Result<Address> {
        let Operand::Address { base, offset, .. } = operand else {
            return Err(format!("expected an address, found {operand:?}"));
        };
        Ok(Address {
            base: self.source(base, true)?,
            offset: *offset,
        })
    }

    /// Elements of a vector operand, or the operand itself.
    pub(super) fn elements(operand: &Operand) -> &[Operand] {
        match operand {
            Operand::List(list) => list,
            other => std::slice::from_ref(other),
        }
    }
}

fn fixed_special(name: &str) -> Option<FixedSpecial> {
    use FixedSpecial as S;
    let (root, component) = name.split_once('.').unwrap_or((name, ""));
    let axis = match component {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    Some(match (root, axis) {
        ("%tid", Some(a)) => S::Tid(a),
        ("%ntid", Some(a)) => S::Ntid(a),
        ("%ctaid", Some(a)) => S::Ctaid(a),
        ("%nctaid", Some(a)) => S::Nctaid(a),
        ("%cluster_ctaid", Some(a)) => S::ClusterCtaid(a),
        ("%cluster_nctaid", Some(a)) => S::ClusterNctaid(a),
        ("%clusterid", Some(a)) => S::ClusterId(a),
        ("%nclusterid", Some(a)) => S::NumClusters(a),
        ("%cluster_ctarank", _) => S::ClusterCtarank,
        ("%cluster_nctarank", _) => S::ClusterNctarank,
        ("%laneid", _) => S::LaneId,
        ("%warpid", _) => S::WarpId,
        ("%nwarpid", _) => S::NumWarps,
        ("%smid", _) => S::SmId,
        ("%nsmid", _) => S::NumSms,
        ("%gridid", _) => S::GridId,
        ("%lanemask_eq", _) => S::LanemaskEq,
        ("%lanemask_lt", _) => S::LanemaskLt,
        ("%lanemask_le", _) => S::LanemaskLe,
        ("%lanemask_gt", _) => S::LanemaskGt,
        ("%lanemask_ge", _) => S::LanemaskGe,
        ("%envreg1", _) => S::Env(1),
        ("%envreg2", _) => S::Env(2),
        ("%dynamic_smem_size", _) => S::DynamicShared,
        ("%total_smem_size", _) => S::TotalShared,
        _ => return None,
    })
}
