//! What the gradients take of dY, in one pass over it for all modules of an input
//! (kernels/lora_up.cu).

use bytemuck::{Pod, Zeroable};

use super::{Adapter, NAME};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE, extent};
use crate::error::Result;
use crate::ops::gemm::cuda::{Layout, Matrix, Product};
use crate::ops::lora::LoraLinear;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Modules that a launch serves at most.
const MODULES: usize = 3;
/// Rows that a block of `lora_up_backward` works through, ranks that it sums at a time, its
/// threads and its shared memory.
const ROWS: usize = 256;
const RANKS: usize = 32;
const THREADS: u32 = 256;
const SHARED: usize = (3 * (128 + RANKS) * 64 + ROWS * RANKS) * 2;

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "lora_up",
        function,
    }
}

/// `UpArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpArgs {
    shares: u64,
    u: u64,
    du: u64,
    dy: [u64; MODULES],
    b: [u64; MODULES],
    db: [u64; MODULES],
    out: [u32; MODULES],
    rows: u32,
    rank: u32,
    span: u32,
    u_stride: u32,
    scale: f32,
}

/// Columns of dY for a block, of `all` of the modules: as many blocks as an H100 was fastest with,
/// two for each multiprocessor, unless the shares of dU would cost more than reading dY again (at
/// rank 32).
fn span(row_blocks: usize, all: usize) -> usize {
    const BLOCKS: usize = 264;
    const LEAST: usize = 128;
    let spans = BLOCKS.div_ceil(row_blocks.max(1));
    all.div_ceil(spans).next_multiple_of(64).max(LEAST)
}

impl LoraLinear {
    /// dU and dB of one module of any shape, otherwise as [`Self::output_gradients`] has them.
    pub(super) fn output_gradients_of_one(
        &self,
        cuda: &CudaDevice,
        dy: &Tensor,
        adapter: &Adapter,
    ) -> Result<(Tensor, Tensor)> {
        let (b, u) = (&adapter.b, adapter.u.matrix()?);
        let ((rows, out), (_, r)) = (dy.matrix_dims(), b.matrix_dims());
        if out.is_multiple_of(WIDE) && r.is_multiple_of(WIDE) && u.is_aligned() {
            let one = std::slice::from_ref(adapter);
            let (du, mut db) = self.output_gradients(cuda, &[dy], one)?;
            return Ok((du, db.swap_remove(0)));
        }
        let dy = Matrix::of(dy)?;
        let du = Product {
            alpha: self.scale,
            ..Product::new(Layout::Nn, dy, Matrix::of(b)?)
        };
        let du = Tensor::from_cuda(du.run(cuda, DType::Bf16)?, [rows, r])?;
        let db = Product::new(Layout::Tn, dy, u).run(cuda, DType::F32)?;
        Ok((du, Tensor::from_cuda(db, b.shape())?))
    }

    /// dU = s dY B of modules that share an input, side by side \[T, modules r\], and each dB =
    /// dYᵀ U, where U holds s already. The adapters have one rank and, if they are several, U in one
    /// matrix, and rows at multiples of 16 bytes, as [`Down`](super::down::Down) asks for.
    pub(super) fn output_gradients(
        &self,
        cuda: &CudaDevice,
        dy: &[&Tensor],
        adapters: &[Adapter],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let (rows, r) = (dy[0].matrix_dims().0, adapters[0].b.matrix_dims().1);
        let u = adapters[0].u.matrix()?;
        let outs: Vec<usize> = dy.iter().map(|dy| dy.matrix_dims().1).collect();
        let ranks = adapters.len() * r;
        let shape = [rows, ranks];
        let blocks = rows.div_ceil(ROWS);
        let all: usize = outs.iter().sum();
        let span = span(blocks, all);
        let spans: usize = outs.iter().map(|out| out.div_ceil(span)).sum();
        let shares = cuda.alloc(DType::F32, (spans * rows + blocks * all) * r)?;
        let du = cuda.alloc(DType::Bf16, rows * ranks)?;
        let mut args = UpArgs {
            shares: shares.address(),
            u: u.address(),
            du: du.address(),
            rows: extent(NAME, rows)?,
            rank: extent(NAME, r)?,
            span: extent(NAME, span)?,
            u_stride: extent(NAME, u.stride())?,
            scale: self.scale,
            ..UpArgs::zeroed()
        };
        let address = |t: &Tensor| t.cuda().map_or(0, CudaBuffer::address);
        let mut all_db = Vec::new();
        for (i, (dy, adapter)) in dy.iter().zip(adapters).enumerate() {
            let db = cuda.alloc(DType::F32, outs[i] * r)?;
            args.out[i] = extent(NAME, outs[i])?;
            args.dy[i] = address(dy);
            args.b[i] = address(&adapter.b);
            args.db[i] = db.address();
            all_db.push(Tensor::from_cuda(db, adapter.b.shape())?);
        }
        let args = Arg::Struct(bytemuck::cast(args));
        let grid = Grid::of_blocks(blocks * spans * r.div_ceil(RANKS), THREADS, SHARED);
        // SAFETY: dY are [rows, out], U [rows, r] of each module with the stride stated, B [out, r],
        // all bf16 and with rows at multiples of 16 bytes; the shares are as many as the kernel has.
        unsafe { cuda.launch(kernel("lora_up_backward"), grid, &[args]) }?;
        let grid = Grid::over(((rows * adapters.len() + all) * r).div_ceil(4));
        let args = [args, Arg::size(NAME, blocks)?];
        // SAFETY: as above; du is [rows, modules r] and each dB [out, r].
        unsafe { cuda.launch(kernel("lora_up_sum"), grid, &args) }?;
        Ok((Tensor::from_cuda(du, shape)?, all_db))
    }
}
