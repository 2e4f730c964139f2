//! A = the k largest of relu((X − b_dec) W_encᵀ + b_enc) of each token, with their latents: the
//! encoder of a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093).
//!
//! The encoder product is made tile by tile and each tile is reduced to a few candidates at
//! once, so the T x m pre-activations never exist. Least work: 2 T d m FLOP forward. Backward
//! touches active latents alone: T k d x 4 bytes (rows of X) and the dense ∂W_enc written once.

mod bf16;
mod cuda;
mod fired;
mod select;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::sparse_decode::rows::weighted_row_sum;
use super::sparse_decode::{LatentGroups, SharedGroups, check_indices, gather, to_f32_row};
use super::{Operator, expect_cols, expect_inputs, expect_shape, only_grad};
use crate::device::simd::vectorized;
use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
pub use fired::Fired;
use select::RowSelection;

/// Tokens and latents of one tile: 1 MB of pre-activations for each thread. Fixed, so that the
/// product's rounding does not depend on the number of threads.
const TILE_TOKENS: usize = 256;
const TILE_LATENTS: usize = 1024;
/// Latents of one task in backward.
const LATENT_BLOCK: usize = 64;

/// Inputs: x \[T, d\], w_enc \[m, d\], b_enc \[m\], b_dec \[d\], all f32. Outputs: acts \[T, k\]
/// f32 and indices \[T, k\] u32, in ascending order of the indices.
///
/// Of equal values the lower latent is taken, zeros of the rectifier included. Only activations
/// above zero have a gradient. A pre-activation that is NaN or +inf is [`Error::NotFinite`].
pub struct TopK {
    /// How many latents a token keeps; at least 1, at most m.
    pub k: usize,
    /// Takes the k among these latents alone (\[n\] u32, ascending, each below m); all where
    /// `None`.
    pub among: Option<Tensor>,
    /// The grouping of the result, shared with the decoder of the same selection.
    pub groups: SharedGroups,
    /// For weights that stay as they are: where a GPU keeps them in the type of the product.
    pub frozen: Option<Frozen>,
}

/// W_enc in bf16 and the biases, as the product on a GPU takes them: made at the first use and
/// shared by clones. Belongs to one set of weights.
#[derive(Clone, Debug, Default)]
pub struct Frozen(Arc<OnceLock<(Tensor, Tensor)>>);

impl TopK {
    /// The k largest of all latents.
    pub fn new(k: usize, groups: SharedGroups) -> Self {
        Self {
            k,
            among: None,
            groups,
            frozen: None,
        }
    }
}

/// What backward needs of a TopK encoder.
pub struct Saved {
    x: Tensor,
    w_enc: Tensor,
    b_dec: Tensor,
    acts: Tensor,
    indices: Tensor,
}

impl Operator for TopK {
    type Saved = Option<Saved>;
    const NAME: &'static str = "topk";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [x, w_enc, b_enc, b_dec] = expect_inputs(Self::NAME, inputs)?;
        let (m, d) = w_enc.matrix_dims();
        expect_shape(Self::NAME, w_enc, &[m, d])?;
        expect_cols(Self::NAME, x, d)?;
        expect_shape(Self::NAME, b_enc, &[m])?;
        expect_shape(Self::NAME, b_dec, &[d])?;
        let candidates = self.among.as_ref().map_or(m, Tensor::len);
        if self.k == 0 || self.k > candidates || d == 0 || u32::try_from(m).is_err() {
            let expected = format!("k from 1 to {candidates} latents, d of at least 1");
            let got = format!("k = {}, d = {d}", self.k);
            return Err(Error::operand(Self::NAME, expected, got));
        }
        if let Device::Cuda(cuda) = device {
            let x = cuda.resident(x, DType::Bf16)?;
            let w_enc = cuda.resident(w_enc, DType::F32)?;
            let b_enc = cuda.resident(b_enc, DType::F32)?;
            let b_dec = cuda.resident(b_dec, DType::F32)?;
            let selected = self.forward_cuda(cuda, [&x, &w_enc, &b_enc, &b_dec])?;
            return Ok(outputs(selected, [&x, &w_enc, &b_dec], needed));
        }
        let (w, b) = match &self.among {
            None => (Cow::from(w_enc.f32s()?), Cow::from(b_enc.f32s()?)),
            Some(among) => {
                let among = among.u32s()?;
                check_indices(Self::NAME, among, m)?;
                let w = gathered(w_enc.f32s()?, among, d);
                (w.into(), gathered(b_enc.f32s()?, among, 1).into())
            }
        };
        let encoder = Encoder {
            w: &w,
            b: &b,
            centre: b_dec.f32s()?,
        };
        let selected = self.select(device, x, &encoder)?;
        Ok(outputs(selected, [x, w_enc, b_dec], needed))
    }

    fn backward(
        &self,
        device: &Device,
        saved: Self::Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (Some(saved), grad) = (saved, only_grad(Self::NAME, grads)?) else {
            return Ok(vec![None; 4]);
        };
        if let Device::Cuda(cuda) = device {
            return self.backward_cuda(cuda, &saved, &grad, needed);
        }
        let grad = rectified(grad, &saved.acts)?;
        let (m, d) = saved.w_enc.matrix_dims();
        let indices = saved.indices.u32s()?;
        let grad_x = if needed[0] {
            let mut out = device.buffer(saved.x.len());
            let pairs = (grad.f32s()?, indices, self.k);
            gather(&mut out, pairs, saved.w_enc.f32s()?, None, d);
            Some(Tensor::from_buffer(out, saved.x.shape())?)
        } else {
            None
        };
        let mut result = vec![grad_x, None, None, None];
        if needed[1] || needed[2] || needed[3] {
            let groups = self.groups.get(indices, m)?;
            let grad_b = bias_gradient(device, groups, &grad)?;
            if needed[3] {
                // ∂b_dec = −Σ_t ∂x_t = −W_encᵀ ∂b_enc: one pass over W_enc instead of a gather.
                let sums = weighted_row_sum(saved.w_enc.f32s()?, d, Some(grad_b.f32s()?));
                result[3] = Some(to_f32_row(sums.into_iter().map(|v| -v).collect())?);
            }
            if needed[1] {
                result[1] = Some(encoder_gradient(device, groups, &grad, &saved)?);
            }
            result[2] = needed[2].then_some(grad_b);
        }
        Ok(result)
    }
}

/// The selection as the operator's outputs, and what backward needs of it where it will be asked.
fn outputs(
    (acts, indices): (Tensor, Tensor),
    [x, w_enc, b_dec]: [&Tensor; 3],
    needed: &[bool],
) -> (Vec<Tensor>, Option<Saved>) {
    let saved = needed.contains(&true).then(|| Saved {
        x: x.clone(),
        w_enc: w_enc.clone(),
        b_dec: b_dec.clone(),
        acts: acts.clone(),
        indices: indices.clone(),
    });
    (vec![acts, indices], saved)
}

/// The candidate latents' weights: w \[m', d\], b \[m'\], and b_dec \[d\].
struct Encoder<'a> {
    w: &'a [f32],
    b: &'a [f32],
    centre: &'a [f32],
}

impl TopK {
    fn select(&self, device: &Device, x: &Tensor, encoder: &Encoder) -> Result<(Tensor, Tensor)> {
        let (tokens, d) = x.matrix_dims();
        let k = self.k;
        let mut acts = device.buffer(tokens * k);
        let mut indices = vec![0u32; tokens * k];
        let rows = x.f32s()?;
        match device.precision() {
            Precision::Bf16 => bf16::select(device, rows, encoder, (&mut acts, &mut indices), k)?,
            Precision::F32 => acts
                .par_chunks_mut(TILE_TOKENS * k)
                .zip(indices.par_chunks_mut(TILE_TOKENS * k))
                .zip(rows.par_chunks(TILE_TOKENS * d))
                .enumerate()
                .try_for_each(|(tile, ((acts, indices), x))| {
                    select_tile(device, x, encoder, (acts, indices), k)
                        .map_err(|row| not_finite(tile * TILE_TOKENS + row))
                })?,
        }
        if let Some(among) = &self.among {
            let among = among.u32s()?;
            for index in &mut indices {
                *index = among[*index as usize];
            }
        }
        Ok((
            Tensor::from_buffer(acts, [tokens, k])?,
            Tensor::from_u32(indices, [tokens, k])?,
        ))
    }
}

fn not_finite(token: usize) -> Error {
    let what = format!("topk: a pre-activation of token {token} is not finite");
    Error::NotFinite { what }
}

fn gathered(matrix: &[f32], rows: &[u32], d: usize) -> Vec<f32> {
    let row = |&i: &u32| &matrix[i as usize * d..][..d];
    rows.iter().flat_map(row).copied().collect()
}

/// Selects for up to [`TILE_TOKENS`] tokens. The error is the row of a value that is not finite.
fn select_tile(
    device: &Device,
    x: &[f32],
    encoder: &Encoder,
    (acts, indices): (&mut [f32], &mut [u32]),
    k: usize,
) -> std::result::Result<(), usize> {
    let d = encoder.centre.len();
    let tokens = x.len() / d;
    let mut centred = device.buffer(tokens * d);
    vectorized!({
        for (out, row) in centred.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            for ((o, x), c) in out.iter_mut().zip(row).zip(encoder.centre) {
                *o = x - c;
            }
        }
    });
    let mut selections: Vec<_> = (0..tokens).map(|_| RowSelection::new(k)).collect();
    let mut products = device.buffer(tokens * TILE_LATENTS);
    let blocks = encoder.w.chunks(TILE_LATENTS * d);
    for (block, (w, b)) in blocks.zip(encoder.b.chunks(TILE_LATENTS)).enumerate() {
        let products = &mut products[..tokens * b.len()];
        matmul(
            MatMut::from_row_major_slice_mut(products, tokens, b.len()),
            Accum::Replace,
            MatRef::from_row_major_slice(&centred, tokens, d),
            MatRef::from_row_major_slice(w, b.len(), d).transpose(),
            1.0f32,
            Par::Seq,
        );
        let first = (block * TILE_LATENTS) as u32;
        let rows = selections.iter_mut().zip(products.chunks_exact(b.len()));
        for (row, (selection, products)) in rows.enumerate() {
            if !selection.offer(first, products, b) {
                return Err(row);
            }
        }
    }
    let outputs = acts.chunks_exact_mut(k).zip(indices.chunks_exact_mut(k));
    for (selection, (acts, indices)) in selections.iter_mut().zip(outputs) {
        selection.finish(acts, indices);
    }
    Ok(())
}

/// The upstream gradient where the rectifier let its input through, else 0.
fn rectified(mut grad: Tensor, acts: &Tensor) -> Result<Tensor> {
    expect_shape(TopK::NAME, &grad, acts.shape())?;
    let values = grad.f32s_mut()?.iter_mut().zip(acts.f32s()?);
    values.for_each(|(g, &a)| *g = if a > 0.0 { *g } else { 0.0 });
    Ok(grad)
}

/// ∂b_enc\[i\] = Σ ∂a over the pairs of latent i.
fn bias_gradient(device: &Device, groups: &LatentGroups, grad: &Tensor) -> Result<Tensor> {
    let grad = grad.f32s()?;
    let mut out = device.buffer(groups.latents());
    out.par_chunks_mut(LATENT_BLOCK)
        .enumerate()
        .for_each(|(block, out)| {
            for (i, o) in out.iter_mut().enumerate() {
                let pairs = groups.pairs_of(block * LATENT_BLOCK + i).iter();
                *o = pairs.map(|&pair| grad[pair as usize]).sum();
            }
        });
    Tensor::from_buffer(out, [groups.latents()])
}

/// ∂W_enc\[i\] = Σ ∂a (x_t − b_dec) over the pairs of latent i.
fn encoder_gradient(
    device: &Device,
    groups: &LatentGroups,
    grad: &Tensor,
    saved: &Saved,
) -> Result<Tensor> {
    let (m, d) = saved.w_enc.matrix_dims();
    let (_, k) = grad.matrix_dims();
    let (grad, x, centre) = (grad.f32s()?, saved.x.f32s()?, saved.b_dec.f32s()?);
    let mut out = device.buffer(m * d);
    out.par_chunks_mut(LATENT_BLOCK * d)
        .enumerate()
        .for_each(|(block, out)| {
            vectorized!({
                for (i, out) in out.chunks_exact_mut(d).enumerate() {
                    out.fill(0.0);
                    for &pair in groups.pairs_of(block * LATENT_BLOCK + i) {
                        let g = grad[pair as usize];
                        let token = &x[pair as usize / k * d..][..d];
                        for ((o, x), c) in out.iter_mut().zip(token).zip(centre) {
                            *o += g * (x - c);
                        }
                    }
                }
            });
        });
    Tensor::from_buffer(out, [m, d])
}
