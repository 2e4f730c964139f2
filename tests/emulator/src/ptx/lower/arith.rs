//! Integer, floating-point, logic, comparison and selection opcodes.

use super::super::ast::{Instruction, Operand, Type};
use super::super::ops::{
    BoolOp, Class, Compare, CompareType, Comparison, CountOp, FloatMods, FloatOp, FloatType, IntOp,
    IntType, Op, PrmtMode, Reg, Rounding,
};
use super::{FunctionLowering, Result, last_type, operand};

/// Integer arithmetic type; untyped bits count as unsigned.
fn int_type(ty: Type) -> Option<IntType> {
    Some(match ty {
        Type::B16 | Type::U16 => IntType::U16,
        Type::S16 => IntType::S16,
        Type::B32 | Type::U32 => IntType::U32,
        Type::S32 => IntType::S32,
        Type::B64 | Type::U64 => IntType::U64,
        Type::S64 => IntType::S64,
        _ => return None,
    })
}

/// Float arithmetic type, and whether it is a packed pair.
fn float_type(ty: Type) -> Option<(FloatType, bool)> {
    Some(match ty {
        Type::F16 => (FloatType::F16, false),
        Type::Bf16 => (FloatType::Bf16, false),
        Type::F32 => (FloatType::F32, false),
        Type::F64 => (FloatType::F64, false),
        Type::F16x2 => (FloatType::F16, true),
        Type::Bf16x2 => (FloatType::Bf16, true),
        _ => return None,
    })
}

fn is_wide(ty: IntType) -> bool {
    matches!(ty, IntType::U64 | IntType::S64)
}

/// Float modifiers; an unknown one is an error.
fn float_mods(i: &Instruction) -> Result<FloatMods> {
    let mut mods = FloatMods::default();
    for part in &i.parts[1..] {
        match part.as_str() {
            "rn" => mods.rounding = Rounding::Nearest,
            "rz" => mods.rounding = Rounding::Zero,
            "rm" => mods.rounding = Rounding::Down,
            "rp" => mods.rounding = Rounding::Up,
            "ftz" => mods.ftz = true,
            "sat" => mods.sat = true,
            "relu" => mods.relu = true,
            "NaN" => mods.nan = true,
            "xorsign" | "abs" => mods.xorsign_abs = true,
            "approx" | "full" | "noftz" => {}
            other if Type::parse(other).is_some() => {}
            other => return Err(format!("unknown modifier `.{other}`")),
        }
    }
    Ok(mods)
}

fn compare(name: &str) -> Option<Compare> {
    Some(match name {
        "eq" => Compare::Eq,
        "ne" => Compare::Ne,
        "lt" | "lo" => Compare::Lt,
        "le" | "ls" => Compare::Le,
        "gt" | "hi" => Compare::Gt,
        "ge" | "hs" => Compare::Ge,
        "equ" => Compare::Equ,
        "neu" => Compare::Neu,
        "ltu" => Compare::Ltu,
        "leu" => Compare::Leu,
        "gtu" => Compare::Gtu,
        "geu" => Compare::Geu,
        "num" => Compare::Num,
        "nan" => Compare::Nan,
        _ => return None,
    })
}

fn bool_op(name: &str) -> Option<BoolOp> {
    Some(match name {
        "and" => BoolOp::And,
        "or" => BoolOp::Or,
        "xor" => BoolOp::Xor,
        _ => return None,
    })
}

impl FunctionLowering<'_> {
    pub(super) fn arithmetic(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        match i.parts[0].as_str() {
            "setp" => return self.setp(i).map(Some),
            "set" => return self.set(i).map(Some),
            "selp" | "slct" => return self.select(i).map(Some),
            "popc" | "clz" | "bfind" => return self.count(i).map(Some),
            "dp4a" | "dp2a" => return self.dot(i).map(Some),
            "testp" => return self.testp(i).map(Some),
            _ => {}
        }
        // prmt alone has a modifier behind its type.
        let last = if i.parts[0] == "prmt" {
            i.parts.get(1)
        } else {
            i.parts.last()
        };
        let Some(ty) = last.and_then(|p| Type::parse(p)) else {
            return Ok(None);
        };
        if ty == Type::Pred {
            return self.predicate_logic(i);
        }
        if let Some((ty, packed)) = float_type(ty) {
            return self.float(i, ty, packed);
        }
        match int_type(ty) {
            Some(ty) => self.integer(i, ty),
            None => Ok(None),
        }
    }

    fn predicate_logic(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        let root = i.parts[0].as_str();
        let op = match (root, bool_op(root)) {
            (_, Some(op)) => {
                let d = self.pred(operand(i, 0)?)?;
                let (a, b) = (self.pred(operand(i, 1)?)?, self.pred(operand(i, 2)?)?);
                Op::PredLogic { op, d, a, b }
            }
            ("not", _) => Op::PredNot {
                d: self.pred(operand(i, 0)?)?,
                a: self.pred(operand(i, 1)?)?,
            },
            ("mov", _) => Op::PredMove {
                d: self.pred(operand(i, 0)?)?,
                a: self.pred(operand(i, 1)?)?,
            },
            _ => return Ok(None),
        };
        Ok(Some((op, Class::Predicate)))
    }

    fn float(
        &mut self,
        i: &Instruction,
        ty: FloatType,
        packed: bool,
    ) -> Result<Option<(Op, Class)>> {
        let (op, sources) = match i.parts[0].as_str() {
            "add" => (FloatOp::Add, 2),
            "sub" => (FloatOp::Sub, 2),
            "mul" => (FloatOp::Mul, 2),
            "fma" | "mad" => (FloatOp::Fma, 3),
            "div" => (FloatOp::Div, 2),
            "min" if i.operands.len() == 3 => (FloatOp::Min, 2),
            "max" if i.operands.len() == 3 => (FloatOp::Max, 2),
            "abs" => (FloatOp::Abs, 1),
            "neg" => (FloatOp::Neg, 1),
            "rcp" => (FloatOp::Rcp, 1),
            "sqrt" => (FloatOp::Sqrt, 1),
            "rsqrt" => (FloatOp::Rsqrt, 1),
            "ex2" => (FloatOp::Ex2, 1),
            "lg2" => (FloatOp::Lg2, 1),
            "sin" => (FloatOp::Sin, 1),
            "cos" => (FloatOp::Cos, 1),
            "tanh" => (FloatOp::Tanh, 1),
            "copysign" => (FloatOp::Copysign, 2),
            _ => return Ok(None),
        };
        let mods = float_mods(i)?;
        let directed = !matches!(mods.rounding, Rounding::Nearest);
        let correct = matches!(
            op,
            FloatOp::Add
                | FloatOp::Sub
                | FloatOp::Mul
                | FloatOp::Fma
                | FloatOp::Div
                | FloatOp::Rcp
                | FloatOp::Sqrt
        );
        if directed && (!correct || packed || !matches!(ty, FloatType::F32 | FloatType::F64)) {
            return Err("directed rounding of this operation does not exist".into());
        }
        let wide = ty == FloatType::F64;
        let d = self.dst(operand(i, 0)?, wide)?;
        let mut s = [0; 3];
        for (n, slot) in s.iter_mut().enumerate().take(sources) {
            *slot = self.src(operand(i, n + 1)?, wide)?;
        }
        let class = if matches!(ty, FloatType::F16 | FloatType::Bf16) {
            Class::Half
        } else {
            Class::Float
        };
        let op = if packed {
            Op::Packed { op, ty, mods, d, s }
        } else {
            Op::Float { op, ty, mods, d, s }
        };
        Ok(Some((op, class)))
    }

    fn testp(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let op = match i.parts.get(1).map_or("", String::as_str) {
            "finite" => FloatOp::TestFinite,
            "infinite" => FloatOp::TestInfinite,
            "number" => FloatOp::TestNumber,
            "notanumber" => FloatOp::TestNan,
            "normal" => FloatOp::TestNormal,
            "subnormal" => FloatOp::TestSubnormal,
            other => return Err(format!("unknown test `.{other}`")),
        };
        let (ty, _) = float_type(last_type(i)?).ok_or("not a float type")?;
        let d = self.pred(operand(i, 0)?)?;
        let a = self.src(operand(i, 1)?, ty == FloatType::F64)?;
        Ok((
            Op::Float {
                op,
                ty,
                mods: FloatMods::default(),
                d,
                s: [a, 0, 0],
            },
            Class::Float,
        ))
    }

    fn integer(&mut self, i: &Instruction, ty: IntType) -> Result<Option<(Op, Class)>> {
        let root = i.parts[0].as_str();
        if (root == "mul" || root == "mad") && i.has("wide") {
            return self.wide_multiply(i, ty).map(Some);
        }
        let wide = is_wide(ty);
        // (op, operand is 64 bits wide) per source
        let (op, widths): (IntOp, &[bool]) = match root {
            "add" if i.has("sat") => (IntOp::AddSat, &[wide, wide]),
            "sub" if i.has("sat") => (IntOp::SubSat, &[wide, wide]),
            "add" if i.has("cc") => (IntOp::AddCarry(false, true), &[wide, wide]),
            "sub" if i.has("cc") => (IntOp::SubCarry(false, true), &[wide, wide]),
            "addc" => (IntOp::AddCarry(true, i.has("cc")), &[wide, wide]),
            "subc" => (IntOp::SubCarry(true, i.has("cc")), &[wide, wide]),
            "mad" if i.has("cc") => {
                let high = i.has("hi");
                (
                    IntOp::MadCarry {
                        high,
                        reads: false,
                        writes: true,
                    },
                    &[wide, wide, wide],
                )
            }
            "madc" => {
                let (high, writes) = (i.has("hi"), i.has("cc"));
                (
                    IntOp::MadCarry {
                        high,
                        reads: true,
                        writes,
                    },
                    &[wide, wide, wide],
                )
            }
            "add" => (IntOp::Add, &[wide, wide]),
            "sub" => (IntOp::Sub, &[wide, wide]),
            "mul" if i.has("hi") => (IntOp::MulHi, &[wide, wide]),
            "mul" if i.has("lo") => (IntOp::MulLo, &[wide, wide]),
            "mad" if i.has("hi") && !i.has("sat") => (IntOp::MadHi, &[wide, wide, wide]),
            "mad" if i.has("lo") => (IntOp::MadLo, &[wide, wide, wide]),
            "mul24" if i.has("lo") => (IntOp::Mul24Lo, &[false, false]),
            "mad24" if i.has("lo") => (IntOp::Mad24Lo, &[false, false, false]),
            "sad" => (IntOp::Sad, &[wide, wide, wide]),
            "div" => (IntOp::Div, &[wide, wide]),
            "rem" => (IntOp::Rem, &[wide, wide]),
            "abs" => (IntOp::Abs, &[wide]),
            "neg" => (IntOp::Neg, &[wide]),
            "min" => (IntOp::Min, &[wide, wide]),
            "max" => (IntOp::Max, &[wide, wide]),
            "and" => (IntOp::And, &[wide, wide]),
            "or" => (IntOp::Or, &[wide, wide]),
            "xor" => (IntOp::Xor, &[wide, wide]),
            "not" => (IntOp::Not, &[wide]),
            "cnot" => (IntOp::Cnot, &[wide]),
            "shl" => (IntOp::Shl, &[wide, false]),
            "shr" => (IntOp::Shr, &[wide, false]),
            "bfe" => (IntOp::Bfe, &[wide, false, false]),
            "bfi" => (IntOp::Bfi, &[wide, wide, false, false]),
            "brev" => (IntOp::Brev, &[wide]),
            "lop3" => {
                let table = super::immediate(operand(i, 4)?)?;
                let table =
                    u8::try_from(table).map_err(|_| format!("lop3 table {table} is not 8 bits"))?;
                (IntOp::Lop3(table), &[false, false, false])
            }
            "prmt" => (IntOp::Prmt(prmt_mode(i)?), &[false, false, false]),
            "shf" => {
                let (left, clamp) = (i.has("l"), i.has("clamp"));
                (IntOp::Shf { left, clamp }, &[false, false, false])
            }
            "bmsk" if !i.has("wrap") => (IntOp::Bmsk, &[false, false]),
            "szext" if !i.has("wrap") => (IntOp::Szext, &[false, false]),
            _ => return Ok(None),
        };
        check_integer_modifiers(i)?;
        let d = self.dst(operand(i, 0)?, wide)?;
        let mut s = [0; 4];
        for (n, (slot, &width)) in s.iter_mut().zip(widths).enumerate() {
            *slot = self.src(operand(i, n + 1)?, width)?;
        }
        Ok(Some((Op::Int { op, ty, d, s }, Class::Integer)))
    }

    fn wide_multiply(&mut self, i: &Instruction, ty: IntType) -> Result<(Op, Class)> {
        if is_wide(ty) {
            return Err("a wide product of 64-bit operands does not exist".into());
        }
        let wide = matches!(ty, IntType::U32 | IntType::S32);
        let d = self.dst(operand(i, 0)?, wide)?;
        let (a, b) = (self.src32(operand(i, 1)?)?, self.src32(operand(i, 2)?)?);
        let c = if i.parts[0] == "mad" {
            Some(self.src(operand(i, 3)?, wide)?)
        } else {
            None
        };
        Ok((Op::Wide { ty, d, a, b, c }, Class::Integer))
    }

    fn count(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let ty = int_type(last_type(i)?).ok_or("not an integer type")?;
        let op = match i.parts[0].as_str() {
            "popc" => CountOp::Popc,
            "clz" => CountOp::Clz,
            _ => CountOp::Bfind {
                shift_amount: i.has("shiftamt"),
            },
        };
        let d = self.dst(operand(i, 0)?, false)?;
        let a = self.src(operand(i, 1)?, is_wide(ty))?;
        Ok((Op::Count { op, ty, d, a }, Class::Integer))
    }

    fn dot(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let lanes = if i.parts[0] == "dp4a" { 4 } else { 2 };
        let types: Vec<Type> = i.parts[1..].iter().filter_map(|p| Type::parse(p)).collect();
        let [a_type, b_type] = types[..] else {
            return Err("expected two operand types".into());
        };
        let d = self.dst(operand(i, 0)?, false)?;
        let mut s = [0; 3];
        for (n, slot) in s.iter_mut().enumerate() {
            *slot = self.src32(operand(i, n + 1)?)?;
        }
        let (a_signed, b_signed) = (a_type.is_signed(), b_type.is_signed());
        Ok((
            Op::Dot {
                lanes,
                a_signed,
                b_signed,
                high: i.has("hi"),
                d,
                s,
            },
            Class::Integer,
        ))
    }

    fn select(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        if i.parts[0] == "selp" {
            let wide = last_type(i)?.bits() == 64;
            let d = self.dst(operand(i, 0)?, wide)?;
            let (a, b) = (
                self.src(operand(i, 1)?, wide)?,
                self.src(operand(i, 2)?, wide)?,
            );
            let p = self.pred(operand(i, 3)?)?;
            return Ok((Op::Select { wide, d, a, b, p }, Class::Predicate));
        }
        let types: Vec<Type> = i.parts[1..].iter().filter_map(|p| Type::parse(p)).collect();
        let [ty, by] = types[..] else {
            return Err("expected two types".into());
        };
        let wide = ty.bits() == 64;
        let d = self.dst(operand(i, 0)?, wide)?;
        let (a, b) = (
            self.src(operand(i, 1)?, wide)?,
            self.src(operand(i, 2)?, wide)?,
        );
        let c = self.src32(operand(i, 3)?)?;
        Ok((
            Op::SelectSign {
                wide,
                float: by == Type::F32,
                d,
                a,
                b,
                c,
            },
            Class::Predicate,
        ))
    }

    fn comparison(&mut self, i: &Instruction) -> Result<Comparison> {
        let compare = i.parts[1..]
            .iter()
            .find_map(|p| compare(p))
            .ok_or("no comparison operator")?;
        let ty = last_type(i)?;
        let (ty, wide) = match (float_type(ty), int_type(ty)) {
            (Some((f, true)), _) => (CompareType::Packed(f), false),
            (Some((f, false)), _) => (CompareType::Float(f), f == FloatType::F64),
            (_, Some(t)) => (CompareType::Int(t), is_wide(t)),
            _ => return Err("not a comparable type".into()),
        };
        let (a, b) = (
            self.src(operand(i, 1)?, wide)?,
            self.src(operand(i, 2)?, wide)?,
        );
        let combine = match i.parts[1..].iter().find_map(|p| bool_op(p)) {
            Some(op) => {
                let (p, negated) = self.signed_pred(operand(i, 3)?)?;
                Some((op, p, negated))
            }
            None => None,
        };
        Ok(Comparison {
            compare,
            ty,
            ftz: i.has("ftz"),
            combine,
            a,
            b,
        })
    }

    fn setp(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let (p, q): (Option<Reg>, Option<Reg>) = match operand(i, 0)? {
            Operand::Pair(p, q) => (Some(self.pred(p)?), Some(self.pred(q)?)),
            p => (Some(self.pred(p)?), None),
        };
        let c = Box::new(self.comparison(i)?);
        Ok((Op::Setp { c, p, q }, Class::Predicate))
    }

    fn set(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let types: Vec<Type> = i.parts[1..].iter().filter_map(|p| Type::parse(p)).collect();
        let to = *types.first().ok_or("no destination type")?;
        let d = self.dst(operand(i, 0)?, to.bits() == 64)?;
        let c = Box::new(self.comparison(i)?);
        Ok((Op::Set { c, d, to }, Class::Predicate))
    }
}

/// Modifiers that some integer op has; any other one is unknown.
fn check_integer_modifiers(i: &Instruction) -> Result<()> {
    const KNOWN: [&str; 9] = ["lo", "hi", "wide", "sat", "cc", "clamp", "wrap", "l", "r"];
    let unknown = i.parts[1..]
        .iter()
        .find(|p| Type::parse(p).is_none() && !KNOWN.contains(&p.as_str()));
    match unknown {
        Some(_) if i.parts[0] == "prmt" => Ok(()),
        Some(part) => Err(format!("unknown modifier `.{part}`")),
        None => Ok(()),
    }
}

fn prmt_mode(i: &Instruction) -> Result<PrmtMode> {
    let mode = i.parts[1..].iter().find(|p| Type::parse(p).is_none());
    Ok(match mode.map(String::as_str) {
        None => PrmtMode::Index,
        Some("f4e") => PrmtMode::F4e,
        Some("b4e") => PrmtMode::B4e,
        Some("rc8") => PrmtMode::Rc8,
        Some("ecl") => PrmtMode::Ecl,
        Some("ecr") => PrmtMode::Ecr,
        Some("rc16") => PrmtMode::Rc16,
        Some(other) => return Err(format!("unknown modifier `.{other}`")),
    })
}
