//! The products on the CPU, in the precision of the device.

pub(crate) mod bf16;
mod single;

use faer::Accum;

use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bf16::{Level, Operand, Product, Values};

/// out \[M, N\] (+)= alpha · X \[M, K\] · W \[N, K\]ᵀ.
pub(crate) fn product_nt(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    x: Values,
    w: &Tensor,
    alpha: f32,
) -> Result<()> {
    let (n, k) = w.matrix_dims();
    let m = rows_of(x.len(), k)?;
    expect_len(out, m * n)?;
    if device.precision() == Precision::F32 {
        return single::product_nt(device, out, accum, x.f32s()?, w, alpha);
    }
    let a = Operand::rows(x, k);
    with_values(w, |w| {
        let b = Operand::rows(w, k);
        in_bf16(device, out, accum, (a, b), [m, n, k], alpha);
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
    let m = rows_of(dy.len(), n)?;
    expect_len(out, m * k)?;
    if device.precision() == Precision::F32 {
        return single::product_nn(device, out, accum, dy, w);
    }
    let a = Operand::rows(Values::F32(dy), n);
    with_values(w, |w| {
        let b = Operand::columns(w, k);
        in_bf16(device, out, accum, (a, b), [m, k, n], 1.0);
    })
}

/// out \[N, K\] (+)= alpha · dY \[M, N\]ᵀ · X \[M, K\]: the gradient of a weight.
pub(crate) fn product_tn(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    dy: &Tensor,
    x: &Tensor,
    alpha: f32,
) -> Result<()> {
    let ((m, n), (rows, k)) = (dy.matrix_dims(), x.matrix_dims());
    if rows != m {
        let expected = format!("{m} rows");
        return Err(Error::operand("gemm", expected, format!("{rows}")));
    }
    expect_len(out, n * k)?;
    if device.precision() == Precision::F32 {
        return single::product_tn(out, accum, dy, x, alpha);
    }
    let a = Operand::columns(Values::of(dy)?, n);
    let b = Operand::columns(Values::of(x)?, k);
    in_bf16(device, out, accum, (a, b), [n, k, m], alpha);
    Ok(())
}

/// A product of operands whose sizes have been checked.
fn in_bf16(
    device: &Device,
    out: &mut [f32],
    accum: Accum,
    (a, b): (Operand, Operand),
    dims: [usize; 3],
    alpha: f32,
) {
    let product = Product {
        a,
        b,
        dims,
        alpha,
        add: accum == Accum::Add,
        level: Level::best(),
    };
    product.run(device, out, dims[1]);
}

/// Calls `use_values` with a weight's elements in place, or with a rounded copy of those that
/// are neither f32 nor aligned bf16.
fn with_values(w: &Tensor, use_values: impl FnOnce(Values)) -> Result<()> {
    if w.dtype() == DType::F32
        && let Ok(values) = w.f32s()
    {
        use_values(Values::F32(values));
        return Ok(());
    }
    let rounded = w.to_bf16()?;
    let values = rounded.bf16s();
    use_values(Values::Bf16(values.ok_or_else(|| {
        Error::operand("gemm", "a weight in host memory", w.found())
    })?));
    Ok(())
}

/// The number of rows of `cols` values among `len`.
fn rows_of(len: usize, cols: usize) -> Result<usize> {
    match len.checked_rem(cols) {
        Some(0) => Ok(len / cols),
        _ => Err(Error::operand(
            "gemm",
            format!("rows of {cols} values"),
            len.to_string(),
        )),
    }
}

pub(super) fn expect_len(out: &[f32], len: usize) -> Result<()> {
    if out.len() == len {
        return Ok(());
    }
    Err(Error::operand(
        "gemm",
        format!("an output of {len} values"),
        out.len().to_string(),
    ))
}
