//! Products of the small matrices of a task, on its thread, in the device's precision.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::super::FlashAttention;
use crate::device::{Device, Precision};
use crate::ops::gemm::bf16::{COLS, Level, Operand, Panels, Part, Side, Values};
use crate::tensor::Buffer;

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
        let Some(heads) = &self.packed else {
            return Right::F32(self.stored(seq, kv_head, keys));
        };
        let all = &heads[seq * self.op.kv_heads + kv_head];
        let columns = 0..self.op.head_dim;
        match self.transposed {
            true => Right::Bf16(all.part(keys, &columns), keys.len()),
            false => Right::Bf16(all.part(&columns, keys), columns.len()),
        }
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

/// A matrix that is an operand of several products, as it is: in bf16 packed once for each side.
pub(super) struct Shared {
    values: Buffer,
    /// Rows and columns.
    dims: [usize; 2],
    packed: Option<[Panels; 2]>,
}

impl Shared {
    /// A row-major matrix of so many rows and columns.
    pub(super) fn new(device: &Device, values: Buffer, dims: [usize; 2]) -> Self {
        let mut shared = Self {
            values,
            dims,
            packed: None,
        };
        if device.precision() == Precision::Bf16 {
            let [rows, cols] = dims;
            let sides = [(Side::Left, rows, cols), (Side::Right, cols, rows)];
            shared.packed = Some(sides.map(|(side, outer, reduction)| {
                let operand = (&shared.stored().operand(side), side);
                Panels::new(device, Level::best(), operand, 0..outer, 0..reduction)
            }));
        }
        shared
    }

    fn stored(&self) -> Mat<'_> {
        let [rows, cols] = self.dims;
        mat(&self.values, rows, cols, cols)
    }

    pub(super) fn left(&self) -> Left<'_> {
        Left {
            stored: self.stored(),
            packed: self.packed.as_ref().map(|[left, _]| left),
        }
    }

    pub(super) fn right(&self) -> Right<'_> {
        let [rows, cols] = self.dims;
        match &self.packed {
            None => Right::F32(self.stored()),
            Some([_, right]) => Right::Bf16(right.part(&(0..cols), &(0..rows)), cols),
        }
    }
}

/// Blocks of packed keys begin at multiples of this: with a panel, or with a step.
pub(super) const KEY_STEP: usize = COLS;

/// A left operand, which may have been packed.
pub(super) struct Left<'a> {
    stored: Mat<'a>,
    packed: Option<&'a Panels>,
}

impl<'a> From<Mat<'a>> for Left<'a> {
    fn from(stored: Mat<'a>) -> Self {
        Self {
            stored,
            packed: None,
        }
    }
}

/// A right operand in the device's precision.
pub(super) enum Right<'a> {
    F32(Mat<'a>),
    /// Packed, with so many columns.
    Bf16(Part<'a>, usize),
}

/// Multiplies: by faer in f32, or with operands rounded to bf16 and sums in f32.
pub(super) struct Products {
    level: Level,
    /// Memory for the left side in bf16.
    left: Panels,
}

impl Products {
    /// For left sides without a side longer than `longest`.
    pub(super) fn new(device: &Device, longest: usize) -> Self {
        let longest = match device.precision() {
            Precision::F32 => 0,
            Precision::Bf16 => longest,
        };
        Self {
            level: Level::best(),
            left: Panels::with_capacity(device, longest, longest),
        }
    }

    /// `out` (rows `stride` long) becomes alpha a b, or has it added.
    pub(super) fn product<'p>(
        &mut self,
        (out, stride): (&mut [f32], usize),
        accumulate: Accum,
        alpha: f32,
        a: impl Into<Left<'p>>,
        b: Right<'_>,
    ) {
        let Left { stored: a, packed } = a.into();
        match b {
            Right::F32(b) => {
                // Made as its transpose: faer 0.24's from_row_major_slice_with_stride_mut mixes
                // up the strides.
                let out =
                    MatMut::from_column_major_slice_with_stride_mut(out, b.cols, a.rows, stride);
                let (a, b) = (a.for_faer(), b.for_faer());
                matmul(out.transpose_mut(), accumulate, a, b, alpha, Par::Seq);
            }
            Right::Bf16(b, cols) => {
                let left = packed.unwrap_or_else(|| {
                    let operand = (&a.operand(Side::Left), Side::Left);
                    self.left.pack(self.level, operand, 0..a.rows, 0..a.cols);
                    &self.left
                });
                let out = (out, [a.rows, cols, stride]);
                left.multiply(self.level, b, out, alpha, accumulate == Accum::Add);
            }
        }
    }
}
