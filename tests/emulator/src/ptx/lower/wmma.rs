//! `wmma.load`, `wmma.store` and `wmma.mma`.

use super::super::ast::{Instruction, Space, Type};
use super::super::ops::{ByteType, Class, MmaType, Op, Reg, WmmaAccess, WmmaProduct, WmmaType};
use super::{FunctionLowering, Result, last_type, operand};
use crate::wmma::known_space;

/// Rows, columns and depth.
fn shape(i: &Instruction) -> Result<[u8; 3]> {
    let shapes = [
        ("m16n16k16", [16, 16, 16]),
        ("m32n8k16", [32, 8, 16]),
        ("m8n32k16", [8, 32, 16]),
        ("m16n16k8", [16, 16, 8]),
    ];
    let found = shapes.iter().find(|(name, _)| i.has(name));
    found
        .map(|(_, shape)| *shape)
        .ok_or_else(|| "unknown opcode: matrix shape".to_string())
}

fn operand_type(ty: Type) -> Result<WmmaType> {
    Ok(match ty {
        Type::F16 => WmmaType::Float(MmaType::F16),
        Type::Bf16 => WmmaType::Float(MmaType::Bf16),
        Type::Tf32 => WmmaType::Float(MmaType::Tf32),
        Type::S8 => WmmaType::Byte(ByteType::Signed),
        Type::U8 => WmmaType::Byte(ByteType::Unsigned),
        _ => return Err("unknown opcode: matrix type".into()),
    })
}

/// Registers of a fragment of this many elements; f16 operands have eight whatever the shape.
fn registers(elements: usize, bytes: u8, f16_operand: bool) -> usize {
    match f16_operand {
        true => 8,
        false => elements * usize::from(bytes) / 128,
    }
}

impl FunctionLowering<'_> {
    pub(super) fn wmma(&mut self, i: &Instruction) -> Result<Option<(Op, Class)>> {
        if i.parts[0] != "wmma" {
            return Ok(None);
        }
        Ok(Some(match i.parts.get(1).map(String::as_str) {
            Some("load") => (self.wmma_access(i, true)?, Class::Matrix),
            Some("store") => (self.wmma_access(i, false)?, Class::Matrix),
            Some("mma") => (self.wmma_product(i)?, Class::Tensor),
            _ => return Err("unknown opcode".into()),
        }))
    }

    fn wmma_registers(
        &mut self,
        i: &Instruction,
        n: usize,
        count: usize,
        write: bool,
    ) -> Result<Vec<Reg>> {
        let elements = Self::elements(operand(i, n)?);
        if elements.len() != count {
            return Err(format!(
                "a fragment of {} registers where {count} were expected",
                elements.len()
            ));
        }
        let mut out = Vec::with_capacity(count);
        for element in elements {
            out.push(match write {
                true => self.dst(element, false)?,
                false => self.src32(element)?,
            });
        }
        Ok(out)
    }

    fn wmma_access(&mut self, i: &Instruction, load: bool) -> Result<Op> {
        let [m, n, k] = shape(i)?;
        let ty = last_type(i)?;
        let (rows, columns, operand_of) = match i.parts.get(2).map(String::as_str) {
            Some("a") => (m, k, true),
            Some("b") => (k, n, true),
            Some("c" | "d") => (m, n, false),
            _ => return Err("unknown opcode: matrix".into()),
        };
        let bytes = match (operand_of, ty) {
            (true, ty) => operand_type(ty)?.bytes(),
            (false, Type::F16) => 2,
            (false, Type::F32 | Type::S32) => 4,
            _ => return Err("unknown opcode: matrix type".into()),
        };
        let space = i.parts[1..].iter().find_map(|p| Space::parse(p));
        let space = space.unwrap_or(Space::Generic);
        if !known_space(space) || i.has("row") == i.has("col") {
            return Err("unknown opcode: layout or state space".into());
        }
        let elements = usize::from(rows) * usize::from(columns);
        let count = registers(elements, bytes, operand_of && ty == Type::F16);
        let (data, address) = if load { (0, 1) } else { (1, 0) };
        let stride = i.operands.get(2).map(|o| self.src32(o)).transpose()?;
        Ok(Op::WmmaAccess(Box::new(WmmaAccess {
            load,
            space,
            bytes,
            rows,
            columns,
            row_major: i.has("row"),
            regs: self.wmma_registers(i, data, count, load)?,
            address: self.address(operand(i, address)?)?,
            stride,
        })))
    }

    fn wmma_product(&mut self, i: &Instruction) -> Result<Op> {
        let shape = shape(i)?;
        let types: Vec<Type> = i.parts[1..].iter().filter_map(|p| Type::parse(p)).collect();
        let (d, a, b, c) = match types[..] {
            [d, c] => (d, Type::F16, Type::F16, c),
            [d, a, b, c] => (d, a, b, c),
            _ => return Err("unknown opcode: matrix types".into()),
        };
        let (a_type, b_type) = (operand_type(a)?, operand_type(b)?);
        let half = |ty: Type, other: Type| match (ty, a_type) {
            (Type::F16, WmmaType::Float(MmaType::F16)) => Ok(true),
            (Type::F32, WmmaType::Float(_)) => Ok(false),
            (Type::S32, WmmaType::Byte(_)) if other == Type::S32 => Ok(false),
            _ => Err("unknown opcode: accumulator type".to_string()),
        };
        let (half_d, half_c) = (half(d, c)?, half(c, d)?);
        let saturate = i.has("satfinite");
        let float = matches!(a_type, WmmaType::Float(_));
        if float && (a != b || saturate) || (a == Type::Tf32) != (shape[2] == 8) {
            return Err("unknown opcode: matrix types".into());
        }
        let [m, n, k] = shape.map(usize::from);
        let f16 = a == Type::F16;
        let accumulators = |half: bool| registers(m * n, if half { 2 } else { 4 }, false);
        Ok(Op::WmmaProduct(Box::new(WmmaProduct {
            shape,
            a_type,
            b_type,
            half_c,
            half_d,
            saturate,
            d: self.wmma_registers(i, 0, accumulators(half_d), true)?,
            a: self.wmma_registers(i, 1, registers(m * k, a_type.bytes(), f16), false)?,
            b: self.wmma_registers(i, 2, registers(k * n, b_type.bytes(), f16), false)?,
            c: self.wmma_registers(i, 3, accumulators(half_c), false)?,
        })))
    }
}
