//! What the gradients take of dY, in one pass over it (kernels/lora.cu).

use super::{Adapter, NAME, kernel};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::Result;
use crate::ops::gemm::cuda::{Layout, Matrix, Product};
use crate::ops::lora::LoraLinear;
use crate::tensor::{CudaBuffer, DType, Tensor};

const UP_BACKWARD: Kernel = kernel("lora_up_backward");
pub(super) const SUM_BF16: Kernel = kernel("lora_sum_bf16");
const SUM_F32: Kernel = kernel("lora_sum_f32");

/// Rows that a block of `lora_up_backward` works through, ranks that it sums at a time, its
/// threads and its shared memory (kernels/lora.cu).
const ROWS: usize = 512;
const RANKS: usize = 32;
const THREADS: u32 = 256;
const SHARED: usize = (3 * (128 + RANKS) * 64 + ROWS * RANKS) * 2;

/// Columns of dY for a block: as many blocks as keep a device busy, unless the shares of dU would
/// cost more than half of reading dY again (at rank 32).
fn span(row_blocks: usize, out: usize) -> usize {
    const BLOCKS: usize = 128;
    const LEAST: usize = 256;
    let spans = BLOCKS.div_ceil(row_blocks.max(1));
    out.div_ceil(spans).next_multiple_of(64).max(LEAST)
}

impl LoraLinear {
    /// dU = s dY B into columns of `du`, from `first` on, whose rows have `stride` values; and
    /// dB = dYᵀ U, where U holds s already.
    pub(super) fn output_gradients(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        adapter: &Adapter,
        du: &CudaBuffer,
        (first, stride): (usize, usize),
    ) -> Result<Tensor> {
        let ((rows, out), (_, r)) = (dy.matrix_dims(), adapter.b.matrix_dims());
        let u = adapter.u.matrix()?;
        if !(out.is_multiple_of(WIDE) && r.is_multiple_of(WIDE) && u.is_aligned()) {
            // Without 16-byte accesses: dU alone in its matrix, as the caller has it then.
            let product = Product {
                alpha: self.scale,
                ..Product::new(Layout::Nn, Matrix::of(dy)?, Matrix::of(&adapter.b)?)
            };
            product.run_into(cuda, du, 0, false)?;
            let db = Product::new(Layout::Tn, Matrix::of(dy)?, u);
            return Tensor::from_cuda(db.run(cuda, DType::F32)?, adapter.b.shape());
        }
        let blocks = rows.div_ceil(ROWS);
        let span = span(blocks, out);
        let spans = out.div_ceil(span);
        let du_shares = cuda.alloc(DType::F32, spans * rows * r)?;
        let db_shares = cuda.alloc(DType::F32, blocks * out * r)?;
        let args = [
            Arg::from(&du_shares),
            Arg::from(&db_shares),
            dy.arg()?,
            Arg::Pointer(u.address()),
            adapter.b.arg()?,
            Arg::size(NAME, u.stride())?,
            Arg::size(NAME, rows)?,
            Arg::size(NAME, out)?,
            Arg::size(NAME, r)?,
            Arg::size(NAME, span)?,
        ];
        let grid = Grid::of_blocks(blocks * spans * r.div_ceil(RANKS), THREADS, SHARED);
        // SAFETY: dY is [rows, out], U [rows, r] with the stride stated, B [out, r], all bf16 and
        // with rows at multiples of 16 bytes; the shares are as kernels/lora.cu has them.
        unsafe { cuda.launch(UP_BACKWARD, grid, &args) }?;
        let db = cuda.alloc(DType::F32, out * r)?;
        let sum = |to, stride, shares: &CudaBuffer, parts: usize, alpha| {
            sum_args(to, (stride, r), shares, parts, alpha)
        };
        let to = Arg::Pointer(du.address() + (first * DType::Bf16.size()) as u64);
        let (args, grid) = sum(to, stride, &du_shares, spans, self.scale)?;
        // SAFETY: the shares are [spans, rows, r]; du has rows of `stride` bf16, of which r from
        // `first` on are this module's.
        unsafe { cuda.launch(SUM_BF16, grid, &args) }?;
        let (args, grid) = sum(Arg::from(&db), r, &db_shares, blocks, 1.0)?;
        // SAFETY: the shares are [blocks, out, r] and db [out, r], all f32.
        unsafe { cuda.launch(SUM_F32, grid, &args) }?;
        Tensor::from_cuda(db, adapter.b.shape())
    }
}

/// The arguments and the grid of `lora_sum_bf16` and `lora_sum_f32`: `to`, whose rows are `stride`
/// values apart and `width` long, becomes alpha times the sum of `parts` shares.
pub(super) fn sum_args(
    to: Arg,
    (stride, width): (usize, usize),
    shares: &CudaBuffer,
    parts: usize,
    alpha: f32,
) -> Result<([Arg; 7], Grid)> {
    let size = shares.len() / parts.max(1);
    let args = [
        to,
        Arg::size(NAME, stride)?,
        Arg::from(shares),
        Arg::size(NAME, parts)?,
        Arg::U64(size as u64),
        Arg::size(NAME, width)?,
        Arg::F32(alpha),
    ];
    Ok((args, Grid::over(size.div_ceil(4))))
}
