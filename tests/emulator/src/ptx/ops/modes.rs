//! What the modifiers of opcodes mean: types, operators, rounding, scopes.

/// Integer operand types of arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntType {
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntOp {
    Add,
    Sub,
    MulLo,
    MulHi,
    MadLo,
    MadHi,
    Mul24Lo,
    Mad24Lo,
    Sad,
    Div,
    Rem,
    Abs,
    Neg,
    Min,
    Max,
    And,
    Or,
    Xor,
    Not,
    Cnot,
    Shl,
    Shr,
    Bfe,
    Bfi,
    /// Three-input logic; the table is the fourth source.
    Lop3(u8),
    Prmt(PrmtMode),
    /// Funnel shift: left or right, clamping or wrapping the distance.
    Shf {
        left: bool,
        clamp: bool,
    },
    Brev,
    Bmsk,
    AddSat,
    SubSat,
    /// Add, setting or reading the carry flag: (reads, writes).
    AddCarry(bool, bool),
    SubCarry(bool, bool),
    MadCarry {
        high: bool,
        reads: bool,
        writes: bool,
    },
    Szext,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrmtMode {
    Index,
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

/// Counting ops, whose result is 32 bits whatever the source's width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountOp {
    Popc,
    Clz,
    Bfind { shift_amount: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    F16,
    Bf16,
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatOp {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Min,
    Max,
    Abs,
    Neg,
    Rcp,
    Sqrt,
    Rsqrt,
    Ex2,
    Lg2,
    Sin,
    Cos,
    Tanh,
    Copysign,
    TestFinite,
    TestInfinite,
    TestNan,
    TestNormal,
    TestSubnormal,
    TestNumber,
}

/// IEEE rounding directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Rounding {
    #[default]
    Nearest,
    Zero,
    Down,
    Up,
    /// Nearest, ties away from zero (`.rna`, tf32 only).
    NearestAway,
}

/// Modifiers of float arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FloatMods {
    pub rounding: Rounding,
    /// Flush subnormal inputs and results to zero.
    pub ftz: bool,
    /// Clamp to [0, 1], NaN to 0.
    pub sat: bool,
    /// Clamp negative results and NaN sign handling of `.relu`.
    pub relu: bool,
    /// `min`/`max` return NaN if an input is NaN.
    pub nan: bool,
    /// `min`/`max` `.xorsign.abs`.
    pub xorsign_abs: bool,
}

impl FloatMods {
    /// No modifier changes the plain IEEE result.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// Comparison operators; the unordered ones are true on NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoolOp {
    And,
    Or,
    Xor,
}

/// Element type of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompareType {
    Int(IntType),
    Float(FloatType),
    /// Both halves of a packed pair.
    Packed(FloatType),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    Inc,
    Dec,
    And,
    Or,
    Xor,
    Exch,
    Cas,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Registers read at run time because their value is not fixed for a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Clock,
    Clock64,
    GlobalTimer,
}

/// Registers constant over a warp's life, filled in when the warp starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FixedSpecial {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NumWarps,
    SmId,
    NumSms,
    GridId,
    LanemaskEq,
    LanemaskLt,
    LanemaskLe,
    LanemaskGt,
    LanemaskGe,
    DynamicShared,
    TotalShared,
    /// The driver's registers: 1 and 2 hold the address of a cooperative grid's workspace.
    Env(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    ClusterId(u8),
    NumClusters(u8),
}

/// Classes the counters tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    Integer,
    Float,
    Half,
    Convert,
    Predicate,
    Move,
    LoadGlobal,
    StoreGlobal,
    LoadShared,
    StoreShared,
    LoadLocal,
    StoreLocal,
    Constant,
    Atomic,
    Warp,
    Tensor,
    Matrix,
    Async,
    Barrier,
    Control,
    Other,
}

impl Class {
    /// Number of classes.
    pub const COUNT: usize = Class::Other as usize + 1;
}
