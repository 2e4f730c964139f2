//! RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / rms(x) * w with
//! rms(x) = sqrt(mean(x^2) + eps) over the last extent.
//!
//! x, y: \[T, d\] f32, bf16 on CUDA, y also where the CPU multiplies in bf16; w: \[d\], frozen.
//! Saved: x and 1 / rms of each row. With r = 1 / rms(x), dx = r (g w) - x r^3 / d Σ(g w x).
//! Least traffic: 2 T d values forward, 3 T d backward.

use half::bf16;
use rayon::prelude::*;

use super::math::dot;
use super::stored::Stored;
use super::{Operator, expect_cols, expect_inputs, expect_shape, only_grad};
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::device::simd::vectorized;
use crate::device::{CudaDevice, Device, Precision};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows that one task works through.
const ROWS: usize = 16;

/// Root-mean-square normalisation of rows: one input [T, d], one output of the same shape.
pub struct RmsNorm {
    /// \[d\], any float type.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

/// What [`RmsNorm`] keeps for backward.
pub struct Saved {
    x: Tensor,
    /// \[T\] f32.
    inverse_rms: Tensor,
}

impl Operator for RmsNorm {
    type Saved = Saved;
    const NAME: &'static str = "rmsnorm";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Saved)> {
        let [x] = expect_inputs(Self::NAME, inputs)?;
        let d = self.weight.len();
        expect_cols(Self::NAME, x, d)?;
        if let Device::Cuda(cuda) = device {
            return self.forward_cuda(cuda, x);
        }
        match device.precision() {
            Precision::F32 => self.forward_host::<f32>(device, x),
            Precision::Bf16 => self.forward_host::<bf16>(device, x),
        }
    }

    fn backward(
        &self,
        device: &Device,
        Saved { x, inverse_rms }: Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut grad = only_grad(Self::NAME, grads)?;
        expect_shape(Self::NAME, &grad, x.shape())?;
        if let Device::Cuda(cuda) = device {
            return Ok(vec![Some(self.backward_cuda(
                cuda,
                &x,
                &inverse_rms,
                &grad,
            )?)]);
        }
        let d = self.weight.len();
        let weight = self.weight.to_f32()?;
        let weight = weight.f32s()?;
        grad.f32s_mut()?
            .par_chunks_mut((ROWS * d).max(1))
            .zip(x.f32s()?.par_chunks((ROWS * d).max(1)))
            .zip(inverse_rms.f32s()?.par_chunks(ROWS))
            .for_each(|((grad, x), r)| vectorized!(backward_rows(grad, x, r, weight)));
        Ok(vec![Some(grad)])
    }
}

impl RmsNorm {
    /// On the CPU, with an output of elements T.
    fn forward_host<T: Stored>(&self, device: &Device, x: &Tensor) -> Result<(Vec<Tensor>, Saved)> {
        let (rows, d) = x.matrix_dims();
        let weight = self.weight.to_f32()?;
        let weight = weight.f32s()?;
        let mut y = device.buffer(x.len());
        let mut inverse_rms = device.buffer(rows);
        y.par_chunks_mut((ROWS * d).max(1))
            .zip(x.f32s()?.par_chunks((ROWS * d).max(1)))
            .zip(inverse_rms.par_chunks_mut(ROWS))
            .for_each(|((y, x), r)| vectorized!(forward_rows::<T>(y, x, r, weight, self.eps)));
        let saved = Saved {
            x: x.clone(),
            inverse_rms: Tensor::from_buffer(inverse_rms, [rows])?,
        };
        Ok((vec![T::into_tensor(y, x.shape())?], saved))
    }
}

#[inline(always)]
fn forward_rows<T: Stored>(
    y: &mut [T],
    x: &[f32],
    inverse_rms: &mut [f32],
    weight: &[f32],
    eps: f32,
) {
    let d = weight.len();
    for ((y, x), r) in y
        .chunks_exact_mut(d)
        .zip(x.chunks_exact(d))
        .zip(inverse_rms)
    {
        *r = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = T::of(x * *r * w);
        }
    }
}

/// Turns the gradient of y into that of x.
#[inline(always)]
fn backward_rows(grad: &mut [f32], x: &[f32], inverse_rms: &[f32], weight: &[f32]) {
    let d = weight.len();
    for ((g, x), &r) in grad
        .chunks_exact_mut(d)
        .zip(x.chunks_exact(d))
        .zip(inverse_rms)
    {
        for (g, w) in g.iter_mut().zip(weight) {
            *g *= w;
        }
        let along = dot(g, x) * r * r / d as f32;
        for (g, x) in g.iter_mut().zip(x) {
            *g = r * (*g - x * along);
        }
    }
}

const FORWARD: Kernel = Kernel {
    stem: "rmsnorm",
    function: "rmsnorm_forward_bf16",
};
const BACKWARD: Kernel = Kernel {
    stem: "rmsnorm",
    function: "rmsnorm_backward_bf16",
};
/// Warps of a block, each with a row of its own, where the rows are not too long.
const WARPS: usize = 8;
const WARP: usize = 32;
/// Shared memory that every launch may have.
const SHARED: usize = 48 << 10;
/// W and two rows of bf16 fit the shared memory that every device grants, 99 KiB.
const LONGEST_ROW: usize = 12_000;

impl RmsNorm {
    /// One warp a token, which holds `rows` rows in shared memory, beside W for the block.
    fn grid(&self, tokens: usize, rows: usize) -> Result<Grid> {
        let d = self.weight.len();
        if d > LONGEST_ROW {
            let expected = format!("rows of at most {LONGEST_ROW} values on CUDA");
            return Err(Error::operand(Self::NAME, expected, format!("{d}")));
        }
        let row = (d.next_multiple_of(WIDE) * DType::Bf16.size()).max(1);
        let warps = ((SHARED / row).saturating_sub(1) / rows).clamp(1, WARPS);
        let shared = (1 + rows * warps) * row;
        let threads = (warps * WARP) as u32;
        Ok(Grid::of_blocks(tokens.div_ceil(warps), threads, shared))
    }

    fn forward_cuda(&self, cuda: &CudaDevice, x: &Tensor) -> Result<(Vec<Tensor>, Saved)> {
        let (rows, d) = x.matrix_dims();
        let x = cuda.resident(x, DType::Bf16)?;
        let weight = cuda.resident(&self.weight, DType::Bf16)?;
        let y = cuda.alloc(DType::Bf16, x.len())?;
        let inverse_rms = cuda.alloc(DType::F32, rows)?;
        let args = [
            Arg::from(&y),
            Arg::from(&inverse_rms),
            x.arg()?,
            weight.arg()?,
            Arg::size(Self::NAME, rows)?,
            Arg::size(Self::NAME, d)?,
            Arg::F32(self.eps),
        ];
        // SAFETY: x and y are [rows, d], weight is [d] (checked by the caller), all bf16;
        // inverse_rms is [rows] f32; shared memory holds w and a row for each warp.
        unsafe { cuda.launch(FORWARD, self.grid(rows, 1)?, &args) }?;
        let y = Tensor::from_cuda(y, x.shape())?;
        let inverse_rms = Tensor::from_cuda(inverse_rms, [rows])?;
        Ok((vec![y], Saved { x, inverse_rms }))
    }

    fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        inverse_rms: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor> {
        let (rows, d) = x.matrix_dims();
        let grad = cuda.resident(grad, DType::Bf16)?;
        let weight = cuda.resident(&self.weight, DType::Bf16)?;
        let dx = cuda.alloc(DType::Bf16, x.len())?;
        let args = [
            Arg::from(&dx),
            grad.arg()?,
            x.arg()?,
            weight.arg()?,
            inverse_rms.arg()?,
            Arg::size(Self::NAME, rows)?,
            Arg::size(Self::NAME, d)?,
        ];
        // SAFETY: grad, x and dx are [rows, d], weight is [d], all bf16; inverse_rms is [rows]
        // f32 from the forward pass; shared memory holds w and two rows for each warp.
        unsafe { cuda.launch(BACKWARD, self.grid(rows, 2)?, &args) }?;
        Tensor::from_cuda(dx, x.shape())
    }
}
