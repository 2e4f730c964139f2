//! A frozen linear module with a low-rank adapter (Hu et al. 2021, arXiv 2106.09685):
//! Y = X Wᵀ + b + s · (drop(X) Aᵀ) Bᵀ (+ residual).
//!
//! X \[T, in\], W \[out, in\], A \[r, in\], B \[out, r\]; all but W in f32. Saved for backward:
//! X, U = drop(X) Aᵀ \[T, r\], A and B; the dropout mask is drawn again. With dU = s · dY B:
//! dA = dUᵀ drop(X), dB = s · dYᵀ U, dX = dY W + drop(dU A).
//!
//! On CUDA X, W, Y and, for the products, A and B are bf16; U is saved with s in it.

mod cuda;

use faer::Accum;
use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::gemm::{affine, input_gradient, output, product_nn, product_nt, product_tn};
use crate::ops::{Operator, expect_cols, expect_shape, only_grad};
use crate::rng::Stream;
use crate::tensor::Tensor;

/// Inputs: X, A, B, and the residual \[T, out\] where there is one.
pub struct LoraLinear {
    /// W \[out, in\]
    pub weight: Tensor,
    /// b \[out\]
    pub bias: Option<Tensor>,
    /// s
    pub scale: f32,
    /// What drops inputs of the adapter in training.
    pub dropout: Option<Dropout>,
}

/// Inverted dropout: zero with probability `p`, else scaled by 1/(1−p).
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of a zero, in \[0, 1).
    pub p: f32,
    /// Where the mask's random numbers come from: word i belongs to element i.
    pub stream: Stream,
}

impl Dropout {
    /// An element is dropped where its random word is below this.
    fn threshold(&self) -> u32 {
        (f64::from(self.p) * 2f64.powi(32)) as u32
    }

    fn apply(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        const CHUNK: usize = 1 << 12;
        let threshold = self.threshold();
        let keep = 1.0 / (1.0 - self.p);
        let mut out = device.buffer(x.len());
        out.par_chunks_mut(CHUNK)
            .zip(x.f32s()?.par_chunks(CHUNK))
            .enumerate()
            .for_each(|(c, (out, x))| {
                for (i, (out, x)) in out.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                    let words = self.stream.block((c * CHUNK / 4 + i) as u32);
                    for ((out, x), word) in out.iter_mut().zip(x).zip(words) {
                        *out = if word < threshold { 0.0 } else { x * keep };
                    }
                }
            });
        Tensor::from_buffer(out, x.shape())
    }
}

/// What backward needs.
pub struct Saved {
    x: Tensor,
    u: Tensor,
    a: Tensor,
    b: Tensor,
}

impl LoraLinear {
    fn dropped(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(dropout) => dropout.apply(device, x),
            None => Ok(x.clone()),
        }
    }
}

impl Operator for LoraLinear {
    type Saved = Saved;
    const NAME: &'static str = "lora";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Saved)> {
        let (x, a, b, residual) = match inputs {
            [x, a, b] => (*x, *a, *b, None),
            [x, a, b, residual] => (*x, *a, *b, Some(*residual)),
            _ => {
                return Err(Error::operand(
                    Self::NAME,
                    "3 or 4 inputs",
                    inputs.len().to_string(),
                ));
            }
        };
        let (rows, _) = x.matrix_dims();
        let ((out, cols), (r, _)) = (self.weight.matrix_dims(), a.matrix_dims());
        expect_cols(Self::NAME, x, cols)?;
        expect_shape(Self::NAME, a, &[r, cols])?;
        expect_shape(Self::NAME, b, &[out, r])?;
        if let Device::Cuda(cuda) = device {
            let (y, saved) = self.forward_cuda(cuda, [x, a, b], residual)?;
            return Ok((vec![y], saved));
        }
        let mut y = affine(device, x, &self.weight, self.bias.as_ref(), residual)?;
        let mut u = device.buffer(rows * r);
        product_nt(
            device,
            &mut u,
            Accum::Replace,
            self.dropped(device, x)?.f32s()?,
            a,
            1.0,
        )?;
        let u = Tensor::from_buffer(u, [rows, r])?;
        product_nt(device, &mut y, Accum::Add, u.f32s()?, b, self.scale)?;
        let y = output(x, &self.weight, y)?;
        let saved = Saved {
            x: x.clone(),
            u,
            a: a.clone(),
            b: b.clone(),
        };
        Ok((vec![y], saved))
    }

    fn backward(
        &self,
        device: &Device,
        saved: Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = only_grad(Self::NAME, grads)?;
        if let Device::Cuda(cuda) = device {
            let (dx, da, db) = self.backward_cuda(cuda, saved, &dy, needed[0])?;
            let mut result = vec![dx, Some(da), Some(db)];
            result.extend(needed.get(3).map(|&needed| needed.then_some(dy)));
            return Ok(result);
        }
        let Saved { x, u, a, b } = saved;
        let ((rows, _), (r, cols)) = (dy.matrix_dims(), a.matrix_dims());
        let mut du = device.buffer(rows * r);
        product_nn(device, &mut du, Accum::Replace, dy.f32s()?, &b)?;
        du.iter_mut().for_each(|v| *v *= self.scale);
        let du = Tensor::from_buffer(du, [rows, r])?;

        let mut da = device.buffer(a.len());
        product_tn(
            device,
            &mut da,
            Accum::Replace,
            &du,
            &self.dropped(device, &x)?,
            1.0,
        )?;
        let mut db = device.buffer(b.len());
        product_tn(device, &mut db, Accum::Replace, &dy, &u, self.scale)?;
        let dx = match needed[0] {
            true => Some(self.input_gradient(device, &dy, &du, &a, &x)?),
            false => None,
        };
        let mut result = vec![
            dx,
            Some(Tensor::from_buffer(da, [r, cols])?),
            Some(Tensor::from_buffer(db, b.shape())?),
        ];
        if let Some(&needed) = needed.get(3) {
            result.push(needed.then_some(dy));
        }
        Ok(result)
    }
}

impl LoraLinear {
    fn input_gradient(
        &self,
        device: &Device,
        dy: &Tensor,
        du: &Tensor,
        a: &Tensor,
        x: &Tensor,
    ) -> Result<Tensor> {
        let mut dx = input_gradient(device, dy, &self.weight)?;
        match &self.dropout {
            None => product_nn(device, dx.f32s_mut()?, Accum::Add, du.f32s()?, a)?,
            Some(dropout) => {
                let through = input_gradient(device, du, a)?;
                device.add_assign(&mut dx, &dropout.apply(device, &through)?)?;
            }
        }
        dx.reshape(x.shape())
    }
}
