//! What happens to a tile of scores between the matrix products. Times `scale` they are in base 2.
//! Of a row of the tile the first `visible.keys.len()` take part in the products.

use std::ops::Range;

use crate::ops::math::{LANES, add_up, exp2_of_negative};

/// Which keys of a block the stacked rows of a query tile see.
pub(super) struct Visible<'a> {
    /// Position of the tile's first query in its sequence.
    pub(super) first_query: usize,
    /// The stacked row that the rows here begin with.
    pub(super) first_row: usize,
    /// Stacked rows of one query.
    pub(super) group: usize,
    /// The block of keys, as positions in the sequence.
    pub(super) keys: Range<usize>,
    /// For each query of the tile the first position that it sees.
    pub(super) doc_starts: Option<&'a [u32]>,
}

impl Visible<'_> {
    /// The columns that row `row` sees.
    #[inline(always)]
    fn columns(&self, row: usize) -> Range<usize> {
        let query = (self.first_row + row) / self.group;
        let start = self.doc_starts.map_or(0, |starts| starts[query] as usize);
        let end = (self.first_query + query + 1).min(self.keys.end);
        start.saturating_sub(self.keys.start)..end.saturating_sub(self.keys.start)
    }
}

/// Whole vectors that cover the visible columns of a row. Around them within these vectors a
/// score of minus infinity is put; outside of them the row becomes zero.
#[inline(always)]
fn cover(row: &mut [f32], columns: Range<usize>, width: usize) -> Range<usize> {
    if columns.is_empty() {
        row[..width].fill(0.0);
        return 0..0;
    }
    let vectors = columns.start / LANES..columns.end.div_ceil(LANES);
    let (first, last) = (vectors.start * LANES, vectors.end * LANES);
    row[..first].fill(0.0);
    row[first..columns.start].fill(f32::NEG_INFINITY);
    row[columns.end..last].fill(f32::NEG_INFINITY);
    if last < width {
        row[last..width].fill(0.0);
    }
    vectors
}

/// One step of the online softmax: scores, in rows of `width`, become 2^(score - maximum), and what
/// `sum` and `o` ([rows, D]) hold from earlier blocks is brought to the new maximum.
#[inline(always)]
pub(super) fn online_softmax(
    (scores, width, scale): (&mut [f32], usize, f32),
    visible: &Visible<'_>,
    max: &mut [f32],
    sum: &mut [f32],
    o: &mut [f32],
) {
    let d = o.len() / max.len();
    let rows = scores.chunks_exact_mut(width).zip(o.chunks_exact_mut(d));
    for (r, ((row, o), (max, sum))) in rows.zip(max.iter_mut().zip(sum)).enumerate() {
        let vectors = cover(row, visible.columns(r), visible.keys.len());
        let vectors = &mut row.as_chunks_mut::<LANES>().0[vectors];
        let mut largest = [f32::NEG_INFINITY; LANES];
        for vector in vectors.iter() {
            for (l, s) in largest.iter_mut().zip(vector) {
                *l = if *s > *l { *s } else { *l };
            }
        }
        let new = largest.iter().map(|l| scale * l);
        let new = new.fold(*max, |a, b| if b > a { b } else { a });
        let mut sums = [0.0f32; LANES];
        for vector in vectors {
            for (total, s) in sums.iter_mut().zip(vector) {
                *s = exp2_of_negative(scale * *s - new);
                *total += *s;
            }
        }
        if new > *max {
            let shrink = exp2_of_negative(*max - new);
            *sum *= shrink;
            o.iter_mut().for_each(|o| *o *= shrink);
            *max = new;
        }
        *sum += add_up(sums);
    }
}

/// Ends the online softmax: `o` is divided by the sums, `max` becomes the base-2 logarithm
/// of the softmax's denominator.
#[inline(always)]
pub(super) fn finish_softmax(max: &mut [f32], sum: &[f32], o: &mut [f32]) {
    let d = o.len() / max.len();
    for ((o, max), sum) in o.chunks_exact_mut(d).zip(max).zip(sum) {
        o.iter_mut().for_each(|o| *o *= 1.0 / sum);
        *max += sum.log2();
    }
}

/// Scores become probabilities P, and the products dO V^T in `grads` become
/// dS = P (dO V^T - delta); the rows of both are `width` long.
#[inline(always)]
pub(super) fn softmax_backward(
    (scores, grads, width): (&mut [f32], &mut [f32], usize),
    scale: f32,
    visible: &Visible<'_>,
    log_sum: &[f32],
    delta: &[f32],
) {
    let rows = scores
        .chunks_exact_mut(width)
        .zip(grads.chunks_exact_mut(width));
    let width = visible.keys.len();
    for (r, ((row, grad), (&log_sum, &delta))) in rows.zip(log_sum.iter().zip(delta)).enumerate() {
        let vectors = cover(row, visible.columns(r), width);
        grad[..width.min(vectors.start * LANES)].fill(0.0);
        grad[width.min(vectors.end * LANES)..width].fill(0.0);
        let row = &mut row.as_chunks_mut::<LANES>().0[vectors.clone()];
        let grad = &mut grad.as_chunks_mut::<LANES>().0[vectors];
        for (row, grad) in row.iter_mut().zip(grad) {
            // Copies, so that the compiler sees that the two do not overlap.
            let (mut p, mut g) = (*row, *grad);
            for p in &mut p {
                *p = exp2_of_negative(scale * *p - log_sum);
            }
            for (g, p) in g.iter_mut().zip(&p) {
                *g = p * (*g - delta);
            }
            (*row, *grad) = (p, g);
        }
    }
}
