//! The adapters on a GPU. Products in bf16 with fp32 accumulation, gradients of A and B in f32;
//! the low-rank product rides in the pass of the frozen one, forward and for dX. What dX does not
//! need of dY is found in one pass over it.

use std::ops::Range;

use super::{Dropout, Frozen, Gradients, LoraLinear};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE};
use crate::error::Result;
use crate::ops::expect_shape;
use crate::ops::gemm::cuda::{Kept, Layout, LowRank, Matrix, Product, with_last};
use crate::tensor::{CudaBuffer, DType, Tensor};

const NAME: &str = "lora";

const DROPOUT: Kernel = Kernel {
    stem: "lora",
    function: "lora_dropout_bf16",
};
const UP_BACKWARD: Kernel = Kernel {
    stem: "lora",
    function: "lora_up_backward",
};
const SUM_BF16: Kernel = Kernel {
    stem: "lora",
    function: "lora_sum_bf16",
};
const SUM_F32: Kernel = Kernel {
    stem: "lora",
    function: "lora_sum_f32",
};

impl Dropout {
    /// X, bf16, with zeros for what is dropped and the rest as it is.
    fn drop_cuda(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        mask: Option<&CudaBuffer>,
    ) -> Result<Tensor> {
        if let Some(step) = &self.step {
            expect_shape(NAME, step, &[2])?;
        }
        let dropped = cuda.alloc(DType::Bf16, x.len())?;
        let (key, high) = self.stream.parts();
        let step = self.step.as_ref();
        let step = step
            .map(|step| cuda.resident(step, DType::U32))
            .transpose()?;
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
        unsafe { cuda.launch(DROPOUT, Grid::over(x.len().div_ceil(WIDE)), &args) }?;
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
    /// Whether one product serves all modules: they read the same inputs, and the parts of their
    /// results begin at multiples of 16 bytes.
    fn are_stacked(&self, ranks: impl IntoIterator<Item = usize>) -> bool {
        self.modules.len() > 1
            && self
                .modules
                .iter()
                .all(|m| m.dropout.is_none() && m.weight.matrix_dims().0.is_multiple_of(WIDE))
            && ranks.into_iter().all(|r| r > 0 && r.is_multiple_of(WIDE))
    }

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
        let a = adapters.iter().map(|[a, _]| resident(a));
        let a = a.collect::<Result<Vec<_>>>()?;
        let a = match self.are_stacked(a.iter().map(|a| a.matrix_dims().0)) {
            true => stacked(cuda, &a)?,
            false => a.into_iter().map(whole).collect(),
        };
        let u = self.activations(cuda, &x, &a)?;
        let (mut outputs, mut saved) = (Vec::new(), Vec::new());
        for (((module, [_, b]), a), u) in self.modules.iter().zip(adapters).zip(a).zip(u) {
            let (weight, b) = (resident(&module.weight)?, resident(b)?);
            let bias = module.bias.as_ref().map(resident).transpose()?;
            let low_rank = LowRank {
                lhs: u.matrix()?,
                rhs: Matrix::of(&b)?,
                dropout: None,
            };
            let y = Product {
                bias: bias.as_ref(),
                residual: residual.as_ref(),
                ..Product::new(Layout::Nt, Matrix::of(&x)?, Matrix::of(&weight)?)
            };
            let y = y.run_with(cuda, DType::Bf16, &low_rank)?;
            outputs.push(Tensor::from_cuda(y, with_last(&x, weight.matrix_dims().0))?);
            saved.push(Adapter { u, a, b });
        }
        let adapters = saved;
        Ok((outputs, Saved { x, adapters }))
    }

    /// U of each module: one product where their A are stacked.
    fn activations(&self, cuda: &CudaDevice, x: &Tensor, a: &[Rows]) -> Result<Vec<Columns>> {
        let rows = x.matrix_dims().0;
        let product = |x: &Tensor, a: &Tensor, alpha: f32| {
            let u = Product {
                alpha,
                ..Product::new(Layout::Nt, Matrix::of(x)?, Matrix::of(a)?)
            };
            Tensor::from_cuda(u.run(cuda, DType::Bf16)?, [rows, a.matrix_dims().0])
        };
        if let (true, Some(all)) = (is_shared(a), a.first()) {
            let u = product(x, &all.tensor, self.scale)?;
            return Ok(a.iter().map(|a| columns(&u, a.range.clone())).collect());
        }
        let modules = self.modules.iter().zip(a);
        let each = modules.map(|(module, a)| {
            let dropped = match &module.dropout {
                Some(dropout) => dropout.drop_cuda(cuda, x, None)?,
                None => x.clone(),
            };
            let u = product(&dropped, &a.tensor, self.scale * module.keep())?;
            Ok(columns(&u, a.range.clone()))
        });
        each.collect()
    }

    /// The gradients of X (where `needed`) and of each module's A and B.
    pub(super) fn backward_cuda(
        &self,
        cuda: &CudaDevice,
        Saved { x, adapters }: Saved,
        dy: &[Option<Tensor>],
        needed: bool,
    ) -> Result<Gradients> {
        let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
        let dy = dy.iter().map(|t| t.as_ref().map(resident).transpose());
        let dy = dy.collect::<Result<Vec<_>>>()?;
        let shared = is_shared(adapters.iter().map(|adapter| &adapter.a));
        if !shared || dy.iter().any(Option::is_none) {
            return self.backward_each(cuda, &x, &adapters, &dy, needed);
        }
        let (rows, all) = (x.matrix_dims().0, adapters[0].a.tensor.matrix_dims().0);
        let du = cuda.alloc(DType::Bf16, rows * all)?;
        let mut found = Vec::new();
        for (adapter, dy) in adapters.iter().zip(dy.iter().flatten()) {
            let db = self.output_gradients(cuda, dy, adapter, &du, (adapter.a.range.start, all))?;
            found.push([None, Some(db)]);
        }
        let du = Tensor::from_cuda(du, [rows, all])?;
        // All dA, one below the other.
        let da = Product::new(Layout::Tn, Matrix::of(&du)?, Matrix::of(&x)?);
        let da = da.run(cuda, DType::F32)?;
        let inner = x.matrix_dims().1;
        let (mut dx, modules) = (None, self.modules.iter().zip(&adapters).zip(&dy));
        for (i, ((module, adapter), dy)) in modules.enumerate() {
            let Range { start, end } = adapter.a.range;
            let mut own = cuda.alloc(DType::F32, (end - start) * inner)?;
            own.copy_from(0, &da, start * inner..end * inner)?;
            found[i][0] = Some(Tensor::from_cuda(own, [end - start, inner])?);
            if let (true, Some(dy)) = (needed, dy) {
                let du = columns(&du, start..end);
                dx = Some(module.input_gradient_cuda(cuda, dy, &du, adapter, None, dx)?);
            }
        }
        let dx = dx.map(|dx| dx.reshape(x.shape())).transpose()?;
        Ok((dx, found))
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
            let (rows, r) = (x.matrix_dims().0, adapter.a.range.len());
            let du = cuda.alloc(DType::Bf16, rows * r)?;
            let db = self.output_gradients(cuda, dy, adapter, &du, (0, r))?;
            let du = columns(&Tensor::from_cuda(du, [rows, r])?, 0..r);
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
                let mask = mask.as_ref();
                sum = Some(module.input_gradient_cuda(cuda, dy, &du, adapter, mask, sum)?);
            }
        }
        let dx = sum.map(|dx| dx.reshape(x.shape())).transpose()?;
        Ok((dx, found))
    }

    /// dU = s dY B into columns of `du`, from `first` on, whose rows have `stride` values; and
    /// dB = dYᵀ U, where U holds s already.
    fn output_gradients(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        adapter: &Adapter,
        du: &CudaBuffer,
        (first, stride): (usize, usize),
    ) -> Result<Tensor> {
        let ((rows, out), (_, r)) = (dy.matrix_dims(), adapter.b.matrix_dims());
        let u = adapter.u.matrix()?;
        if !(out.is_multiple_of(WIDE) && r.is_multiple_of(WIDE) && u.is_aligned()) {
            // Without 16-byte accesses: dU alone in its matrix, as the caller has it then.
            let product = Product {
                alpha: self.scale,
                ..Product::new(Layout::Nn, Matrix::of(dy)?, Matrix::of(&adapter.b)?)
            };
            product.run_into(cuda, du, 0, false)?;
            let db = Product::new(Layout::Tn, Matrix::of(dy)?, u);
            return Tensor::from_cuda(db.run(cuda, DType::F32)?, adapter.b.shape());
        }
        let blocks = rows.div_ceil(ROWS);
        let span = span(blocks, out);
        let spans = out.div_ceil(span);
        let du_shares = cuda.alloc(DType::F32, spans * rows * r)?;
        let db_shares = cuda.alloc(DType::F32, blocks * out * r)?;
        let args = [
            Arg::from(&du_shares),
            Arg::from(&db_shares),
            dy.arg()?,
            Arg::Pointer(u.address()),
            adapter.b.arg()?,
            Arg::size(NAME, u.stride())?,
            Arg::size(NAME, rows)?,
            Arg::size(NAME, out)?,
            Arg::size(NAME, r)?,
            Arg::size(NAME, span)?,
        ];
        let grid = Grid::of_blocks(blocks * spans * r.div_ceil(RANKS), THREADS, SHARED);
        // SAFETY: dY is [rows, out], U [rows, r] with the stride stated, B [out, r], all bf16 and
        // with rows at multiples of 16 bytes; the shares are as kernels/lora.cu has them.
        unsafe { cuda.launch(UP_BACKWARD, grid, &args) }?;
        let db = cuda.alloc(DType::F32, out * r)?;
        let sum = |to: Arg, stride: usize, shares: &CudaBuffer, parts: usize, alpha: f32| {
            let size = shares.len() / parts.max(1);
            let args = [
                to,
                Arg::size(NAME, stride)?,
                Arg::from(shares),
                Arg::size(NAME, parts)?,
                Arg::U64(size as u64),
                Arg::size(NAME, r)?,
                Arg::F32(alpha),
            ];
            Ok::<_, crate::error::Error>((args, Grid::over(size.div_ceil(4))))
        };
        let to = Arg::Pointer(du.address() + (first * DType::Bf16.size()) as u64);
        let (args, grid) = sum(to, stride, &du_shares, spans, self.scale)?;
        // SAFETY: the shares are [spans, rows, r]; du has rows of `stride` bf16, of which r from
        // `first` on are this module's.
        unsafe { cuda.launch(SUM_BF16, grid, &args) }?;
        let (args, grid) = sum(Arg::from(&db), r, &db_shares, blocks, 1.0)?;
        // SAFETY: the shares are [blocks, out, r] and db [out, r], all f32.
        unsafe { cuda.launch(SUM_F32, grid, &args) }?;
        Tensor::from_cuda(db, adapter.b.shape())
    }
}

impl Frozen {
    /// dX = dY W + drop(dU A), added to what `sum` has of it.
    fn input_gradient_cuda(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        du: &Columns,
        adapter: &Adapter,
        mask: Option<&CudaBuffer>,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let weight = cuda.resident(&self.weight, DType::Bf16)?;
        let low_rank = LowRank {
            lhs: du.matrix()?,
            rhs: adapter.a.matrix()?,
            dropout: mask.map(|mask| Kept {
                mask,
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

/// Rows that a block of `lora_up_backward` works through, ranks that it sums at a time, its
/// threads and its shared memory (kernels/lora.cu).
const ROWS: usize = 512;
const RANKS: usize = 32;
const THREADS: u32 = 256;
const SHARED: usize = (3 * (128 + RANKS) * 64 + ROWS * RANKS) * 2;

/// Columns of dY for a block: as many blocks as keep a device busy, unless the shares of dU would
/// cost more than half of reading dY again (at rank 32).
fn span(row_blocks: usize, out: usize) -> usize {
    const BLOCKS: usize = 128;
    const LEAST: usize = 256;
    let spans = BLOCKS.div_ceil(row_blocks.max(1));
    out.div_ceil(spans).next_multiple_of(64).max(LEAST)
}

/// A alone in its matrix.
fn whole(tensor: Tensor) -> Rows {
    let range = 0..tensor.matrix_dims().0;
    Rows { tensor, range }
}

/// The matrices below each other in one.
fn stacked(cuda: &CudaDevice, parts: &[Tensor]) -> Result<Vec<Rows>> {
    let cols = parts.first().map_or(0, |t| t.matrix_dims().1);
    let rows: usize = parts.iter().map(|t| t.matrix_dims().0).sum();
    let mut all = cuda.alloc(DType::Bf16, rows * cols)?;
    let (mut first, mut ranges) = (0, Vec::new());
    for part in parts {
        let rows = part.matrix_dims().0;
        if let Some(values) = part.cuda() {
            all.copy_from(first * cols, values, 0..values.len())?;
        }
        ranges.push(first..first + rows);
        first += rows;
    }
    let tensor = Tensor::from_cuda(all, [rows, cols])?;
    let rows = ranges.into_iter().map(|range| Rows {
        tensor: tensor.clone(),
        range,
    });
    Ok(rows.collect())
}

/// Whether the rows are parts of one matrix.
fn is_shared<'a>(rows: impl IntoIterator<Item = &'a Rows>) -> bool {
    let mut rows = rows.into_iter();
    rows.any(|rows| rows.range.len() < rows.tensor.matrix_dims().0)
}

fn columns(tensor: &Tensor, range: Range<usize>) -> Columns {
    Columns {
        tensor: tensor.clone(),
        range,
    }
}
