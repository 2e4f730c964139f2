//! Backward in one pass over the pairs of a block of queries and a block of keys that it may see.
//! In step s of n, for n blocks, the keys of block j meet the queries of block i ≥ j with
//! i + j = s modulo n: the pairs of a step add to different parts of dQ, dK and dV, so that threads
//! share no sum, every sum is added up in the order of the steps, and all steps have about as much to
//! do. That is all five products for each pair, where one pass for dQ and another for dK and dV
//! computes the scores and dP twice.

use std::ops::Range;

use rayon::prelude::*;

use super::arithmetic::{Arithmetic, Grads, KeysAndValues, Upstream};
use super::{Block, FlashAttention, KEYS, Operands, TileOf, blocks, copy_scaled};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::math::dot;
use crate::ops::stored::Stored;
use crate::tensor::{Buffer, Tensor};

/// Positions of a block of queries or keys.
const BLOCK: usize = 128;

/// dQ, dK and dV for the gradient of the output `o`. `log_sum` is forward's.
pub(in super::super) fn backward<T: Arithmetic>(
    device: &Device,
    x: &Operands<'_>,
    o: &Tensor,
    grad: &Tensor,
    log_sum: &Tensor,
) -> Result<[Buffer; 3]> {
    let op = x.op;
    let d = op.head_dim;
    let pass = Pass::<T> {
        device,
        x,
        keys: KeysAndValues {
            k: T::keys(device, op, x.k, false),
            k_t: T::keys(device, op, x.k, true),
            v_t: T::keys(device, op, x.v, true),
        },
    };
    let delta = row_products(device, T::of_tensor(o)?, grad.f32s()?, d);
    let upstream = [grad.f32s()?, log_sum.f32s()?, &delta];
    // Blocks of each head. Heads follow one another, in sums as in tiles.
    let count = op.seq_len.div_ceil(BLOCK);
    let all = (0..op.batch * op.kv_heads * count).into_par_iter();
    let tiles: Vec<Vec<Tile<T>>> = all
        .map(|i| pass.tiles(i / count, i % count, upstream))
        .collect();

    let [mut dq, mut dk, mut dv] = [x.q, x.k, x.v].map(|t| device.zeroed(t.len()));
    let mut sums_q = blocks(&mut dq, op, op.group() * d, BLOCK);
    let [mut sums_k, mut sums_v] = [&mut dk, &mut dv].map(|t| blocks(t, op, d, BLOCK));
    for step in 0..count {
        let mut pairs = Vec::new();
        let of_queries = sums_q.chunks_mut(count).zip(tiles.chunks(count));
        let of_keys = sums_k.chunks_mut(count).zip(sums_v.chunks_mut(count));
        for ((dq, tiles), (dk, dv)) in of_queries.zip(of_keys) {
            let mut of_keys: Vec<_> = dk.iter_mut().zip(dv).map(Some).collect();
            for (i, ((_, _, dq), tiles)) in dq.iter_mut().zip(tiles).enumerate() {
                let j = (step + count - i) % count;
                if let Some(((_, keys, dk), (_, _, dv))) = of_keys[j].take_if(|_| j <= i) {
                    let keys = keys.clone();
                    pairs.push(Pair {
                        tiles,
                        keys,
                        dq,
                        dk,
                        dv,
                    });
                }
            }
        }
        let pairs = pairs.into_par_iter().with_max_len(1);
        pairs.for_each(|pair| pass.add(pair));
    }
    let width = op.group() * d;
    let of_queries = |from: &[f32], to: &mut [f32], cols| {
        vectorized!(copy_scaled(from, width, to, cols, width, x.scales.dq));
    };
    let of_keys =
        |scale| move |from: &[f32], to: &mut [f32], cols| copy_turned(from, d, to, cols, scale);
    Ok([
        by_token(device, op, (&dq, width), of_queries),
        by_token(device, op, (&dk, d), of_keys(x.scales.dk)),
        by_token(device, op, (&dv, d), of_keys(1.0)),
    ])
}

/// What all tasks read.
struct Pass<'a, T: Arithmetic> {
    device: &'a Device,
    x: &'a Operands<'a>,
    keys: KeysAndValues<T::Keys<'a>>,
}

/// A query tile with what flows into it.
struct Tile<T: Arithmetic> {
    of: TileOf,
    upstream: Upstream<T::Summed>,
}

/// A block of queries and one of keys, with the part of each sum that is theirs.
struct Pair<'p, T: Arithmetic> {
    /// The tiles of the block of queries.
    tiles: &'p [Tile<T>],
    keys: Range<usize>,
    /// \[queries x group, D\]
    dq: &'p mut [f32],
    /// \[D, keys\]
    dk: &'p mut [f32],
    /// \[D, keys\]
    dv: &'p mut [f32],
}

impl<T: Arithmetic> Pass<'_, T> {
    /// The tiles of a block of queries, for one of sequences x key/value heads.
    fn tiles(
        &self,
        head: usize,
        block: usize,
        [grad, log_sum, delta]: [&[f32]; 3],
    ) -> Vec<Tile<T>> {
        let (x, d) = (self.x, self.x.op.head_dim);
        let load = |queries: Range<usize>| {
            let rows = queries.len() * x.op.group();
            let of = TileOf {
                seq: head / x.op.kv_heads,
                kv_head: head % x.op.kv_heads,
                queries,
            };
            let stacked = |from, cols, scale| {
                let mut to = self.device.buffer(rows * cols);
                x.pack(from, cols, &of, scale, &mut to);
                to
            };
            let [q, grad] = [stacked(x.q, d, x.scales.queries), stacked(grad, d, 1.0)]
                .map(|values| T::summed(self.device, values, d));
            let upstream = Upstream {
                q,
                grad,
                log_sum: stacked(log_sum, 1, 1.0),
                delta: stacked(delta, 1, 1.0),
            };
            Tile { of, upstream }
        };
        let (first, step) = (block * BLOCK, x.queries_of_tile());
        let end = x.op.seq_len.min(first + BLOCK);
        let tiles = (first..end).step_by(step);
        tiles.map(|i| load(i..end.min(i + step))).collect()
    }

    /// Adds what a pair contributes.
    fn add(&self, pair: Pair<'_, T>) {
        let (x, d) = (self.x, self.x.op.head_dim);
        let mut scratch = T::scratch(self.device, [x.rows_of_tile(), BLOCK]);
        let mut first_row = 0;
        for tile in pair.tiles {
            let keys = pair.keys.start..pair.keys.end.min(tile.of.queries.end);
            let rows = tile.of.queries.len() * x.op.group();
            let dq = &mut pair.dq[first_row * d..][..rows * d];
            first_row += rows;
            if x.first_visible(&tile.of) >= keys.end {
                continue;
            }
            let block = Block {
                x,
                tile: &tile.of,
                keys: &keys,
            };
            let grads = Grads {
                dq,
                dk: pair.dk,
                dv: pair.dv,
            };
            T::add_grads(&block, &tile.upstream, &self.keys, grads, &mut scratch);
        }
    }
}

/// A sum of blocks \[batch, kv_heads, seq_len, width\] as \[T, kv_heads * width\]. `copy` is given a
/// block, what it becomes and the distance of two rows there.
fn by_token(
    device: &Device,
    op: &FlashAttention,
    (sums, width): (&[f32], usize),
    copy: impl Fn(&[f32], &mut [f32], usize) + Sync,
) -> Buffer {
    let cols = op.kv_heads * width;
    let mut out = device.buffer(sums.len());
    let parts = blocks(&mut out, op, cols, BLOCK).into_par_iter();
    parts.for_each(|(seq, positions, out)| {
        for kv_head in 0..op.kv_heads {
            let first = (seq * op.kv_heads + kv_head) * op.seq_len + positions.start;
            let from = &sums[first * width..][..positions.len() * width];
            copy(from, &mut out[kv_head * width..], cols);
        }
    });
    out
}

/// `scale` times the transpose of a matrix of so many rows, whose own rows are `stride` apart.
fn copy_turned(from: &[f32], rows: usize, to: &mut [f32], stride: usize, scale: f32) {
    let cols = from.len() / rows;
    for (c, to) in to.chunks_mut(stride).enumerate() {
        for (r, to) in to[..rows].iter_mut().enumerate() {
            *to = scale * from[r * cols + c];
        }
    }
}

/// Σ a\[i\] b\[i\] over each row of `d`: rowsum(dO O) of each row and head, \[T, heads\].
fn row_products<T: Stored>(device: &Device, a: &[T], b: &[f32], d: usize) -> Buffer {
    let mut out = device.buffer(a.len() / d);
    let chunks = a.par_chunks(KEYS * d).zip(b.par_chunks(KEYS * d));
    out.par_chunks_mut(KEYS)
        .zip(chunks)
        .for_each(|(out, (a, b))| {
            vectorized!({
                for (out, (a, b)) in out.iter_mut().zip(a.chunks_exact(d).zip(b.chunks_exact(d))) {
                    *out = dot(a, b);
                }
            })
        });
    out
}
