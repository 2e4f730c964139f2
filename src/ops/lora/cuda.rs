//! The adapter on a GPU. Products in bf16 with fp32 accumulation, gradients of A and B in f32;
//! the low-rank product rides in the pass of the frozen one, forward and for dX.

use super::{Dropout, LoraLinear, Saved};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::Result;
use crate::ops::gemm::cuda::{Kept, Layout, LowRank, Matrix, Product, with_last};
use crate::tensor::{CudaBuffer, DType, Tensor};

const DROPOUT: Kernel = Kernel {
    stem: "lora",
    function: "lora_dropout_bf16",
};

impl Dropout {
    /// X, bf16, with zeros for what is dropped and the rest as it is.
    fn drop_cuda(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        mask: Option<&CudaBuffer>,
    ) -> Result<Tensor> {
        let dropped = cuda.alloc(DType::Bf16, x.len())?;
        let (key, high) = self.stream.parts();
        let args = [
            Arg::from(&dropped),
            mask.map_or(Arg::Pointer(0), Arg::from),
            x.arg()?,
            Arg::U64(x.len() as u64),
            Arg::U32(key[0]),
            Arg::U32(key[1]),
            Arg::U32(high[0]),
            Arg::U32(high[1]),
            Arg::U32(high[2]),
            Arg::U32(self.threshold()),
        ];
        // SAFETY: x and its copy are bf16 of one length; the mask, where there is one, was made
        // for that length by `mask`.
        unsafe { cuda.launch(DROPOUT, Grid::over(x.len().div_ceil(WIDE)), &args) }?;
        Tensor::from_cuda(dropped, x.shape())
    }

    /// Memory for one bit for each element of `x`.
    fn mask(cuda: &CudaDevice, x: &Tensor) -> Result<CudaBuffer> {
        cuda.alloc(DType::U32, x.len().div_ceil(32))
    }
}

impl LoraLinear {
    /// The factor on products with what dropout kept.
    fn keep(&self) -> f32 {
        self.dropout.as_ref().map_or(1.0, |d| 1.0 / (1.0 - d.p))
    }

    pub(super) fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        [x, a, b]: [&Tensor; 3],
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Saved)> {
        let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
        let [x, a, b] = [resident(x)?, resident(a)?, resident(b)?];
        let weight = resident(&self.weight)?;
        let bias = self.bias.as_ref().map(resident).transpose()?;
        let residual = residual.map(resident).transpose()?;
        let dropped = match &self.dropout {
            Some(dropout) => dropout.drop_cuda(cuda, &x, None)?,
            None => x.clone(),
        };
        let u = Product {
            alpha: self.scale * self.keep(),
            ..Product::new(Layout::Nt, Matrix::of(&dropped)?, Matrix::of(&a)?)
        };
        let u = Tensor::from_cuda(
            u.run(cuda, DType::Bf16)?,
            [x.matrix_dims().0, a.matrix_dims().0],
        )?;
        let low_rank = LowRank {
            lhs: Matrix::of(&u)?,
            rhs: Matrix::of(&b)?,
            dropout: None,
        };
        let y = Product {
            bias: bias.as_ref(),
            residual: residual.as_ref(),
            ..Product::new(Layout::Nt, Matrix::of(&x)?, Matrix::of(&weight)?)
        };
        let y = y.run_with(cuda, DType::Bf16, &low_rank)?;
        let y = Tensor::from_cuda(y, with_last(&x, weight.matrix_dims().0))?;
        Ok((y, Saved { x, u, a, b }))
    }

    /// The gradients of X (where `needed`), A and B.
    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        Saved { x, u, a, b }: Saved,
        dy: &Tensor,
        needed: bool,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let dy = cuda.resident(dy, DType::Bf16)?;
        let ((rows, _), (r, _)) = (dy.matrix_dims(), a.matrix_dims());
        let du = Product {
            alpha: self.scale,
            ..Product::new(Layout::Nn, Matrix::of(&dy)?, Matrix::of(&b)?)
        };
        let du = Tensor::from_cuda(du.run(cuda, DType::Bf16)?, [rows, r])?;
        // The saved U holds the scale already.
        let db = Product::new(Layout::Tn, Matrix::of(&dy)?, Matrix::of(&u)?);
        let db = Tensor::from_cuda(db.run(cuda, DType::F32)?, b.shape())?;

        let mask = match (&self.dropout, needed) {
            (Some(_), true) => Some(Dropout::mask(cuda, &x)?),
            _ => None,
        };
        let dropped = match &self.dropout {
            Some(dropout) => dropout.drop_cuda(cuda, &x, mask.as_ref())?,
            None => x,
        };
        let da = Product {
            alpha: self.keep(),
            ..Product::new(Layout::Tn, Matrix::of(&du)?, Matrix::of(&dropped)?)
        };
        let da = Tensor::from_cuda(da.run(cuda, DType::F32)?, a.shape())?;
        let dx = match needed {
            true => Some(self.input_gradient_cuda(cuda, &dy, &du, &a, mask.as_ref())?),
            false => None,
        };
        Ok((dx, da, db))
    }

    /// dX = dY W + drop(dU A).
    fn input_gradient_cuda(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        du: &Tensor,
        a: &Tensor,
        mask: Option<&CudaBuffer>,
    ) -> Result<Tensor> {
        let weight = cuda.resident(&self.weight, DType::Bf16)?;
        let low_rank = LowRank {
            lhs: Matrix::of(du)?,
            rhs: Matrix::of(a)?,
            dropout: mask.map(|mask| Kept {
                mask,
                scale: self.keep(),
            }),
        };
        let dx = Product::new(Layout::Nn, Matrix::of(dy)?, Matrix::of(&weight)?);
        let dx = dx.run_with(cuda, DType::Bf16, &low_rank)?;
        Tensor::from_cuda(dx, with_last(dy, weight.matrix_dims().1))
    }
}
