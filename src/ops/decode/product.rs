//! X Wᵀ for few rows of X: blocks of rows of W, each multiplied with all of X while it is in the
//! cache.

use std::array::from_fn;

use half::bf16;
use rayon::prelude::*;

use super::Map;
use crate::device::Device;
use crate::device::simd::{Simd, level, vectorized};
use crate::error::Result;
use crate::tensor::{Buffer, DType, Tensor};

/// Partial sums of a product: one vector register of 512 bits.
const LANES: usize = 16;
/// Rows of X that are multiplied at a time, and rows of W where X has one.
const TILE: usize = 4;
/// Weights in the block of one task.
const BLOCK: usize = 1 << 15;

/// X Wᵀ as \[B, out\] for each map; X \[B, cols\], shapes checked before.
pub(super) fn products(
    device: &Device,
    x: &[f32],
    cols: usize,
    maps: &[Map],
) -> Result<Vec<Buffer>> {
    let batch = x.len() / cols;
    let block = (BLOCK / cols).next_multiple_of(TILE).max(TILE);
    let outputs = maps.iter().map(|map| map.weight.matrix_dims().0 * batch);
    let mut outputs: Vec<Buffer> = outputs.map(|len| device.buffer(len)).collect();
    // Transposed, so that what a task writes lies together.
    let tasks: Vec<_> = outputs
        .iter_mut()
        .zip(maps)
        .flat_map(|(out, map)| {
            let blocks = out.chunks_mut(block * batch).enumerate();
            blocks.map(|(i, out)| (map.weight, i * block, out))
        })
        .collect();
    tasks
        .into_par_iter()
        .try_for_each(|(weight, start, out)| product(weight, start, x, cols, out))?;
    if batch > 1 {
        for out in &mut outputs {
            *out = transposed(device, out, batch);
        }
    }
    Ok(outputs)
}

/// \[n, batch\] as \[batch, n\].
fn transposed(device: &Device, columns: &[f32], batch: usize) -> Buffer {
    let n = columns.len() / batch;
    let mut rows = device.buffer(columns.len());
    rows.par_chunks_mut(n.max(1))
        .enumerate()
        .for_each(|(b, row)| {
            for (value, column) in row.iter_mut().zip(columns.chunks_exact(batch)) {
                *value = column[b];
            }
        });
    rows
}

/// Rows of W from `start` on times each row of X: `out` is \[rows of W, B\].
fn product(weight: &Tensor, start: usize, x: &[f32], cols: usize, out: &mut [f32]) -> Result<()> {
    let range = start * cols..(start + out.len() * cols / x.len()) * cols;
    match weight.dtype() {
        DType::F32 if let Ok(data) = weight.f32s() => at_level(&data[range], x, cols, out),
        DType::Bf16 if let Some(data) = weight.bf16s() => at_level(&data[range], x, cols, out),
        _ => {
            let mut data = vec![0.0; range.len()];
            weight.read_f32(range.start, &mut data)?;
            at_level(&data, x, cols, out);
        }
    }
    Ok(())
}

/// Of the rows of W that are multiplied with several of X, as many at a time as there are vector
/// registers for the sums: 32 of 512 bits, else 16 of 256, of which a sum takes two.
fn at_level<W: Weight>(weights: &[W], x: &[f32], cols: usize, out: &mut [f32]) {
    match level() {
        Simd::Avx512 => vectorized!(block::<W, TILE>(weights, x, cols, out)),
        _ => vectorized!(block::<W, 1>(weights, x, cols, out)),
    }
}

/// A weight that becomes an f32 in a register.
trait Weight: Copy {
    fn widen(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Rows of W times each row of X, `R` of W at a time where X has as many as a tile.
#[inline(always)]
fn block<W: Weight, const R: usize>(weights: &[W], x: &[f32], cols: usize, out: &mut [f32]) {
    let batch = x.len() / cols;
    if R < TILE && batch >= TILE {
        for (weights, out) in weights.chunks(cols).zip(out.chunks_mut(batch)) {
            columns([weights], x, cols, out);
        }
        return;
    }
    let quads = weights
        .chunks(TILE * cols)
        .zip(out.chunks_mut(TILE * batch));
    for (weights, out) in quads {
        if weights.len() == TILE * cols {
            let rows: [&[W]; TILE] = from_fn(|r| &weights[r * cols..(r + 1) * cols]);
            columns(rows, x, cols, out);
        } else {
            for (row, out) in weights.chunks(cols).zip(out.chunks_mut(batch)) {
                columns([row], x, cols, out);
            }
        }
    }
}

/// R rows of W times each row of X.
#[inline(always)]
fn columns<W: Weight, const R: usize>(rows: [&[W]; R], x: &[f32], cols: usize, out: &mut [f32]) {
    let batch = x.len() / cols;
    let row_of_x = |b: usize| &x[b * cols..(b + 1) * cols];
    let mut b = 0;
    while b + TILE <= batch {
        let x: [&[f32]; TILE] = from_fn(|c| row_of_x(b + c));
        for (r, sums) in dots(rows, x).iter().enumerate() {
            out[r * batch + b..][..TILE].copy_from_slice(sums);
        }
        b += TILE;
    }
    for b in b..batch {
        for (r, [sum]) in dots(rows, [row_of_x(b)]).iter().enumerate() {
            out[r * batch + b] = *sum;
        }
    }
}

/// ⟨w_r, x_c⟩ for each pair, each in an order of its own that depends on the length alone.
#[inline(always)]
fn dots<W: Weight, const R: usize, const C: usize>(w: [&[W]; R], x: [&[f32]; C]) -> [[f32; C]; R] {
    let w_parts = w.map(|w| w.as_chunks::<LANES>());
    let x_parts = x.map(|x| x.as_chunks::<LANES>());
    let steps = x_parts[0].0.len();
    // All of one length that is known to be the loop's: with a check of bounds within the loop
    // the sums would not stay in registers.
    let w_steps = w_parts.map(|(chunks, _)| &chunks[..steps]);
    let x_steps = x_parts.map(|(chunks, _)| &chunks[..steps]);
    let mut sums = [[[0.0f32; LANES]; C]; R];
    for i in 0..steps {
        for r in 0..R {
            let w = w_steps[r][i].map(W::widen);
            for c in 0..C {
                let x = x_steps[c][i];
                for lane in 0..LANES {
                    sums[r][c][lane] += w[lane] * x[lane];
                }
            }
        }
    }
    from_fn(|r| {
        from_fn(|c| {
            let rest = w_parts[r].1.iter().zip(x_parts[c].1);
            add_up(sums[r][c]) + rest.map(|(w, x)| w.widen() * x).sum::<f32>()
        })
    })
}

/// The sum of the lanes, pairwise.
#[inline(always)]
fn add_up(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
