//! Sums of rows of f32 matrices.

use rayon::prelude::*;

use crate::device::simd::vectorized;
use crate::ops::math::add_scaled;

/// Rows that one task sums up before the partial sums are added in order.
const SUM_BLOCK: usize = 64;

/// `out += Σ_j scales[j] * matrix[indices[j]]`, in the order of j.
#[inline(always)]
pub(crate) fn add_gathered(out: &mut [f32], scales: &[f32], indices: &[u32], matrix: &[f32]) {
    let d = out.len();
    let row = |i: u32| &matrix[i as usize * d..][..d];
    let (scales4, scales_rest) = scales.as_chunks::<4>();
    let (indices4, indices_rest) = indices.as_chunks::<4>();
    // Four rows at once: `out` is read and written a quarter as often.
    for (s, i) in scales4.iter().zip(indices4) {
        let rows = row(i[0])
            .iter()
            .zip(row(i[1]))
            .zip(row(i[2]))
            .zip(row(i[3]));
        for (o, (((a, b), c), d)) in out.iter_mut().zip(rows) {
            *o = (((*o + s[0] * a) + s[1] * b) + s[2] * c) + s[3] * d;
        }
    }
    for (&s, &i) in scales_rest.iter().zip(indices_rest) {
        add_scaled(out, s, row(i));
    }
}

/// Σ_r weights\[r\] matrix\[r\] (weights 1 where `None`) of a matrix with `d` columns: blocks of
/// rows in f32, their sums in f64 in order.
pub(crate) fn weighted_row_sum(matrix: &[f32], d: usize, weights: Option<&[f32]>) -> Vec<f64> {
    let partial: Vec<Vec<f32>> = matrix
        .par_chunks(SUM_BLOCK * d)
        .enumerate()
        .map(|(block, rows)| {
            let mut sum = vec![0.0; d];
            vectorized!({
                for (r, row) in rows.chunks_exact(d).enumerate() {
                    add_scaled(
                        &mut sum,
                        weights.map_or(1.0, |w| w[block * SUM_BLOCK + r]),
                        row,
                    );
                }
            });
            sum
        })
        .collect();
    let mut total = vec![0.0f64; d];
    for sum in &partial {
        for (t, &s) in total.iter_mut().zip(sum) {
            *t += f64::from(s);
        }
    }
    total
}
