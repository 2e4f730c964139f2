//! X Wᵀ for few rows of X: blocks of rows of W, each multiplied with all of X while it is in the
//! cache.

use std::array::from_fn;

use half::bf16;
use rayon::prelude::*;

use super::Map;
use crate::device::Device;
use crate::device::simd::{CACHE_LINE, Fetch, Simd, level, prefetch, vectorized};
use crate::error::Result;
use crate::tensor::{Buffer, DType, Tensor};

/// Partial sums of a product: one vector register of 512 bits.
const LANES: usize = 16;
/// Weights that are widened at a time: a cache line of bf16.
const CHUNK: usize = 2 * LANES;
/// Rows of X that are multiplied at a time, and rows of W where there are registers for it.
const TILE: usize = 4;
/// Weights in the block of one task.
const BLOCK: usize = 1 << 15;
/// How far ahead of where they are multiplied weights are asked for, in bytes. Rows of a small
/// model end before the processor has seen that they go on.
const AHEAD: usize = 2048;

/// X Wᵀ as \[B, out\] for each map; X \[B, cols\], shapes checked before.
pub(super) fn products(
    device: &Device,
    x: &[f32],
    cols: usize,
    maps: &[Map],
) -> Result<Vec<Buffer>> {
    let batch = x.len() / cols;
    let block = (BLOCK / cols).next_multiple_of(TILE).max(TILE);
    let mut arranged = Vec::new();
    if maps.iter().any(|map| map.weight.dtype() == DType::Bf16) {
        arranged = even_then_odd(x, cols);
    }
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
        .try_for_each(|(weight, start, out)| product(weight, start, [x, &arranged], cols, out))?;
    if batch > 1 {
        for out in &mut outputs {
            *out = transposed(device, out, batch);
        }
    }
    Ok(outputs)
}

/// Rows of X, each in the order in which bf16 weights are widened: of every chunk the values of even
/// index, then those of odd index.
fn even_then_odd(x: &[f32], cols: usize) -> Vec<f32> {
    let mut arranged = x.to_vec();
    for (to, from) in arranged.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
        let to = to.as_chunks_mut::<CHUNK>().0;
        for (to, from) in to.iter_mut().zip(from.as_chunks::<CHUNK>().0) {
            for i in 0..LANES {
                to[i] = from[2 * i];
                to[LANES + i] = from[2 * i + 1];
            }
        }
    }
    arranged
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

/// Rows of W from `start` on times each row of X: `out` is \[rows of W, B\]. X as it is, and
/// arranged for bf16.
fn product(
    weight: &Tensor,
    start: usize,
    [x, arranged]: [&[f32]; 2],
    cols: usize,
    out: &mut [f32],
) -> Result<()> {
    let range = start * cols..(start + out.len() * cols / x.len()) * cols;
    match weight.dtype() {
        DType::F32 if let Ok(data) = weight.f32s() => at_level(&data[range], x, cols, out),
        DType::Bf16 if let Some(data) = weight.bf16s() => {
            let data = &data[range];
            match x.len() == cols {
                true => vectorized!(stream(data, arranged, cols, out)),
                false => at_level(&vectorized!(widened(data, cols)), arranged, cols, out),
            }
        }
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
fn at_level(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    match level() {
        _ if x.len() == cols => vectorized!(stream(weights, x, cols, out)),
        Simd::Avx512 => vectorized!(block::<TILE>(weights, x, cols, out)),
        _ => vectorized!(block::<1>(weights, x, cols, out)),
    }
}

/// Weights that become f32 in registers.
trait Weight: Copy {
    /// One half of a chunk, the first or the second.
    fn widen(chunk: &[Self; CHUNK], half: usize) -> [f32; LANES];

    fn wide(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(chunk: &[Self; CHUNK], half: usize) -> [f32; LANES] {
        from_fn(|i| chunk[half * LANES + i])
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    /// Those of even or those of odd index, which takes one instruction each: bf16 is the upper
    /// half of an f32, and two of them lie in a word.
    #[inline(always)]
    fn widen(chunk: &[Self; CHUNK], half: usize) -> [f32; LANES] {
        let words: [u32; LANES] = bytemuck::pod_read_unaligned(bytemuck::bytes_of(chunk));
        match half {
            0 => words.map(|word| f32::from_bits(u32::from_le(word) << 16)),
            _ => words.map(|word| f32::from_bits(u32::from_le(word) & 0xffff_0000)),
        }
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Rows of weights in f32, each in the order of [`even_then_odd`].
#[inline(always)]
fn widened(weights: &[bf16], cols: usize) -> Vec<f32> {
    let mut wide = Vec::with_capacity(weights.len());
    for row in weights.chunks_exact(cols) {
        let (chunks, rest) = row.as_chunks::<CHUNK>();
        for chunk in chunks {
            prefetch(chunk.as_ptr().cast::<u8>().wrapping_add(AHEAD), Fetch::Once);
            wide.extend(bf16::widen(chunk, 0));
            wide.extend(bf16::widen(chunk, 1));
        }
        wide.extend(rest.iter().map(|w| w.wide()));
    }
    wide
}

/// Rows of W times the one row of X. What this waits for is memory, which is fastest where it is
/// read from end to end.
#[inline(always)]
fn stream<W: Weight>(weights: &[W], x: &[f32], cols: usize, out: &mut [f32]) {
    for (row, out) in weights.chunks_exact(cols).zip(out) {
        *out = dot(row, x);
    }
}

/// ⟨w, x⟩.
#[inline(always)]
fn dot<W: Weight>(w: &[W], x: &[f32]) -> f32 {
    let (w_chunks, w_rest) = w.as_chunks::<CHUNK>();
    let (x_chunks, x_rest) = x.as_chunks::<CHUNK>();
    let mut sums = [0.0f32; LANES];
    for (w, x) in w_chunks.iter().zip(x_chunks) {
        for line in (0..size_of_val(w)).step_by(CACHE_LINE) {
            prefetch(
                w.as_ptr().cast::<u8>().wrapping_add(AHEAD + line),
                Fetch::Once,
            );
        }
        for half in 0..2 {
            let w = W::widen(w, half);
            for lane in 0..LANES {
                sums[lane] += w[lane] * x[half * LANES + lane];
            }
        }
    }
    add_up(sums) + rest(w_rest, x_rest)
}

/// Rows of W times each row of X, `R` of W at a time.
#[inline(always)]
fn block<const R: usize>(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    let batch = x.len() / cols;
    for (weights, out) in weights.chunks(R * cols).zip(out.chunks_mut(R * batch)) {
        if weights.len() == R * cols {
            let rows: [&[f32]; R] = from_fn(|r| &weights[r * cols..(r + 1) * cols]);
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
fn columns<const R: usize>(rows: [&[f32]; R], x: &[f32], cols: usize, out: &mut [f32]) {
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
        for (r, row) in rows.iter().enumerate() {
            out[r * batch + b] = dot(row, row_of_x(b));
        }
    }
}

/// ⟨w_r, x_c⟩ for each pair, each in the order in which [`dot`] adds.
#[inline(always)]
fn dots<const R: usize, const C: usize>(w: [&[f32]; R], x: [&[f32]; C]) -> [[f32; C]; R] {
    let whole = x[0].len() / CHUNK * CHUNK;
    let w_parts = w.map(|w| w.split_at(whole));
    let x_parts = x.map(|x| x.split_at(whole));
    let w_chunks = w_parts.map(|(w, _)| w.as_chunks::<LANES>().0);
    let x_chunks = x_parts.map(|(x, _)| x.as_chunks::<LANES>().0);
    let mut sums = [[[0.0f32; LANES]; C]; R];
    for i in 0..whole / LANES {
        for r in 0..R {
            let w = w_chunks[r][i];
            for c in 0..C {
                let x = x_chunks[c][i];
                for lane in 0..LANES {
                    sums[r][c][lane] += w[lane] * x[lane];
                }
            }
        }
    }
    from_fn(|r| from_fn(|c| add_up(sums[r][c]) + rest(w_parts[r].1, x_parts[c].1)))
}

/// ⟨w, x⟩ of what comes after the last whole chunk.
#[inline(always)]
fn rest<W: Weight>(w: &[W], x: &[f32]) -> f32 {
    w.iter().zip(x).map(|(w, x)| w.wide() * x).sum()
}

/// The sum of the lanes, pairwise. They pass through memory once, so that the narrow vectors of the
/// last additions are not taken for the loop before them, as in `math::add_up`.
#[inline(always)]
fn add_up(lanes: [f32; LANES]) -> f32 {
    let lanes = std::hint::black_box(lanes);
    let eight: [f32; 8] = from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
