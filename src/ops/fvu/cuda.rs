//! The kernels of kernels/fvu.cu.

use super::{Fvu, SINK_FACTOR, Sinks};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE_F32};
use crate::error::Result;
use crate::ops::sparse_decode::cuda::row_sum;
use crate::ops::{Operator, expect_shape};
use crate::tensor::{CudaBuffer, DType, Tensor};

const NAME: &str = Fvu::NAME;
const NULL: Arg = Arg::U64(0);
const THREADS: u32 = 256;
/// Rows of one partial sum.
const ROWS: usize = 16;

const fn kernel(function: &'static str) -> Kernel {
    let stem = "fvu";
    Kernel { stem, function }
}

/// The tensor on the device, in f32 or bf16 as it is there; one that comes from the host in f32.
pub(super) fn operand(cuda: &CudaDevice, tensor: &Tensor) -> Result<Tensor> {
    match cuda.holds(tensor) && tensor.dtype() == DType::Bf16 {
        true => Ok(tensor.clone()),
        false => cuda.resident(tensor, DType::F32),
    }
}

/// An operand's address and whether it is f32.
fn args_of(tensor: &Tensor) -> Result<[Arg; 2]> {
    let wide = u32::from(tensor.dtype() == DType::F32);
    Ok([tensor.arg()?, Arg::U32(wide)])
}

/// Memory for values of type f64, of which there are no tensors.
fn scalars(cuda: &CudaDevice, len: usize) -> Result<CudaBuffer> {
    cuda.alloc(DType::U32, len * size_of::<f64>() / DType::U32.size())
}

/// Mean over tokens of `x` \[T, d\]; zeros where T is 0.
pub(super) fn token_mean(cuda: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let x = operand(cuda, x)?;
    row_sum(cuda, &x, None, x.matrix_dims().0.max(1) as f32)
}

/// Σ‖x_t − mean‖² over the tokens that are no sinks; all where `None`.
pub(super) fn total_variance(cuda: &CudaDevice, x: &Tensor, sinks: Option<&Sinks>) -> Result<f64> {
    let x = operand(cuda, x)?;
    let keep = sinks.map(|s| cuda.resident(&s.keep, DType::F32));
    let keep = keep.transpose()?;
    let kept = sinks.map_or(x.matrix_dims().0, Sinks::kept).max(1);
    let mean = row_sum(cuda, &x, keep.as_ref(), kept as f32)?;
    let partial = distances(cuda, &x, (&mean, 0), keep.as_ref(), ROWS)?;
    total(cuda, &partial)
}

/// Σ‖x_t − y_t‖² over the tokens that are no sinks; all where `None`.
pub(super) fn squared_error(
    cuda: &CudaDevice,
    x: &Tensor,
    y: &Tensor,
    sinks: Option<&Sinks>,
) -> Result<f64> {
    expect_shape(NAME, y, x.shape())?;
    let (x, y) = (operand(cuda, x)?, operand(cuda, y)?);
    let keep = sinks.map(|s| cuda.resident(&s.keep, DType::F32));
    let y = (&y, y.matrix_dims().1);
    let partial = distances(cuda, &x, y, keep.transpose()?.as_ref(), ROWS)?;
    total(cuda, &partial)
}

/// Σ‖x_t − y_t‖² over each of the parts of `tokens` tokens.
pub(super) fn squared_errors(
    cuda: &CudaDevice,
    x: &Tensor,
    y: &Tensor,
    tokens: usize,
) -> Result<Vec<f64>> {
    expect_shape(NAME, y, x.shape())?;
    let (x, y) = (operand(cuda, x)?, operand(cuda, y)?);
    // No block's rows lie in two parts.
    let divides = |rows: &usize| tokens.is_multiple_of(*rows);
    let per_block = (1..=ROWS).rev().find(divides).unwrap_or(1);
    let sums = distances(cuda, &x, (&y, y.matrix_dims().1), None, per_block)?;
    let bytes = sums.read(0, sums.len())?;
    let (words, _) = bytes.as_chunks::<8>();
    let sums: Vec<f64> = words.iter().map(|&word| f64::from_ne_bytes(word)).collect();
    let parts = sums.chunks((tokens / per_block).max(1));
    Ok(parts.map(|part| part.iter().sum()).collect())
}

/// f64 sums over `per_block` rows each. `y` has a row for each of x where its stride is d, and
/// one row in all where it is 0.
fn distances(
    cuda: &CudaDevice,
    x: &Tensor,
    (y, stride): (&Tensor, usize),
    keep: Option<&Tensor>,
    per_block: usize,
) -> Result<CudaBuffer> {
    let (rows, d) = x.matrix_dims();
    let parts = rows.div_ceil(per_block);
    let partial = scalars(cuda, parts)?;
    let ([x, wide_x], [y, wide_y]) = (args_of(x)?, args_of(y)?);
    let args = [
        Arg::from(&partial),
        x,
        wide_x,
        y,
        wide_y,
        Arg::U64(stride as u64),
        keep.map_or(Ok(NULL), Tensor::arg)?,
        Arg::size(NAME, rows)?,
        Arg::size(NAME, per_block)?,
        Arg::size(NAME, d)?,
    ];
    let grid = Grid::of_blocks(parts, THREADS, 0);
    // SAFETY: x is [rows, d], y as much or, with stride 0, [d], each of the type that is said;
    // keep is [rows] f32 or null; there is a partial sum for each block.
    unsafe { cuda.launch(kernel("fvu_distance"), grid, &args) }?;
    Ok(partial)
}

/// The sum of f64 values, on the host.
fn total(cuda: &CudaDevice, partial: &CudaBuffer) -> Result<f64> {
    let total = scalars(cuda, 1)?;
    let parts = partial.len() / total.len();
    let args = [
        Arg::from(&total),
        Arg::from(partial),
        Arg::size(NAME, parts)?,
    ];
    let grid = Grid::of_blocks(1, THREADS, 0);
    // SAFETY: [parts] and [1] values of eight bytes.
    unsafe { cuda.launch(kernel("fvu_total"), grid, &args) }?;
    let bytes = total.read(0, total.len())?;
    Ok(bytemuck::pod_read_unaligned(&bytes))
}

/// scale (x − y) in `dtype`.
pub(super) fn difference(
    cuda: &CudaDevice,
    x: &Tensor,
    y: &Tensor,
    scale: f32,
    dtype: DType,
) -> Result<Tensor> {
    expect_shape(NAME, y, x.shape())?;
    let (x, y) = (operand(cuda, x)?, operand(cuda, y)?);
    let out = cuda.alloc(dtype, x.len())?;
    let ([x_at, wide_x], [y_at, wide_y]) = (args_of(&x)?, args_of(&y)?);
    let args = [
        Arg::from(&out),
        x_at,
        wide_x,
        y_at,
        wide_y,
        Arg::F32(scale),
        Arg::U64(x.len() as u64),
    ];
    let kernel = kernel(match dtype {
        DType::F32 => "fvu_difference_f32",
        _ => "fvu_difference_bf16",
    });
    // SAFETY: x, y and out are of one length and of the types that are said.
    unsafe { cuda.launch(kernel, Grid::over(x.len().div_ceil(WIDE_F32)), &args) }?;
    Tensor::from_cuda(out, x.shape())
}

/// The sinks of `x` \[T, d\], T and d at least 1.
pub(super) fn sinks(cuda: &CudaDevice, x: &Tensor) -> Result<Sinks> {
    const WARP: usize = 32;
    let x = operand(cuda, x)?;
    let (tokens, d) = x.matrix_dims();
    let norms = cuda.alloc(DType::F32, tokens)?;
    let [x_at, wide] = args_of(&x)?;
    let (tokens_arg, d) = (Arg::size(NAME, tokens)?, Arg::size(NAME, d)?);
    let args = [Arg::from(&norms), x_at, wide, tokens_arg, d];
    // SAFETY: x is [T, d] of the type that is said, norms [T]; the grid has a warp for each row.
    unsafe { cuda.launch(kernel("fvu_norms"), Grid::over(tokens * WARP), &args) }?;
    let keep = cuda.alloc(DType::F32, tokens)?;
    let kept = cuda.alloc(DType::U32, tokens)?;
    let number = cuda.alloc(DType::U32, 1)?;
    let args = [
        Arg::from(&keep),
        Arg::from(&kept),
        Arg::from(&number),
        Arg::from(&norms),
        tokens_arg,
        Arg::F32(SINK_FACTOR),
    ];
    let grid = Grid::of_blocks(1, THREADS, 0);
    // SAFETY: keep, kept and norms are [T], number [1].
    unsafe { cuda.launch(kernel("fvu_sinks"), grid, &args) }?;
    let number = bytemuck::pod_read_unaligned::<u32>(&number.read(0, 1)?);
    Ok(Sinks {
        keep: Tensor::from_cuda(keep, [tokens])?,
        order: Tensor::from_cuda(kept, [tokens])?,
        kept: number as usize,
    })
}

/// The rows of `x` \[T, d\] that are no sinks, in x's type.
pub(super) fn without(cuda: &CudaDevice, x: &Tensor, sinks: &Sinks) -> Result<Tensor> {
    let x = operand(cuda, x)?;
    let order = cuda.resident(&sinks.order, DType::U32)?;
    let (_, d) = x.matrix_dims();
    let out = cuda.alloc(x.dtype(), sinks.kept * d)?;
    let words = d * x.dtype().size() / size_of::<u16>();
    let args = [
        Arg::from(&out),
        x.arg()?,
        order.arg()?,
        Arg::U64(words as u64),
    ];
    let grid = Grid::of_blocks(sinks.kept, THREADS, 0);
    // SAFETY: the first `kept` of the order are rows of x, and out has as many of `words` words.
    unsafe { cuda.launch(kernel("fvu_rows"), grid, &args) }?;
    Tensor::from_cuda(out, [sinks.kept, d])
}
