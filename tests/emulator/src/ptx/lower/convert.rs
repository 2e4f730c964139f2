//! Moves, conversions between types and between address spaces.

use super::super::ast::{Instruction, Operand, Space, Type};
use super::super::ops::{AnyReg, Class, Convert, Op, Rounding, Special};
use super::{FunctionLowering, Result, last_type, operand};
use crate::fp8::Format;

impl FunctionLowering<'_> {
    pub(super) fn conversion(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        Ok(Some(match i.parts[0].as_str() {
            "mov" => (self.mov(i)?, Class::Move),
            "cvt" => (self.convert(i)?, Class::Convert),
            "cvta" => (self.convert_address(i)?, Class::Move),
            "isspacep" => {
                let space = i
                    .parts
                    .get(1)
                    .and_then(|s| Space::parse(s))
                    .ok_or("unknown state space")?;
                let p = self.pred(operand(i, 0)?)?;
                (
                    Op::IsSpace {
                        p,
                        a: self.src(operand(i, 1)?, true)?,
                        space,
                    },
                    Class::Predicate,
                )
            }
            _ => return Ok(None),
        }))
    }

    fn mov(&mut self, i: &Instruction) -> Result<Op> {
        let ty = last_type(i)?;
        let (to, from) = (operand(i, 0)?, operand(i, 1)?);
        match (to, from) {
            (Operand::List(parts), _) => self.unpack(ty, parts, from),
            (_, Operand::List(parts)) => self.pack(ty, to, parts),
            (_, Operand::Name(name)) if name.starts_with('%') && special(name).is_some() => {
                let which = special(name).ok_or("unknown special register")?;
                Ok(Op::Special {
                    which,
                    d: self.dest(to, ty.bits() == 64)?,
                })
            }
            _ => {
                let wide = ty.bits() == 64;
                let d = self.dst(to, wide)?;
                Ok(Op::Move {
                    wide,
                    d,
                    a: self.src(from, wide)?,
                })
            }
        }
    }

    fn pack(&mut self, ty: Type, to: &Operand, list: &[Operand]) -> Result<Op> {
        let (bits, count) = part_width(ty, list.len())?;
        let d = self.dest(to, ty.bits() == 64)?;
        let mut parts = [AnyReg {
            index: 0,
            wide: false,
        }; 4];
        for (slot, part) in parts.iter_mut().zip(list) {
            *slot = self.source(part, bits == 64)?;
        }
        Ok(Op::Pack {
            d,
            parts,
            count,
            bits,
        })
    }

    fn unpack(&mut self, ty: Type, list: &[Operand], from: &Operand) -> Result<Op> {
        let (bits, count) = part_width(ty, list.len())?;
        let a = self.source(from, ty.bits() == 64)?;
        let mut parts = [None; 4];
        for (slot, part) in parts.iter_mut().zip(list) {
            let discarded = matches!(part, Operand::Name(n) if n == "_");
            *slot = if discarded {
                None
            } else {
                Some(self.dest(part, bits == 64)?)
            };
        }
        Ok(Op::Unpack {
            parts,
            count,
            bits,
            a,
        })
    }

    fn convert(&mut self, i: &Instruction) -> Result<Op> {
        let types: Vec<Type> = i.parts[1..].iter().filter_map(|p| Type::parse(p)).collect();
        let [to, from] = types[..] else {
            return Err("expected two types".into());
        };
        let to_fp8 = Format::of_pair(to).is_some();
        let from_fp8 = Format::of_pair(from).is_some();
        let pair = to_fp8 || matches!(to, Type::F16x2 | Type::Bf16x2);
        let packed = pair && from == Type::F32;
        let mut c = Convert {
            from,
            to,
            rounding: Rounding::Nearest,
            integral: false,
            ftz: false,
            sat: false,
            relu: false,
            satfinite: false,
            d: self.dest(operand(i, 0)?, to.bits() == 64)?,
            a: self.source(operand(i, 1)?, from.bits() == 64)?,
            b: if packed {
                Some(self.source(operand(i, 2)?, false)?)
            } else {
                None
            },
        };
        for part in i.parts[1..].iter().filter(|p| Type::parse(p).is_none()) {
            (c.rounding, c.integral) = match part.as_str() {
                "rn" => (Rounding::Nearest, false),
                "rz" => (Rounding::Zero, false),
                "rm" => (Rounding::Down, false),
                "rp" => (Rounding::Up, false),
                "rna" => (Rounding::NearestAway, false),
                "rni" => (Rounding::Nearest, true),
                "rzi" => (Rounding::Zero, true),
                "rmi" => (Rounding::Down, true),
                "rpi" => (Rounding::Up, true),
                other => {
                    match other {
                        "ftz" => c.ftz = true,
                        "sat" => c.sat = true,
                        "relu" => c.relu = true,
                        "satfinite" => c.satfinite = true,
                        _ => return Err(format!("unknown modifier `.{other}`")),
                    }
                    (c.rounding, c.integral)
                }
            };
        }
        let fp8_known = match (to_fp8, from_fp8) {
            (true, _) => matches!(from, Type::F32 | Type::F16x2) && c.satfinite,
            (_, true) => to == Type::F16x2,
            _ => !c.satfinite,
        };
        let supported = |t: Type| !matches!(t, Type::U16x2 | Type::S16x2 | Type::Pred);
        if !supported(to) || !supported(from) || from == Type::Tf32 || !fp8_known {
            return Err("unknown conversion".into());
        }
        Ok(Op::Convert(Box::new(c)))
    }

    fn convert_address(&mut self, i: &Instruction) -> Result<Op> {
        let space = i.parts[1..]
            .iter()
            .find_map(|p| Space::parse(p))
            .ok_or("unknown state space")?;
        let wide = last_type(i)?.bits() == 64;
        let d = self.dest(operand(i, 0)?, wide)?;
        let a = self.source(operand(i, 1)?, wide)?;
        Ok(Op::Convaddr {
            d,
            a,
            space,
            to_generic: !i.has("to"),
        })
    }
}

fn part_width(ty: Type, count: usize) -> Result<(u8, u8)> {
    let bits = ty.bits() as usize;
    if !matches!(count, 2 | 4) || bits > 64 {
        return Err(format!(
            "a vector of {count} parts does not fill {bits} bits"
        ));
    }
    Ok(((bits / count) as u8, count as u8))
}

fn special(name: &str) -> Option<Special> {
    Some(match name {
        "%clock" => Special::Clock,
        "%clock64" => Special::Clock64,
        "%globaltimer" | "%globaltimer_lo" => Special::GlobalTimer,
        _ => return None,
    })
}
