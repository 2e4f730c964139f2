//! Products of the small matrices of a task, on its thread, in the device's precision.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::super::FlashAttention;
use crate::device::{Device, Precision};
use crate::ops::gemm::bf16::{COLS, Level, Operand, Panels, Part, Side, Values};

/// A row-major matrix or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    /// Distance of two stored rows.
    stride: usize,
    transposed: bool,
}

/// The first `cols` columns of a row-major matrix whose rows are `stride` long.
pub(super) fn mat(data: &[f32], rows: usize, cols: usize, stride: usize) -> Mat<'_> {
    Mat {
        data,
        rows,
        cols,
        stride,
        transposed: false,
    }
}

impl<'a> Mat<'a> {
    pub(super) fn transpose(self) -> Self {
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

    /// As an operand whose reduction runs over the columns (`left`) or over the rows.
    fn operand(self, side: Side) -> Operand<'a> {
        let values = Values::F32(self.data);
        match self.transposed == (side == Side::Left) {
            true => Operand::columns(values, self.stride),
            false => Operand::rows(values, self.stride),
        }
    }
}

/// Keys or values of all sequences as right operands: [keys, D] of a sequence and head, or its
/// transpose. In bf16 they are packed once, for all tasks.
pub(super) struct Keys<'a> {
    op: &'a FlashAttention,
    values: &'a [f32],
    transposed: bool,
    packed: Option<Vec<Panels>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(
        device: &Device,
        op: &'a FlashAttention,
        values: &'a [f32],
        transposed: bool,
    ) -> Self {
        let mut keys = Self {
            op,
            values,
            transposed,
            packed: None,
        };
        if device.precision() == Precision::Bf16 {
            let heads = (0..op.batch * op.kv_heads).into_par_iter();
            let pack = |head| {
                let all = keys.stored(head / op.kv_heads, head % op.kv_heads, &(0..op.seq_len));
                let operand = (&all.operand(Side::Right), Side::Right);
                Panels::new(device, Level::best(), operand, 0..all.cols, 0..all.rows)
            };
            keys.packed = Some(heads.map(pack).collect());
        }
        keys
    }

    /// Those at the positions `keys`, which in bf16 begin at a multiple of [`KEY_STEP`].
    pub(super) fn of(&self, seq: usize, kv_head: usize, keys: &Range<usize>) -> Right<'_> {
        let stored = self.stored(seq, kv_head, keys);
        let packed = self.packed.as_ref().map(|heads| {
            let all = &heads[seq * self.op.kv_heads + kv_head];
            let columns = 0..self.op.head_dim;
            match self.transposed {
                true => all.part(keys, &columns),
                false => all.part(&columns, keys),
            }
        });
        Right { stored, packed }
    }

    fn stored(&self, seq: usize, kv_head: usize, keys: &Range<usize>) -> Mat<'a> {
        let (d, stride) = (self.op.head_dim, self.op.kv_heads * self.op.head_dim);
        let first = (seq * self.op.seq_len + keys.start) * stride + kv_head * d;
        let stored = mat(&self.values[first..], keys.len(), d, stride);
        match self.transposed {
            true => stored.transpose(),
            false => stored,
        }
    }
}

/// Blocks of packed keys begin at multiples of this: with a panel, or with a step.
pub(super) const KEY_STEP: usize = COLS;

/// A right operand, which may have been packed.
pub(super) struct Right<'a> {
    stored: Mat<'a>,
    packed: Option<Part<'a>>,
}

impl<'a> From<Mat<'a>> for Right<'a> {
    fn from(stored: Mat<'a>) -> Self {
        Self {
            stored,
            packed: None,
        }
    }
}

/// Multiplies.
pub(super) enum Products {
    /// By faer.
    F32,
    /// Operands rounded to bf16 and packed here, sums in f32.
    Bf16 {
        level: Level,
        left: Panels,
        right: Panels,
    },
}

impl Products {
    /// For matrices without a side longer than `longest`.
    pub(super) fn new(device: &Device, longest: usize) -> Self {
        match device.precision() {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16 {
                level: Level::best(),
                left: Panels::with_capacity(device, longest, longest),
                right: Panels::with_capacity(device, longest, longest),
            },
        }
    }

    /// `out` (rows `stride` long) becomes alpha a b, or has it added.
    pub(super) fn product<'b>(
        &mut self,
        (out, stride): (&mut [f32], usize),
        accumulate: Accum,
        alpha: f32,
        a: Mat<'_>,
        b: impl Into<Right<'b>>,
    ) {
        let Right { stored: b, packed } = b.into();
        match self {
            Self::F32 => {
                // Made as its transpose: faer 0.24's from_row_major_slice_with_stride_mut mixes
                // up the strides.
                let out =
                    MatMut::from_column_major_slice_with_stride_mut(out, b.cols, a.rows, stride);
                let (a, b) = (a.for_faer(), b.for_faer());
                matmul(out.transpose_mut(), accumulate, a, b, alpha, Par::Seq);
            }
            Self::Bf16 { level, left, right } => {
                let (side, reduction) = (Side::Left, 0..a.cols);
                left.pack(
                    *level,
                    (&a.operand(side), side),
                    0..a.rows,
                    reduction.clone(),
                );
                let packed = match packed {
                    Some(part) => part,
                    None => {
                        let operand = (&b.operand(Side::Right), Side::Right);
                        right.pack(*level, operand, 0..b.cols, reduction.clone());
                        right.part(&(0..b.cols), &reduction)
                    }
                };
                let out = (out, [a.rows, b.cols, stride]);
                left.multiply(*level, packed, out, alpha, accumulate == Accum::Add);
            }
        }
    }
}
