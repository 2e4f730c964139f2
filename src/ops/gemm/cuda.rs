//! Matrix products on a GPU: bf16 operands, fp32 accumulation (kernels/gemm.cu).

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::hopper;
use super::tile::Tile;
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE, extent};
use crate::error::{Error, Result};
use crate::ops::expect_shape;
use crate::tensor::{CudaBuffer, DType, Tensor};

const NAME: &str = "gemm";

// Flags of the kernels (kernels/common/gemm_epilogue.cuh).
const OUT_F32: u32 = 1;
const BIAS_F32: u32 = 2;
const ADD: u32 = 4;
const VECTOR: u32 = 8;

/// Some rows and columns of a bf16 matrix on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    tensor: &'a Tensor,
    first_row: usize,
    first_col: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// The whole tensor as a matrix (see [`Tensor::matrix_dims`]).
    ///
    /// # Errors
    /// A tensor that is not bf16 on a CUDA device.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        if tensor.cuda().is_none() || tensor.dtype() != DType::Bf16 {
            return Err(Error::operand(
                NAME,
                "bfloat16 on a CUDA device",
                tensor.found(),
            ));
        }
        let (rows, cols) = tensor.matrix_dims();
        Ok(Self {
            tensor,
            first_row: 0,
            first_col: 0,
            rows,
            cols,
        })
    }

    /// Some of its rows.
    ///
    /// # Errors
    /// A range that is not within the rows.
    pub(crate) fn rows(self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.rows {
            let expected = format!("a range of {} rows", self.rows);
            return Err(Error::operand(NAME, expected, format!("{range:?}")));
        }
        Ok(Self {
            first_row: self.first_row + range.start,
            rows: range.len(),
            ..self
        })
    }

    /// Some of its columns.
    ///
    /// # Errors
    /// A range that is not within the columns.
    pub(crate) fn cols(self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.cols {
            let expected = format!("a range of {} columns", self.cols);
            return Err(Error::operand(NAME, expected, format!("{range:?}")));
        }
        Ok(Self {
            first_col: self.first_col + range.start,
            cols: range.len(),
            ..self
        })
    }

    pub(crate) fn address(&self) -> u64 {
        let start = (self.first_row * self.stride() + self.first_col) * DType::Bf16.size();
        // `of` refuses a tensor without device memory.
        self.tensor
            .cuda()
            .map_or(0, |buffer| buffer.address() + start as u64)
    }

    /// Values from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.tensor.matrix_dims().1
    }

    /// A map of it for copies of blocks; see [`CudaDevice::block_map`].
    pub(crate) fn block_map(&self, cuda: &CudaDevice) -> Result<Arg> {
        cuda.block_map(self.address(), &[self.rows, self.cols], self.stride())
    }

    /// Whether every row begins at a multiple of 16 bytes.
    pub(crate) fn is_aligned(&self) -> bool {
        self.stride().is_multiple_of(WIDE) && self.first_col.is_multiple_of(WIDE)
    }
}

/// How the operands enter the product; all matrices are row-major in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// lhs · rhsᵀ
    Nt,
    /// lhs · rhs
    Nn,
    /// lhsᵀ · rhs
    Tn,
}

impl Layout {
    /// M, N and K of a product.
    fn extents(self, lhs: &Matrix, rhs: &Matrix) -> Result<(usize, usize, usize)> {
        let ((m, k), (n, other_k)) = match self {
            Self::Nt => ((lhs.rows, lhs.cols), (rhs.rows, rhs.cols)),
            Self::Nn => ((lhs.rows, lhs.cols), (rhs.cols, rhs.rows)),
            Self::Tn => ((lhs.cols, lhs.rows), (rhs.cols, rhs.rows)),
        };
        if k != other_k {
            let expected = format!("operands of one inner extent ({self:?})");
            let found = [lhs, rhs].map(|o| format!("[{}, {}]", o.rows, o.cols));
            return Err(Error::operand(NAME, expected, found.join(" and ")));
        }
        Ok((m, n, k))
    }
}

/// alpha · lhs · rhs + bias + residual, \[M, N\].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product<'a> {
    pub(crate) layout: Layout,
    pub(crate) lhs: Matrix<'a>,
    pub(crate) rhs: Matrix<'a>,
    pub(crate) alpha: f32,
    /// \[N\] bf16 or f32.
    pub(crate) bias: Option<&'a Tensor>,
    /// \[M, N\] bf16.
    pub(crate) residual: Option<&'a Tensor>,
}

impl<'a> Product<'a> {
    /// The product alone.
    pub(crate) fn new(layout: Layout, lhs: Matrix<'a>, rhs: Matrix<'a>) -> Self {
        Self {
            layout,
            lhs,
            rhs,
            alpha: 1.0,
            bias: None,
            residual: None,
        }
    }

    /// \[M, N\] in `dtype`, bf16 or f32.
    ///
    /// # Errors
    /// Operands whose extents do not agree, or what a launch can fail with.
    pub(crate) fn run(&self, cuda: &CudaDevice, dtype: DType) -> Result<CudaBuffer> {
        let out = self.output(cuda, dtype)?;
        self.run_into(cuda, &out, 0, false)?;
        Ok(out)
    }

    /// The same into rows `first_row` and following of `out`, whose rows have N values: replaced,
    /// or added to (f32 only).
    ///
    /// # Errors
    /// As [`Product::run`]; an `out` that has not as many rows, or is of another dtype.
    pub(crate) fn run_into(
        &self,
        cuda: &CudaDevice,
        out: &CudaBuffer,
        first_row: usize,
        accumulate: bool,
    ) -> Result<()> {
        self.launch(cuda, out, first_row, accumulate, None)
    }

    /// The product with `low_rank` added inside the parentheses that alpha multiplies, in
    /// `dtype`.
    ///
    /// # Errors
    /// As [`Product::run`].
    pub(crate) fn run_with(
        &self,
        cuda: &CudaDevice,
        dtype: DType,
        low_rank: &LowRank,
    ) -> Result<CudaBuffer> {
        let out = self.output(cuda, dtype)?;
        self.launch(cuda, &out, 0, false, Some(low_rank))?;
        Ok(out)
    }

    fn output(&self, cuda: &CudaDevice, dtype: DType) -> Result<CudaBuffer> {
        let (m, n, _) = self.extents()?;
        let len = m.checked_mul(n);
        let len = len.ok_or_else(|| Error::operand(NAME, "a smaller result", format!("{m} x {n}")));
        cuda.alloc(dtype, len?)
    }

    fn launch(
        &self,
        cuda: &CudaDevice,
        out: &CudaBuffer,
        first_row: usize,
        accumulate: bool,
        low_rank: Option<&LowRank>,
    ) -> Result<()> {
        let (m, n, k) = self.extents()?;
        let dtype = out.dtype();
        if !matches!((dtype, accumulate), (DType::F32, _) | (DType::Bf16, false)) {
            let expected = "a result in float32, or in bfloat16 if it is not added to";
            return Err(Error::operand(NAME, expected, dtype.name()));
        }
        let end = first_row.checked_add(m).and_then(|end| end.checked_mul(n));
        if end.is_none_or(|end| end > out.len()) {
            let expected = format!("{m} rows of {n} values from row {first_row} on");
            return Err(Error::operand(NAME, expected, format!("{}", out.len())));
        }
        let mut operands = vec![self.lhs, self.rhs];
        operands.extend(low_rank.iter().flat_map(|low| [low.lhs, low.rhs]));
        let aligned = operands.iter().all(Matrix::is_aligned);
        let start = first_row * n * dtype.size();
        let mut args = GemmArgs {
            out: out.address() + start as u64,
            flags: self.flags(dtype, accumulate, n, start),
            ..self.args(m, n, k)?
        };
        if let Some(low_rank) = low_rank {
            low_rank.add_to(&mut args, self.layout)?;
        }
        if let Some(tile) = hopper::Tile::choose(cuda, self.layout, [m, n, k], aligned, low_rank) {
            return sliced(cuda, args, tile.splits, |args| {
                // SAFETY: as below.
                unsafe { tile.launch(cuda, args, &operands) }
            });
        }
        let masked = low_rank.is_some_and(|low| low.dropout.is_some());
        let tile = Tile::choose(self.layout, [m, n], aligned, masked, cuda.most_shared());
        let splits = low_rank.map_or_else(|| tile.splits(m, n, k), |_| 1);
        let grid = Grid::of_blocks(tile.count(m, n) * splits, tile.threads, tile.shared());
        sliced(cuda, args, splits, |args| {
            // SAFETY: `args` holds the addresses of lhs and rhs with the extents that `extents`
            // compared, of the low-rank operands with those that `add_to` compared, bias [n] and
            // residual [m, n] that were checked, and of m rows of n values within `out`, or of
            // `splits` times as many for slices of K. A kernel that expects aligned rows is
            // chosen only where they are.
            unsafe { cuda.launch(tile.kernel(), grid, &[Arg::Struct(bytemuck::cast(args))]) }
        })
    }

    /// M, N and K.
    fn extents(&self) -> Result<(usize, usize, usize)> {
        let (m, n, k) = self.layout.extents(&self.lhs, &self.rhs)?;
        if let Some(bias) = self.bias {
            expect_shape(NAME, bias, &[n])?;
        }
        if let Some(residual) = self.residual.filter(|r| r.matrix_dims() != (m, n)) {
            let found = format!("shape {:?}", residual.shape());
            return Err(Error::operand(NAME, format!("shape [{m}, {n}]"), found));
        }
        Ok((m, n, k))
    }

    fn args(&self, m: usize, n: usize, k: usize) -> Result<GemmArgs> {
        Ok(GemmArgs {
            lhs: self.lhs.address(),
            rhs: self.rhs.address(),
            bias: operand(self.bias, &[DType::Bf16, DType::F32])?,
            residual: operand(self.residual, &[DType::Bf16])?,
            lhs_stride: extent(NAME, self.lhs.stride())?,
            rhs_stride: extent(NAME, self.rhs.stride())?,
            m: extent(NAME, m)?,
            n: extent(NAME, n)?,
            k: extent(NAME, k)?,
            alpha: self.alpha,
            ..GemmArgs::zeroed()
        })
    }

    /// The kernels' flags for rows of `n` values in `dtype`, `start` bytes into the result.
    fn flags(&self, dtype: DType, accumulate: bool, n: usize, start: usize) -> u32 {
        let flag = |bit: u32, is_set: bool| if is_set { bit } else { 0 };
        let vector = n.is_multiple_of(4) && start.is_multiple_of(4 * dtype.size());
        flag(OUT_F32, dtype == DType::F32)
            | flag(BIAS_F32, self.bias.is_some_and(|b| b.dtype() == DType::F32))
            | flag(ADD, accumulate)
            | flag(VECTOR, vector)
    }
}

/// A product of small inner extent that rides in the same pass as a [`Product`], in its layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRank<'a> {
    pub(crate) lhs: Matrix<'a>,
    pub(crate) rhs: Matrix<'a>,
    /// Scales what was kept and drops the rest (layout Nn only).
    pub(crate) dropout: Option<Kept<'a>>,
}

/// What dropout kept of a matrix \[M, N\].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept<'a> {
    /// One bit an element, the lowest of a byte first.
    pub(crate) mask: &'a CudaBuffer,
    /// The element of the buffer that the bits begin with.
    pub(crate) first: usize,
    /// The factor on what was kept.
    pub(crate) scale: f32,
}

impl LowRank<'_> {
    fn add_to(&self, args: &mut GemmArgs, layout: Layout) -> Result<()> {
        let (m, n, k) = layout.extents(&self.lhs, &self.rhs)?;
        if (extent(NAME, m)?, extent(NAME, n)?) != (args.m, args.n) {
            let expected = format!("a low-rank product [{}, {}]", args.m, args.n);
            return Err(Error::operand(NAME, expected, format!("[{m}, {n}]")));
        }
        args.low_lhs = self.lhs.address();
        args.low_rhs = self.rhs.address();
        args.low_lhs_stride = extent(NAME, self.lhs.stride())?;
        args.low_rhs_stride = extent(NAME, self.rhs.stride())?;
        args.low_k = extent(NAME, k)?;
        if let Some(Kept { mask, first, scale }) = self.dropout {
            let bytes = mask.dtype().size();
            let bits = mask.len().saturating_sub(first) * bytes * 8;
            if layout != Layout::Nn || bits < m * n {
                let expected = format!("layout Nn and a mask of {} bits", m * n);
                return Err(Error::operand(
                    NAME,
                    expected,
                    format!("{layout:?} and {bits}"),
                ));
            }
            args.mask = mask.address() + (first * bytes) as u64;
            args.keep = scale;
        }
        Ok(())
    }
}

/// Runs `launch` with `args`; where there are several slices of K, into memory of their own
/// (\[splits, m, n\] f32), and adds them up.
fn sliced(
    cuda: &CudaDevice,
    args: GemmArgs,
    splits: usize,
    launch: impl Fn(GemmArgs) -> Result<()>,
) -> Result<()> {
    let args = GemmArgs {
        splits: extent(NAME, splits)?,
        ..args
    };
    if splits == 1 {
        return launch(args);
    }
    let values = args.m as usize * args.n as usize;
    let partial = cuda.alloc(DType::F32, splits * values)?;
    launch(GemmArgs {
        out: partial.address(),
        bias: 0,
        residual: 0,
        alpha: 1.0,
        flags: OUT_F32 | (args.flags & VECTOR),
        ..args
    })?;
    let width = if args.flags & VECTOR == 0 { 1 } else { 4 };
    let sum = Kernel {
        stem: NAME,
        function: "gemm_sum",
    };
    let args = [Arg::Struct(bytemuck::cast(args)), Arg::from(&partial)];
    // SAFETY: the operands of the epilogue that the caller has checked, and the slices' results.
    unsafe { cuda.launch(sum, Grid::over(values.div_ceil(width)), &args) }
}

/// The address of an optional operand on the device; 0 stands for none.
fn operand(tensor: Option<&Tensor>, dtypes: &[DType]) -> Result<u64> {
    let Some(tensor) = tensor else { return Ok(0) };
    match tensor.cuda().filter(|b| dtypes.contains(&b.dtype())) {
        Some(buffer) => Ok(buffer.address()),
        None => {
            let names: Vec<&str> = dtypes.iter().map(|d| d.name()).collect();
            let expected = format!("{} on a CUDA device", names.join(" or "));
            Err(Error::operand(NAME, expected, tensor.found()))
        }
    }
}

/// `GemmArgs` of kernels/common/gemm_args.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct GemmArgs {
    out: u64,
    lhs: u64,
    rhs: u64,
    low_lhs: u64,
    low_rhs: u64,
    bias: u64,
    residual: u64,
    mask: u64,
    lhs_stride: u32,
    rhs_stride: u32,
    low_lhs_stride: u32,
    low_rhs_stride: u32,
    m: u32,
    n: u32,
    k: u32,
    low_k: u32,
    alpha: f32,
    keep: f32,
    flags: u32,
    splits: u32,
    unused: [u32; 4],
}

/// Y = X Wᵀ + b + R in bf16, in X's leading shape.
pub(super) fn affine(
    cuda: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
    let (x, weight) = (resident(x)?, resident(weight)?);
    let bias = bias.map(resident).transpose()?;
    let residual = residual.map(resident).transpose()?;
    let product = Product {
        bias: bias.as_ref(),
        residual: residual.as_ref(),
        ..Product::new(Layout::Nt, Matrix::of(&x)?, Matrix::of(&weight)?)
    };
    let y = product.run(cuda, DType::Bf16)?;
    Tensor::from_cuda(y, with_last(&x, weight.matrix_dims().0))
}

/// dX = dY W in bf16, in dY's leading shape.
pub(super) fn input_gradient(cuda: &CudaDevice, dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let dy = cuda.resident(dy, DType::Bf16)?;
    let weight = cuda.resident(weight, DType::Bf16)?;
    let product = Product::new(Layout::Nn, Matrix::of(&dy)?, Matrix::of(&weight)?);
    let dx = product.run(cuda, DType::Bf16)?;
    Tensor::from_cuda(dx, with_last(&dy, weight.matrix_dims().1))
}

/// The tensor's shape with another last extent.
pub(crate) fn with_last(tensor: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = tensor.shape().to_vec();
    if let Some(extent) = shape.last_mut() {
        *extent = last;
    }
    shape
}
