//! The kernels of kernels/topk.cu.

mod selection;

use super::{Frozen, Saved, TopK};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::error::{Error, Result};
use crate::ops::Operator;
use crate::ops::sparse_decode::{SharedGroups, check_indices, cuda as sparse};
use crate::tensor::{DType, Tensor};
use selection::Selection;

const NAME: &str = TopK::NAME;
const NULL: Arg = Arg::U64(0);
/// The selection keeps k candidates and those of two rounds, 8 bytes each, in the shared memory
/// that every launch may have, 48 KiB, less what the block itself needs.
const MOST_K: usize = 3072;
/// Rows of W_enc that a warp rounds, and latents that a block of the backward pass owns.
const ROWS_PER_WARP: usize = 8;
const LATENTS: usize = 4;

const fn kernel(function: &'static str) -> Kernel {
    let stem = "topk";
    Kernel { stem, function }
}

impl TopK {
    /// acts \[T, k\] f32 and indices \[T, k\] u32 on the device. x: \[T, d\]; w_enc: \[m, d\];
    /// b_enc: \[m\]; b_dec: \[d\], of shapes that the caller has checked; W_enc and x enter the
    /// product in bf16, which gives f32.
    pub(super) fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        [x, w_enc, b_enc, b_dec]: [&Tensor; 4],
    ) -> Result<(Tensor, Tensor)> {
        let among = match &self.among {
            Some(among) if !cuda.holds(among) => {
                check_indices(NAME, among.u32s()?, w_enc.matrix_dims().0)?;
                Some(cuda.resident(among, DType::U32)?)
            }
            among => among.clone(),
        };
        let prepared = || prepare(cuda, [w_enc, b_enc, b_dec], among.as_ref());
        let (weights, bias) = match self.frozen.as_ref().filter(|_| among.is_none()) {
            Some(frozen) => frozen.get_or(cuda, prepared)?,
            None => prepared()?,
        };
        let selection = Selection {
            cuda,
            x,
            weights,
            bias,
            among,
            k: self.k,
        };
        selection.run()
    }

    /// As [`crate::ops::Operator::backward`], with all that was saved on the device.
    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        saved: &Saved,
        grad: &Tensor,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = rectified(cuda, grad, &saved.acts)?;
        let mut result = vec![None; 4];
        if needed[0] {
            let pairs = (&grad, &saved.indices);
            let grad_x = sparse::gather(cuda, pairs, &saved.w_enc, None, DType::Bf16)?;
            result[0] = Some(grad_x.reshape(saved.x.shape())?);
        }
        if needed[1] || needed[2] || needed[3] {
            let (grad_w, grad_b) = by_latent(cuda, &self.groups, &grad, saved)?;
            if needed[3] {
                // ∂b_dec = −Σ_t ∂x_t = −W_encᵀ ∂b_enc: one pass over W_enc instead of a gather.
                let sum = sparse::row_sum(cuda, &saved.w_enc, Some(&grad_b), -1.0)?;
                result[3] = Some(sum);
            }
            result[1] = needed[1].then_some(grad_w);
            result[2] = needed[2].then_some(grad_b);
        }
        Ok(result)
    }
}

impl Frozen {
    /// What is kept here for this device, or `prepare`d now.
    fn get_or(
        &self,
        cuda: &CudaDevice,
        prepare: impl FnOnce() -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        if let Some(kept) = self.0.get().filter(|(weights, _)| cuda.holds(weights)) {
            return Ok(kept.clone());
        }
        let prepared = prepare()?;
        // A second device goes without: nothing is kept for it.
        self.0.get_or_init(|| prepared.clone());
        Ok(prepared)
    }
}

fn check_k(k: usize) -> Result<()> {
    if k <= MOST_K {
        return Ok(());
    }
    let expected = format!("k of at most {MOST_K} on CUDA");
    Err(Error::operand(NAME, expected, format!("{k}")))
}

/// W_enc \[n, d\] in bf16 and b_enc − W_enc b_dec \[n\] f32, of all latents or of those `among`.
fn prepare(
    cuda: &CudaDevice,
    [w_enc, b_enc, b_dec]: [&Tensor; 3],
    among: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    const WARP: usize = 32;
    let (m, d) = w_enc.matrix_dims();
    let rows = among.map_or(m, Tensor::len);
    let weights = cuda.alloc(DType::Bf16, rows * d)?;
    let bias = cuda.alloc(DType::F32, rows)?;
    let args = [
        Arg::from(&weights),
        Arg::from(&bias),
        w_enc.arg()?,
        b_enc.arg()?,
        b_dec.arg()?,
        among.map_or(Ok(NULL), Tensor::arg)?,
        Arg::size(NAME, rows)?,
        Arg::size(NAME, m)?,
        Arg::size(NAME, d)?,
    ];
    let grid = Grid::over(rows.div_ceil(ROWS_PER_WARP) * WARP);
    // SAFETY: W_enc is [m, d], b_enc [m], b_dec [d], all f32; the results have `rows` rows; an
    // index of m or more reads the last latent.
    unsafe { cuda.launch(kernel("topk_prepare"), grid, &args) }?;
    Ok((
        Tensor::from_cuda(weights, [rows, d])?,
        Tensor::from_cuda(bias, [rows])?,
    ))
}

/// The upstream gradient where the rectifier let its input through, else 0.
fn rectified(cuda: &CudaDevice, grad: &Tensor, acts: &Tensor) -> Result<Tensor> {
    crate::ops::expect_shape(NAME, grad, acts.shape())?;
    let grad = cuda.resident(grad, DType::F32)?;
    let out = cuda.alloc(DType::F32, grad.len())?;
    let len = Arg::size(NAME, grad.len())?;
    let args = [Arg::from(&out), grad.arg()?, acts.arg()?, len];
    // SAFETY: three buffers of f32 of one length.
    unsafe { cuda.launch(kernel("topk_rectify"), Grid::over(grad.len()), &args) }?;
    Tensor::from_cuda(out, acts.shape())
}

/// ∂W_enc and ∂b_enc, f32; `grad` is that of the pre-activations.
fn by_latent(
    cuda: &CudaDevice,
    groups: &SharedGroups,
    grad: &Tensor,
    saved: &Saved,
) -> Result<(Tensor, Tensor)> {
    let ((_, k), (m, d)) = (grad.matrix_dims(), saved.w_enc.matrix_dims());
    let grad_w = cuda.alloc(DType::F32, m * d)?;
    let grad_b = cuda.alloc(DType::F32, m)?;
    let [offsets, pairs] = groups.on_device(cuda, &saved.indices, m)?.args();
    let args = [
        Arg::from(&grad_w),
        Arg::from(&grad_b),
        grad.arg()?,
        saved.x.arg()?,
        saved.b_dec.arg()?,
        offsets,
        pairs,
        Arg::size(NAME, m)?,
        Arg::size(NAME, k)?,
        Arg::size(NAME, d)?,
    ];
    let grid = sparse::row_grid(m.div_ceil(LATENTS), d);
    // SAFETY: grad is [T, k] f32, x [T, d] bf16, b_dec [d] f32, the results [m, d] and [m]; the
    // groups are those of T k pairs over m latents.
    unsafe { cuda.launch(kernel("topk_backward"), grid, &args) }?;
    Ok((
        Tensor::from_cuda(grad_w, [m, d])?,
        Tensor::from_cuda(grad_b, [m])?,
    ))
}

/// counts \[m\] += the tokens of a selection, and 0 where a latent is active in it.
pub(super) fn count_fired(
    cuda: &CudaDevice,
    counts: &Tensor,
    acts: &Tensor,
    indices: &Tensor,
) -> Result<()> {
    let (tokens, _) = acts.matrix_dims();
    let latents = Arg::size(NAME, counts.len())?;
    let args = [counts.arg()?, latents, Arg::size(NAME, tokens)?];
    // SAFETY: counts is [m] u32 and the caller's alone.
    unsafe { cuda.launch(kernel("topk_age"), Grid::over(counts.len()), &args) }?;
    let args = [
        counts.arg()?,
        acts.arg()?,
        indices.arg()?,
        Arg::size(NAME, acts.len())?,
        latents,
    ];
    // SAFETY: acts and indices are of one length; an index of m or more is skipped.
    unsafe { cuda.launch(kernel("topk_fire"), Grid::over(acts.len()), &args) }
}

/// The latents whose count is above `limit`, ascending.
pub(super) fn dead(cuda: &CudaDevice, counts: &Tensor, limit: u32) -> Result<Tensor> {
    let latents = cuda.alloc(DType::U32, counts.len())?;
    let number = cuda.alloc(DType::U32, 1)?;
    let args = [
        Arg::from(&latents),
        Arg::from(&number),
        counts.arg()?,
        Arg::size(NAME, counts.len())?,
        Arg::U32(limit),
    ];
    let grid = Grid::of_blocks(1, 1024, 0);
    // SAFETY: counts and latents are [m] u32, number [1].
    unsafe { cuda.launch(kernel("topk_dead"), grid, &args) }?;
    let number = bytemuck::pod_read_unaligned::<u32>(&number.read(0, 1)?) as usize;
    let mut list = cuda.alloc(DType::U32, number)?;
    list.copy_from(0, &latents, 0..number)?;
    Tensor::from_cuda(list, [number])
}
