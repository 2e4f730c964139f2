//! Executable instructions: opcodes understood, operands resolved to register indices.
//!
//! Immediates live in constant registers that a frame is filled with on entry, so every
//! source operand is a register index.

mod matrix;
mod modes;

pub use matrix::*;
pub use modes::*;

use super::ast::{Space, Type};

/// Index of a register within its function's 32-bit, 64-bit or predicate file.
pub type Reg = u32;

/// A general register of either width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnyReg {
    pub index: Reg,
    /// Lives in the 64-bit file.
    pub wide: bool,
}

/// A comparison, shared by `setp` and `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    pub compare: Compare,
    pub ty: CompareType,
    pub ftz: bool,
    /// Combined with a predicate: operator, predicate, negated.
    pub combine: Option<(BoolOp, Reg, bool)>,
    pub a: Reg,
    pub b: Reg,
}

/// A `cvt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convert {
    pub from: Type,
    pub to: Type,
    pub rounding: Rounding,
    /// Round a float to an integral value (`.rni` and its kin).
    pub integral: bool,
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    pub satfinite: bool,
    pub d: AnyReg,
    pub a: AnyReg,
    /// Lower half of a packed result.
    pub b: Option<AnyReg>,
}

/// A memory address: register plus constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub base: AnyReg,
    pub offset: i64,
}

/// A vector load or store of up to four elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub space: Space,
    /// Bytes of an element.
    pub size: u8,
    pub signed: bool,
    /// Ordered with other threads (`.relaxed`, `.acquire`, `.release`, `.volatile`).
    pub strong: bool,
    /// A store that publishes the block's earlier writes to the device.
    pub release: bool,
    pub count: u8,
    pub regs: [AnyReg; 4],
    /// Elements of a load that `_` discards, as bits.
    pub discard: u8,
    pub address: Address,
}

/// An `atom` (with a destination) or `red`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atomic {
    pub space: Space,
    pub op: AtomicOp,
    pub ty: Type,
    /// Publishes the block's earlier writes to the device.
    pub release: bool,
    pub d: Option<AnyReg>,
    pub address: Address,
    pub b: AnyReg,
    pub c: Option<AnyReg>,
}

/// A `cp.async` of 4, 8 or 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyAsync {
    pub destination: Address,
    pub source: Address,
    pub size: u8,
    /// Bytes really read; the rest is zero.
    pub source_size: Option<Reg>,
    /// Predicate that makes the whole copy zeros.
    pub ignore: Option<(Reg, bool)>,
}

/// What a `bar`/`barrier` does besides waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierKind {
    Sync,
    Arrive,
    /// Reduction of a predicate (negated?) into a register or predicate.
    Popc {
        d: Reg,
        p: Reg,
        negated: bool,
    },
    And {
        d: Reg,
        p: Reg,
        negated: bool,
    },
    Or {
        d: Reg,
        p: Reg,
        negated: bool,
    },
}

/// Where a call goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Function(usize),
    Pointer(Reg),
    Printf,
    AssertFail,
}

/// A call; arguments and results are slices of the frame's local memory: (offset, bytes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub target: Target,
    pub args: Vec<(u32, u32)>,
    pub results: Vec<(u32, u32)>,
}

/// Operations of an `mbarrier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MbarrierOp {
    Init {
        count: Reg,
    },
    Invalidate,
    /// Arrive with a count (None = 1), announcing bytes first; the state goes to `d`.
    Arrive {
        d: Option<AnyReg>,
        count: Option<Reg>,
        expect: Option<Reg>,
        drop: bool,
    },
    ExpectTx {
        bytes: Reg,
    },
    CompleteTx {
        bytes: Reg,
    },
    /// Phase test against a parity bit or a state word.
    Test {
        p: Reg,
        parity: Option<Reg>,
        state: Option<Reg>,
    },
    /// Arrival when this thread's cp.async copies have landed.
    CopyArrive {
        no_increment: bool,
    },
}

/// From where to where a bulk copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkKind {
    /// Global memory to a block of the cluster, or to those that a mask names.
    Load { multicast: Option<Reg> },
    /// Own shared memory to global memory.
    Store,
    /// Own shared memory to that of a block of the cluster.
    Share,
}

/// A bulk copy (`cp.async.bulk`), with or without a tensor map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BulkCopy {
    pub kind: BulkKind,
    /// The operand in shared memory; that of a copy within the cluster is its destination.
    pub shared: Address,
    /// Global address, that of the tensor map, or the source of a copy within the cluster.
    pub other: Address,
    /// Bytes of a copy without tensor map.
    pub bytes: Option<Reg>,
    /// Tensor coordinates, innermost first; empty without tensor map.
    pub coordinates: Vec<Reg>,
    pub barrier: Option<Address>,
    /// Reduction into the destination, and its type unless a tensor map says it.
    pub reduce: Option<AtomicOp>,
    pub ty: Option<Type>,
}

/// An executable operation. `d` is the destination; `a`, `b`, `c` are sources.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Int {
        op: IntOp,
        ty: IntType,
        d: Reg,
        s: [Reg; 4],
    },
    /// `mul.wide` / `mad.wide`.
    Wide {
        ty: IntType,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Option<Reg>,
    },
    Count {
        op: CountOp,
        ty: IntType,
        d: Reg,
        a: Reg,
    },
    Dot {
        lanes: u8,
        a_signed: bool,
        b_signed: bool,
        high: bool,
        d: Reg,
        s: [Reg; 3],
    },
    Float {
        op: FloatOp,
        ty: FloatType,
        mods: FloatMods,
        d: Reg,
        s: [Reg; 3],
    },
    /// Both halves of a 32-bit register pair of f16 or bf16.
    Packed {
        op: FloatOp,
        ty: FloatType,
        mods: FloatMods,
        d: Reg,
        s: [Reg; 3],
    },
    Convert(Box<Convert>),
    Setp {
        c: Box<Comparison>,
        p: Option<Reg>,
        q: Option<Reg>,
    },
    Set {
        c: Box<Comparison>,
        d: Reg,
        to: Type,
    },
    Select {
        wide: bool,
        d: Reg,
        a: Reg,
        b: Reg,
        p: Reg,
    },
    /// `slct`: a where c >= 0, else b.
    SelectSign {
        wide: bool,
        float: bool,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    PredLogic {
        op: BoolOp,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    PredNot {
        d: Reg,
        a: Reg,
    },
    PredMove {
        d: Reg,
        a: Reg,
    },
    Move {
        wide: bool,
        d: Reg,
        a: Reg,
    },
    /// `mov` from a vector: parts of `bits` each, lowest first.
    Pack {
        d: AnyReg,
        parts: [AnyReg; 4],
        count: u8,
        bits: u8,
    },
    Unpack {
        parts: [Option<AnyReg>; 4],
        count: u8,
        bits: u8,
        a: AnyReg,
    },
    /// Address of a variable in this frame's local memory.
    LocalAddress {
        d: Reg,
        offset: u32,
    },
    /// Generic address to or from a window: added when converting to generic.
    Convaddr {
        d: AnyReg,
        a: AnyReg,
        space: Space,
        to_generic: bool,
    },
    IsSpace {
        p: Reg,
        a: Reg,
        space: Space,
    },
    Special {
        which: Special,
        d: AnyReg,
    },
    Load(Box<Access>),
    Store(Box<Access>),
    Atomic(Box<Atomic>),
    Shuffle {
        mode: ShuffleMode,
        d: Reg,
        p: Option<Reg>,
        a: Reg,
        b: Reg,
        c: Reg,
        members: Reg,
    },
    Vote {
        mode: VoteMode,
        d: Reg,
        p: Reg,
        negated: bool,
        members: Reg,
    },
    Match {
        all: bool,
        d: Reg,
        p: Option<Reg>,
        a: AnyReg,
        members: Reg,
    },
    Redux {
        op: AtomicOp,
        signed: bool,
        d: Reg,
        a: Reg,
        members: Reg,
    },
    Activemask {
        d: Reg,
    },
    WarpSync {
        members: Reg,
    },
    Elect {
        d: Option<Reg>,
        p: Reg,
        members: Reg,
    },
    Mma(Box<Mma>),
    ByteMma(Box<ByteMma>),
    DoubleMma(Box<DoubleMma>),
    WmmaAccess(Box<WmmaAccess>),
    WmmaProduct(Box<WmmaProduct>),
    LoadMatrix(Box<Matrix>),
    StoreMatrix(Box<Matrix>),
    CopyAsync(Box<CopyAsync>),
    CopyCommit,
    CopyWait {
        pending: u32,
        all: bool,
    },
    Barrier {
        kind: BarrierKind,
        id: Reg,
        threads: Option<Reg>,
        aligned: bool,
    },
    /// Memory fence; device or system scope publishes global writes.
    Fence {
        device: bool,
    },
    /// `fence.proxy.async` for shared memory.
    ProxyFence,
    Mbarrier {
        op: Box<MbarrierOp>,
        address: Address,
    },
    BulkCopy(Box<BulkCopy>),
    /// `st.async`: a store to the cluster's shared memory that reports to an mbarrier.
    StoreAsync {
        access: Box<Access>,
        barrier: Address,
    },
    BulkCommit,
    /// Waits until at most this many groups of bulk stores are under way, or only until those
    /// have read shared memory.
    BulkWait {
        pending: u32,
        read: bool,
    },
    Wgmma(Box<Wgmma>),
    WgmmaCommit,
    /// Waits until at most this many groups are under way.
    WgmmaWait {
        pending: u32,
    },
    /// `mapa`: an address in the shared memory of the block with rank `b`.
    MapCluster {
        d: AnyReg,
        a: AnyReg,
        b: Reg,
        generic: bool,
    },
    /// `getctarank`: the rank of the block whose shared memory an address lies in.
    ClusterRank {
        d: Reg,
        a: AnyReg,
    },
    ClusterArrive {
        relaxed: bool,
    },
    ClusterWait,
    /// Accepted, with no effect on values (prefetches, hints, register counts).
    Nothing,
    Nanosleep,
    Branch {
        to: u32,
    },
    BranchIndex {
        targets: Vec<u32>,
        a: Reg,
    },
    Call(Box<Call>),
    Return,
    Exit,
    Trap,
    Breakpoint,
}

/// One executable instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Inst {
    pub op: Op,
    /// Predicate register and whether it is negated.
    pub guard: Option<(Reg, bool)>,
    pub class: Class,
    /// 1-based PTX line.
    pub line: u32,
    /// Index into the function's source locations; `u32::MAX` for none.
    pub location: u32,
    /// The instruction's 32-bit registers: start and end in [`Function::uses`].
    ///
    /// [`Function::uses`]: super::program::Function::uses
    pub uses: (u32, u32),
}
