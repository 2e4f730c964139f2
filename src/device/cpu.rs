use std::sync::Arc;

use bytemuck::Pod;
use rayon::prelude::*;

use super::{amx, simd};
use crate::error::{Error, Result};
use crate::tensor::{Buffer, DType, Pool};

/// The host's cores: a thread pool and a pool of reusable memory.
#[derive(Clone, Debug)]
pub struct CpuDevice {
    threads: Arc<rayon::ThreadPool>,
    memory: Arc<Pool>,
    precision: Precision,
}

/// The most worker threads that a device starts: more than any machine is faster with.
pub const MOST_THREADS: usize = 1024;

/// What matrix products on the CPU compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Operands rounded to bf16, sums in f32, as CUDA devices have it.
    Bf16,
}

impl Precision {
    /// The one that this machine's CPU is fastest in.
    pub fn fastest() -> Self {
        match amx::available() || simd::multiplies_bf16_faster() {
            true => Self::Bf16,
            false => Self::F32,
        }
    }

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// The type of the operands.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }
}

impl CpuDevice {
    /// A pool of `threads` threads, at most [`MOST_THREADS`]; 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self> {
        check_threads(threads)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("resa-{i}"))
            .build()
            .map_err(|e| Error::setting("--threads", e.to_string()))?;
        Ok(Self {
            threads: Arc::new(pool),
            memory: Pool::new(),
            precision: Precision::default(),
        })
    }

    pub(super) fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    pub(super) fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    pub(super) fn buffer<T: Pod>(&self, len: usize) -> Buffer<T> {
        self.memory.take(len)
    }

    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.threads.install(work)
    }

    pub(super) fn release_memory(&self) {
        self.memory.clear();
    }
}

/// An error where that many threads are more than a device starts.
pub(crate) fn check_threads(threads: usize) -> Result<()> {
    if threads <= MOST_THREADS {
        return Ok(());
    }
    let what = format!("expected at most {MOST_THREADS}, found {threads}");
    Err(Error::setting("--threads", what))
}

/// Applies `f` to pairs of elements, in parallel over chunks of fixed size.
pub(super) fn for_each_chunk(a: &mut [f32], b: &[f32], f: impl Fn(&mut f32, f32) + Sync) {
    const CHUNK: usize = 1 << 14;
    a.par_chunks_mut(CHUNK)
        .zip(b.par_chunks(CHUNK))
        .for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, &b)| f(a, b)));
}
