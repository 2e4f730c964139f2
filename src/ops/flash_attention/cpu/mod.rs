//! The CPU version. In forward a task owns a block of queries and works through the blocks of keys
//! that they see. The query heads that share a key/value head are stacked: the tile of `rows`
//! queries and `group` heads is a matrix [rows * group, D] whose row r is query r / group, head
//! r % group. That gives matrix products of a good size, and their reduction adds up the gradients
//! of the group in a fixed order.

mod arithmetic;
mod backward;
mod in_bf16;
mod in_f32;

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use rayon::prelude::*;

use super::FlashAttention;
use super::softmax::{Visible, finish_softmax};
use crate::device::simd::vectorized;
use crate::device::{Device, Precision};
use crate::error::Result;
use crate::ops::stored::Stored;
use crate::tensor::{Buffer, Tensor};
pub(super) use arithmetic::Arithmetic;
use arithmetic::Sums;
pub(super) use backward::backward;

/// Stacked rows of a query tile (more only where the group alone is larger).
const TILE_ROWS: usize = 192;
/// Queries of a tile at most: what lies above the diagonal within it is wasted.
const MAX_QUERIES: usize = 64;
/// Keys that a query tile meets at a time.
const KEYS: usize = 256;

/// The operator and its inputs as slices.
pub(super) struct Operands<'a> {
    op: &'a FlashAttention,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    doc_starts: Option<&'a [u32]>,
    scales: Scales,
}

impl<'a> Operands<'a> {
    /// The caller has checked the shapes.
    pub(super) fn new(
        device: &Device,
        op: &'a FlashAttention,
        q: &'a Tensor,
        k: &'a Tensor,
        v: &'a Tensor,
    ) -> Result<Self> {
        Ok(Self {
            op,
            q: q.f32s()?,
            k: k.f32s()?,
            v: v.f32s()?,
            doc_starts: op.doc_starts.as_ref().map(Tensor::u32s).transpose()?,
            scales: Scales::new(device.precision(), op.head_dim),
        })
    }

    fn queries_of_tile(&self) -> usize {
        (TILE_ROWS / self.op.group()).clamp(1, MAX_QUERIES)
    }

    fn rows_of_tile(&self) -> usize {
        self.queries_of_tile() * self.op.group()
    }

    /// For each query of the tile the first position that it sees, where documents are masked.
    fn starts_of(&self, tile: &TileOf) -> Option<&'a [u32]> {
        let starts = &self.doc_starts?[tile.seq * self.op.seq_len..];
        Some(&starts[tile.queries.clone()])
    }

    /// The first position that any query of the tile sees.
    fn first_visible(&self, tile: &TileOf) -> usize {
        let first = self.starts_of(tile).and_then(|starts| starts.iter().min());
        first.map_or(0, |&start| start as usize)
    }

    /// Copies the tile of one group of heads out of `from` ([T, heads * d]), times `scale`.
    fn pack(&self, from: &[f32], d: usize, tile: &TileOf, scale: f32, to: &mut [f32]) {
        let (cols, width) = (self.op.heads * d, self.op.group() * d);
        let first = tile.seq * self.op.seq_len + tile.queries.start;
        let from = &from[first * cols + tile.kv_head * width..];
        vectorized!(copy_scaled(from, cols, to, width, width, scale));
    }

    /// Writes the tile of one group of heads, times `scale`, into a block of rows [_, heads * d].
    fn unpack<T: Stored>(
        &self,
        from: &[f32],
        d: usize,
        kv_head: usize,
        scale: f32,
        rows: &mut [T],
    ) {
        let (cols, width) = (self.op.heads * d, self.op.group() * d);
        vectorized!(copy_scaled(
            from,
            width,
            &mut rows[kv_head * width..],
            cols,
            width,
            scale,
        ));
    }
}

/// Factors by which scores come out in base 2, and gradients of what they are of.
struct Scales {
    /// Of the queries in a tile.
    queries: f32,
    /// Of their products with keys.
    scores: f32,
    /// Of dS K.
    dq: f32,
    /// Of dS^T times the queries in a tile.
    dk: f32,
}

impl Scales {
    fn new(precision: Precision, head_dim: usize) -> Self {
        let dq = 1.0 / (head_dim as f32).sqrt();
        match precision {
            Precision::F32 => Self {
                queries: LOG2_E * dq,
                scores: 1.0,
                dq,
                dk: LN_2,
            },
            // Queries that bf16 holds stay as they are: times a factor they would be rounded.
            Precision::Bf16 => Self {
                queries: 1.0,
                scores: LOG2_E * dq,
                dq,
                dk: dq,
            },
        }
    }
}

/// Some queries of one sequence, and the heads that share a key/value head.
struct TileOf {
    seq: usize,
    kv_head: usize,
    queries: Range<usize>,
}

/// `to = scale * from` for matrices of `width` columns with rows of different lengths.
#[inline(always)]
fn copy_scaled<T: Stored>(
    from: &[f32],
    from_stride: usize,
    to: &mut [T],
    to_stride: usize,
    width: usize,
    scale: f32,
) {
    for (to, from) in to.chunks_mut(to_stride).zip(from.chunks(from_stride)) {
        for (to, from) in to[..width].iter_mut().zip(&from[..width]) {
            *to = T::of(from * scale);
        }
    }
}

/// Memory for one query tile.
struct Scratch<T: Arithmetic> {
    /// [rows, D]: O.
    out: Buffer,
    /// [rows]: the running maximum, at the end the logarithm of the denominator.
    log_sum: Buffer,
    /// [rows]: the running sum.
    sum: Buffer,
    scores: T::Scratch,
}

impl<T: Arithmetic> Scratch<T> {
    fn new(device: &Device, x: &Operands<'_>) -> Self {
        let rows = x.rows_of_tile();
        Self {
            out: device.buffer(rows * x.op.head_dim),
            log_sum: device.buffer(rows),
            sum: device.buffer(rows),
            scores: T::scratch(device, [rows, KEYS]),
        }
    }
}

/// Blocks of at most `rows` rows of each sequence (or of each head of each, where one follows the
/// other), `cols` wide: sequence, rows, elements.
fn blocks<'a, T>(
    data: &'a mut [T],
    op: &FlashAttention,
    cols: usize,
    rows: usize,
) -> Vec<(usize, Range<usize>, &'a mut [T])> {
    let sequences = data.chunks_exact_mut(op.seq_len * cols).enumerate();
    sequences
        .flat_map(|(seq, data)| {
            let blocks = data.chunks_mut(rows * cols).enumerate();
            blocks.map(move |(i, block)| {
                let first = i * rows;
                (seq, first..first + block.len() / cols, block)
            })
        })
        .collect()
}

/// The keys that a query tile meets, in blocks that begin at multiples of `step`.
fn key_blocks(
    x: &Operands<'_>,
    tile: &TileOf,
    step: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let (first, end) = (x.first_visible(tile), tile.queries.end);
    let first = first - first % step;
    let blocks = (first..end).step_by(KEYS);
    blocks.map(move |j| j..(j + KEYS).min(end))
}

/// Computes the output and the base-2 logarithms of the softmax's denominators.
pub(super) fn forward<T: Arithmetic>(
    device: &Device,
    x: &Operands<'_>,
    o: &mut [T],
    log_sum: &mut [f32],
) {
    let op = x.op;
    let (k_t, v) = rayon::join(
        || T::keys(device, op, x.k, true),
        || T::keys(device, op, x.v, false),
    );
    let o = blocks(o, op, op.heads * op.head_dim, x.queries_of_tile());
    let log_sum = blocks(log_sum, op, op.heads, x.queries_of_tile());
    // The later queries of a sequence see the most keys: threads are done together where these come
    // first.
    let tasks = o.into_iter().zip(log_sum).rev().par_bridge();
    tasks.for_each(|((seq, queries, o), (_, _, log_sum))| {
        let mut scratch = Scratch::<T>::new(device, x);
        let rows = queries.len() * op.group();
        for kv_head in 0..op.kv_heads {
            let tile = TileOf {
                seq,
                kv_head,
                queries: queries.clone(),
            };
            forward_tile(device, x, [&k_t, &v], &tile, &mut scratch);
            x.unpack(
                &scratch.out[..rows * op.head_dim],
                op.head_dim,
                kv_head,
                1.0,
                o,
            );
            x.unpack(&scratch.log_sum[..rows], 1, kv_head, 1.0, log_sum);
        }
    });
}

fn forward_tile<'k, T: Arithmetic>(
    device: &Device,
    x: &Operands<'_>,
    keys_and_values: [&T::Keys<'k>; 2],
    tile: &TileOf,
    scratch: &mut Scratch<T>,
) {
    let d = x.op.head_dim;
    let rows = tile.queries.len() * x.op.group();
    let mut sums = Sums {
        o: &mut scratch.out[..rows * d],
        max: &mut scratch.log_sum[..rows],
        sum: &mut scratch.sum[..rows],
    };
    let mut q = device.buffer(rows * d);
    x.pack(x.q, d, tile, x.scales.queries, &mut q);
    let q = T::rows(device, q, d);
    sums.o.fill(0.0);
    sums.max.fill(f32::NEG_INFINITY);
    sums.sum.fill(0.0);
    for keys in key_blocks(x, tile, T::KEY_STEP) {
        let block = Block {
            x,
            tile,
            keys: &keys,
        };
        T::attend(&block, &q, keys_and_values, &mut sums, &mut scratch.scores);
    }
    vectorized!(finish_softmax(sums.max, sums.sum, sums.o));
}

/// A query tile and some of the keys that it meets.
pub(super) struct Block<'b> {
    x: &'b Operands<'b>,
    tile: &'b TileOf,
    keys: &'b Range<usize>,
}

impl<'b> Block<'b> {
    /// Which of some keys the rows of the tile see, from stacked row `first_row` on.
    fn visible(&self, first_row: usize, keys: &Range<usize>) -> Visible<'b> {
        Visible {
            first_query: self.tile.queries.start,
            first_row,
            group: self.x.op.group(),
            keys: keys.clone(),
            doc_starts: self.x.starts_of(self.tile),
        }
    }
}
