//! Products in f32, faer's. Weights of 16 bits are widened panel by panel, so that a product
//! never needs the whole matrix in f32. The callers have checked all sizes.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::Layout;
use crate::device::Device;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// out \[M, N\] (+)= alpha · X \[M, K\] · W, which is stored in `layout`.
pub(super) fn product(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    (x, w): (&[f32], &Tensor),
    layout: Layout,
    alpha: f32,
) -> Result<()> {
    let (n, k) = layout.extents(w);
    let m = x.len() / k;
    for_each_panel(device, w, |start, panel| {
        let rows = panel.nrows();
        match layout {
            Layout::Nt => {
                let out = strided_mut(&mut out[start..], m, rows, n);
                multiply(out, accum, matrix(x, m, k), panel.transpose(), alpha);
            }
            Layout::Nn => {
                let x = MatRef::from_row_major_slice_with_stride(&x[start..], m, rows, k);
                let out = MatMut::from_row_major_slice_mut(&mut *out, m, n);
                let accum = if start == 0 { accum } else { Accum::Add };
                multiply(out, accum, x, panel, alpha);
            }
        }
    })
}

/// out \[N, K\] = dY \[M, N\]ᵀ · X \[M, K\]: the gradient of a weight.
pub(super) fn product_tn(out: &mut [f32], dy: &Tensor, x: &Tensor) -> Result<()> {
    let ((m, n), (_, k)) = (dy.matrix_dims(), x.matrix_dims());
    let dy = matrix(dy.f32s()?, m, n).transpose();
    let out = MatMut::from_row_major_slice_mut(out, n, k);
    multiply(out, Accum::Replace, dy, matrix(x.f32s()?, m, k), 1.0);
    Ok(())
}

fn matrix(data: &[f32], rows: usize, cols: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data, rows, cols)
}

/// Rows `stride` apart. Not by way of `from_row_major_slice_with_stride_mut`: faer 0.24.4 takes
/// the stride for that of the columns there and reaches beyond the slice.
fn strided_mut(data: &mut [f32], rows: usize, cols: usize, stride: usize) -> MatMut<'_, f32> {
    MatMut::from_column_major_slice_with_stride_mut(data, cols, rows, stride).transpose_mut()
}

/// out (+)= alpha · lhs · rhs in tiles that the threads share. Tiles are of a fixed size, so the
/// result does not depend on the number of threads, and each is a product of one thread: faer's
/// own threads meet at spinning barriers, which wastes the time of a machine with other work.
fn multiply(
    out: MatMut<'_, f32>,
    accum: Accum,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    alpha: f32,
) {
    const COLS: usize = 96;
    // A product of 512 rows and 576 columns is 12 tiles: a slow core does not hold up the rest.
    let rows = if rhs.ncols() > COLS { 256 } else { COLS };
    if lhs.nrows() <= rows && rhs.ncols() <= COLS {
        return matmul(out, accum, lhs, rhs, alpha, Par::Seq);
    }
    out.par_row_chunks_mut(rows)
        .zip(lhs.par_row_chunks(rows))
        .for_each(|(out, lhs)| {
            out.par_col_chunks_mut(COLS)
                .zip(rhs.par_col_chunks(COLS))
                .for_each(|(out, rhs)| matmul(out, accum, lhs, rhs, alpha, Par::Seq));
        });
}

/// Calls `use_panel` with W in f32: whole where it is stored so, else in panels of rows widened
/// into one reused buffer, with the index of their first row.
fn for_each_panel(
    device: &Device,
    w: &Tensor,
    mut use_panel: impl FnMut(usize, MatRef<'_, f32>),
) -> Result<()> {
    const PANEL: usize = 1 << 20;
    let (rows, cols) = w.matrix_dims();
    if w.dtype() == DType::F32
        && let Ok(data) = w.f32s()
    {
        use_panel(0, matrix(data, rows, cols));
        return Ok(());
    }
    let panel_rows = (PANEL / cols.max(1)).clamp(1, rows.max(1));
    let mut panel = device.buffer(panel_rows * cols);
    for start in (0..rows).step_by(panel_rows) {
        let n = panel_rows.min(rows - start);
        let panel = &mut panel[..n * cols];
        widen(w, start * cols, panel)?;
        use_panel(start, matrix(panel, n, cols));
    }
    Ok(())
}

/// `out` = elements of `w` from `start` on, in f32, shared among the threads.
fn widen(w: &Tensor, start: usize, out: &mut [f32]) -> Result<()> {
    const CHUNK: usize = 1 << 15;
    out.par_chunks_mut(CHUNK)
        .enumerate()
        .try_for_each(|(i, chunk)| w.read_f32(start + i * CHUNK, chunk))
}
