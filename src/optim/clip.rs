use rayon::prelude::*;

use crate::error::Result;
use crate::tensor::Tensor;

/// Scales all gradients so that their common norm is at most `max_norm`; the norm before. As
/// PyTorch's `clip_grad_norm_`, the divisor is the norm plus 1e-6.
pub fn clip_grad_norm(grads: &mut [&mut Tensor], max_norm: f64) -> Result<f64> {
    let mut sum = 0.0;
    for grad in grads.iter() {
        sum += sum_of_squares(grad.f32s()?);
    }
    let norm = sum.sqrt();
    let scale = (max_norm / (norm + 1e-6)) as f32;
    if scale < 1.0 {
        for grad in grads.iter_mut() {
            grad.f32s_mut()?
                .par_iter_mut()
                .with_min_len(1 << 14)
                .for_each(|g| *g *= scale);
        }
    }
    Ok(norm)
}

/// In float64, over chunks of fixed size added up in order, so that the result does not depend
/// on the number of threads.
fn sum_of_squares(values: &[f32]) -> f64 {
    const CHUNK: usize = 1 << 14;
    let partial: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| chunk.iter().map(|&v| f64::from(v) * f64::from(v)).sum())
        .collect();
    partial.iter().sum()
}
