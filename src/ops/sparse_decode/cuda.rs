//! The kernels of kernels/sparse_decode.cu, also as the encoder and the loss use them.

use super::{SharedGroups, SparseDecode, check_indices};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE_F32};
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::tensor::{CudaBuffer, DType, Tensor};

const NAME: &str = SparseDecode::NAME;
/// The most threads of a block that sums up rows, and the fewest: pairs in shared memory.
const THREADS: [usize; 2] = [512, 32];
/// Rows of one partial sum.
const SUM_ROWS: usize = 64;
/// Keys of one block in a pass of the sort.
const SORT_TILE: usize = 2048;
const SORT_THREADS: u32 = 256;
/// Values of a digit of the sort, of 8 bits.
const DIGITS: usize = 256;
const NULL: Arg = Arg::U64(0);

const fn kernel(function: &'static str) -> Kernel {
    let stem = "sparse_decode";
    Kernel { stem, function }
}

/// One block for each of `blocks`, with a thread for every few of `d` columns.
pub(crate) fn row_grid(blocks: usize, d: usize) -> Grid {
    let columns = if d.is_multiple_of(WIDE_F32) {
        WIDE_F32
    } else {
        1
    };
    let [most, least] = THREADS;
    let threads = d.div_ceil(columns).next_multiple_of(least).min(most);
    Grid::of_blocks(blocks, threads as u32, 0)
}

/// The indices on the device. Those that come from the host are checked; on the device they are
/// TopK's own.
///
/// # Errors
/// An index of m or more.
pub(super) fn resident_indices(cuda: &CudaDevice, indices: &Tensor, m: usize) -> Result<Tensor> {
    if !cuda.holds(indices) {
        check_indices(NAME, indices.u32s()?, m)?;
    }
    cuda.resident(indices, DType::U32)
}

/// `bias + Σ_j scales[t, j] w[indices[t, j]]`, \[T, d\] in `dtype`; no bias means zero.
///
/// scales: \[T, k\] f32; indices: \[T, k\] u32; w: \[m, d\] f32; bias: \[d\] f32, all on the
/// device and of shapes that the caller has checked.
pub(crate) fn gather(
    cuda: &CudaDevice,
    (scales, indices): (&Tensor, &Tensor),
    w: &Tensor,
    bias: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    let ((tokens, k), (m, d)) = (scales.matrix_dims(), w.matrix_dims());
    let out = cuda.alloc(dtype, tokens * d)?;
    let args = [
        Arg::from(&out),
        scales.arg()?,
        indices.arg()?,
        w.arg()?,
        bias.map_or(Ok(NULL), Tensor::arg)?,
        Arg::size(NAME, k)?,
        Arg::size(NAME, m)?,
        Arg::size(NAME, d)?,
    ];
    let kernel = kernel(match dtype {
        DType::F32 => "sparse_decode_forward_f32",
        _ => "sparse_decode_forward_bf16",
    });
    // SAFETY: shapes and types are as documented above; out is [T, d] of the kernel's type; an
    // index of m or more is skipped.
    unsafe { cuda.launch(kernel, row_grid(tokens, d), &args) }?;
    Tensor::from_cuda(out, [tokens, d])
}

/// The sum of the rows of a matrix in f32 or bf16 on the device, each times its weight (\[rows\]
/// f32; 1 where `None`), divided by `divisor`: \[d\] f32.
pub(crate) fn row_sum(
    cuda: &CudaDevice,
    matrix: &Tensor,
    weights: Option<&Tensor>,
    divisor: f32,
) -> Result<Tensor> {
    let (rows, d) = matrix.matrix_dims();
    let parts = rows.div_ceil(SUM_ROWS);
    let partial = cuda.alloc(DType::F32, parts * d)?;
    let args = [
        Arg::from(&partial),
        matrix.arg()?,
        weights.map_or(Ok(NULL), Tensor::arg)?,
        Arg::size(NAME, rows)?,
        Arg::size(NAME, d)?,
    ];
    let first = kernel(match matrix.dtype() {
        DType::F32 => "row_sum_partial_f32",
        _ => "row_sum_partial_bf16",
    });
    // SAFETY: the matrix is [rows, d] of the kernel's type, weights are [rows] f32 or null, and
    // there is a row of d partial sums for each block of 64 rows.
    unsafe { cuda.launch(first, row_grid(parts, d), &args) }?;
    let out = cuda.alloc(DType::F32, d)?;
    let args = [
        Arg::from(&out),
        Arg::from(&partial),
        Arg::size(NAME, parts)?,
        Arg::size(NAME, d)?,
        Arg::F32(divisor),
    ];
    // SAFETY: partial is [parts, d] and out [d], both f32.
    unsafe { cuda.launch(kernel("row_sum_total"), Grid::over(d), &args) }?;
    Tensor::from_cuda(out, [d])
}

/// Divides each row of `w` \[m, d\] f32 by its norm + 2^-23.
pub(crate) fn normalize_rows(cuda: &CudaDevice, w: &mut Tensor) -> Result<()> {
    cuda.own(w)?;
    let (m, d) = w.matrix_dims();
    let args = [w.arg()?, Arg::size(NAME, d)?, Arg::F32(f32::EPSILON)];
    let kernel = kernel("sparse_decode_normalize");
    // SAFETY: w is [m, d] f32 and nobody else's (`own`).
    unsafe { cuda.launch(kernel, row_grid(m, d), &args) }
}

/// The pairs of a selection by latent, as [`super::LatentGroups`] has them, on the device.
#[derive(Debug)]
pub(crate) struct CudaGroups {
    /// \[m + 1\] u32: where each latent's pairs begin.
    offsets: CudaBuffer,
    /// \[T k\] u32, ascending within each latent.
    pairs: CudaBuffer,
}

impl CudaGroups {
    /// A stable radix sort of the pairs by their indices, which are on the device.
    pub(super) fn new(cuda: &CudaDevice, indices: &Tensor, m: usize) -> Result<Self> {
        let count = indices.len();
        let blocks = count.div_ceil(SORT_TILE);
        let counts = cuda.alloc(DType::U32, DIGITS * blocks)?;
        let mut sorted: Option<(CudaBuffer, CudaBuffer)> = None;
        let (count_arg, limit) = (Arg::size(NAME, count)?, Arg::size(NAME, m)?);
        let bits = usize::BITS - m.leading_zeros();
        for shift in (0..bits).step_by(8) {
            let (keys, pairs) = match &sorted {
                Some((keys, pairs)) => (Arg::from(keys), Arg::from(pairs)),
                None => (indices.arg()?, NULL),
            };
            let shift = Arg::U32(shift);
            let args = [Arg::from(&counts), keys, count_arg, limit, shift];
            let grid = Grid::of_blocks(blocks, SORT_THREADS, 0);
            // SAFETY: keys are [count] u32, counts [256, blocks].
            unsafe { cuda.launch(kernel("group_count"), grid, &args) }?;
            let args = [Arg::from(&counts), Arg::size(NAME, counts.len())?];
            let scan = Grid::of_blocks(blocks.min(1), 1024, 0);
            // SAFETY: one block over all counts.
            unsafe { cuda.launch(kernel("group_scan"), scan, &args) }?;
            let next = (
                cuda.alloc(DType::U32, count)?,
                cuda.alloc(DType::U32, count)?,
            );
            let args = [
                Arg::from(&next.0),
                Arg::from(&next.1),
                keys,
                pairs,
                Arg::from(&counts),
                count_arg,
                limit,
                shift,
            ];
            // SAFETY: keys and pairs are [count] u32 (pairs null at first), so are the results,
            // and the scanned counts place every one of them within.
            unsafe { cuda.launch(kernel("group_scatter"), grid, &args) }?;
            sorted = Some(next);
        }
        let (keys, pairs) = sorted.ok_or_else(|| Error::operand(NAME, "latents", "none"))?;
        let offsets = cuda.alloc(DType::U32, m + 1)?;
        let args = [Arg::from(&offsets), Arg::from(&keys), count_arg, limit];
        // SAFETY: keys are [count], each at most m, and offsets [m + 1].
        unsafe { cuda.launch(kernel("group_offsets"), Grid::over(count + 1), &args) }?;
        Ok(Self { offsets, pairs })
    }

    /// Number of latents.
    pub(super) fn latents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of pairs.
    pub(super) fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The offsets \[m + 1\] and the pairs \[T k\], both u32, as a kernel's arguments.
    pub(crate) fn args(&self) -> [Arg; 2] {
        [Arg::from(&self.offsets), Arg::from(&self.pairs)]
    }
}

/// ∂acts and ∂W_dec, f32, in one sweep over the latents.
///
/// grad: \[T, d\] bf16; acts, indices: \[T, k\]; w: \[m, d\] f32, all on the device.
pub(super) fn by_latent(
    cuda: &CudaDevice,
    groups: &SharedGroups,
    grad: &Tensor,
    (acts, indices): (&Tensor, &Tensor),
    w: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let ((_, k), (m, d)) = (acts.matrix_dims(), w.matrix_dims());
    let groups = groups.on_device(cuda, indices, m)?;
    let mut grad_acts = cuda.alloc(DType::F32, acts.len())?;
    // A pair that no latent owns has no gradient.
    grad_acts.clear()?;
    let grad_w = cuda.alloc(DType::F32, w.len())?;
    let [offsets, pairs] = groups.args();
    let args = [
        Arg::from(&grad_acts),
        Arg::from(&grad_w),
        grad.arg()?,
        acts.arg()?,
        w.arg()?,
        offsets,
        pairs,
        Arg::size(NAME, k)?,
        Arg::size(NAME, d)?,
    ];
    // SAFETY: grad is [T, d] bf16, acts and its gradient [T, k], w and its gradient [m, d]; the
    // groups are those of T k pairs over m latents.
    unsafe { cuda.launch(kernel("sparse_decode_backward"), row_grid(m, d), &args) }?;
    Ok((
        Tensor::from_cuda(grad_acts, acts.shape())?,
        Tensor::from_cuda(grad_w, w.shape())?,
    ))
}

/// ∂acts alone, for a frozen decoder; operands as in [`by_latent`].
pub(super) fn by_token(
    cuda: &CudaDevice,
    grad: &Tensor,
    (acts, indices): (&Tensor, &Tensor),
    w: &Tensor,
) -> Result<Tensor> {
    let ((tokens, k), (m, d)) = (acts.matrix_dims(), w.matrix_dims());
    let grad_acts = cuda.alloc(DType::F32, acts.len())?;
    let args = [
        Arg::from(&grad_acts),
        grad.arg()?,
        indices.arg()?,
        w.arg()?,
        Arg::size(NAME, k)?,
        Arg::size(NAME, m)?,
        Arg::size(NAME, d)?,
    ];
    let grid = row_grid(tokens, d);
    // SAFETY: grad is [T, d] bf16, indices and the result [T, k], w [m, d]; an index of m or
    // more reads row 0.
    unsafe { cuda.launch(kernel("sparse_decode_backward_acts"), grid, &args) }?;
    Tensor::from_cuda(grad_acts, acts.shape())
}
