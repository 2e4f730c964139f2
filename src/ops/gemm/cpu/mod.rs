//! The products on the CPU, in the precision of the device.

pub(crate) mod bf16;
mod kept;
mod single;

use faer::Accum;
use rayon::prelude::*;

use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bf16::{Level, Operand, Packed, Side, Values};
pub(crate) use kept::Kept;

/// The left operand of products, \[M, K\].
pub(crate) struct Left<'a> {
    values: Values<'a>,
    rows: usize,
    cols: usize,
    /// The same for products in bf16, where more than one reads it.
    packed: Option<Packed>,
}

impl<'a> Left<'a> {
    /// Rows of `cols` values.
    ///
    /// # Errors
    /// Values that are no whole rows.
    pub(crate) fn new(values: Values<'a>, cols: usize) -> Result<Self> {
        Ok(Self {
            values,
            rows: rows_of(values.len(), cols)?,
            cols,
            packed: None,
        })
    }

    /// M
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The same to be read by several [`Product::nt`]: what is packed for one serves them all.
    pub(crate) fn shared_by_nt(self, device: &Device) -> Self {
        self.shared(device, Layout::Nt)
    }

    /// The same for several [`Product::nn`].
    pub(crate) fn shared_by_nn(self, device: &Device) -> Self {
        self.shared(device, Layout::Nn)
    }

    fn shared(self, device: &Device, layout: Layout) -> Self {
        let packed = match device.precision() {
            Precision::F32 => None,
            Precision::Bf16 => {
                let operand = Operand::rows(self.values, self.cols);
                let side = match layout {
                    Layout::Nt => Side::Right,
                    Layout::Nn => Side::Left,
                };
                Packed::new(device, (&operand, side), [self.rows, self.cols])
            }
        };
        Self { packed, ..self }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing: whatever is in the output is replaced.
    Zero,
    /// What is in the output.
    Output,
    /// \[M, N\]
    Matrix(&'a [f32]),
    /// \[N\], to each row.
    Row(&'a [f32]),
}

impl Start<'_> {
    /// Makes it what is in the output, whose rows of `n` values are `stride` apart.
    fn write(self, out: &mut [f32], n: usize, stride: usize) {
        if n == 0 {
            return;
        }
        let rows = out.par_chunks_mut(stride).map(|row| &mut row[..n]);
        match self {
            Self::Zero => rows.for_each(|row| row.fill(0.0)),
            Self::Output => {}
            Self::Matrix(start) => rows
                .zip(start.par_chunks(stride))
                .for_each(|(row, start)| row.copy_from_slice(&start[..n])),
            Self::Row(start) => rows.for_each(|row| row.copy_from_slice(start)),
        }
    }
}

/// start + alpha · (X · W + U · B): X \[M, K\], U \[M, r\], in f32 or bf16 as the device has it.
pub(crate) struct Product<'a> {
    /// X
    pub(crate) left: &'a Left<'a>,
    /// W as it is stored, in f32, f16 or bf16.
    pub(crate) right: &'a Tensor,
    pub(crate) alpha: f32,
    pub(crate) start: Start<'a>,
    pub(crate) low_rank: Option<LowRank<'a>>,
}

/// A product of a small reduction that is computed along with another one.
pub(crate) struct LowRank<'a> {
    /// U \[M, r\]
    pub(crate) left: &'a Tensor,
    /// B the same way round as W.
    pub(crate) right: &'a Tensor,
    /// Which elements of the product dropout kept, if it came there.
    pub(crate) kept: Option<Kept<'a>>,
}

/// The way round that the right operands are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// \[N, K\]
    Nt,
    /// \[K, N\]
    Nn,
}

impl Layout {
    /// N and K.
    fn extents(self, right: &Tensor) -> (usize, usize) {
        let (rows, cols) = right.matrix_dims();
        match self {
            Self::Nt => (rows, cols),
            Self::Nn => (cols, rows),
        }
    }

    /// The values of a right operand as one of a product in bf16.
    fn operand<'a>(self, values: Values<'a>, right: &Tensor) -> Operand<'a> {
        let (_, cols) = right.matrix_dims();
        match self {
            Self::Nt => Operand::rows(values, cols),
            Self::Nn => Operand::columns(values, cols),
        }
    }
}

impl<'a> Product<'a> {
    /// X · W alone.
    pub(crate) fn new(left: &'a Left<'a>, right: &'a Tensor) -> Self {
        Self {
            left,
            right,
            alpha: 1.0,
            start: Start::Zero,
            low_rank: None,
        }
    }

    /// The product into `out` \[M, N\], with W \[N, K\] and B \[N, r\].
    ///
    /// # Errors
    /// Operands whose extents do not agree, or that are not in host memory.
    pub(crate) fn nt(self, device: &Device, out: &mut [f32]) -> Result<()> {
        self.run(device, out, Layout::Nt)
    }

    /// The same with W \[K, N\] and B \[r, N\].
    pub(crate) fn nn(self, device: &Device, out: &mut [f32]) -> Result<()> {
        self.run(device, out, Layout::Nn)
    }

    fn run(&self, device: &Device, out: &mut [f32], layout: Layout) -> Result<()> {
        let (n, k) = layout.extents(self.right);
        expect("rows", k, self.left.cols)?;
        let dims = [self.left.rows, n, k];
        expect("an output", dims[0] * n, out.len())?;
        match self.start {
            Start::Zero | Start::Output => {}
            Start::Matrix(start) => expect("a start", out.len(), start.len())?,
            Start::Row(start) => expect("a start", n, start.len())?,
        }
        if let Some(low_rank) = &self.low_rank {
            let (cols, rank) = layout.extents(low_rank.right);
            expect("a low-rank factor", n, cols)?;
            expect("a low-rank factor", dims[0] * rank, low_rank.left.len())?;
        }
        match device.precision() {
            Precision::F32 => self.run_f32(device, out, layout),
            Precision::Bf16 => self.run_bf16(device, out, layout, dims),
        }
    }

    fn run_f32(&self, device: &Device, out: &mut [f32], layout: Layout) -> Result<()> {
        let (n, _) = layout.extents(self.right);
        let accum = match self.start {
            Start::Zero => Accum::Replace,
            start => {
                start.write(out, n, n);
                Accum::Add
            }
        };
        let x = self.left.values.f32s()?;
        single::product(device, out, accum, (x, self.right), layout, self.alpha)?;
        let Some(LowRank { left, right, kept }) = &self.low_rank else {
            return Ok(());
        };
        let u = (left.f32s()?, *right);
        let Some(kept) = kept else {
            return single::product(device, out, Accum::Add, u, layout, self.alpha);
        };
        let mut dropped = device.buffer(out.len());
        single::product(device, &mut dropped, Accum::Replace, u, layout, self.alpha)?;
        kept.add(out, &dropped);
        Ok(())
    }

    fn run_bf16(
        &self,
        device: &Device,
        out: &mut [f32],
        layout: Layout,
        dims: [usize; 3],
    ) -> Result<()> {
        // So that a weight's rows are read where they lie; what dropout kept is known the other way.
        let kept = self.low_rank.as_ref().and_then(|low_rank| low_rank.kept);
        let turned = layout == Layout::Nt && kept.is_none();
        with_values(self.right, |w| {
            let low_rank = self.low_rank.as_ref().map(|low_rank| {
                let (_, rank) = layout.extents(low_rank.right);
                Ok(bf16::LowRank {
                    a: Operand::rows(Values::of(low_rank.left)?, rank),
                    b: layout.operand(Values::of(low_rank.right)?, low_rank.right),
                    rank,
                    kept: low_rank.kept,
                })
            });
            let product = bf16::Product {
                a: Operand::rows(self.left.values, self.left.cols),
                packed: self.left.packed.as_ref(),
                b: layout.operand(w, self.right),
                packed_b: None,
                low_rank: low_rank.transpose()?,
                dims,
                alpha: self.alpha,
                start: self.start,
                turned,
                level: Level::best(),
            };
            product.run(device, out, dims[1]);
            Ok(())
        })
    }
}

/// The right operand of products that sum over its rows, \[M, K\].
pub(crate) struct Summed<'a> {
    x: &'a Tensor,
    /// The same for products in bf16, where more than one reads it.
    packed: Option<Packed>,
}

impl<'a> Summed<'a> {
    /// For one product.
    pub(crate) fn once(x: &'a Tensor) -> Self {
        Self { x, packed: None }
    }

    /// For several: what is packed for one serves them all.
    ///
    /// # Errors
    /// Elements that are neither f32 nor bf16 in host memory.
    pub(crate) fn shared(device: &Device, x: &'a Tensor) -> Result<Self> {
        let (rows, cols) = x.matrix_dims();
        let packed = match device.precision() {
            Precision::F32 => None,
            Precision::Bf16 => {
                let operand = Operand::columns(Values::of(x)?, cols);
                Packed::new(device, (&operand, Side::Right), [cols, rows])
            }
        };
        Ok(Self { x, packed })
    }
}

/// out \[N, K\] = dY \[M, N\]ᵀ · X \[M, K\]: the gradient of a weight.
pub(crate) fn product_tn(
    device: &Device,
    out: &mut [f32],
    dy: &Tensor,
    Summed { x, packed }: &Summed,
) -> Result<()> {
    let ((m, n), (rows, k)) = (dy.matrix_dims(), x.matrix_dims());
    expect("rows", m, rows)?;
    expect("an output", n * k, out.len())?;
    if device.precision() == Precision::F32 {
        return single::product_tn(out, dy, x);
    }
    let product = bf16::Product {
        a: Operand::columns(Values::of(dy)?, n),
        packed: None,
        b: Operand::columns(Values::of(x)?, k),
        packed_b: packed.as_ref(),
        low_rank: None,
        dims: [n, k, m],
        alpha: 1.0,
        start: Start::Zero,
        turned: false,
        level: Level::best(),
    };
    product.run(device, out, k);
    Ok(())
}

/// Calls `use_values` with a weight's elements in place, or with a rounded copy of those that
/// are neither f32 nor aligned bf16.
fn with_values(w: &Tensor, use_values: impl FnOnce(Values) -> Result<()>) -> Result<()> {
    if w.dtype() == DType::F32
        && let Ok(values) = w.f32s()
    {
        return use_values(Values::F32(values));
    }
    let rounded = w.to_bf16()?;
    let values = rounded.bf16s();
    use_values(Values::Bf16(values.ok_or_else(|| {
        Error::operand("gemm", "a weight in host memory", w.found())
    })?))
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

fn expect(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let expected = format!("{what} of {expected} values");
    Err(Error::operand("gemm", expected, found.to_string()))
}
