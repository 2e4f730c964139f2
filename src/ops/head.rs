//! What kl_div and cross_entropy share: chunks of tokens, so that logits exist for one chunk at
//! a time, and the softmax statistics of a row.

use crate::device::CudaDevice;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::gemm::cuda::{Layout, Matrix, Product};
use crate::ops::math::{LANES, add_up, exp};
use crate::ops::only_grad;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Tokens in a chunk: as many as keep `copies` rows of logits a token within 64 MiB, in chunks
/// of nearly equal size.
pub(super) fn chunk_tokens(tokens: usize, vocab: usize, copies: usize) -> usize {
    const BUDGET: usize = (64 << 20) / size_of::<f32>();
    let fitting = (BUDGET / (vocab * copies).max(1)).max(1);
    tokens.div_ceil(tokens.div_ceil(fitting).max(1)).max(1)
}

/// The same for a GPU: at most 768 rows of logits, in whole tiles of 128 where there are several
/// chunks. With so many rows reading the head's weights costs little beside the products.
pub(super) fn cuda_chunk_tokens(tokens: usize, copies: usize) -> usize {
    const TILE: usize = 128;
    let most = 6 * TILE / copies;
    let even = tokens.div_ceil(tokens.div_ceil(most).max(1));
    even.next_multiple_of(TILE / copies).min(tokens).max(1)
}

/// The gradient of a loss with respect to the rows it is computed from, on a GPU, chunk by chunk.
pub(super) struct CudaGradient {
    /// \[rows, d\] f32: what the upstream gradient multiplies is not rounded before.
    sum: CudaBuffer,
    vocab: usize,
}

impl CudaGradient {
    /// Room for the gradient of `rows` rows of `d` values.
    pub(super) fn new(cuda: &CudaDevice, rows: usize, d: usize, vocab: usize) -> Result<Self> {
        let sum = cuda.alloc(DType::F32, rows * d)?;
        Ok(Self { sum, vocab })
    }

    /// Memory for the gradient of `rows` rows of logits.
    pub(super) fn of_logits(&self, cuda: &CudaDevice, rows: usize) -> Result<Tensor> {
        let shape = [rows, self.vocab];
        Tensor::from_cuda(cuda.alloc(DType::Bf16, rows * self.vocab)?, shape)
    }

    /// Row `first` and those that follow, from the gradient of their logits and the head's
    /// weights \[V, d\].
    pub(super) fn set(
        &self,
        cuda: &CudaDevice,
        first: usize,
        of_logits: &Tensor,
        weights: &Tensor,
    ) -> Result<()> {
        let (lhs, rhs) = (Matrix::of(of_logits)?, Matrix::of(weights)?);
        Product::new(Layout::Nn, lhs, rhs).run_into(cuda, &self.sum, first, false)
    }

    /// The whole, in `shape`.
    pub(super) fn into_tensor(self, shape: impl Into<Vec<usize>>) -> Result<Tensor> {
        Tensor::from_cuda(self.sum, shape)
    }
}

/// The logits of rows of hidden states \[n, d\] in f32, \[n, V\].
pub(super) fn cuda_logits(cuda: &CudaDevice, hidden: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (lhs, rhs) = (Matrix::of(hidden)?, Matrix::of(weights)?);
    let logits = Product::new(Layout::Nt, lhs, rhs).run(cuda, DType::F32)?;
    Tensor::from_cuda(logits, [hidden.matrix_dims().0, weights.matrix_dims().0])
}

/// log Σ exp of a row of logits.
pub(super) fn log_sum_exp(row: &[f32]) -> f32 {
    let max = vectorized!(max(row));
    max + vectorized!(sum_exp(row, max)).ln()
}

#[inline(always)]
fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

#[inline(always)]
fn sum_exp(row: &[f32], shift: f32) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += exp(v - shift);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += exp(v - shift);
    }
    add_up(lanes)
}

/// The saved gradient times that of the loss, as the one input gradient of a loss operator.
pub(super) fn scaled(
    op: &'static str,
    saved: Option<Tensor>,
    grads: Vec<Option<Tensor>>,
) -> Result<Vec<Option<Tensor>>> {
    let seed = only_grad(op, grads)?.f32s()?[0];
    let Some(mut grad) = saved else {
        return Ok(vec![None]);
    };
    if seed != 1.0 {
        grad.f32s_mut()?.iter_mut().for_each(|g| *g *= seed);
    }
    Ok(vec![Some(grad)])
}
