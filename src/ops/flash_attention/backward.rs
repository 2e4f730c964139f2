//! The launches of `kernels/flash_attention_backward.cu` and of its variant for Hopper.

use bytemuck::{Pod, Zeroable};

use super::cuda::ROWS;
use super::{FlashAttention, Saved};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, extent};
use crate::error::Result;
use crate::ops::Operator;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Rows of the other side that a pass meets at a time.
const STREAM: usize = 32;
/// Queries whose statistics lie together: three words for each.
const SPAN: usize = 64;
/// Blocks of keys among which the longest takes less than its share of the largest device's time
/// (170 multiprocessors; both passes). A constant, so that the order of a sum does not depend on
/// the device.
const BLOCKS: usize = 192;
/// Bytes for the tiles that come and go on Hopper.
const RING: usize = 128 << 10;
/// Values that a thread adds up.
const WIDTH: usize = 4;

/// `BackwardArgs` of kernels/common/attention_backward.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BackwardArgs {
    dq: u64,
    dk: u64,
    dv: u64,
    partial: u64,
    dout: u64,
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    log_sum: u64,
    statistics: u64,
    doc_starts: u64,
    seq_len: u32,
    heads: u32,
    kv_heads: u32,
    d: u32,
    scale: f32,
    parts: u32,
    key_blocks: u32,
    unused: u32,
}

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "flash_attention_backward",
        function,
    }
}

/// What a backward pass writes. Gradients are there where something needs them, those of keys and
/// values both or neither; parts of their sums where several blocks share them.
struct Buffers {
    dq: Option<CudaBuffer>,
    dk: Option<CudaBuffer>,
    dv: Option<CudaBuffer>,
    partial: Option<CudaBuffer>,
    statistics: CudaBuffer,
}

impl FlashAttention {
    /// How many blocks share the query heads of a key/value head: enough for `BLOCKS`, if there
    /// are as many heads.
    fn parts(&self) -> usize {
        let (group, blocks) = (self.group(), self.blocks(self.kv_heads));
        let mut divisors = (1..=group).filter(|parts| group.is_multiple_of(*parts));
        let enough = divisors.find(|parts| parts * blocks >= BLOCKS);
        enough.unwrap_or(group)
    }

    /// Spans of statistics.
    fn spans(&self) -> usize {
        self.batch * self.heads * self.seq_len.div_ceil(SPAN)
    }

    /// The kernel of both passes and its launch over `blocks` blocks.
    fn passes(&self, blocks: usize) -> Result<(Kernel, Grid)> {
        let (function, head_dim, threads) = match self.is_small()? {
            true => ("flash_attention_backward_bf16_d64", 64, 128),
            false => ("flash_attention_backward_bf16_d128", 128, 256),
        };
        // Two tiles that stay, two pairs of tiles that come and go and the statistics of those.
        let row = head_dim * DType::Bf16.size();
        let statistics = 2 * 3 * STREAM * size_of::<f32>();
        let shared = (2 * ROWS + 4 * STREAM) * row + statistics;
        Ok((kernel(function), Grid::of_blocks(blocks, threads, shared)))
    }

    /// The same on compute capability 9.0, if there is one for heads of this size.
    fn hopper_passes(&self, blocks: usize) -> Option<(Kernel, Grid)> {
        let function = match self.head_dim {
            64 => "flash_attention_backward_wgmma_bf16_d64",
            128 => "flash_attention_backward_wgmma_bf16_d128",
            _ => return None,
        };
        // Two tiles that stay, pairs of tiles that come and go, which for the pass over keys are
        // of SPAN rows, with the statistics of these; document starts and a number for each warp;
        // a barrier for the first tiles, two for each pair.
        let row = self.head_dim * DType::Bf16.size();
        let stages = RING / (2 * SPAN * row);
        let words = stages * 3 * SPAN + ROWS + 16;
        let shared = 2 * ROWS * row + RING + words * size_of::<f32>() + 8 * (1 + 2 * stages);
        let kernel = Kernel {
            stem: "flash_attention_backward_sm90a",
            function,
        };
        Some((kernel, Grid::of_blocks(blocks, 384, shared)))
    }

    fn buffers(
        &self,
        cuda: &CudaDevice,
        [q, k, v]: [usize; 3],
        needed: &[bool],
        parts: usize,
    ) -> Result<Buffers> {
        let alloc = |wanted: bool, dtype, len| match wanted {
            true => cuda.alloc(dtype, len).map(Some),
            false => Ok(None),
        };
        let of_keys = needed[1] || needed[2];
        Ok(Buffers {
            dq: alloc(needed[0], DType::Bf16, q)?,
            dk: alloc(of_keys, DType::Bf16, k)?,
            dv: alloc(of_keys, DType::Bf16, v)?,
            partial: alloc(of_keys && parts > 1, DType::F32, parts * (k + v))?,
            statistics: cuda.alloc(DType::F32, self.spans() * 3 * SPAN)?,
        })
    }

    fn backward_args(
        &self,
        saved: &Saved,
        grad: &Tensor,
        starts: Option<&Tensor>,
        buffers: &Buffers,
        parts: usize,
    ) -> Result<BackwardArgs> {
        let read = |tensor: &Tensor| tensor.cuda().map_or(0, CudaBuffer::address);
        let written = |buffer: &Option<CudaBuffer>| buffer.as_ref().map_or(0, CudaBuffer::address);
        let key_blocks = match buffers.dk {
            Some(_) => self.blocks(self.kv_heads * parts),
            None => 0,
        };
        Ok(BackwardArgs {
            dq: written(&buffers.dq),
            dk: written(&buffers.dk),
            dv: written(&buffers.dv),
            partial: written(&buffers.partial),
            dout: read(grad),
            q: read(&saved.q),
            k: read(&saved.k),
            v: read(&saved.v),
            o: read(&saved.o),
            log_sum: read(&saved.log_sum),
            statistics: buffers.statistics.address(),
            doc_starts: starts.map_or(0, read),
            seq_len: extent(Self::NAME, self.seq_len)?,
            heads: extent(Self::NAME, self.heads)?,
            kv_heads: extent(Self::NAME, self.kv_heads)?,
            d: extent(Self::NAME, self.head_dim)?,
            scale: self.scale(),
            parts: extent(Self::NAME, parts)?,
            key_blocks: extent(Self::NAME, key_blocks)?,
            unused: 0,
        })
    }

    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        saved: &Saved,
        grad: &Tensor,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let Saved { q, k, v, .. } = saved;
        let grad = cuda.resident(grad, DType::Bf16)?;
        let starts = self.resident_starts(cuda)?;
        let parts = self.parts();
        let buffers = self.buffers(cuda, [q, k, v].map(Tensor::len), needed, parts)?;
        let args = self.backward_args(saved, &grad, starts.as_ref(), &buffers, parts)?;
        let query_blocks = if needed[0] {
            self.blocks(self.heads)
        } else {
            0
        };
        let blocks = args.key_blocks as usize + query_blocks;
        let args = Arg::Struct(bytemuck::cast(args));
        let on_hopper = cuda.capability() == (9, 0) && !q.is_empty();
        let hopper = self.hopper_passes(blocks).filter(|_| on_hopper);
        let mut passes_args = vec![args];
        if hopper.is_some() {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            for (tensor, heads) in [(q, heads), (k, kv_heads), (v, kv_heads), (&grad, heads)] {
                passes_args.push(self.map(cuda, tensor, heads)?);
            }
        }
        let (passes, grid) = hopper.map_or_else(|| self.passes(blocks), Ok)?;
        let statistics = kernel("flash_attention_backward_statistics_bf16");
        // SAFETY: `args` holds grad, q and o [T, heads * D], k and v [T, kv_heads * D], bf16;
        // log_sum with one f32 for each row and head, which forward wrote, and statistics with
        // three words for each, in whole spans; starts, null or [T] u32. dq is as long as q unless
        // no block owns queries, dk and dv as k and v unless none owns keys; of both, `partial`
        // has a sum for each part if there are several.
        unsafe { cuda.launch(statistics, Grid::of_blocks(self.spans(), 256, 0), &[args]) }?;
        // SAFETY: as above, after the statistics. Shared memory holds the kernel's tiles. The
        // kernels of Hopper take maps of q, k, v and grad besides.
        unsafe { cuda.launch(passes, grid, &passes_args) }?;
        if buffers.partial.is_some() {
            let sum = kernel("flash_attention_backward_sum_bf16");
            let grid = Grid::over((k.len() + v.len()).div_ceil(WIDTH));
            // SAFETY: as above, after the passes.
            unsafe { cuda.launch(sum, grid, &[args, Arg::size(Self::NAME, k.len())?]) }?;
        }
        let tensor = |buffer: Option<CudaBuffer>, like: &Tensor, needed: bool| {
            let buffer = buffer.filter(|_| needed);
            buffer
                .map(|b| Tensor::from_cuda(b, like.shape()))
                .transpose()
        };
        Ok(vec![
            tensor(buffers.dq, q, needed[0])?,
            tensor(buffers.dk, k, needed[1])?,
            tensor(buffers.dv, v, needed[2])?,
        ])
    }
}
