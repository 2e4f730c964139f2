//! Loops over rows of f32 matrices, compiled for the widest vectors the processor has. Products
//! and sums are rounded one by one (no fused multiply-add) and sums have a fixed number of
//! lanes, so the result does not depend on the processor.

use rayon::prelude::*;

const LANES: usize = 32;

/// Rows that one task sums up before the partial sums are added in order.
const SUM_BLOCK: usize = 64;

/// Runs `work` with the loops inlined into it compiled for this processor's vectors. `work` must
/// itself be `#[inline(always)]`: a function of its own would be compiled for the baseline.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// ⟨a, b⟩ in 32 partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

/// ‖a − b‖² in 32 partial sums.
#[inline(always)]
pub(crate) fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| (a - b) * (a - b))
}

/// Σ_i term(a_i, b_i). Every index into the partial sums is a constant, so that they stay in
/// vector registers.
#[inline(always)]
fn sum_of(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += term(a[i], b[i]);
        }
    }
    let mut rest = 0.0;
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        rest += term(a, b);
    }
    let mut eight = [0.0f32; 8];
    for i in 0..8 {
        eight[i] = (lanes[i] + lanes[i + 8]) + (lanes[i + 16] + lanes[i + 24]);
    }
    let [a, b, c, d, e, f, g, h] = eight;
    (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest
}

/// `out += scale * row`.
#[inline(always)]
pub(crate) fn add_scaled(out: &mut [f32], scale: f32, row: &[f32]) {
    for (o, r) in out.iter_mut().zip(row) {
        *o += scale * r;
    }
}

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
            vectorized(
                #[inline(always)]
                || {
                    for (r, row) in rows.chunks_exact(d).enumerate() {
                        add_scaled(
                            &mut sum,
                            weights.map_or(1.0, |w| w[block * SUM_BLOCK + r]),
                            row,
                        );
                    }
                },
            );
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
