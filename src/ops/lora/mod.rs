//! Frozen linear modules with low-rank adapters (Hu et al. 2021, arXiv 2106.09685):
//! Y = X Wᵀ + b + s · (drop(X) Aᵀ) Bᵀ (+ residual), for all modules that read the same X at once.
//!
//! X \[T, in\], W \[out, in\], A \[r, in\], B \[out, r\]; all but W in f32, X also in bf16 where the
//! CPU multiplies in it. Saved for backward:
//! X and, for each module, U = drop(X) Aᵀ \[T, r\], A, B and a bit for each element of X that
//! dropout kept. With dU = s · dY B: dA = dUᵀ drop(X), dB = s · dYᵀ U, and dX is the sum of
//! dY W + drop(dU A).
//!
//! On CUDA X, W, Y and, for the products, A and B are bf16, and U is saved with s in it. There, U of
//! all modules comes from one pass over X, and so do their dA, where the shapes allow it; elsewhere
//! module by module, and what dropout keeps is drawn again.

mod cuda;
mod dropout;

use faer::Accum;

pub use dropout::Dropout;
use dropout::Mask;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::gemm::{
    Values, affine, input_gradient, output, product_nn, product_nt, product_tn,
};
use crate::ops::{Operator, expect_cols, expect_shape};
use crate::tensor::Tensor;

/// Modules on one input. Inputs: X, then A and B of each module, and for one module alone also a
/// residual \[T, out\]. Outputs: Y of each.
pub struct LoraLinear {
    /// The frozen parts; at least one.
    pub modules: Vec<Frozen>,
    /// s
    pub scale: f32,
}

/// What a module has besides its adapter.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// W \[out, in\]
    pub weight: Tensor,
    /// b \[out\]
    pub bias: Option<Tensor>,
    /// What drops inputs of the adapter in training.
    pub dropout: Option<Dropout>,
}

/// What backward needs.
pub enum Saved {
    /// On the CPU.
    Host {
        /// X
        x: Tensor,
        /// Of each module.
        adapters: Vec<HostAdapter>,
    },
    /// On a GPU.
    Cuda(cuda::Saved),
}

/// What backward needs of a module on the CPU.
pub struct HostAdapter {
    /// U, A and B.
    factors: [Tensor; 3],
    mask: Option<Mask>,
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
        let (x, adapters, residual) = self.operands(inputs)?;
        if let Device::Cuda(cuda) = device {
            let (y, saved) = self.forward_cuda(cuda, x, &adapters, residual)?;
            return Ok((y, Saved::Cuda(saved)));
        }
        let (mut outputs, mut saved) = (Vec::new(), Vec::new());
        for (module, [a, b]) in self.modules.iter().zip(adapters) {
            let (y, adapter) = module.forward(device, [x, a, b], residual, self.scale)?;
            outputs.push(y);
            saved.push(adapter);
        }
        let (x, adapters) = (x.clone(), saved);
        Ok((outputs, Saved::Host { x, adapters }))
    }

    fn backward(
        &self,
        device: &Device,
        saved: Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if grads.len() != self.modules.len() {
            let expected = format!("{} output gradients", self.modules.len());
            return Err(Error::operand(
                Self::NAME,
                expected,
                grads.len().to_string(),
            ));
        }
        // A residual stands beside one module alone, and its gradient is that of Y.
        let of_residual = needed.get(1 + 2 * self.modules.len());
        let of_residual = of_residual.map(|&needed| grads[0].clone().filter(|_| needed));
        let (dx, adapters) = match (device, saved) {
            (Device::Cuda(cuda), Saved::Cuda(saved)) => {
                self.backward_cuda(cuda, saved, &grads, needed[0])?
            }
            (_, Saved::Host { x, adapters }) => {
                self.backward_host(device, &x, adapters, grads, needed[0])?
            }
            (_, Saved::Cuda(_)) => {
                let expected = "the device of the forward pass";
                return Err(Error::operand(Self::NAME, expected, device.name()));
            }
        };
        let mut result = vec![dx];
        result.extend(adapters.into_iter().flatten());
        result.extend(of_residual);
        Ok(result)
    }
}

/// X, A and B of each module, and the residual.
type Operands<'t> = (&'t Tensor, Vec<[&'t Tensor; 2]>, Option<&'t Tensor>);

/// The gradients of X and of each module's A and B.
type Gradients = (Option<Tensor>, Vec<[Option<Tensor>; 2]>);

impl LoraLinear {
    /// X, A and B of each module, the residual; their shapes agree.
    fn operands<'t>(&self, inputs: &[&'t Tensor]) -> Result<Operands<'t>> {
        let pairs = 1 + 2 * self.modules.len();
        let with_residual = self.modules.len() == 1 && inputs.len() == pairs + 1;
        if self.modules.is_empty() || !(inputs.len() == pairs || with_residual) {
            let expected = "X, A and B of each module, and for one alone a residual";
            return Err(Error::operand(
                Self::NAME,
                expected,
                format!("{} inputs", inputs.len()),
            ));
        }
        let x = inputs[0];
        let adapters: Vec<_> = inputs[1..pairs].chunks(2).map(|p| [p[0], p[1]]).collect();
        for (module, [a, b]) in self.modules.iter().zip(&adapters) {
            let ((out, cols), (r, _)) = (module.weight.matrix_dims(), a.matrix_dims());
            expect_cols(Self::NAME, x, cols)?;
            expect_shape(Self::NAME, a, &[r, cols])?;
            expect_shape(Self::NAME, b, &[out, r])?;
        }
        Ok((x, adapters, inputs.get(pairs).copied()))
    }

    fn backward_host(
        &self,
        device: &Device,
        x: &Tensor,
        adapters: Vec<HostAdapter>,
        grads: Vec<Option<Tensor>>,
        needed: bool,
    ) -> Result<Gradients> {
        let mut sum: Option<Tensor> = None;
        let mut found = Vec::new();
        let modules = self.modules.iter().zip(adapters).zip(grads);
        for ((module, adapter), dy) in modules.rev() {
            let Some(dy) = dy else {
                found.push([None, None]);
                continue;
            };
            let (dx, da, db) = module.backward(device, x, adapter, &dy, self.scale, needed)?;
            found.push([Some(da), Some(db)]);
            match (&mut sum, dx) {
                (Some(sum), Some(dx)) => device.add_assign(sum, &dx)?,
                (_, dx) => sum = sum.or(dx),
            }
        }
        found.reverse();
        Ok((sum, found))
    }
}

impl Frozen {
    /// Y on the CPU, and what backward needs.
    fn forward(
        &self,
        device: &Device,
        [x, a, b]: [&Tensor; 3],
        residual: Option<&Tensor>,
        scale: f32,
    ) -> Result<(Tensor, HostAdapter)> {
        let ((rows, _), (r, _)) = (x.matrix_dims(), a.matrix_dims());
        let mut y = affine(device, x, &self.weight, self.bias.as_ref(), residual)?;
        let mut u = device.buffer(rows * r);
        let mask = self.dropout.as_ref().map(|dropout| dropout.draw(x.len()));
        let dropped = dropped(device, x, mask.as_ref())?;
        product_nt(
            device,
            &mut u,
            Accum::Replace,
            Values::of(&dropped)?,
            a,
            1.0,
        )?;
        let u = Tensor::from_buffer(u, [rows, r])?;
        product_nt(device, &mut y, Accum::Add, Values::of(&u)?, b, scale)?;
        let factors = [u, a.clone(), b.clone()];
        let y = output(x, &self.weight, y)?;
        Ok((y, HostAdapter { factors, mask }))
    }

    /// The gradients of X (where `needed`), A and B on the CPU.
    fn backward(
        &self,
        device: &Device,
        x: &Tensor,
        HostAdapter { factors, mask }: HostAdapter,
        dy: &Tensor,
        scale: f32,
        needed: bool,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let [u, a, b] = factors;
        let ((rows, _), (r, cols)) = (dy.matrix_dims(), a.matrix_dims());
        let mut du = device.buffer(rows * r);
        product_nn(device, &mut du, Accum::Replace, dy.f32s()?, &b)?;
        du.iter_mut().for_each(|v| *v *= scale);
        let du = Tensor::from_buffer(du, [rows, r])?;

        let mut da = device.buffer(a.len());
        let dropped = dropped(device, x, mask.as_ref())?;
        product_tn(device, &mut da, Accum::Replace, &du, &dropped, 1.0)?;
        drop(dropped);
        let mut db = device.buffer(b.len());
        product_tn(device, &mut db, Accum::Replace, dy, &u, scale)?;
        let (da, db) = (
            Tensor::from_buffer(da, [r, cols])?,
            Tensor::from_buffer(db, b.shape())?,
        );
        if !needed {
            return Ok((None, da, db));
        }
        let mut dx = input_gradient(device, dy, &self.weight)?;
        match mask {
            None => product_nn(device, dx.f32s_mut()?, Accum::Add, du.f32s()?, &a)?,
            Some(mask) => mask.add(&mut dx, &input_gradient(device, &du, &a)?)?,
        }
        Ok((Some(dx.reshape(x.shape())?), da, db))
    }
}

fn dropped(device: &Device, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
    match mask {
        Some(mask) => mask.apply(device, x),
        None => Ok(x.clone()),
    }
}
