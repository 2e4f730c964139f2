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

use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::{Operator, expect_shape, only_grad};
use crate::tensor::{Buffer, Tensor};
pub(crate) use cpu::bf16::{self, Values};
pub(crate) use cpu::{Kept, Left, LowRank, Product, Start, Summed, product_tn};

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
        let left = Left::new(Values::of(x)?, x.matrix_dims().1)?;
        let bias = self.bias.as_ref();
        let y = affine(device, &left, &self.weight, bias, residual, None)?;
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
    let ((rows, out), (_, cols)) = (dy.matrix_dims(), weight.matrix_dims());
    let mut dx = device.buffer(rows * cols);
    let left = Left::new(Values::of(dy)?, out)?;
    Product::new(&left, weight).nn(device, &mut dx)?;
    let mut shape = dy.shape().to_vec();
    *shape
        .last_mut()
        .expect("checked by the product to be a matrix") = cols;
    Tensor::from_buffer(dx, shape)
}

/// R + X Wᵀ + b and what is of low rank, as a flat buffer \[T, out\].
pub(crate) fn affine(
    device: &Device,
    x: &Left,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    low_rank: Option<LowRank>,
) -> Result<Buffer> {
    let (out, _) = weight.matrix_dims();
    let mut y = device.buffer(x.rows() * out);
    if let Some(bias) = bias {
        expect_shape("gemm", bias, &[out])?;
    }
    if let Some(residual) = residual
        && residual.matrix_dims() != (x.rows(), out)
    {
        let expected = format!("a residual [{}, {out}]", x.rows());
        return Err(Error::operand("gemm", expected, residual.found()));
    }
    let start = match (residual, bias) {
        (None, None) => Start::Zero,
        (Some(residual), None) => Start::Matrix(residual.f32s()?),
        (None, Some(bias)) => Start::Row(bias.f32s()?),
        (Some(residual), Some(bias)) => {
            let bias = bias.f32s()?;
            y.par_chunks_mut(out.max(1))
                .zip(residual.f32s()?.par_chunks(out.max(1)))
                .for_each(|(y, r)| {
                    for ((y, r), b) in y.iter_mut().zip(r).zip(bias) {
                        *y = r + b;
                    }
                });
            Start::Output
        }
    };
    let product = Product {
        start,
        low_rank,
        ..Product::new(x, weight)
    };
    product.nt(device, &mut y)?;
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
