//! What kl_div and cross_entropy share: chunks of tokens, so that logits exist for one chunk at
//! a time, and the softmax statistics of a row.

use half::bf16;

use crate::device::CudaDevice;
use crate::device::cuda::Arg;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::gemm::bf16::COLS;
use crate::ops::gemm::cuda::{Layout, Matrix, Product};
use crate::ops::math::{LANES, add_up, exp_of_negative};
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Bytes of logits and of their gradients at a time.
const BUDGET: usize = 72 << 20;

/// Tokens in a chunk: as many as keep `copies` rows of f32 a token within the budget, in chunks of
/// nearly equal size. Each chunk reads, and in bf16 packs, the whole head, which chunks that fit a
/// last-level cache would do too often.
pub(super) fn chunk_tokens(tokens: usize, vocab: usize, copies: usize) -> usize {
    let row = vocab * copies * size_of::<f32>();
    let fitting = (BUDGET / row.max(1)).max(1);
    tokens.div_ceil(tokens.div_ceil(fitting).max(1)).max(1)
}

/// Tokens in a chunk with two rows of logits each, and in a group of chunks whose gradients, in
/// bf16, are kept: that product alone packs the head. A chunk takes a third of the budget: with fewer
/// rows the head would come from memory more often. Its rows are whole panels, and so are those of a
/// group.
pub(super) fn chunk_and_group(tokens: usize, vocab: usize) -> [usize; 2] {
    let panels = |bytes: usize, row: usize| bytes / (vocab * row * COLS).max(1);
    let chunk = panels(BUDGET / 3, size_of::<f32>()).max(1) * COLS / 2;
    let group = (panels(BUDGET / 3 * 2, size_of::<bf16>()) * COLS).max(chunk);
    [chunk, group].map(|most| most.min(tokens).max(1))
}

/// The same for a GPU: at most 1024 rows of logits, in whole tiles of 128 where there are several
/// chunks. With so many rows reading the head's weights costs little beside the products.
pub(super) fn cuda_chunk_tokens(tokens: usize, copies: usize) -> usize {
    const TILE: usize = 128;
    let most = 8 * TILE / copies;
    let even = tokens.div_ceil(tokens.div_ceil(most).max(1));
    even.next_multiple_of(TILE / copies).min(tokens).max(1)
}

/// The head on a GPU: its products, and the memory of one chunk that they share.
pub(super) struct CudaHead<'a> {
    cuda: &'a CudaDevice,
    /// \[V, d\] bf16
    weights: Tensor,
    /// f32, for a chunk's rows of logits.
    logits: CudaBuffer,
    /// Where a gradient is wanted.
    gradient: Option<Gradient>,
}

struct Gradient {
    /// Of a chunk's logits, \[rows, V\] bf16.
    logits: Tensor,
    /// Of all hidden states, f32, so that they are rounded only after the loss's own gradient
    /// has multiplied them.
    hidden: CudaBuffer,
}

impl<'a> CudaHead<'a> {
    /// Memory for chunks of `chunk` tokens with `copies` rows of logits each, and for the
    /// gradient of `tokens` hidden states where it is `needed`. `weights`: \[V, d\].
    pub(super) fn new(
        cuda: &'a CudaDevice,
        weights: &Tensor,
        [tokens, chunk, copies]: [usize; 3],
        needed: bool,
    ) -> Result<Self> {
        let (vocab, d) = weights.matrix_dims();
        let gradient = || {
            let logits = cuda.alloc(DType::Bf16, chunk * vocab)?;
            Ok(Gradient {
                logits: Tensor::from_cuda(logits, [chunk, vocab])?,
                hidden: cuda.alloc(DType::F32, tokens * d)?,
            })
        };
        Ok(Self {
            cuda,
            weights: cuda.resident(weights, DType::Bf16)?,
            logits: cuda.alloc(DType::F32, copies * chunk * vocab)?,
            gradient: needed.then(gradient).transpose()?,
        })
    }

    /// Computes the logits of a chunk's hidden states \[n, d\] bf16: f32, \[n, V\].
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Arg> {
        let (lhs, rhs) = (Matrix::of(hidden)?, Matrix::of(&self.weights)?);
        Product::new(Layout::Nt, lhs, rhs).run_into(self.cuda, &self.logits, 0, false)?;
        Ok(Arg::from(&self.logits))
    }

    /// Where the gradient of a chunk's logits goes, bf16, a row a token; null where none is
    /// needed.
    pub(super) fn logits_gradient(&self) -> Result<Arg> {
        let gradient = self.gradient.as_ref();
        gradient.map_or(Ok(Arg::Pointer(0)), |g| g.logits.arg())
    }

    /// The gradient of the hidden states from `first` on from that of the logits of `n` tokens.
    pub(super) fn set_gradient(&self, first: usize, n: usize) -> Result<()> {
        let Some(gradient) = &self.gradient else {
            return Ok(());
        };
        let lhs = Matrix::of(&gradient.logits)?.rows(0..n)?;
        let product = Product::new(Layout::Nn, lhs, Matrix::of(&self.weights)?);
        product.run_into(self.cuda, &gradient.hidden, first, false)
    }

    /// The gradient of all hidden states in `shape`, f32.
    pub(super) fn into_gradient(self, shape: &[usize]) -> Result<Option<Tensor>> {
        let gradient = self.gradient.map(|g| Tensor::from_cuda(g.hidden, shape));
        gradient.transpose()
    }
}

/// log Σ exp of a row of logits.
pub(super) fn log_sum_exp(row: &[f32]) -> f32 {
    let max = vectorized!(max(row));
    max + vectorized!(sum_exp(row, max)).ln()
}

/// The largest of a row.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
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
            *lane += exp_of_negative(v - shift);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += exp_of_negative(v - shift);
    }
    add_up(lanes)
}
