//! Head, softmax, cross-entropy and its gradient, fused over chunks of tokens:
//! loss = (1/n) Σ_t w_t (log Σ_v exp(l_tv) − l_t,y_t), l = h Wᵀ, where w_t is 1 for tokens that
//! count, else 0, and n their number.
//!
//! h \[T, d\] f32 after the final norm, W \[V, d\], y \[T\] u32. As in kl_div, the gradient with
//! respect to h is computed in the same sweep and is all that is saved. Tokens that do not count
//! are left out of the products.

use faer::Accum;
use rayon::prelude::*;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::ops::gemm::{product_nn, product_nt};
use crate::ops::math::exp;
use crate::ops::{Operator, expect_cols, expect_inputs, head};
use crate::tensor::Tensor;

/// Input: hidden states \[T, d\]. Outputs: the mean loss \[1\]; the loss of each token \[T\], 0
/// for those that do not count (no gradient flows through it).
pub struct CrossEntropy {
    /// y: the token that should follow each position; `None` where the position does not count.
    pub targets: Vec<Option<u32>>,
    /// W \[V, d\]
    pub head: Tensor,
}

impl Operator for CrossEntropy {
    /// The input's gradient for a loss gradient of 1.
    type Saved = Option<Tensor>;
    const NAME: &'static str = "cross_entropy";

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [hidden] = expect_inputs(Self::NAME, inputs)?;
        let ((tokens, d), (vocab, _)) = (hidden.matrix_dims(), self.head.matrix_dims());
        expect_cols(Self::NAME, &self.head, d)?;
        let counted = self.counted(tokens, vocab)?;
        let scale = 1.0 / counted.len() as f32;
        let hidden_rows = hidden.f32s()?;
        let chunk = head::chunk_tokens(counted.len(), vocab, 1);
        let mut logits = device.buffer(chunk * vocab);
        let (mut gathered, mut gathered_grad) =
            (device.buffer(chunk * d), device.buffer(chunk * d));
        let mut grad = needed[0].then(|| device.zeroed(tokens * d));
        let mut losses = vec![0.0; tokens];
        for counted in counted.chunks(chunk) {
            let n = counted.len();
            for (row, &(t, _)) in gathered.chunks_exact_mut(d).zip(counted) {
                row.copy_from_slice(&hidden_rows[t * d..][..d]);
            }
            let logits = &mut logits[..n * vocab];
            product_nt(
                device,
                logits,
                Accum::Replace,
                &gathered[..n * d],
                &self.head,
                1.0,
            )?;
            let rows = logits.par_chunks_mut(vocab).zip(counted);
            let terms: Vec<f32> = rows
                .map(|(row, &(_, y))| nll(row, y as usize, scale))
                .collect();
            counted
                .iter()
                .zip(terms)
                .for_each(|(&(t, _), loss)| losses[t] = loss);
            if let Some(grad) = &mut grad {
                let chunk_grad = &mut gathered_grad[..n * d];
                product_nn(device, chunk_grad, Accum::Replace, logits, &self.head)?;
                for (row, &(t, _)) in chunk_grad.chunks_exact(d).zip(counted) {
                    grad[t * d..][..d].copy_from_slice(row);
                }
            }
        }
        let loss = losses.iter().map(|&v| f64::from(v)).sum::<f64>() / counted.len() as f64;
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the cross-entropy is {loss}"),
            });
        }
        let grad = grad
            .map(|g| Tensor::from_buffer(g, hidden.shape()))
            .transpose()?;
        let outputs = vec![
            Tensor::from_vec(vec![loss as f32], [1])?,
            Tensor::from_vec(losses, [tokens])?,
        ];
        Ok((outputs, grad))
    }

    fn backward(
        &self,
        _: &Device,
        saved: Self::Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        head::scaled(Self::NAME, saved, grads)
    }
}

impl CrossEntropy {
    /// (position, target) of the tokens that count.
    fn counted(&self, tokens: usize, vocab: usize) -> Result<Vec<(usize, u32)>> {
        let counted: Vec<_> = self
            .targets
            .iter()
            .enumerate()
            .filter_map(|(t, y)| Some((t, (*y)?)))
            .collect();
        let invalid = counted.iter().find(|(_, y)| *y as usize >= vocab);
        if self.targets.len() != tokens || counted.is_empty() || invalid.is_some() {
            return Err(Error::operand(
                Self::NAME,
                format!("{tokens} targets below {vocab}, one of them at least counting"),
                format!(
                    "{} targets, {} counting, {invalid:?}",
                    self.targets.len(),
                    counted.len()
                ),
            ));
        }
        Ok(counted)
    }
}

/// −log softmax(row)[y]; the row becomes `scale` (softmax(row) − onehot(y)).
fn nll(row: &mut [f32], y: usize, scale: f32) -> f32 {
    let log_sum = head::log_sum_exp(row);
    let loss = log_sum - row[y];
    vectorized!(softmax_scaled(row, log_sum, scale));
    row[y] -= scale;
    loss
}

#[inline(always)]
fn softmax_scaled(row: &mut [f32], log_sum: f32, scale: f32) {
    row.iter_mut().for_each(|v| *v = scale * exp(*v - log_sum));
}
