//! Matrix products: Y = X Wᵀ + b (+ residual).
//!
//! X \[T, in\] f32, or bf16 where products are in it, W \[out, in\] frozen in f32, f16 or bf16,
//! b \[out\] f32, Y \[T, out\] f32.
//! Backward: dX = dY W; the residual's gradient is dY itself. Saved for backward: nothing but W.
//!
//! On CUDA everything is bf16, accumulated in fp32.
//!
//! On the CPU products are computed in the device's precision: f32, or bf16 with sums in f32.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod hopper;
#[cfg(test)]
mod tests;
mod tile;

use faer::Accum;
use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::{Operator, expect_cols, expect_shape, only_grad};
use crate::tensor::{Buffer, Tensor};
pub(crate) use cpu::bf16::{self, Values};
use cpu::expect_len;
pub(crate) use cpu::{product_nn, product_nt, product_tn};

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
    product_nt(device, &mut y, accum, Values::of(x)?, weight, 1.0)?;
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
