//! Where tensors live and operators run. A device is passed explicitly; there are no globals.

mod cpu;
pub(crate) mod simd;

pub use cpu::CpuDevice;

use crate::error::Result;
use crate::tensor::{Buffer, Tensor};

/// A place that operators run on.
#[derive(Clone, Debug)]
pub enum Device {
    /// The host's cores.
    Cpu(CpuDevice),
}

impl Device {
    /// The CPU with `threads` worker threads; 0 means one for each core.
    pub fn cpu(threads: usize) -> Result<Self> {
        Ok(Self::Cpu(CpuDevice::new(threads)?))
    }

    /// `cpu`, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
        }
    }

    /// Number of threads that share the work of an operator.
    pub fn threads(&self) -> usize {
        match self {
            Self::Cpu(cpu) => cpu.threads(),
        }
    }

    /// An f32 buffer of `len` values with unspecified contents.
    pub fn buffer(&self, len: usize) -> Buffer {
        match self {
            Self::Cpu(cpu) => cpu.buffer(len),
        }
    }

    /// An f32 buffer of `len` zeros.
    pub fn zeroed(&self, len: usize) -> Buffer {
        let mut buffer = self.buffer(len);
        buffer.fill(0.0);
        buffer
    }

    /// Runs `work` on the device's threads: everything that computes is called inside this.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Cpu(cpu) => cpu.run(work),
        }
    }

    /// Gives memory that is kept for reuse back to the system, for instance between two stages.
    pub fn release_memory(&self) {
        match self {
            Self::Cpu(cpu) => cpu.release_memory(),
        }
    }

    /// `sum += term`, element by element; both f32 and of one length. The tape adds up
    /// gradients that reach a value by several paths with it.
    pub fn add_assign(&self, sum: &mut Tensor, term: &Tensor) -> Result<()> {
        let term = term.f32s()?;
        let sum = sum.f32s_mut()?;
        if sum.len() != term.len() {
            return Err(crate::error::Error::operand(
                "add",
                format!("{} values", sum.len()),
                format!("{}", term.len()),
            ));
        }
        match self {
            Self::Cpu(_) => cpu::for_each_chunk(sum, term, |s, t| *s += t),
        }
        Ok(())
    }
}
