//! `mma.sync`, `ldmatrix`, `stmatrix` and `wgmma`.

use super::super::ast::{Instruction, Operand, Type};
use super::super::ops::{
    ByteMma, ByteType, Class, DoubleMma, Matrix, Mma, MmaType, Op, Reg, ScaleD, Wgmma,
};
use super::{FunctionLowering, Result, immediate, operand};
use crate::fp8::Format;

fn mma_type(name: &str) -> Result<MmaType> {
    Ok(match name {
        "f16" => MmaType::F16,
        "bf16" => MmaType::Bf16,
        "tf32" => MmaType::Tf32,
        other => return Err(format!("unknown matrix type `.{other}`")),
    })
}

impl FunctionLowering<'_> {
    pub(super) fn warp_matrix(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        Ok(Some(match i.parts[0].as_str() {
            "mma" => (self.mma(i)?, Class::Tensor),
            "ldmatrix" => (Op::LoadMatrix(self.matrix(i, 0, 1)?), Class::Matrix),
            "stmatrix" => (Op::StoreMatrix(self.matrix(i, 1, 0)?), Class::Matrix),
            "wgmma" if i.has("mma_async") => (self.wgmma(i)?, Class::Tensor),
            "wgmma" if i.has("fence") => (Op::Nothing, Class::Async),
            "wgmma" if i.has("commit_group") => (Op::WgmmaCommit, Class::Async),
            "wgmma" if i.has("wait_group") => {
                let pending = Self::constant_operand(i, 0)?;
                (Op::WgmmaWait { pending }, Class::Async)
            }
            _ => return Ok(None),
        }))
    }

    /// Exactly `N` 32-bit registers of a vector operand; the rest of the array is zero.
    fn fragment<const N: usize>(
        &mut self,
        o: &Operand,
        count: usize,
        write: bool,
    ) -> Result<[Reg; N]> {
        let elements = Self::elements(o);
        if elements.len() != count {
            return Err(format!(
                "a fragment of {} registers where {count} were expected",
                elements.len()
            ));
        }
        let mut out = [0; N];
        for (slot, element) in out.iter_mut().zip(elements) {
            *slot = if write {
                self.dst(element, false)?
            } else {
                self.src32(element)?
            };
        }
        Ok(out)
    }

    fn mma(&mut self, i: &Instruction) -> Result<Op> {
        if let Some(op) = self.byte_mma(i)? {
            return Ok(op);
        }
        if i.has("m8n8k4") && i.has("f64") {
            return self.double_mma(i);
        }
        let Some(shape_at) = i.parts.iter().position(|p| p.starts_with("m16n8k")) else {
            return Err("unknown opcode: matrix shape".into());
        };
        let types = &i.parts[i.parts.len() - 4..];
        let layout_known = i.has("sync") && i.has("row") && i.has("col");
        if !layout_known
            || i.parts.len() != shape_at + 7
            || types[1] != types[2]
            || types[0] != types[3]
        {
            return Err("unknown opcode: matrix layout or types".into());
        }
        let ty = mma_type(&types[1])?;
        let half_accumulate = match (types[0].as_str(), ty) {
            ("f32", _) => false,
            ("f16", MmaType::F16) => true,
            _ => return Err("unknown opcode: accumulator type".into()),
        };
        let (k, a_count, b_count) = match (i.parts[shape_at].as_str(), ty) {
            ("m16n8k16", MmaType::F16 | MmaType::Bf16) => (16, 4, 2),
            ("m16n8k8", MmaType::F16 | MmaType::Bf16) => (8, 2, 1),
            ("m16n8k8", MmaType::Tf32) => (8, 4, 2),
            ("m16n8k4", MmaType::Tf32) => (4, 2, 1),
            _ => return Err("unknown opcode: matrix shape".into()),
        };
        let c_count = if half_accumulate { 2 } else { 4 };
        Ok(Op::Mma(Box::new(Mma {
            ty,
            k,
            half_accumulate,
            d: self.fragment(operand(i, 0)?, c_count, true)?,
            a: self.fragment(operand(i, 1)?, a_count, false)?,
            b: self.fragment(operand(i, 2)?, b_count, false)?,
            c: self.fragment(operand(i, 3)?, c_count, false)?,
        })))
    }

    /// Products of 8-bit operands; None for others.
    fn byte_mma(&mut self, i: &Instruction) -> Result<Option<Op>> {
        let types = &i.parts[i.parts.len().saturating_sub(4)..];
        let byte_type = |name: &String| match name.as_str() {
            "s8" => Some(ByteType::Signed),
            "u8" => Some(ByteType::Unsigned),
            "e4m3" => Some(ByteType::Fp8(Format::E4m3)),
            "e5m2" => Some(ByteType::Fp8(Format::E5m2)),
            _ => None,
        };
        let (Some(a_type), Some(b_type)) = (
            types.get(1).and_then(byte_type),
            types.get(2).and_then(byte_type),
        ) else {
            return Ok(None);
        };
        let fp8 = |t| matches!(t, ByteType::Fp8(_));
        let half_accumulate = match (types[0].as_str(), fp8(a_type)) {
            ("s32", false) | ("f32", true) => false,
            ("f16", true) => true,
            _ => return Err("unknown opcode: accumulator type".into()),
        };
        let k = match (i.has("m16n8k32"), i.has("m16n8k16")) {
            (true, _) => 32,
            (_, true) if !fp8(a_type) => 16,
            _ => return Err("unknown opcode: matrix shape".into()),
        };
        let known = i.has("sync") && i.has("row") && i.has("col");
        if !known || types[0] != types[3] || fp8(a_type) != fp8(b_type) {
            return Err("unknown opcode: matrix layout or types".into());
        }
        let c_count = if half_accumulate { 2 } else { 4 };
        Ok(Some(Op::ByteMma(Box::new(ByteMma {
            a_type,
            b_type,
            k,
            saturate: i.has("satfinite"),
            half_accumulate,
            d: self.fragment(operand(i, 0)?, c_count, true)?,
            a: self.fragment(operand(i, 1)?, usize::from(k) / 8, false)?,
            b: self.fragment(operand(i, 2)?, usize::from(k) / 16, false)?,
            c: self.fragment(operand(i, 3)?, c_count, false)?,
        }))))
    }

    fn double_mma(&mut self, i: &Instruction) -> Result<Op> {
        let types = &i.parts[i.parts.len() - 4..];
        if types.iter().any(|t| t != "f64") || !(i.has("row") && i.has("col")) {
            return Err("unknown opcode: matrix layout or types".into());
        }
        let (d, c) = (
            Self::elements(operand(i, 0)?),
            Self::elements(operand(i, 3)?),
        );
        let (a, b) = (
            Self::elements(operand(i, 1)?),
            Self::elements(operand(i, 2)?),
        );
        let ([d0, d1], [a], [b], [c0, c1]) = (d, a, b, c) else {
            return Err("fragments of the wrong size".into());
        };
        Ok(Op::DoubleMma(Box::new(DoubleMma {
            d: [self.dst(d0, true)?, self.dst(d1, true)?],
            a: self.src(a, true)?,
            b: self.src(b, true)?,
            c: [self.src(c0, true)?, self.src(c1, true)?],
        })))
    }

    fn matrix(&mut self, i: &Instruction, data: usize, address: usize) -> Result<Box<Matrix>> {
        let count = match i
            .parts
            .iter()
            .find(|p| matches!(p.as_str(), "x1" | "x2" | "x4"))
            .map(String::as_str)
        {
            Some("x1") => 1,
            Some("x2") => 2,
            Some("x4") => 4,
            _ => return Err("unknown opcode: matrix count".into()),
        };
        if !i.has("m8n8") || i.parts.last().map(String::as_str) != Some("b16") {
            return Err("unknown opcode: matrix shape or type".into());
        }
        let regs = self.fragment(operand(i, data)?, count, data == 0)?;
        let address = self.address(operand(i, address)?)?;
        Ok(Box::new(Matrix {
            count: count as u8,
            transpose: i.has("trans"),
            regs,
            address,
        }))
    }

    fn wgmma(&mut self, i: &Instruction) -> Result<Op> {
        let shape = i
            .parts
            .iter()
            .find(|p| p.starts_with("m64n"))
            .ok_or("no wgmma shape")?;
        let (n, k) = shape["m64n".len()..]
            .split_once('k')
            .ok_or("no wgmma shape")?;
        let n: u16 = n.parse().map_err(|_| "malformed wgmma shape".to_string())?;
        let types: Vec<&String> = i.parts[1..]
            .iter()
            .filter(|p| Type::parse(p).is_some())
            .collect();
        let [d_type, a_type, b_type] = types[..] else {
            return Err("expected three types".into());
        };
        let ty = mma_type(a_type)?;
        let k_known = k == if ty == MmaType::Tf32 { "8" } else { "16" };
        if a_type != b_type || !k_known || n == 0 || !n.is_multiple_of(8) || n > 256 {
            return Err("unknown opcode: wgmma shape or types".into());
        }
        let half_accumulate = d_type == "f16";
        let count = usize::from(n) / if half_accumulate { 4 } else { 2 };
        let destinations = Self::elements(operand(i, 0)?);
        if destinations.len() != count {
            return Err(format!(
                "{} accumulator registers where {count} were expected",
                destinations.len()
            ));
        }
        let d = destinations
            .iter()
            .map(|o| self.dst(o, false))
            .collect::<Result<Vec<_>>>()?;
        let (mut a, mut a_descriptor) = (Vec::new(), None);
        match operand(i, 1)? {
            list @ Operand::List(_) => a = self.fragment::<4>(list, 4, false)?.to_vec(),
            descriptor => a_descriptor = Some(self.src(descriptor, true)?),
        }
        let b_descriptor = self.src(operand(i, 2)?, true)?;
        let scale_d = match operand(i, 3)? {
            Operand::Int(v) => ScaleD::Constant(*v != 0),
            p => {
                let (p, negated) = self.signed_pred(p)?;
                ScaleD::Predicate(p, negated)
            }
        };
        let flag = |n: usize| i.operands.get(n).map_or(Ok(0), immediate).map(|v| v as i64);
        let transposable = ty != MmaType::Tf32;
        // With A in registers only B has a transpose flag.
        let (ta, tb) = if a_descriptor.is_some() {
            (Some(6), 7)
        } else {
            (None, 6)
        };
        Ok(Op::Wgmma(Box::new(Wgmma {
            ty,
            n,
            half_accumulate,
            d,
            a,
            a_descriptor,
            b_descriptor,
            scale_d,
            negate_a: flag(4)? < 0,
            negate_b: flag(5)? < 0,
            transpose_a: transposable && ta.map_or(Ok(0), flag)? != 0,
            transpose_b: transposable && flag(tb)? != 0,
        })))
    }
}
