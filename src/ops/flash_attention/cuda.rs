//! The launches of `kernels/flash_attention_forward.cu`, of its variant for Hopper and of
//! `flash_attention_backward.cu`.

use std::f32::consts::LOG2_E;

use super::{FlashAttention, Saved};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Rows that a block owns.
const ROWS: usize = 128;
/// Rows that a backward pass meets at a time.
const STREAM: usize = 32;
/// Bytes for document starts of a block's rows, and a number for each warp.
const STARTS: usize = (ROWS + 8) * size_of::<u32>();

const fn forward(function: &'static str) -> Kernel {
    Kernel {
        stem: "flash_attention_forward",
        function,
    }
}

const fn backward(function: &'static str) -> Kernel {
    Kernel {
        stem: "flash_attention_backward",
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
    backward_q: Kernel,
    backward_kv: Kernel,
    backward_threads: u32,
}

const SMALL_HEAD: Kernels = Kernels {
    head_dim: 64,
    forward: forward("flash_attention_forward_bf16_d64"),
    forward_threads: 128,
    keys: 64,
    backward_q: backward("flash_attention_backward_q_bf16_d64"),
    backward_kv: backward("flash_attention_backward_kv_bf16_d64"),
    backward_threads: 128,
};
const LARGE_HEAD: Kernels = Kernels {
    head_dim: 128,
    forward: forward("flash_attention_forward_bf16_d128"),
    forward_threads: 128,
    keys: 32,
    backward_q: backward("flash_attention_backward_q_bf16_d128"),
    backward_kv: backward("flash_attention_backward_kv_bf16_d128"),
    backward_threads: 256,
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

    /// Two tiles that stay and two pairs of tiles that come and go; a number for each row that
    /// stays and document starts, which is more than three numbers for each row of these pairs.
    fn backward_shared(&self) -> usize {
        let statistics = ROWS * DType::F32.size() + STARTS;
        (2 * ROWS + 4 * STREAM) * self.row() + statistics
    }
}

impl FlashAttention {
    fn kernels(&self) -> Result<&'static Kernels> {
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
        let small = self.head_dim <= SMALL_HEAD.head_dim;
        Ok(if small { &SMALL_HEAD } else { &LARGE_HEAD })
    }

    /// One block for each tile of rows of `heads` heads.
    fn grid(&self, heads: usize, threads: u32, shared: usize) -> Grid {
        let tiles = self.seq_len.div_ceil(ROWS);
        Grid::of_blocks(tiles * heads * self.batch, threads, shared)
    }

    /// The last arguments of every kernel, document starts first.
    fn shape_args(&self, starts: Option<&Tensor>) -> Result<[Arg; 6]> {
        Ok([
            starts.map_or(Ok(Arg::Pointer(0)), Tensor::arg)?,
            Arg::size(Self::NAME, self.seq_len)?,
            Arg::size(Self::NAME, self.heads)?,
            Arg::size(Self::NAME, self.kv_heads)?,
            Arg::size(Self::NAME, self.head_dim)?,
            Arg::F32(LOG2_E / (self.head_dim as f32).sqrt()),
        ])
    }

    fn resident_starts(&self, cuda: &CudaDevice) -> Result<Option<Tensor>> {
        let starts = self.doc_starts.as_ref();
        starts.map(|s| cuda.resident(s, DType::U32)).transpose()
    }

    /// A map of the rows of `heads` heads, a matrix for each sequence.
    fn map(&self, cuda: &CudaDevice, tensor: &Tensor, heads: usize) -> Result<Arg> {
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
        let kernels = self.kernels()?;
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
        let grid = self.grid(self.heads, threads, shared);
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

    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        saved: &Saved,
        grad: &Tensor,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let kernels = self.kernels()?;
        let Saved {
            q,
            k,
            v,
            o,
            log_sum,
        } = saved;
        let grad = cuda.resident(grad, DType::Bf16)?;
        let starts = self.resident_starts(cuda)?;
        let shape = self.shape_args(starts.as_ref())?;
        let (threads, shared) = (kernels.backward_threads, kernels.backward_shared());
        let dq = cuda.alloc(DType::Bf16, q.len())?;
        let delta = cuda.alloc(DType::F32, log_sum.len())?;
        let mut args = vec![Arg::from(&dq), Arg::from(&delta)];
        for tensor in [&grad, q, k, v, o, log_sum] {
            args.push(tensor.arg()?);
        }
        args.extend(shape);
        let grid = self.grid(self.heads, threads, shared);
        // SAFETY: dq, grad, q and o are [T, heads * D], k and v [T, kv_heads * D], bf16; delta is
        // as long as log_sum, one f32 for each row and head, which forward wrote; starts is null
        // or [T] u32. Shared memory holds the kernel's tiles and statistics.
        unsafe { cuda.launch(kernels.backward_q, grid, &args) }?;
        let dq = Tensor::from_cuda(dq, q.shape())?;
        let mut result = vec![needed[0].then_some(dq), None, None];
        if needed[1] || needed[2] {
            let (dk, dv) = (
                cuda.alloc(DType::Bf16, k.len())?,
                cuda.alloc(DType::Bf16, v.len())?,
            );
            let mut args = vec![Arg::from(&dk), Arg::from(&dv)];
            for tensor in [&grad, q, k, v, log_sum] {
                args.push(tensor.arg()?);
            }
            args.push(Arg::from(&delta));
            args.extend(shape);
            let grid = self.grid(self.kv_heads, threads, shared);
            // SAFETY: as above; dk and dv are as long as k and v; delta was written by the
            // launch before.
            unsafe { cuda.launch(kernels.backward_kv, grid, &args) }?;
            let (dk, dv) = (
                Tensor::from_cuda(dk, k.shape())?,
                Tensor::from_cuda(dv, v.shape())?,
            );
            result[1] = needed[1].then_some(dk);
            result[2] = needed[2].then_some(dv);
        }
        Ok(result)
    }
}
