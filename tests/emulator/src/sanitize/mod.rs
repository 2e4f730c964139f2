//! Findings: what a kernel did wrong, and where.

pub mod global;
pub mod shared;

use std::fmt;

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An access outside every live allocation, or outside the block's shared or local memory.
    OutOfBounds,
    /// An access to memory that was freed.
    UseAfterFree,
    Misaligned,
    /// A read of bytes nothing wrote.
    Uninitialized,
    /// Two warps touched a shared byte without a barrier between them, one of them writing.
    SharedRace,
    /// Two blocks touched a global byte in one launch, one of them writing without an atomic.
    GlobalRace,
    /// A barrier not all threads reach, or reached by threads that diverged.
    Barrier,
    /// Shared memory touched while an asynchronous copy into it is in flight.
    AsyncCopy,
    /// Shared memory of a block that has exited, or may have, used by another of its cluster.
    ClusterExit,
    /// A warp-level instruction whose member mask names lanes that do not take part.
    WarpSync,
    /// A device assertion failed.
    Assert,
    /// A trap, or an address or call the machine cannot make sense of.
    IllegalInstruction,
    /// The launch did not end within the step limit.
    Timeout,
}

impl Kind {
    /// Code the driver API reports, as for the same fault on a GPU.
    pub fn cuda_error(self) -> i32 {
        match self {
            Kind::OutOfBounds | Kind::UseAfterFree => 700,
            Kind::Misaligned => 716,
            Kind::Assert => 710,
            Kind::IllegalInstruction => 715,
            Kind::Timeout => 702,
            _ => 719,
        }
    }

    /// Short name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::OutOfBounds => "out-of-bounds access",
            Kind::UseAfterFree => "use after free",
            Kind::Misaligned => "misaligned access",
            Kind::Uninitialized => "uninitialized read",
            Kind::SharedRace => "shared-memory race",
            Kind::GlobalRace => "global-memory race",
            Kind::Barrier => "barrier error",
            Kind::AsyncCopy => "asynchronous copy not waited for",
            Kind::ClusterExit => "shared memory of an exited block",
            Kind::WarpSync => "warp synchronisation error",
            Kind::Assert => "assertion failed",
            Kind::IllegalInstruction => "illegal instruction",
            Kind::Timeout => "launch timed out",
        }
    }
}

/// A fault of one instruction, before its place is known.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: Kind,
    pub message: String,
    /// Lane at fault; the first active one if None.
    pub lane: Option<u32>,
}

impl Fault {
    pub fn new(kind: Kind, lane: impl Into<Option<u32>>, message: impl Into<String>) -> Box<Self> {
        Box::new(Self {
            kind,
            message: message.into(),
            lane: lane.into(),
        })
    }
}

/// Result of machine operations; a fault ends the launch.
pub type Checked<T> = Result<T, Box<Fault>>;

/// A fault with its place.
#[derive(Clone, Debug)]
pub struct Finding {
    pub kind: Kind,
    pub message: String,
    pub kernel: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// 1-based line of the PTX text, and that line.
    pub ptx_line: u32,
    pub ptx_text: String,
    /// `file:line` when the module was compiled with `-lineinfo`.
    pub source: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "{}: {}\n  in kernel {}",
            self.kind.name(),
            self.message,
            self.kernel
        )?;
        write!(f, ", block ({bx}, {by}, {bz}), thread ({tx}, {ty}, {tz})")?;
        write!(
            f,
            "\n  at PTX line {}: {}",
            self.ptx_line,
            self.ptx_text.trim()
        )?;
        match &self.source {
            Some(source) => write!(f, "\n  source {source}"),
            None => Ok(()),
        }
    }
}
