//! Matrix products: Y = X Wᵀ + b (+ residual).
//!
//! X \[T, in\] f32, W \[out, in\] frozen in f32, f16 or bf16, b \[out\] f32, Y \[T, out\] f32.
//! Backward: dX = dY W; the residual's gradient is dY itself. Saved for backward: nothing but W.
//!
//! On CUDA everything is bf16, accumulated in fp32.
//!
//! f32 products on the CPU are faer's. Weights of 16 bits are widened panel by panel, so that a
//! product never needs the whole matrix in f32.

pub(crate) mod cuda;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::{Operator, expect_cols, expect_shape, only_grad};
use crate::tensor::{Buffer, DType, Tensor};

/// Y = X Wᵀ + b, or Y = R + X Wᵀ + b. Inputs: X, and the residual R \[T, out\] where there is one.
pub struct Linear {
    /// \[out, in\]
    pub weight: Tensor,
    /// \[out\]
    pub bias: Option<Tensor>,
}

impl Operator for Linear {
    type Saved = ();
    const NAME: &'static str = "gemm";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, ())> {
        let (x, residual) = match inputs {
            [x] => (x, None),
            [x, residual] => (x, Some(*residual)),
            _ => {
                return Err(Error::operand(
                    Self::NAME,
                    "1 or 2 inputs",
                    inputs.len().to_string(),
                ));
            }
        };
        if let Device::Cuda(cuda) = device {
            let y = cuda::affine(cuda, x, &self.weight, self.bias.as_ref(), residual)?;
            return Ok((vec![y], ()));
        }
        let y = affine(device, x, &self.weight, self.bias.as_ref(), residual)?;
        Ok((vec![output(x, &self.weight, y)?], ()))
    }

    fn backward(
        &self,
        device: &Device,
        (): (),
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = only_grad(Self::NAME, grads)?;
        let mut result = vec![match needed[0] {
            true => Some(input_gradient(device, &dy, &self.weight)?),
            false => None,
        }];
        if let Some(&needed) = needed.get(1) {
            result.push(needed.then_some(dy));
        }
        Ok(result)
    }
}

/// dX = dY W, in X's shape.
pub(crate) fn input_gradient(device: &Device, dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if let Device::Cuda(cuda) = device {
        return cuda::input_gradient(cuda, dy, weight);
    }
    let (rows, _) = dy.matrix_dims();
    let (_, cols) = weight.matrix_dims();
    let mut dx = device.buffer(rows * cols);
    expect_cols("gemm", dy, weight.matrix_dims().0)?;
    product_nn(device, &mut dx, Accum::Replace, dy.f32s()?, weight)?;
    let mut shape = dy.shape().to_vec();
    *shape
        .last_mut()
        .expect("checked by the product to be a matrix") = cols;
    Tensor::from_buffer(dx, shape)
}

/// R + X Wᵀ + b as a flat buffer \[T, out\].
pub(crate) fn affine(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Buffer> {
    let (rows, _) = x.matrix_dims();
    let (out, _) = weight.matrix_dims();
    let mut y = device.buffer(rows * out);
    let accum = match (residual, bias) {
        (None, None) => Accum::Replace,
        _ => Accum::Add,
    };
    if let Some(residual) = residual {
        expect_len(residual.f32s()?, rows * out)?;
        y.par_chunks_mut(out)
            .zip(residual.f32s()?.par_chunks(out))
            .for_each(|(y, r)| y.copy_from_slice(r));
    }
    if let Some(bias) = bias {
        expect_shape("gemm", bias, &[out])?;
        let bias = bias.f32s()?;
        y.par_chunks_mut(out).for_each(|y| match residual {
            None => y.copy_from_slice(bias),
            Some(_) => y.iter_mut().zip(bias).for_each(|(y, b)| *y += b),
        });
    }
    expect_cols("gemm", x, weight.matrix_dims().1)?;
    product_nt(device, &mut y, accum, x.f32s()?, weight, 1.0)?;
    Ok(y)
}

/// Wraps a flat \[T, out\] buffer in X's leading shape.
pub(crate) fn output(x: &Tensor, weight: &Tensor, y: Buffer) -> Result<Tensor> {
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.matrix_dims().0;
    }
    Tensor::from_buffer(y, shape)
}

/// out \[M, N\] (+)= alpha · X \[M, K\] · W \[N, K\]ᵀ.
pub(crate) fn product_nt(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    x: &[f32],
    w: &Tensor,
    alpha: f32,
) -> Result<()> {
    let (n, k) = w.matrix_dims();
    let m = rows_of(x, k)?;
    expect_len(out, m * n)?;
    let x = matrix(x, m, k);
    for_each_panel(device, w, |start, panel| {
        let rows = panel.nrows();
        let out = strided_mut(&mut out[start..], m, rows, n);
        multiply(out, accum, x, panel.transpose(), alpha);
    })
}

/// out \[M, K\] (+)= dY \[M, N\] · W \[N, K\].
pub(crate) fn product_nn(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    dy: &[f32],
    w: &Tensor,
) -> Result<()> {
    let (n, k) = w.matrix_dims();
    let m = rows_of(dy, n)?;
    expect_len(out, m * k)?;
    for_each_panel(device, w, |start, panel| {
        let rows = panel.nrows();
        let dy = MatRef::from_row_major_slice_with_stride(&dy[start..], m, rows, n);
        let out = MatMut::from_row_major_slice_mut(&mut *out, m, k);
        let accum = if start == 0 { accum } else { Accum::Add };
        multiply(out, accum, dy, panel, 1.0);
    })
}

/// out \[N, K\] (+)= alpha · dY \[M, N\]ᵀ · X \[M, K\]: the gradient of a weight.
pub(crate) fn product_tn(
    out: &mut [f32],
    accum: Accum,
    dy: &Tensor,
    x: &Tensor,
    alpha: f32,
) -> Result<()> {
    let ((m, n), (rows, k)) = (dy.matrix_dims(), x.matrix_dims());
    if rows != m {
        return Err(Error::operand(
            "gemm",
            format!("{m} rows"),
            format!("{rows}"),
        ));
    }
    expect_len(out, n * k)?;
    let dy = matrix(dy.f32s()?, m, n).transpose();
    let out = MatMut::from_row_major_slice_mut(out, n, k);
    multiply(out, accum, dy, matrix(x.f32s()?, m, k), alpha);
    Ok(())
}

/// The number of rows of `cols` values.
fn rows_of(data: &[f32], cols: usize) -> Result<usize> {
    match data.len().checked_rem(cols) {
        Some(0) => Ok(data.len() / cols),
        _ => Err(Error::operand(
            "gemm",
            format!("rows of {cols} values"),
            data.len().to_string(),
        )),
    }
}

fn matrix(data: &[f32], rows: usize, cols: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data, rows, cols)
}

/// Rows `stride` apart. Not by way of `from_row_major_slice_with_stride_mut`: faer 0.24.4 takes
/// the stride for that of the columns there and reaches beyond the slice.
pub(crate) fn strided_mut(
    data: &mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
) -> MatMut<'_, f32> {
    MatMut::from_column_major_slice_with_stride_mut(data, cols, rows, stride).transpose_mut()
}

fn expect_len(out: &[f32], len: usize) -> Result<()> {
    if out.len() == len {
        return Ok(());
    }
    Err(Error::operand(
        "gemm",
        format!("an output of {len} values"),
        out.len().to_string(),
    ))
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
    let rows = if rhs.ncols() > COLS { 512 } else { COLS };
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
pub(crate) fn widen(w: &Tensor, start: usize, out: &mut [f32]) -> Result<()> {
    const CHUNK: usize = 1 << 15;
    out.par_chunks_mut(CHUNK)
        .enumerate()
        .try_for_each(|(i, chunk)| w.read_f32(start + i * CHUNK, chunk))
}
