//! Head, softmax, Kullback-Leibler divergence and its gradient, fused over chunks of tokens:
//! loss = (1/batch) Σ_t KL(softmax(h'_t Wᵀ) ‖ softmax(h_t Wᵀ)).
//!
//! h' (teacher) and h (student) \[T, d\] f32 after the final norm, W \[V, d\]. The gradient
//! (1/batch) (q − p) W with respect to h is computed in the same sweep over the chunks and is
//! all that is saved, so that no T x V matrix ever exists. Two products a chunk forward (teacher
//! and student rows stacked in one), one for the gradient.

use faer::Accum;
use rayon::prelude::*;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::ops::gemm::{product_nn, product_nt};
use crate::ops::math::{LANES, add_up, exp};
use crate::ops::{Operator, expect_cols, expect_inputs, expect_shape, head};
use crate::tensor::Tensor;

/// Input: the student's hidden states \[T, d\]. Output: the loss \[1\].
pub struct KlDiv {
    /// h' \[T, d\]
    pub teacher: Tensor,
    /// W \[V, d\]
    pub head: Tensor,
    /// What the sum over tokens is divided by.
    pub batch: f32,
}

impl Operator for KlDiv {
    /// The input's gradient for a loss gradient of 1.
    type Saved = Option<Tensor>;
    const NAME: &'static str = "kl_div";

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [student] = expect_inputs(Self::NAME, inputs)?;
        expect_shape(Self::NAME, &self.teacher, student.shape())?;
        let ((tokens, d), (vocab, _)) = (student.matrix_dims(), self.head.matrix_dims());
        expect_cols(Self::NAME, &self.head, d)?;
        let chunk = head::chunk_tokens(tokens, vocab, 2);
        let mut logits = device.buffer(2 * chunk * vocab);
        let mut stacked = device.buffer(2 * chunk * d);
        let mut grad = needed[0].then(|| device.buffer(tokens * d));
        let mut loss = 0.0;
        let chunks = self
            .teacher
            .f32s()?
            .chunks(chunk * d)
            .zip(student.f32s()?.chunks(chunk * d));
        for (i, (teacher, student)) in chunks.enumerate() {
            let n = student.len() / d;
            stacked[..n * d].copy_from_slice(teacher);
            stacked[n * d..2 * n * d].copy_from_slice(student);
            let logits = &mut logits[..2 * n * vocab];
            product_nt(
                device,
                logits,
                Accum::Replace,
                &stacked[..2 * n * d],
                &self.head,
                1.0,
            )?;
            let (p, q) = logits.split_at_mut(n * vocab);
            let terms: Vec<f32> = p
                .par_chunks(vocab)
                .zip(q.par_chunks_mut(vocab))
                .map(|(p, q)| divergence(p, q, 1.0 / self.batch))
                .collect();
            loss += terms.iter().map(|&v| f64::from(v)).sum::<f64>();
            if let Some(grad) = &mut grad {
                let grad = &mut grad[i * chunk * d..][..n * d];
                product_nn(device, grad, Accum::Replace, q, &self.head)?;
            }
        }
        let loss = (loss / f64::from(self.batch)) as f32;
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the KL divergence is {loss}"),
            });
        }
        let grad = grad
            .map(|g| Tensor::from_buffer(g, student.shape()))
            .transpose()?;
        Ok((vec![Tensor::from_vec(vec![loss], [1])?], grad))
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

/// KL(softmax(p) ‖ softmax(q)) of two rows of logits; q becomes `scale` (softmax(q) − softmax(p)).
fn divergence(p: &[f32], q: &mut [f32], scale: f32) -> f32 {
    let (log_p_sum, log_q_sum) = (head::log_sum_exp(p), head::log_sum_exp(q));
    vectorized!(divergence_and_gradient(p, q, log_p_sum, log_q_sum, scale))
}

#[inline(always)]
fn divergence_and_gradient(
    p: &[f32],
    q: &mut [f32],
    log_p_sum: f32,
    log_q_sum: f32,
    scale: f32,
) -> f32 {
    let mut lanes = [0.0; LANES];
    for (p, q) in p.chunks(LANES).zip(q.chunks_mut(LANES)) {
        for ((lane, p), q) in lanes.iter_mut().zip(p).zip(q) {
            let (log_p, log_q) = (p - log_p_sum, *q - log_q_sum);
            let p = exp(log_p);
            *lane += p * (log_p - log_q);
            *q = scale * (exp(log_q) - p);
        }
    }
    add_up(lanes)
}
