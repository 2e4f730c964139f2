//! Syntax tree of a PTX module: what the text says, before opcodes are understood.

use std::collections::HashMap;

/// Fundamental types of PTX registers, variables and instruction operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    E4m3x2,
    E5m2x2,
    U16x2,
    S16x2,
}

impl Type {
    /// The type a modifier such as `u32` names.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "pred" => Type::Pred,
            "b8" => Type::B8,
            "b16" => Type::B16,
            "b32" => Type::B32,
            "b64" => Type::B64,
            "b128" => Type::B128,
            "u8" => Type::U8,
            "u16" => Type::U16,
            "u32" => Type::U32,
            "u64" => Type::U64,
            "s8" => Type::S8,
            "s16" => Type::S16,
            "s32" => Type::S32,
            "s64" => Type::S64,
            "f16" => Type::F16,
            "f16x2" => Type::F16x2,
            "bf16" => Type::Bf16,
            "bf16x2" => Type::Bf16x2,
            "tf32" => Type::Tf32,
            "f32" => Type::F32,
            "f64" => Type::F64,
            "e4m3x2" => Type::E4m3x2,
            "e5m2x2" => Type::E5m2x2,
            "u16x2" => Type::U16x2,
            "s16x2" => Type::S16x2,
            _ => return None,
        })
    }

    /// Width in bits; predicates count as one.
    pub fn bits(self) -> u32 {
        match self {
            Type::Pred => 1,
            Type::B8 | Type::U8 | Type::S8 => 8,
            Type::B16
            | Type::U16
            | Type::S16
            | Type::F16
            | Type::Bf16
            | Type::E4m3x2
            | Type::E5m2x2 => 16,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 => 64,
            Type::B128 => 128,
            _ => 32,
        }
    }

    /// Width in bytes, at least one.
    pub fn bytes(self) -> u32 {
        self.bits().div_ceil(8)
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }

    pub fn is_float(self) -> bool {
        matches!(
            self,
            Type::F16 | Type::Bf16 | Type::F32 | Type::F64 | Type::Tf32
        )
    }
}

/// State spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    Generic,
    Global,
    Const,
    Shared,
    /// Shared memory of any block of the cluster.
    Cluster,
    Local,
    Param,
}

impl Space {
    /// The space a modifier such as `shared::cta` names.
    pub fn parse(name: &str) -> Option<Self> {
        if name == "shared::cluster" {
            return Some(Space::Cluster);
        }
        Some(match name.split("::").next().unwrap_or(name) {
            "global" => Space::Global,
            "const" => Space::Const,
            "shared" => Space::Shared,
            "local" => Space::Local,
            "param" => Space::Param,
            _ => return None,
        })
    }
}

/// One value of a variable's initialiser.
#[derive(Clone, Debug, PartialEq)]
pub enum Initial {
    Bits(u64),
    /// Address of a symbol plus an offset; generic unless the variable's own space is meant.
    Symbol(String, i64),
}

/// A declared variable: module scope, function scope, or a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    pub name: String,
    pub space: Space,
    pub ty: Type,
    /// Bytes; 0 for an unsized (`[]`) array.
    pub size: u64,
    pub align: u64,
    pub external: bool,
    pub initial: Vec<Initial>,
    pub line: u32,
}

/// An instruction's operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// Register, label, symbol or special register (`%tid.x`).
    Name(String),
    /// `!%p1`
    Not(String),
    /// `%p1|%p2`
    Pair(Box<Operand>, Box<Operand>),
    Int(u64),
    Float32(u32),
    Float64(u64),
    /// `{a, b}`
    List(Vec<Operand>),
    /// `(a, b)` of a call
    Group(Vec<Operand>),
    /// `[base + offset]`, with the coordinates of a tensor access
    Address {
        base: Box<Operand>,
        offset: i64,
        coordinates: Vec<Operand>,
    },
    /// `symbol + offset`
    Offset(String, i64),
}

/// One instruction as written.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    /// Guard predicate and whether it is negated.
    pub guard: Option<(String, bool)>,
    /// Opcode root, then its modifiers.
    pub parts: Vec<String>,
    pub operands: Vec<Operand>,
    pub line: u32,
}

impl Instruction {
    /// The opcode with its modifiers, as written.
    pub fn opcode(&self) -> String {
        self.parts.join(".")
    }

    pub fn has(&self, modifier: &str) -> bool {
        self.parts[1..].iter().any(|p| p == modifier)
    }
}

/// A source position from a `.loc` directive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLocation {
    pub file: u32,
    pub line: u32,
    /// Where the function was inlined, if it was.
    pub inlined_at: Option<(u32, u32)>,
}

/// One statement of a function body.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    OpenScope,
    CloseScope,
    Label(String),
    /// Type, name, and the count of a `%r<n>` declaration.
    Registers(Type, Vec<(String, Option<u32>)>),
    Variable(Variable),
    Location(SourceLocation),
    BranchTargets(String, Vec<String>),
    Instruction(Instruction),
}

/// A kernel or device function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Function {
    pub name: String,
    pub is_entry: bool,
    pub params: Vec<Variable>,
    pub returns: Vec<Variable>,
    /// `.maxntid`, or `.reqntid` when that is given.
    pub max_threads: Option<[u32; 3]>,
    pub required_threads: bool,
    pub cluster: Option<[u32; 3]>,
    /// None for a declaration.
    pub body: Option<Vec<Statement>>,
    pub line: u32,
}

/// A parsed module.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module {
    /// The `.version` as major * 10 + minor.
    pub version: u32,
    /// Number of the `.target`, 80 for `sm_80`, and whether it has an `a` or `f` suffix.
    pub target: u32,
    pub target_specific: bool,
    pub variables: Vec<Variable>,
    pub functions: Vec<Function>,
    pub files: HashMap<u32, String>,
}
