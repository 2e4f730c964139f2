//! Attention and its gradients by the textbook's formulas.

use half::bf16;
use resa_engine::tensor::Tensor;

use super::Case;

pub(super) fn to_bf16(value: f64) -> f64 {
    bf16::from_f64(value).to_f64()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The output and the gradients of Σ o_i u_i by the textbook's formulas in float64, with the whole
/// matrix of weights. Scores, weights, their gradients and the results go through `round`.
pub(super) fn textbook(
    case: Case,
    x: &[Vec<f64>],
    starts: Option<&Tensor>,
    up: &[f64],
    round: fn(f64) -> f64,
) -> (Vec<f64>, [Vec<f64>; 3]) {
    let (d, group) = (case.head_dim, case.heads / case.kv_heads);
    let scale = 1.0 / (d as f64).sqrt();
    let starts = starts.map(|s| s.u32s().unwrap());
    let mut grads = [0, 1, 2].map(|i: usize| vec![0.0; x[i].len()]);
    let mut o = vec![0.0; x[0].len()];
    for row in 0..case.batch * case.seq_len {
        let first = row / case.seq_len * case.seq_len + starts.map_or(0, |s| s[row] as usize);
        for head in 0..case.heads {
            let i = (row * case.heads + head) * d;
            let at = |j: usize| (j * case.kv_heads + head / group) * d;
            let score = |j: usize| round(scale * dot(&x[0][i..i + d], &x[1][at(j)..][..d]));
            let scores: Vec<f64> = (first..=row).map(score).collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let weights = scores.iter().map(|s| round((s - max).exp() / sum));
            let p: Vec<f64> = weights.collect();
            let dp = (first..=row).map(|j| round(dot(&up[i..i + d], &x[2][at(j)..][..d])));
            let dp: Vec<f64> = dp.collect();
            let mean = dot(&p, &dp);
            for (n, j) in (first..=row).enumerate() {
                let ds = round(p[n] * (dp[n] - mean)) * scale;
                for c in 0..d {
                    o[i + c] += p[n] * x[2][at(j) + c];
                    grads[0][i + c] += ds * x[1][at(j) + c];
                    grads[1][at(j) + c] += ds * x[0][i + c];
                    grads[2][at(j) + c] += p[n] * up[i + c];
                }
            }
        }
    }
    let results = grads.iter_mut().chain([&mut o]).flatten();
    results.for_each(|v| *v = round(*v));
    (o, grads)
}
