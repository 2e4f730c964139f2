//! What kl_div and cross_entropy share: chunks of tokens, so that logits exist for one chunk at
//! a time, and the softmax statistics of a row.

use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::math::{LANES, add_up, exp};
use crate::ops::only_grad;
use crate::tensor::Tensor;

/// Tokens in a chunk: as many as keep `copies` rows of logits a token within 32 MiB (the size of
/// a last-level cache), in chunks of nearly equal size.
pub(super) fn chunk_tokens(tokens: usize, vocab: usize, copies: usize) -> usize {
    const BUDGET: usize = (32 << 20) / size_of::<f32>();
    let fitting = (BUDGET / (vocab * copies).max(1)).max(1);
    tokens.div_ceil(tokens.div_ceil(fitting).max(1)).max(1)
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
