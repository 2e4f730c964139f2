//! Where tensors live and operators run. A device is passed explicitly; there are no globals.

pub(crate) mod amx;
mod cpu;
pub(crate) mod cuda;
pub(crate) mod simd;

pub(crate) use cpu::check_threads;
pub use cpu::{CpuDevice, MOST_THREADS, Precision};
pub use cuda::CudaDevice;

use bytemuck::Pod;

use crate::error::{Error, Result};
use crate::tensor::{Buffer, DType, Tensor};

/// A place that operators run on.
#[derive(Clone, Debug)]
pub enum Device {
    /// The host's cores.
    Cpu(CpuDevice),
    /// An NVIDIA GPU.
    Cuda(CudaDevice),
}

impl Device {
    /// The CPU with `threads` worker threads; 0 means one for each core.
    pub fn cpu(threads: usize) -> Result<Self> {
        Ok(Self::Cpu(CpuDevice::new(threads)?))
    }

    /// GPU number `ordinal`, with `threads` worker threads on the host; 0 means one for each core.
    pub fn cuda(ordinal: usize, threads: usize) -> Result<Self> {
        Ok(Self::Cuda(CudaDevice::new(ordinal, threads)?))
    }

    /// The same device with another precision of matrix products; a GPU's is always bf16.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        match self {
            Self::Cpu(cpu) => Self::Cpu(cpu.with_precision(precision)),
            Self::Cuda(cuda) => Self::Cuda(cuda),
        }
    }

    /// The precision of matrix products.
    pub fn precision(&self) -> Precision {
        match self {
            Self::Cpu(cpu) => cpu.precision(),
            Self::Cuda(_) => Precision::Bf16,
        }
    }

    /// `cpu` or `cuda`, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }

    /// Number of host threads that share work.
    pub fn threads(&self) -> usize {
        self.host().threads()
    }

    /// A buffer of `len` values in host memory with unspecified contents: f32, or others of at
    /// most their size.
    pub fn buffer<T: Pod>(&self, len: usize) -> Buffer<T> {
        self.host().buffer(len)
    }

    /// An f32 buffer of `len` zeros in host memory.
    pub fn zeroed(&self, len: usize) -> Buffer {
        let mut buffer = self.buffer(len);
        buffer.fill(0.0);
        buffer
    }

    /// Runs `work` on the host's threads: everything that computes is called inside this.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.host().run(work)
    }

    /// A trained value, its gradient or an optimizer's state, in f32 where the device works on
    /// it: itself where it is there already.
    ///
    /// # Errors
    /// A tensor of integers, out of memory.
    pub fn resident(&self, tensor: &Tensor) -> Result<Tensor> {
        match self {
            Self::Cpu(_) => tensor.to_f32(),
            Self::Cuda(cuda) => cuda.resident(tensor, DType::F32),
        }
    }

    /// The host's cores alone.
    pub fn to_host(&self) -> Self {
        Self::Cpu(self.host().clone())
    }

    /// Gives memory that is kept for reuse back to the system, for instance between two stages.
    pub fn release_memory(&self) {
        self.host().release_memory();
        if let Self::Cuda(cuda) = self {
            cuda.release_memory();
        }
    }

    fn host(&self) -> &CpuDevice {
        match self {
            Self::Cpu(cpu) => cpu,
            Self::Cuda(cuda) => cuda.host(),
        }
    }

    /// `sum += term`, element by element, both of one length and f32 on the CPU. On a GPU the sum
    /// is f32 where `sum` is f32 in the GPU's memory, as parameters' gradients are, else bf16.
    /// The tape adds up gradients that reach a value by several paths with it.
    pub fn add_assign(&self, sum: &mut Tensor, term: &Tensor) -> Result<()> {
        if sum.len() != term.len() {
            return Err(Error::operand(
                "add",
                format!("{} values", sum.len()),
                format!("{}", term.len()),
            ));
        }
        match self {
            Self::Cpu(_) => cpu::for_each_chunk(sum.f32s_mut()?, term.f32s()?, |s, t| *s += t),
            Self::Cuda(cuda) if cuda.holds(sum) && sum.dtype() == DType::F32 => {
                cuda.add_f32(sum, term)?;
            }
            Self::Cuda(cuda) => *sum = cuda.add(sum, term)?,
        }
        Ok(())
    }
}
