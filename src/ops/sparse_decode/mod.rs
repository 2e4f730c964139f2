//! X̂_t = Σ_j a_tj W_dec\[i_tj\] + b_dec: the decoder of a TopK sparse autoencoder (Gao et al.
//! 2024, arXiv 2406.04093), as sparse-dense products instead of dense T x m ones.
//!
//! Least traffic: T k d x 4 bytes forward (rows of W_dec), as much again backward (rows of the
//! upstream gradient, read once for both gradients; bf16 on CUDA, half of that), and the dense
//! ∂W_dec written once.

pub(crate) mod cuda;
mod groups;
pub(crate) mod rows;

use rayon::prelude::*;

use super::math::{add_scaled, dot};
use super::{Operator, expect_cols, expect_inputs, expect_shape, only_grad};
use crate::device::simd::vectorized;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use rows::{add_gathered, weighted_row_sum};

pub(crate) use groups::check_indices;
pub use groups::{LatentGroups, SharedGroups};

/// Tokens of one task.
const TOKEN_BLOCK: usize = 16;
/// Latents of one task.
const LATENT_BLOCK: usize = 64;

/// Inputs: acts \[T, k\], w_dec \[m, d\], b_dec \[d\], all f32. Output: \[T, d\] f32; on CUDA
/// bf16, an activation of the model, where the decoder is frozen.
///
/// Every pair counts, also where the activation is 0; an index out of range is an error.
pub struct SparseDecode {
    /// \[T, k\] u32, each below m.
    pub indices: Tensor,
    /// The grouping of `indices`, shared with the TopK that made them.
    pub groups: SharedGroups,
}

impl Operator for SparseDecode {
    type Saved = (Tensor, Tensor);
    const NAME: &'static str = "sparse_decode";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [acts, w_dec, b_dec] = expect_inputs(Self::NAME, inputs)?;
        let (m, d) = w_dec.matrix_dims();
        expect_shape(Self::NAME, acts, self.indices.shape())?;
        expect_cols(Self::NAME, b_dec, d)?;
        expect_shape(Self::NAME, w_dec, &[m, d])?;
        let (tokens, k) = acts.matrix_dims();
        if d == 0 || k == 0 {
            let got = format!("k = {k}, d = {d}");
            return Err(Error::operand(Self::NAME, "k and d of at least 1", got));
        }
        if let Device::Cuda(cuda) = device {
            return self.forward_cuda(cuda, [acts, w_dec, b_dec], needed);
        }
        check_indices(Self::NAME, self.indices.u32s()?, m)?;
        let mut out = device.buffer(tokens * d);
        gather(
            &mut out,
            (acts.f32s()?, self.indices.u32s()?, k),
            w_dec.f32s()?,
            Some(b_dec.f32s()?),
            d,
        );
        let out = Tensor::from_buffer(out, [tokens, d])?;
        Ok((vec![out], (acts.clone(), w_dec.clone())))
    }

    fn backward(
        &self,
        device: &Device,
        (acts, w_dec): Self::Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = only_grad(Self::NAME, grads)?;
        let (m, d) = w_dec.matrix_dims();
        if let Device::Cuda(cuda) = device {
            return self.backward_cuda(cuda, &grad, (&acts, &w_dec), needed);
        }
        let (grad_acts, grad_w) = if needed[1] {
            let groups = self.groups.get(self.indices.u32s()?, m)?;
            let (a, w) = by_latent(device, groups, &grad, &acts, &w_dec)?;
            (needed[0].then_some(a), Some(w))
        } else if needed[0] {
            let indices = self.indices.u32s()?;
            (Some(by_token(device, indices, &grad, &acts, &w_dec)?), None)
        } else {
            (None, None)
        };
        let grad_b = match needed[2] {
            true => Some(to_f32_row(weighted_row_sum(grad.f32s()?, d, None))?),
            false => None,
        };
        Ok(vec![grad_acts, grad_w, grad_b])
    }
}

impl SparseDecode {
    fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        [acts, w_dec, b_dec]: [&Tensor; 3],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, (Tensor, Tensor))> {
        let (m, _) = w_dec.matrix_dims();
        let indices = cuda::resident_indices(cuda, &self.indices, m)?;
        let acts = cuda.resident(acts, DType::F32)?;
        let w_dec = cuda.resident(w_dec, DType::F32)?;
        let b_dec = cuda.resident(b_dec, DType::F32)?;
        let dtype = match needed[1] || needed[2] {
            true => DType::F32,
            false => DType::Bf16,
        };
        let out = cuda::gather(cuda, (&acts, &indices), &w_dec, Some(&b_dec), dtype)?;
        Ok((vec![out], (acts, w_dec)))
    }

    fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        grad: &Tensor,
        (acts, w_dec): (&Tensor, &Tensor),
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (m, d) = w_dec.matrix_dims();
        let (tokens, _) = acts.matrix_dims();
        expect_shape(Self::NAME, grad, &[tokens, d])?;
        let grad = cuda.resident(grad, DType::Bf16)?;
        let indices = cuda::resident_indices(cuda, &self.indices, m)?;
        let pairs = (acts, &indices);
        let (grad_acts, grad_w) = if needed[1] {
            let (a, w) = cuda::by_latent(cuda, &self.groups, &grad, pairs, w_dec)?;
            (needed[0].then_some(a), Some(w))
        } else if needed[0] {
            (Some(cuda::by_token(cuda, &grad, pairs, w_dec)?), None)
        } else {
            (None, None)
        };
        let grad_b = match needed[2] {
            true => Some(cuda::row_sum(cuda, &grad, None, 1.0)?),
            false => None,
        };
        Ok(vec![grad_acts, grad_w, grad_b])
    }
}

/// A vector of d values from sums in f64.
pub(crate) fn to_f32_row(sums: Vec<f64>) -> Result<Tensor> {
    let d = sums.len();
    Tensor::from_vec(sums.into_iter().map(|v| v as f32).collect(), [d])
}

/// `out[t] = bias + Σ_j scales[t, j] matrix[indices[t, j]]`; no bias means zero. k and d are at least 1.
pub(crate) fn gather(
    out: &mut [f32],
    (scales, indices, k): (&[f32], &[u32], usize),
    matrix: &[f32],
    bias: Option<&[f32]>,
    d: usize,
) {
    out.par_chunks_mut(TOKEN_BLOCK * d)
        .zip(scales.par_chunks(TOKEN_BLOCK * k))
        .zip(indices.par_chunks(TOKEN_BLOCK * k))
        .for_each(|((out, scales), indices)| {
            vectorized!({
                let pairs = scales.chunks_exact(k).zip(indices.chunks_exact(k));
                for (out, (scales, indices)) in out.chunks_exact_mut(d).zip(pairs) {
                    match bias {
                        Some(bias) => out.copy_from_slice(bias),
                        None => out.fill(0.0),
                    }
                    add_gathered(out, scales, indices, matrix);
                }
            });
        });
}

/// ∂acts and ∂W_dec in one sweep over the latents: row t of the gradient is read once for both.
fn by_latent(
    device: &Device,
    groups: &LatentGroups,
    grad: &Tensor,
    acts: &Tensor,
    w_dec: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (m, d) = w_dec.matrix_dims();
    let (_, k) = acts.matrix_dims();
    let mut sorted = device.buffer(acts.len());
    let mut grad_w = device.buffer(m * d);
    let (grad, a, w) = (grad.f32s()?, acts.f32s()?, w_dec.f32s()?);
    grad_w
        .par_chunks_mut(LATENT_BLOCK * d)
        .zip(groups.split_blocks(LATENT_BLOCK, &mut sorted))
        .enumerate()
        .for_each(|(block, (grad_w, grad_acts))| {
            vectorized!({
                let mut grad_acts = grad_acts.iter_mut();
                for (i, grad_row) in grad_w.chunks_exact_mut(d).enumerate() {
                    let latent = block * LATENT_BLOCK + i;
                    let row = &w[latent * d..][..d];
                    grad_row.fill(0.0);
                    for (&pair, grad_act) in groups.pairs_of(latent).iter().zip(&mut grad_acts) {
                        let token = &grad[pair as usize / k * d..][..d];
                        *grad_act = dot(token, row);
                        add_scaled(grad_row, a[pair as usize], token);
                    }
                }
            });
        });
    let mut grad_acts = device.buffer(acts.len());
    for (&pair, &value) in groups.pairs().iter().zip(sorted.iter()) {
        grad_acts[pair as usize] = value;
    }
    Ok((
        Tensor::from_buffer(grad_acts, acts.shape())?,
        Tensor::from_buffer(grad_w, [m, d])?,
    ))
}

/// ∂acts alone, for a frozen decoder.
fn by_token(
    device: &Device,
    indices: &[u32],
    grad: &Tensor,
    acts: &Tensor,
    w_dec: &Tensor,
) -> Result<Tensor> {
    let (_, d) = w_dec.matrix_dims();
    let (_, k) = acts.matrix_dims();
    let mut grad_acts = device.buffer(acts.len());
    let (grad, w) = (grad.f32s()?, w_dec.f32s()?);
    grad_acts
        .par_chunks_mut(k)
        .zip(indices.par_chunks(k))
        .zip(grad.par_chunks(d))
        .for_each(|((out, indices), token)| {
            vectorized!({
                for (o, &i) in out.iter_mut().zip(indices) {
                    *o = dot(token, &w[i as usize * d..][..d]);
                }
            });
        });
    Tensor::from_buffer(grad_acts, acts.shape())
}
