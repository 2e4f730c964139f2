//! Frozen linear modules with low-rank adapters (Hu et al. 2021, arXiv 2106.09685):
//! Y = X Wᵀ + b + s · (drop(X) Aᵀ) Bᵀ (+ residual), for all modules that read the same X at once.
//!
//! X \[T, in\], W \[out, in\], A \[r, in\], B \[out, r\]; all but W in f32, X also in bf16 where the
//! CPU multiplies in it. Saved for backward:
//! X and, for each module, U = s · drop(X) Aᵀ \[T, r\], A, B and a bit for each element of X that
//! dropout kept. With dU = s · dY B: dA = dUᵀ drop(X), dB = dYᵀ U, and dX is the sum of
//! dY W + drop(dU A). The product of low rank is computed along with the one beside it, tile by
//! tile, where that is in bf16.
//!
//! On CUDA X, W, Y and, for the products, A and B are bf16. There, U of all modules comes from one
//! pass over X, and so do their dA, where the shapes allow it; elsewhere module by module, and what
//! dropout keeps is drawn again.

mod cuda;
mod dropout;

pub use dropout::Dropout;
use dropout::Mask;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::gemm::{Left, LowRank, Product, Start, Summed, Values, affine, output, product_tn};
use crate::ops::{Operator, expect_cols, expect_shape};
use crate::tensor::{Buffer, Tensor};

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
        let mut left = Left::new(Values::of(x)?, x.matrix_dims().1)?;
        if self.modules.len() > 1 || self.modules[0].dropout.is_none() {
            left = left.shared_by_nt(device);
        }
        for (module, [a, b]) in self.modules.iter().zip(adapters) {
            let (y, adapter) = module.forward(device, (x, &left), [a, b], residual, self.scale)?;
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
        let mut sum = None;
        let mut found = Vec::new();
        let readers = adapters.iter().filter(|adapter| adapter.mask.is_none());
        let summed = match readers.count() > 1 {
            true => Summed::shared(device, x)?,
            false => Summed::once(x),
        };
        let modules = self.modules.iter().zip(adapters).zip(grads);
        for ((module, adapter), dy) in modules.rev() {
            let Some(dy) = dy else {
                found.push([None, None]);
                continue;
            };
            let sum = needed.then_some(&mut sum);
            let x = (x, &summed);
            let (da, db) = module.backward(device, x, adapter, &dy, self.scale, sum)?;
            found.push([Some(da), Some(db)]);
        }
        found.reverse();
        let dx = sum.map(|sum| Tensor::from_buffer(sum, x.shape()));
        Ok((dx.transpose()?, found))
    }
}

impl Frozen {
    /// Y on the CPU, and what backward needs.
    fn forward(
        &self,
        device: &Device,
        (x, left): (&Tensor, &Left),
        [a, b]: [&Tensor; 2],
        residual: Option<&Tensor>,
        scale: f32,
    ) -> Result<(Tensor, HostAdapter)> {
        let ((rows, cols), (r, _)) = (x.matrix_dims(), a.matrix_dims());
        let mut u = device.buffer(rows * r);
        let mask = self.dropout.as_ref().map(|dropout| dropout.draw(x.len()));
        let (dropped, own);
        let input = match &mask {
            None => left,
            Some(mask) => {
                dropped = mask.apply(device, x)?;
                own = Left::new(Values::of(&dropped)?, cols)?;
                &own
            }
        };
        let product = Product {
            alpha: scale,
            ..Product::new(input, a)
        };
        product.nt(device, &mut u)?;
        let u = Tensor::from_buffer(u, [rows, r])?;
        let low_rank = LowRank {
            left: &u,
            right: b,
            kept: None,
        };
        let bias = self.bias.as_ref();
        let y = affine(device, left, &self.weight, bias, residual, Some(low_rank))?;
        let y = output(x, &self.weight, y)?;
        let factors = [u, a.clone(), b.clone()];
        Ok((y, HostAdapter { factors, mask }))
    }

    /// The gradients of A and B on the CPU; that of X is added to `dx` or becomes it.
    fn backward(
        &self,
        device: &Device,
        (x, summed): (&Tensor, &Summed),
        HostAdapter { factors, mask }: HostAdapter,
        dy: &Tensor,
        scale: f32,
        dx: Option<&mut Option<Buffer>>,
    ) -> Result<(Tensor, Tensor)> {
        let [u, a, b] = factors;
        let ((rows, out), (r, _)) = (dy.matrix_dims(), a.matrix_dims());
        let mut left = Left::new(Values::of(dy)?, out)?;
        if dx.is_some() {
            left = left.shared_by_nn(device);
        }
        let mut du = device.buffer(rows * r);
        let product = Product {
            alpha: scale,
            ..Product::new(&left, &b)
        };
        product.nn(device, &mut du)?;
        let du = Tensor::from_buffer(du, [rows, r])?;

        let mut da = device.buffer(a.len());
        match &mask {
            None => product_tn(device, &mut da, &du, summed)?,
            Some(mask) => {
                let dropped = mask.apply(device, x)?;
                product_tn(device, &mut da, &du, &Summed::once(&dropped))?;
            }
        }
        let mut db = device.buffer(b.len());
        product_tn(device, &mut db, dy, &Summed::once(&u))?;
        let grads = (
            Tensor::from_buffer(da, a.shape())?,
            Tensor::from_buffer(db, b.shape())?,
        );
        let Some(dx) = dx else {
            return Ok(grads);
        };
        let product = Product {
            start: if dx.is_some() {
                Start::Output
            } else {
                Start::Zero
            },
            low_rank: Some(LowRank {
                left: &du,
                right: &a,
                kept: mask.as_ref().map(Mask::kept),
            }),
            ..Product::new(&left, &self.weight)
        };
        product.nn(device, dx.get_or_insert_with(|| device.buffer(x.len())))?;
        Ok(grads)
    }
}
