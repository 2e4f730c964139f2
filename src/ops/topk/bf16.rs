//! The encoder product in bf16, with the selection made tile by tile: a tile of pre-activations
//! is offered while it is in the first-level cache, and exists nowhere else.

use rayon::prelude::*;

use super::select::RowSelection;
use super::{Encoder, not_finite};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::gemm::bf16::{COLS, Level, Operand, Panels, ROWS, Side, Values};

/// Most tokens of a task: their packed values stay in the second-level cache.
const TASK_TOKENS: usize = 16 * ROWS;
/// Latents whose weights are packed at a time, for all tokens.
const SLAB: usize = 1 << 13;

/// Selects the k largest latents of each row of `x`.
pub(super) fn select(
    device: &Device,
    x: &[f32],
    encoder: &Encoder,
    (acts, indices): (&mut [f32], &mut [u32]),
    k: usize,
) -> Result<()> {
    let level = Level::best();
    let d = encoder.centre.len();
    let mut selections: Vec<_> = (0..x.len() / d).map(|_| RowSelection::new(k)).collect();
    let tokens = task_tokens(selections.len(), rayon::current_num_threads());
    let slabs = encoder.w.chunks(SLAB * d).zip(encoder.b.chunks(SLAB));
    for (slab, (w, b)) in slabs.enumerate() {
        let w = Operand::rows(Values::F32(w), d);
        let latents = Panels::in_parallel(device, level, (&w, Side::Right), 0..b.len(), 0..d);
        selections
            .par_chunks_mut(tokens)
            .zip(x.par_chunks(tokens * d))
            .with_max_len(1)
            .enumerate()
            .try_for_each(|(task, (selections, x))| {
                let packed = packed_tokens(device, level, x, encoder.centre);
                offer_tiles(level, (&packed, &latents), (slab * SLAB, b), selections)
                    .map_err(|row| not_finite(task * tokens + row))
            })?;
    }
    selections
        .par_iter_mut()
        .zip(acts.par_chunks_mut(k).zip(indices.par_chunks_mut(k)))
        .with_min_len(ROWS)
        .for_each(|(selection, (acts, indices))| selection.finish(acts, indices));
    Ok(())
}

/// Tokens of a task, so that each thread has two where there are few: the sums of a tile are the
/// same whatever task it is in.
fn task_tokens(tokens: usize, threads: usize) -> usize {
    let share = tokens.div_ceil(2 * threads.max(1));
    share.next_multiple_of(ROWS).clamp(ROWS, TASK_TOKENS)
}

/// x − b_dec, packed.
fn packed_tokens(device: &Device, level: Level, x: &[f32], centre: &[f32]) -> Panels {
    let d = centre.len();
    let mut centred = device.buffer(x.len());
    vectorized!({
        for (out, row) in centred.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            for ((o, x), c) in out.iter_mut().zip(row).zip(centre) {
                *o = x - c;
            }
        }
    });
    let centred = Operand::rows(Values::F32(&centred), d);
    Panels::new(device, level, (&centred, Side::Left), 0..x.len() / d, 0..d)
}

/// Offers the pre-activations of a slab, of which `first` is the first latent. The error is the
/// row of a value that is not finite.
fn offer_tiles(
    level: Level,
    (tokens, latents): (&Panels, &Panels),
    (first, bias): (usize, &[f32]),
    selections: &mut [RowSelection],
) -> std::result::Result<(), usize> {
    tokens.for_each_tile(level, latents, |row, col, tile| {
        let bias = &bias[col..bias.len().min(col + COLS)];
        vectorized!({
            for (r, sums) in tile.0.iter().enumerate().take(selections.len() - row) {
                let products = &sums[..bias.len()];
                if !selections[row + r].offer_block((first + col) as u32, products, bias) {
                    return Err(row + r);
                }
            }
            Ok(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_are_work_for_every_thread() {
        for (tokens, threads) in [(512, 4), (256, 4), (300, 2), (TASK_TOKENS, 8)] {
            let task = task_tokens(tokens, threads);
            assert!(
                tokens.div_ceil(task) >= threads.min(tokens / ROWS),
                "{tokens}: {task}"
            );
            assert!(task.is_multiple_of(ROWS));
        }
        assert_eq!(task_tokens(1 << 20, 2), TASK_TOKENS);
        assert_eq!(task_tokens(0, 2), ROWS);
    }
}
