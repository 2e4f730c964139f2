//! Operands of the matrix instructions.

use super::{Address, Reg};
use crate::fp8::Format;
use crate::ptx::ast::Space;

/// Number formats of `mma.sync` and `wgmma` operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmaType {
    F16,
    Bf16,
    Tf32,
}

/// An `mma.sync` m16n8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mma {
    pub ty: MmaType,
    pub k: u8,
    /// Accumulators are packed f16 instead of f32.
    pub half_accumulate: bool,
    pub d: [Reg; 4],
    pub a: [Reg; 4],
    pub b: [Reg; 2],
    pub c: [Reg; 4],
}

/// Formats of 8-bit operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteType {
    Signed,
    Unsigned,
    Fp8(Format),
}

/// An `mma.sync` m16n8k16 or m16n8k32 of 8-bit operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteMma {
    pub a_type: ByteType,
    pub b_type: ByteType,
    pub k: u8,
    /// Integer sums clamp instead of wrapping.
    pub saturate: bool,
    /// Accumulators are packed f16 instead of f32.
    pub half_accumulate: bool,
    pub d: [Reg; 4],
    pub a: [Reg; 4],
    pub b: [Reg; 2],
    pub c: [Reg; 4],
}

/// An `mma.sync` m8n8k4 of f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoubleMma {
    pub d: [Reg; 2],
    pub a: Reg,
    pub b: Reg,
    pub c: [Reg; 2],
}

/// Element types of `wmma` operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WmmaType {
    Float(MmaType),
    Byte(ByteType),
}

/// `wmma.load` or `wmma.store` of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WmmaAccess {
    pub load: bool,
    pub space: Space,
    /// Bytes of an element.
    pub bytes: u8,
    pub rows: u8,
    pub columns: u8,
    pub row_major: bool,
    pub regs: Vec<Reg>,
    pub address: Address,
    /// Elements between neighbouring rows (or columns); None if there is nothing between them.
    pub stride: Option<Reg>,
}

/// A `wmma.mma`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WmmaProduct {
    /// Rows, columns and depth.
    pub shape: [u8; 3],
    pub a_type: WmmaType,
    pub b_type: WmmaType,
    /// Accumulators are f16 instead of f32 or s32.
    pub half_c: bool,
    pub half_d: bool,
    pub saturate: bool,
    pub d: Vec<Reg>,
    pub a: Vec<Reg>,
    pub b: Vec<Reg>,
    pub c: Vec<Reg>,
}

/// `ldmatrix` or `stmatrix` of 1, 2 or 4 8x8 matrices of 16-bit elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    pub count: u8,
    pub transpose: bool,
    pub regs: [Reg; 4],
    pub address: Address,
}

/// A `wgmma.mma_async` of m64nNk16 (k8 for tf32).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wgmma {
    pub ty: MmaType,
    pub n: u16,
    pub half_accumulate: bool,
    pub d: Vec<Reg>,
    /// A from registers, or else its descriptor.
    pub a: Vec<Reg>,
    pub a_descriptor: Option<Reg>,
    pub b_descriptor: Reg,
    pub scale_d: ScaleD,
    pub negate_a: bool,
    pub negate_b: bool,
    pub transpose_a: bool,
    pub transpose_b: bool,
}

/// Whether a wgmma adds to its accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleD {
    Constant(bool),
    Predicate(Reg, bool),
}
