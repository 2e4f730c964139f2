//! The launches of `kernels/flash_attention.cu`.

use std::f32::consts::LOG2_E;

use super::{FlashAttention, Saved};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::tensor::{DType, Tensor};

/// Rows that a block owns.
const ROWS: usize = 128;
/// Keys that forward meets at a time.
const KEYS: usize = 64;
/// Rows that a backward pass meets at a time.
const STREAM: usize = 32;
/// The head sizes that there are kernels for; smaller ones are filled up with zeros.
const SMALL: usize = 64;
const LARGE: usize = 128;

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "flash_attention",
        function,
    }
}

/// The kernels of one head size.
struct Kernels {
    head_dim: usize,
    forward: Kernel,
    forward_threads: u32,
    backward_q: Kernel,
    backward_kv: Kernel,
    backward_threads: u32,
}

const SMALL_HEAD: Kernels = Kernels {
    head_dim: SMALL,
    forward: kernel("flash_attention_forward_bf16_d64"),
    forward_threads: 128,
    backward_q: kernel("flash_attention_backward_q_bf16_d64"),
    backward_kv: kernel("flash_attention_backward_kv_bf16_d64"),
    backward_threads: 128,
};
const LARGE_HEAD: Kernels = Kernels {
    head_dim: LARGE,
    forward: kernel("flash_attention_forward_bf16_d128"),
    forward_threads: 128,
    backward_q: kernel("flash_attention_backward_q_bf16_d128"),
    backward_kv: kernel("flash_attention_backward_kv_bf16_d128"),
    backward_threads: 256,
};

impl Kernels {
    /// Bytes of a row of a tile.
    fn row(&self) -> usize {
        self.head_dim * DType::Bf16.size()
    }

    /// Queries, keys and values.
    fn forward_shared(&self) -> usize {
        (ROWS + 2 * KEYS) * self.row()
    }

    /// Two tiles that stay, two pairs of tiles that come and go, three numbers for each row of
    /// these pairs or one for each row that stays.
    fn backward_shared(&self) -> usize {
        let statistics = ROWS.max(2 * 3 * STREAM) * DType::F32.size();
        (2 * ROWS + 4 * STREAM) * self.row() + statistics
    }
}

impl FlashAttention {
    fn kernels(&self) -> Result<&'static Kernels> {
        match self.head_dim {
            ..=SMALL => Ok(&SMALL_HEAD),
            ..=LARGE => Ok(&LARGE_HEAD),
            _ => Err(Error::operand(
                Self::NAME,
                format!("a head size of at most {LARGE} on CUDA"),
                format!("{}", self.head_dim),
            )),
        }
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
        let mut args = vec![
            Arg::from(&o),
            Arg::from(&log_sum),
            q.arg()?,
            k.arg()?,
            v.arg()?,
        ];
        args.extend(self.shape_args(starts.as_ref())?);
        let shared = kernels.forward_shared();
        let grid = self.grid(self.heads, kernels.forward_threads, shared);
        // SAFETY: q and o are [T, heads * D], k and v [T, kv_heads * D], bf16; log_sum has one
        // f32 for each row and head; starts is null or [T] u32, none after its row. Shared memory
        // holds the kernel's tiles.
        unsafe { cuda.launch(kernels.forward, grid, &args) }?;
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
