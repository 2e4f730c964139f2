//! Products in f32, by faer.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::super::softmax::{online_softmax, softmax_backward};
use super::arithmetic::{Arithmetic, Grads, KeysAndValues, Sums, Upstream};
use super::{Block, FlashAttention, KEYS};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::tensor::Buffer;

impl Arithmetic for f32 {
    const KEY_STEP: usize = 1;
    type Keys<'a> = Keys<'a>;
    type Rows = Buffer;
    type Summed = Buffer;
    /// Scores, and in backward the gradients of the probabilities: rows [`KEYS`] long.
    type Scratch = [Buffer; 2];

    fn keys<'a>(
        _: &Device,
        op: &'a FlashAttention,
        values: &'a [f32],
        transposed: bool,
    ) -> Keys<'a> {
        Keys {
            op,
            values,
            transposed,
        }
    }

    fn rows(_: &Device, values: Buffer, _: usize) -> Buffer {
        values
    }

    fn summed(_: &Device, values: Buffer, _: usize) -> Buffer {
        values
    }

    fn scratch(device: &Device, [rows, _]: [usize; 2]) -> Self::Scratch {
        [(); 2].map(|()| device.buffer(rows * KEYS))
    }

    fn attend(
        block: &Block<'_>,
        q: &Buffer,
        [k_t, v]: [&Keys<'_>; 2],
        sums: &mut Sums<'_>,
        [scores, _]: &mut Self::Scratch,
    ) {
        let (d, rows) = (block.x.op.head_dim, sums.max.len());
        let scores = &mut scores[..rows * KEYS];
        let q = mat(q, rows, d, d);
        product((scores, KEYS), Accum::Replace, q, k_t.of(block));
        vectorized!(online_softmax(
            (scores, KEYS, block.x.scales.scores),
            &block.visible(0, block.keys),
            sums.max,
            sums.sum,
            sums.o,
        ));
        let p = mat(scores, rows, block.keys.len(), KEYS);
        product((sums.o, d), Accum::Add, p, v.of(block));
    }

    fn add_grads(
        block: &Block<'_>,
        tile: &Upstream<Buffer>,
        keys: &KeysAndValues<Keys<'_>>,
        grads: Grads<'_>,
        [p, ds]: &mut Self::Scratch,
    ) {
        let (d, rows) = (block.x.op.head_dim, tile.delta.len());
        let [q, grad] = [&tile.q, &tile.grad].map(|values| mat(values, rows, d, d));
        product((p, KEYS), Accum::Replace, q, keys.k_t.of(block));
        product((ds, KEYS), Accum::Replace, grad, keys.v_t.of(block));
        vectorized!(softmax_backward(
            (p, ds, KEYS),
            block.x.scales.scores,
            &block.visible(0, block.keys),
            &tile.log_sum,
            &tile.delta,
        ));
        let [p, ds] = [p, ds].map(|values| mat(values, rows, block.keys.len(), KEYS));
        product((grads.dq, d), Accum::Add, ds, keys.k.of(block));
        let stride = grads.dk.len() / d;
        product((grads.dk, stride), Accum::Add, q.transpose(), ds);
        product((grads.dv, stride), Accum::Add, grad.transpose(), p);
    }
}

/// Keys or values where they are stored.
pub(in super::super) struct Keys<'a> {
    op: &'a FlashAttention,
    values: &'a [f32],
    transposed: bool,
}

impl<'a> Keys<'a> {
    fn of(&self, block: &Block<'_>) -> Mat<'a> {
        let (d, stride) = (self.op.head_dim, self.op.kv_heads * self.op.head_dim);
        let Range { start, end } = *block.keys;
        let first = (block.tile.seq * self.op.seq_len + start) * stride + block.tile.kv_head * d;
        let stored = mat(&self.values[first..], end - start, d, stride);
        match self.transposed {
            true => stored.transpose(),
            false => stored,
        }
    }
}

/// A row-major matrix or the transpose of one.
#[derive(Clone, Copy)]
struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    /// Distance of two stored rows.
    stride: usize,
    transposed: bool,
}

/// The first `cols` columns of a row-major matrix whose rows are `stride` long.
fn mat(data: &[f32], rows: usize, cols: usize, stride: usize) -> Mat<'_> {
    Mat {
        data,
        rows,
        cols,
        stride,
        transposed: false,
    }
}

impl<'a> Mat<'a> {
    fn transpose(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            transposed: !self.transposed,
            ..self
        }
    }

    fn for_faer(self) -> MatRef<'a, f32> {
        let Self { data, stride, .. } = self;
        match self.transposed {
            true => MatRef::from_column_major_slice_with_stride(data, self.rows, self.cols, stride),
            false => MatRef::from_row_major_slice_with_stride(data, self.rows, self.cols, stride),
        }
    }
}

/// `out` (rows `stride` long) becomes a b, or has it added.
fn product((out, stride): (&mut [f32], usize), accumulate: Accum, a: Mat<'_>, b: Mat<'_>) {
    // Made as its transpose: faer 0.24's from_row_major_slice_with_stride_mut mixes up the strides.
    let out = MatMut::from_column_major_slice_with_stride_mut(out, b.cols, a.rows, stride);
    let (a, b) = (a.for_faer(), b.for_faer());
    matmul(out.transpose_mut(), accumulate, a, b, 1.0, Par::Seq);
}
