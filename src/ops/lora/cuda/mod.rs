//! The adapters on a GPU. Products in bf16 with fp32 accumulation, gradients of A and B in f32;
//! the low-rank product rides in the pass of the frozen one, forward and for dX. What dX does not
//! need of dY is found in one pass over it.

mod down;
mod up;

use std::ops::Range;

use super::{Dropout, Frozen, Gradients, LoraLinear};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::Result;
use crate::ops::expect_shape;
use crate::ops::gemm::cuda::{Kept, Layout, LowRank, Matrix, Product, with_last};
use crate::tensor::{CudaBuffer, DType, Tensor};

use down::{Down, Masks};

const NAME: &str = "lora";

/// A kernel of kernels/lora.cu.
const fn kernel(function: &'static str) -> Kernel {
    let stem = "lora";
    Kernel { stem, function }
}

impl Dropout {
    /// The step's words in the GPU's memory, where the stream takes it from memory.
    fn resident_step(&self, cuda: &CudaDevice) -> Result<Option<Tensor>> {
        let step = self.step.as_ref().map(|step| {
            expect_shape(NAME, step, &[2])?;
            cuda.resident(step, DType::U32)
        });
        step.transpose()
    }

    /// X, bf16, with zeros for what is dropped and the rest as it is.
    fn drop_cuda(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        mask: Option<&CudaBuffer>,
    ) -> Result<Tensor> {
        let step = self.resident_step(cuda)?;
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
            step.as_ref().map_or(Ok(Arg::Pointer(0)), Tensor::arg)?,
            Arg::U32(self.threshold()),
        ];
        // SAFETY: x and its copy are bf16 of one length; the mask, where there is one, was made
        // for that length by `mask`; the step, where it is in memory, is two u32.
        unsafe {
            cuda.launch(
                kernel("lora_dropout_bf16"),
                Grid::over(x.len().div_ceil(WIDE)),
                &args,
            )
        }?;
        Tensor::from_cuda(dropped, x.shape())
    }

    /// Memory for one bit for each element of `x`.
    fn mask(cuda: &CudaDevice, x: &Tensor) -> Result<CudaBuffer> {
        cuda.alloc(DType::U32, x.len().div_ceil(32))
    }
}

/// What backward needs, all in bf16.
pub struct Saved {
    x: Tensor,
    adapters: Vec<Adapter>,
    /// What dropout kept, where one launch drew for all modules.
    masks: Option<Masks>,
}

/// One module's part.
struct Adapter {
    u: Columns,
    a: Rows,
    b: Tensor,
}

/// Some rows of a matrix that may hold several modules' A.
#[derive(Clone)]
struct Rows {
    tensor: Tensor,
    range: Range<usize>,
}

impl Rows {
    fn matrix(&self) -> Result<Matrix<'_>> {
        Matrix::of(&self.tensor)?.rows(self.range.clone())
    }
}

/// Some columns of a matrix \[T, ..\] that may hold several modules' U or dU.
#[derive(Clone)]
struct Columns {
    tensor: Tensor,
    range: Range<usize>,
}

impl Columns {
    fn matrix(&self) -> Result<Matrix<'_>> {
        Matrix::of(&self.tensor)?.cols(self.range.clone())
    }
}

impl Frozen {
    /// The factor on products with what dropout kept.
    fn keep(&self) -> f32 {
        self.dropout.as_ref().map_or(1.0, Dropout::keep)
    }
}

impl LoraLinear {
    pub(super) fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        adapters: &[[&Tensor; 2]],
        residual: Option<&Tensor>,
    ) -> Result<(Vec<Tensor>, Saved)> {
        let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
        let x = resident(x)?;
        let residual = residual.map(resident).transpose()?;
        let ranks = adapters.iter().map(|[a, _]| a.matrix_dims().0);
        let (adapters, masks) = match Down::of(&self.modules, &x, ranks) {
            Some(down) => {
                let (a, all_b) = down.factors(cuda, adapters)?;
                let (u, masks) = down.forward(cuda, &x, &a, self.scale)?;
                let adapter = |(i, b)| {
                    let (range, tensor) = (down.ranks_of(i), a.clone());
                    Adapter {
                        u: columns(&u, range.clone()),
                        a: Rows { tensor, range },
                        b,
                    }
                };
                (all_b.into_iter().enumerate().map(adapter).collect(), masks)
            }
            None => (self.adapters_each(cuda, &x, adapters)?, None),
        };
        let mut outputs = Vec::new();
        for (module, adapter) in self.modules.iter().zip(&adapters) {
            let weight = resident(&module.weight)?;
            let bias = module.bias.as_ref().map(resident).transpose()?;
            let low_rank = LowRank {
                lhs: adapter.u.matrix()?,
                rhs: Matrix::of(&adapter.b)?,
                dropout: None,
            };
            let y = Product {
                bias: bias.as_ref(),
                residual: residual.as_ref(),
                ..Product::new(Layout::Nt, Matrix::of(&x)?, Matrix::of(&weight)?)
            };
            let y = y.run_with(cuda, DType::Bf16, &low_rank)?;
            outputs.push(Tensor::from_cuda(y, with_last(&x, weight.matrix_dims().0))?);
        }
        Ok((outputs, Saved { x, adapters, masks }))
    }

    /// U and the factors in bf16, module by module.
    fn adapters_each(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        adapters: &[[&Tensor; 2]],
    ) -> Result<Vec<Adapter>> {
        let modules = self.modules.iter().zip(adapters);
        let each = modules.map(|(module, [a, b])| {
            let [a, b] = [
                cuda.resident(a, DType::Bf16)?,
                cuda.resident(b, DType::Bf16)?,
            ];
            let dropped = match &module.dropout {
                Some(dropout) => dropout.drop_cuda(cuda, x, None)?,
                None => x.clone(),
            };
            let u = Product {
                alpha: self.scale * module.keep(),
                ..Product::new(Layout::Nt, Matrix::of(&dropped)?, Matrix::of(&a)?)
            };
            let (rows, range) = (x.matrix_dims().0, 0..a.matrix_dims().0);
            let u = Tensor::from_cuda(u.run(cuda, DType::Bf16)?, [rows, range.end])?;
            Ok(Adapter {
                u: columns(&u, range.clone()),
                a: Rows { tensor: a, range },
                b,
            })
        });
        each.collect()
    }

    /// The gradients of X (where `needed`) and of each module's A and B.
    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        Saved { x, adapters, masks }: Saved,
        dy: &[Option<Tensor>],
        needed: bool,
    ) -> Result<Gradients> {
        let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
        let dy = dy.iter().map(|t| t.as_ref().map(resident).transpose());
        let dy = dy.collect::<Result<Vec<_>>>()?;
        let ranks = adapters.iter().map(|adapter| adapter.a.range.len());
        let down = Down::of(&self.modules, &x, ranks);
        let Some(down) = down.filter(|_| dy.iter().all(Option::is_some)) else {
            return self.backward_each(cuda, &x, &adapters, &dy, needed);
        };
        let all_dy: Vec<&Tensor> = dy.iter().flatten().collect();
        let (du, all_db) = self.output_gradients(cuda, &all_dy, &adapters)?;
        let all_da = down.backward(cuda, &x, &du, masks.as_ref())?;
        let mut dx = None;
        if needed {
            let modules = self.modules.iter().zip(&adapters).zip(all_dy);
            for (i, ((module, adapter), dy)) in modules.enumerate() {
                let mask = masks.as_ref().map(|masks| masks.of(i, &x));
                let du = columns(&du, adapter.a.range.clone());
                dx = Some(module.input_gradient_cuda(cuda, dy, &du, adapter, mask, dx)?);
            }
        }
        let dx = dx.map(|dx| dx.reshape(x.shape())).transpose()?;
        let found = all_da.into_iter().zip(all_db);
        Ok((dx, found.map(|(da, db)| [Some(da), Some(db)]).collect()))
    }

    /// As [`Self::backward_cuda`], module by module.
    fn backward_each(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        adapters: &[Adapter],
        dy: &[Option<Tensor>],
        needed: bool,
    ) -> Result<Gradients> {
        let (mut sum, mut found) = (None, Vec::new());
        for ((module, adapter), dy) in self.modules.iter().zip(adapters).zip(dy) {
            let Some(dy) = dy else {
                found.push([None, None]);
                continue;
            };
            let r = adapter.a.range.len();
            let (du, db) = self.output_gradients_of_one(cuda, dy, adapter)?;
            let du = columns(&du, 0..r);
            let mask = match (&module.dropout, needed) {
                (Some(_), true) => Some(Dropout::mask(cuda, x)?),
                _ => None,
            };
            let dropped = match &module.dropout {
                Some(dropout) => dropout.drop_cuda(cuda, x, mask.as_ref())?,
                None => x.clone(),
            };
            let da = Product {
                alpha: module.keep(),
                ..Product::new(Layout::Tn, du.matrix()?, Matrix::of(&dropped)?)
            };
            let da = Tensor::from_cuda(da.run(cuda, DType::F32)?, [r, x.matrix_dims().1])?;
            found.push([Some(da), Some(db)]);
            if needed {
                let mask = mask.as_ref().map(|mask| (mask, 0));
                sum = Some(module.input_gradient_cuda(cuda, dy, &du, adapter, mask, sum)?);
            }
        }
        let dx = sum.map(|dx| dx.reshape(x.shape())).transpose()?;
        Ok((dx, found))
    }
}

impl Frozen {
    /// dX = dY W + drop(dU A), added to what `sum` has of it. `mask`: what dropout kept, in a buffer
    /// from that element on.
    fn input_gradient_cuda(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        du: &Columns,
        adapter: &Adapter,
        mask: Option<(&CudaBuffer, usize)>,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let weight = cuda.resident(&self.weight, DType::Bf16)?;
        let low_rank = LowRank {
            lhs: du.matrix()?,
            rhs: adapter.a.matrix()?,
            dropout: mask.map(|(mask, first)| Kept {
                mask,
                first,
                scale: self.keep(),
            }),
        };
        let dx = Product {
            residual: sum.as_ref(),
            ..Product::new(Layout::Nn, Matrix::of(dy)?, Matrix::of(&weight)?)
        };
        let dx = dx.run_with(cuda, DType::Bf16, &low_rank)?;
        Tensor::from_cuda(dx, with_last(dy, weight.matrix_dims().1))
    }
}

fn columns(tensor: &Tensor, range: Range<usize>) -> Columns {
    Columns {
        tensor: tensor.clone(),
        range,
    }
}
