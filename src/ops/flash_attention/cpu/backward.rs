//! Backward in one pass over the pairs of a block of queries and a block of keys that it may see.
//! In step s of n, for n blocks, the keys of block j meet the queries of block i ≥ j with
//! i + j = s modulo n: the pairs of a step add to different parts of dQ, dK and dV, and all steps have
//! about as much to do. Threads take pair after pair, and one whose sums have not had their earlier
//! steps waits for these alone: every sum is added up in the order of the steps. That is all five
//! products for each pair, where one pass for dQ and another for dK and dV computes the scores and dP
//! twice.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use rayon::prelude::*;

use super::arithmetic::{Arithmetic, Grads, KeysAndValues, Upstream};
use super::{Block, FlashAttention, KEYS, Operands, TileOf, blocks, copy_scaled};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::gemm::bf16::copy_transposed;
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
    let keys_of = |values, transposed| T::keys(device, op, values, transposed);
    let (k, (k_t, v_t)) = rayon::join(
        || keys_of(x.k, false),
        || rayon::join(|| keys_of(x.k, true), || keys_of(x.v, true)),
    );
    let keys = KeysAndValues { k, k_t, v_t };
    let pass = Pass::<T> { device, x, keys };
    let delta = row_products(device, T::of_tensor(o)?, grad.f32s()?, d);
    let upstream = [grad.f32s()?, log_sum.f32s()?, &delta];
    // Blocks of each head. Heads follow one another, in sums as in tiles.
    let (count, heads) = (op.seq_len.div_ceil(BLOCK), op.batch * op.kv_heads);
    let all = (0..heads * count).into_par_iter();
    let tiles: Vec<Vec<Tile<T>>> = all
        .map(|i| pass.tiles(i / count, i % count, upstream))
        .collect();

    let buffers = || [x.q, x.k, x.v].map(|t| device.buffer(t.len()));
    let ([mut dq, mut dk, mut dv], mut grads) = (buffers(), buffers());
    let [to_q, to_k, to_v] = &mut grads;
    let width = op.group() * d;
    let to_q = ByToken::new(op, to_q, width);
    let [to_k, to_v] = [to_k, to_v].map(|to| ByToken::new(op, to, d));
    let of_queries = blocks(&mut dq, op, width, BLOCK).into_iter();
    let of_queries: Vec<_> = of_queries.map(|(_, _, dq)| Turns::new(dq)).collect();
    let of_keys = blocks(&mut dk, op, d, BLOCK).into_iter();
    let of_keys = of_keys.zip(blocks(&mut dv, op, d, BLOCK));
    let of_keys: Vec<_> = of_keys
        .map(|((_, keys, dk), (_, _, dv))| Turns::new((keys, dk, dv)))
        .collect();
    Pair::all(count, heads)
        .into_iter()
        .par_bridge()
        .for_each(|pair| {
            let Pair {
                head,
                queries,
                keys,
            } = pair;
            let block = |turn: Turn| head * count + turn.block;
            let mut of_queries = of_queries[block(queries)].wait_for(queries.turn);
            let mut of_keys = of_keys[block(keys)].wait_for(keys.turn);
            let (dq, (positions, dk, dv)) = (&mut *of_queries.sum, &mut of_keys.sum);
            if queries.turn == 0 {
                dq.fill(0.0);
            }
            if keys.turn == 0 {
                dk.fill(0.0);
                dv.fill(0.0);
            }
            pass.add(&tiles[block(queries)], positions.clone(), dq, [dk, dv]);
            if queries.is_last {
                to_q.set(head, queries.block, |to, cols| {
                    vectorized!(copy_scaled(dq, width, to, cols, width, x.scales.dq));
                });
            }
            if keys.is_last {
                for (to, sum, scale) in [(&to_k, dk, x.scales.dk), (&to_v, dv, 1.0)] {
                    let dims = [d, positions.len()];
                    to.set(head, keys.block, |to, cols| {
                        copy_transposed(sum, dims, (to, cols), scale);
                    });
                }
            }
            of_queries.next += 1;
            of_keys.next += 1;
        });
    Ok(grads)
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

/// A block of queries and one of keys, and when they may add to their sums.
struct Pair {
    head: usize,
    queries: Turn,
    keys: Turn,
}

#[derive(Clone, Copy)]
struct Turn {
    block: usize,
    /// How many pairs add to the block's sum before this one.
    turn: usize,
    is_last: bool,
}

impl Pair {
    /// Those of heads with `count` blocks each, in the order of the steps.
    fn all(count: usize, heads: usize) -> Vec<Self> {
        let (mut of_queries, mut of_keys) = (vec![0; count], vec![0; count]);
        let mut pairs = Vec::new();
        for step in 0..count {
            let mut of_step = Vec::new();
            for i in 0..count {
                let j = (step + count - i) % count;
                if j <= i {
                    let next = |turns: &mut [usize], block: usize, all: usize| {
                        let turn = turns[block];
                        turns[block] += 1;
                        let is_last = turn + 1 == all;
                        Turn {
                            block,
                            turn,
                            is_last,
                        }
                    };
                    let queries = next(&mut of_queries, i, i + 1);
                    of_step.push((queries, next(&mut of_keys, j, count - j)));
                }
            }
            for head in 0..heads {
                let of_head = of_step.iter();
                pairs.extend(of_head.map(|&(queries, keys)| Self {
                    head,
                    queries,
                    keys,
                }));
            }
        }
        pairs
    }
}

/// A sum that is added to in a given order.
struct Turns<S>(Mutex<Ordered<S>>);

struct Ordered<S> {
    next: usize,
    sum: S,
}

impl<S> Turns<S> {
    fn new(sum: S) -> Self {
        Self(Mutex::new(Ordered { next: 0, sum }))
    }

    /// Waits until so many have added. These have begun, since pairs are taken in order, and they end,
    /// since what a pair computes is computed on the thread that took it.
    fn wait_for(&self, turn: usize) -> MutexGuard<'_, Ordered<S>> {
        loop {
            let sum = self.0.lock().expect("no thread that adds panics");
            if sum.next == turn {
                return sum;
            }
            drop(sum);
            std::thread::yield_now();
        }
    }
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

    /// Adds what the tiles of a block of queries and a block of keys contribute to dQ
    /// \[queries x group, D\] and to dK and dV \[D, keys\].
    fn add(
        &self,
        tiles: &[Tile<T>],
        keys: Range<usize>,
        dq: &mut [f32],
        [dk, dv]: [&mut [f32]; 2],
    ) {
        let (x, d) = (self.x, self.x.op.head_dim);
        let mut scratch = T::scratch(self.device, [x.rows_of_tile(), BLOCK]);
        let mut first_row = 0;
        for tile in tiles {
            let keys = keys.start..keys.end.min(tile.of.queries.end);
            let rows = tile.of.queries.len() * x.op.group();
            let dq = &mut dq[first_row * d..][..rows * d];
            first_row += rows;
            if x.first_visible(&tile.of) >= keys.end {
                continue;
            }
            let block = Block {
                x,
                tile: &tile.of,
                keys: &keys,
            };
            let grads = Grads { dq, dk, dv };
            T::add_grads(&block, &tile.upstream, &self.keys, grads, &mut scratch);
        }
    }
}

/// A gradient \[T, kv_heads * width\], to which each head writes its columns block by block.
struct ByToken<'g> {
    op: &'g FlashAttention,
    width: usize,
    /// Those of a sequence after those of another.
    blocks: Vec<Mutex<&'g mut [f32]>>,
}

impl<'g> ByToken<'g> {
    fn new(op: &'g FlashAttention, grad: &'g mut [f32], width: usize) -> Self {
        let blocks = blocks(grad, op, op.kv_heads * width, BLOCK).into_iter();
        let blocks = blocks.map(|(_, _, block)| Mutex::new(block)).collect();
        Self { op, width, blocks }
    }

    /// Has `copy` write what is a head's in a block, given the distance of two rows.
    fn set(&self, head: usize, block: usize, copy: impl FnOnce(&mut [f32], usize)) {
        let (seq, kv_head) = (head / self.op.kv_heads, head % self.op.kv_heads);
        let of_sequence = self.blocks.len() / self.op.batch;
        let block = self.blocks[seq * of_sequence + block].lock();
        let mut block = block.expect("no thread that adds panics");
        let cols = self.op.kv_heads * self.width;
        copy(&mut block[kv_head * self.width..], cols);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_comes_once_and_takes_its_turn_with_both_sums() {
        for (count, heads) in [(1, 2), (2, 1), (5, 3), (8, 2)] {
            let mut found = Vec::new();
            let mut added = vec![[0; 2]; heads * count];
            for pair in Pair::all(count, heads) {
                found.push((pair.head, pair.queries.block, pair.keys.block));
                for (side, of) in [pair.queries, pair.keys].into_iter().enumerate() {
                    let added = &mut added[pair.head * count + of.block][side];
                    assert_eq!(of.turn, *added);
                    *added += 1;
                    let all = [of.block + 1, count - of.block][side];
                    assert_eq!(of.is_last, *added == all);
                }
            }
            found.sort();
            let of_head = |head| (0..count).flat_map(move |i| (0..=i).map(move |j| (head, i, j)));
            assert_eq!(found, (0..heads).flat_map(of_head).collect::<Vec<_>>());
        }
    }
}
