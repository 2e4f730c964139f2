//! Backward in one pass over the pairs of a block of queries and a block of keys that it may see.
//! In step s the keys of block j meet the queries of block j + s: the pairs of a step add to
//! different parts of dQ, dK and dV, so that threads share no sum, and every sum is added up in
//! the order of the steps. That is all five products for each pair, where one pass for dQ and
//! another for dK and dV computes the scores and dP twice.

use std::ops::Range;

use faer::Accum;
use half::bf16;
use rayon::prelude::*;

use super::super::softmax::softmax_backward;
use super::products::{Keys, Products, Shared, mat};
use super::{FlashAttention, KEYS, Operands, TileOf, blocks, copy_scaled};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::math::dot;
use crate::ops::stored::Stored;
use crate::tensor::{Buffer, DType, Tensor};

/// Positions of a block of queries or keys.
const BLOCK: usize = 128;

/// dQ, dK and dV for the gradient of the output `o`. `log_sum` is forward's.
pub(in super::super) fn backward(
    device: &Device,
    x: &Operands<'_>,
    o: &Tensor,
    grad: &Tensor,
    log_sum: &Tensor,
) -> Result<[Buffer; 3]> {
    let op = x.op;
    let d = op.head_dim;
    let pass = Pass {
        device,
        x,
        k: Keys::new(device, op, x.k, false),
        k_t: Keys::new(device, op, x.k, true),
        v_t: Keys::new(device, op, x.v, true),
    };
    let delta = row_products(device, o, grad, d)?;
    let upstream = [grad.f32s()?, log_sum.f32s()?, &delta];
    // Blocks of each head. Heads follow one another, in sums as in tiles.
    let count = op.seq_len.div_ceil(BLOCK);
    let all = (0..op.batch * op.kv_heads * count).into_par_iter();
    let tiles: Vec<Vec<Tile>> = all
        .map(|i| pass.tiles(i / count, i % count, upstream))
        .collect();

    let mut dq = device.buffer(x.q.len());
    let [mut dk, mut dv] = [x.k, x.v].map(|t| device.buffer(t.len()));
    let mut sums_q = blocks(&mut dq, op, op.group() * d, BLOCK);
    let [mut sums_k, mut sums_v] = [&mut dk, &mut dv].map(|t| blocks(t, op, d, BLOCK));
    for step in 0..count {
        let of_queries = sums_q.chunks_mut(count).zip(tiles.chunks(count));
        let of_keys = sums_k.chunks_mut(count).zip(sums_v.chunks_mut(count));
        let pairs = of_queries.zip(of_keys).flat_map(|((dq, tiles), (dk, dv))| {
            let of_queries = dq[step..].iter_mut().zip(&tiles[step..]);
            let pairs = of_queries.zip(dk.iter_mut().zip(dv));
            pairs.map(|(((_, _, dq), tiles), ((_, keys, dk), (_, _, dv)))| Pair {
                tiles,
                keys: keys.clone(),
                dq,
                dk,
                dv,
            })
        });
        let pairs: Vec<_> = pairs.collect();
        let pairs = pairs.into_par_iter().with_max_len(1);
        pairs.for_each(|pair| pass.add(pair, step == 0));
    }
    Ok([
        by_token(device, op, (&dq, op.group() * d), x.scales.dq),
        by_token(device, op, (&dk, d), x.scales.dk),
        by_token(device, op, (&dv, d), 1.0),
    ])
}

/// What all tasks read.
struct Pass<'a> {
    device: &'a Device,
    x: &'a Operands<'a>,
    k: Keys<'a>,
    k_t: Keys<'a>,
    v_t: Keys<'a>,
}

/// A query tile with what flows into it.
struct Tile {
    of: TileOf,
    /// \[rows, D\]: queries, scaled.
    q: Shared,
    /// \[rows, D\]: dO.
    grad: Shared,
    /// \[rows\], base 2.
    log_sum: Buffer,
    /// \[rows\]: rowsum(dO O).
    delta: Buffer,
}

/// A block of queries and one of keys, with the part of each sum that is theirs.
struct Pair<'p> {
    /// The tiles of the block of queries.
    tiles: &'p [Tile],
    keys: Range<usize>,
    /// \[queries x group, D\]
    dq: &'p mut [f32],
    /// \[keys, D\]
    dk: &'p mut [f32],
    /// \[keys, D\]
    dv: &'p mut [f32],
}

impl Pass<'_> {
    /// The tiles of a block of queries, for one of sequences x key/value heads.
    fn tiles(&self, head: usize, block: usize, [grad, log_sum, delta]: [&[f32]; 3]) -> Vec<Tile> {
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
                .map(|values| Shared::new(self.device, values, [rows, d]));
            Tile {
                q,
                grad,
                log_sum: stacked(log_sum, 1, 1.0),
                delta: stacked(delta, 1, 1.0),
                of,
            }
        };
        let (first, step) = (block * BLOCK, x.queries_of_tile());
        let end = x.op.seq_len.min(first + BLOCK);
        let tiles = (first..end).step_by(step);
        tiles.map(|i| load(i..end.min(i + step))).collect()
    }

    /// Adds what a pair contributes. In the first step nothing has been added yet.
    fn add(&self, pair: Pair<'_>, is_first: bool) {
        let (x, d) = (self.x, self.x.op.head_dim);
        let Pair { dq, dk, dv, .. } = pair;
        if is_first {
            dk.fill(0.0);
            dv.fill(0.0);
        }
        let mut products = x.products(self.device);
        let [mut p, mut ds] = [(); 2].map(|()| self.device.buffer(x.rows_of_tile() * KEYS));
        let (p, ds): (&mut [f32], &mut [f32]) = (&mut p, &mut ds);
        let mut first_row = 0;
        for tile in pair.tiles {
            let keys = pair.keys.start..pair.keys.end.min(tile.of.queries.end);
            let rows = tile.of.queries.len() * x.op.group();
            let dq = &mut dq[first_row * d..][..rows * d];
            first_row += rows;
            if x.first_visible(&tile.of) >= keys.end {
                continue;
            }
            self.score_grads(tile, &keys, &mut products, (p, ds));
            let ds = mat(ds, rows, keys.len(), KEYS);
            let k = self.k.of(tile.of.seq, tile.of.kv_head, &keys);
            // The block that holds a query's own position comes first, and the query sees it.
            let accum = if is_first { Accum::Replace } else { Accum::Add };
            products.product((dq, d), accum, 1.0, ds, k);
            let add = Accum::Add;
            products.product((dk, d), add, 1.0, ds.transpose(), tile.q.right());
            let p = mat(p, rows, keys.len(), KEYS);
            products.product((dv, d), add, 1.0, p.transpose(), tile.grad.right());
        }
    }

    /// P and dS of a tile and a block of keys, rows [`KEYS`] long.
    fn score_grads(
        &self,
        tile: &Tile,
        keys: &Range<usize>,
        products: &mut Products,
        (p, ds): (&mut [f32], &mut [f32]),
    ) {
        let x = self.x;
        let [k_t, v_t] = [&self.k_t, &self.v_t].map(|t| t.of(tile.of.seq, tile.of.kv_head, keys));
        let (scale, replace) = (x.scales.scores, Accum::Replace);
        products.product((p, KEYS), replace, scale, tile.q.left(), k_t);
        products.product((ds, KEYS), replace, 1.0, tile.grad.left(), v_t);
        let visible = x.visible(&tile.of, keys);
        vectorized!(softmax_backward(
            p,
            ds,
            &visible,
            &tile.log_sum,
            &tile.delta
        ));
    }
}

/// A sum \[batch, kv_heads, seq_len, width\], times `scale`, as \[T, kv_heads * width\].
fn by_token(
    device: &Device,
    op: &FlashAttention,
    (sums, width): (&[f32], usize),
    scale: f32,
) -> Buffer {
    let cols = op.kv_heads * width;
    let mut out = device.buffer(sums.len());
    let parts = blocks(&mut out, op, cols, BLOCK).into_par_iter();
    parts.for_each(|(seq, positions, out)| {
        for kv_head in 0..op.kv_heads {
            let first = (seq * op.kv_heads + kv_head) * op.seq_len + positions.start;
            let from = &sums[first * width..][..positions.len() * width];
            let to = &mut out[kv_head * width..];
            vectorized!(copy_scaled(from, width, to, cols, width, scale));
        }
    });
    out
}

/// Σ a\[i\] b\[i\] over each row of `d`: rowsum(dO O) of each row and head, \[T, heads\].
fn row_products(device: &Device, o: &Tensor, grad: &Tensor, d: usize) -> Result<Buffer> {
    let mut out = device.buffer(o.len() / d);
    match o.dtype() {
        DType::Bf16 => set_row_products(&mut out, bf16::of_tensor(o)?, grad.f32s()?, d),
        _ => set_row_products(&mut out, f32::of_tensor(o)?, grad.f32s()?, d),
    }
    Ok(out)
}

fn set_row_products<T: Stored>(out: &mut [f32], a: &[T], b: &[f32], d: usize) {
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
}
