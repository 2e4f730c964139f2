//! Products of the small matrices of a task, on its thread, in the device's precision.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::device::{Device, Precision};
use crate::ops::gemm::bf16::{Level, Operand, Panels, Side, Values};

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
    pub(super) fn product(
        &mut self,
        (out, stride): (&mut [f32], usize),
        accumulate: Accum,
        alpha: f32,
        a: Mat<'_>,
        b: Mat<'_>,
    ) {
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
                let side = Side::Right;
                right.pack(*level, (&b.operand(side), side), 0..b.cols, reduction);
                let add = accumulate == Accum::Add;
                left.multiply(*level, right, (out, [a.rows, b.cols, stride]), alpha, add);
            }
        }
    }
}
