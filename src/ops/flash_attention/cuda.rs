//! What the launches of `kernels/flash_attention_*.cu` share, and those of the forward pass.

use std::f32::consts::LOG2_E;

use super::{FlashAttention, Saved};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Rows that a block owns.
pub(super) const ROWS: usize = 128;
/// Bytes for document starts of a block's rows, and a number for each warp.
const STARTS: usize = (ROWS + 8) * size_of::<u32>();

const fn forward(function: &'static str) -> Kernel {
    Kernel {
        stem: "flash_attention_forward",
        function,
    }
}

/// The forward pass on compute capability 9.0, for heads of exactly this size
/// (`kernels/flash_attention_forward_sm90a.cu`).
struct Hopper {
    head_dim: usize,
    function: &'static str,
    /// Pairs of tiles of keys and values in shared memory.
    stages: usize,
}

const HOPPER: [Hopper; 2] = [
    Hopper {
        head_dim: 64,
        function: "flash_attention_forward_wgmma_bf16_d64",
        stages: 4,
    },
    Hopper {
        head_dim: 128,
        function: "flash_attention_forward_wgmma_bf16_d128",
        stages: 2,
    },
];

impl Hopper {
    const THREADS: u32 = 384;
    /// Document starts, and a number for each warp.
    const STARTS: usize = (ROWS + 16) * size_of::<u32>();

    fn kernel(&self) -> Kernel {
        Kernel {
            stem: "flash_attention_forward_sm90a",
            function: self.function,
        }
    }

    /// Queries, the tiles of keys and values, document starts, a barrier for the queries and two
    /// for each stage.
    fn shared(&self) -> usize {
        let tile = ROWS * self.head_dim * DType::Bf16.size();
        (1 + 2 * self.stages) * tile + Self::STARTS + 8 * (1 + 2 * self.stages)
    }
}

/// The kernels of one head size; smaller heads are filled up with zeros.
struct Kernels {
    head_dim: usize,
    forward: Kernel,
    forward_threads: u32,
    /// Keys of a step of forward.
    keys: usize,
}

const SMALL_HEAD: Kernels = Kernels {
    head_dim: 64,
    forward: forward("flash_attention_forward_bf16_d64"),
    forward_threads: 128,
    keys: 64,
};
const LARGE_HEAD: Kernels = Kernels {
    head_dim: 128,
    forward: forward("flash_attention_forward_bf16_d128"),
    forward_threads: 128,
    keys: 32,
};

impl Kernels {
    /// Bytes of a row of a tile.
    fn row(&self) -> usize {
        self.head_dim * DType::Bf16.size()
    }

    /// Queries and two pairs of tiles of keys and values; document starts.
    fn forward_shared(&self) -> usize {
        (ROWS + 4 * self.keys) * self.row() + STARTS
    }
}

impl FlashAttention {
    /// Whether heads are those of the small kernels; an error where no kernel takes them.
    pub(super) fn is_small(&self) -> Result<bool> {
        if self.head_dim > LARGE_HEAD.head_dim || !self.head_dim.is_multiple_of(WIDE) {
            return Err(Error::operand(
                Self::NAME,
                format!(
                    "a head size in multiples of {WIDE} up to {} on CUDA",
                    LARGE_HEAD.head_dim
                ),
                format!("{}", self.head_dim),
            ));
        }
        Ok(self.head_dim <= SMALL_HEAD.head_dim)
    }

    /// One block for each tile of rows of `heads` heads.
    pub(super) fn blocks(&self, heads: usize) -> usize {
        self.seq_len.div_ceil(ROWS) * heads * self.batch
    }

    /// Scores times this are in base 2.
    pub(super) fn scale(&self) -> f32 {
        LOG2_E / (self.head_dim as f32).sqrt()
    }

    /// The last arguments of the forward kernels, document starts first.
    fn shape_args(&self, starts: Option<&Tensor>) -> Result<[Arg; 6]> {
        Ok([
            starts.map_or(Ok(Arg::Pointer(0)), Tensor::arg)?,
            Arg::size(Self::NAME, self.seq_len)?,
            Arg::size(Self::NAME, self.heads)?,
            Arg::size(Self::NAME, self.kv_heads)?,
            Arg::size(Self::NAME, self.head_dim)?,
            Arg::F32(self.scale()),
        ])
    }

    pub(super) fn resident_starts(&self, cuda: &CudaDevice) -> Result<Option<Tensor>> {
        let starts = self.doc_starts.as_ref();
        starts.map(|s| cuda.resident(s, DType::U32)).transpose()
    }

    /// A map of the rows of `heads` heads, a matrix for each sequence.
    pub(super) fn map(&self, cuda: &CudaDevice, tensor: &Tensor, heads: usize) -> Result<Arg> {
        let address = tensor.cuda().map_or(0, CudaBuffer::address);
        let row = heads * self.head_dim;
        cuda.block_map(address, &[self.batch, self.seq_len, row], row)
    }

    /// The caller has checked shapes and document starts.
    pub(super) fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Vec<Tensor>, Saved)> {
        let small = self.is_small()?;
        let kernels = if small { &SMALL_HEAD } else { &LARGE_HEAD };
        let [q, k, v] = [q, k, v].map(|t| cuda.resident(t, DType::Bf16));
        let (q, k, v) = (q?, k?, v?);
        let starts = self.resident_starts(cuda)?;
        let o = cuda.alloc(DType::Bf16, q.len())?;
        let log_sum = cuda.alloc(DType::F32, self.batch * self.heads * self.seq_len)?;
        let hopper = HOPPER.iter().find(|h| h.head_dim == self.head_dim);
        let hopper = hopper.filter(|_| cuda.capability() == (9, 0) && o.len() > 0);
        let operands = [(&q, self.heads), (&k, self.kv_heads), (&v, self.kv_heads)];
        let operands = operands.map(|(tensor, heads)| match hopper {
            Some(_) => self.map(cuda, tensor, heads),
            None => tensor.arg(),
        });
        let mut args = vec![Arg::from(&o), Arg::from(&log_sum)];
        args.extend(operands.into_iter().collect::<Result<Vec<Arg>>>()?);
        args.extend(self.shape_args(starts.as_ref())?);
        let (kernel, threads, shared) = match hopper {
            Some(hopper) => (hopper.kernel(), Hopper::THREADS, hopper.shared()),
            None => (
                kernels.forward,
                kernels.forward_threads,
                kernels.forward_shared(),
            ),
        };
        let grid = Grid::of_blocks(self.blocks(self.heads), threads, shared);
        // SAFETY: q and o are [T, heads * D], k and v [T, kv_heads * D], bf16; log_sum has one
        // f32 for each row and head; starts is null or [T] u32, none after its row. Shared memory
        // holds the kernel's tiles. The kernels of `hopper` take maps of q, k and v.
        unsafe { cuda.launch(kernel, grid, &args) }?;
        let o = Tensor::from_cuda(o, q.shape())?;
        let log_sum = Tensor::from_cuda(log_sum, [self.batch * self.heads, self.seq_len])?;
        let saved = Saved {
            q,
            k,
            v,
            o: o.clone(),
            log_sum,
        };
        Ok((vec![o], saved))
    }
}
