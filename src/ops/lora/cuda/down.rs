//! The products with the inputs that modules share, for all of them in one launch
//! (kernels/lora_down.cu).

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::NAME;
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE, extent};
use crate::error::Result;
use crate::ops::lora::{Dropout, Frozen};
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Modules that a launch serves at most.
const MODULES: usize = 3;
/// Columns of X that a word of the masks is for.
const WORD: usize = 32;
/// Rows (forward) or columns (backward) of X, and ranks of each module, for a block; the reduction
/// that it takes at a time.
const EXTENT: usize = 128;
const RANKS: usize = 32;
const STAGE: usize = 64;
const THREADS: u32 = 256;
/// Depth of the ring of stages.
const STAGES: usize = 3;

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "lora_down",
        function,
    }
}

/// `DownArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DownArgs {
    shares: u64,
    x: u64,
    with: u64,
    masks: u64,
    step: u64,
    rows: u32,
    inner: u32,
    rank: u32,
    slices: u32,
    threshold: u32,
    streams: [[u32; 5]; MODULES],
    unused: [u32; 2],
}

/// `FactorArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FactorArgs {
    a: u64,
    b: [u64; MODULES],
    from_a: [u64; MODULES],
    from_b: [u64; MODULES],
    size_a: u64,
    size_b: [u64; MODULES],
    modules: u32,
    unused: [u32; 3],
}

/// What dropout kept of X for each module: [modules, T, in / 32] words, the lowest bit first.
pub(super) struct Masks(CudaBuffer);

impl Masks {
    /// The buffer and the element that the words of a module begin at.
    pub(super) fn of(&self, module: usize, x: &Tensor) -> (&CudaBuffer, usize) {
        (&self.0, module * (x.len() / WORD))
    }
}

/// Modules that one launch can serve.
pub(super) struct Down<'m> {
    modules: &'m [Frozen],
    rows: usize,
    inner: usize,
    /// Of each module.
    rank: usize,
}

impl<'m> Down<'m> {
    /// `None` where there are too many modules or they differ in what the launch has once, and for
    /// rows that do not allow accesses of 16 bytes. `ranks` are those of the modules.
    pub(super) fn of(
        modules: &'m [Frozen],
        x: &Tensor,
        ranks: impl IntoIterator<Item = usize>,
    ) -> Option<Self> {
        let (rows, inner) = x.matrix_dims();
        let mut ranks = ranks.into_iter();
        let rank = ranks.next()?;
        let first = modules.first()?;
        let alike = |m: &Frozen| threshold(m) == threshold(first) && is_same(step(m), step(first));
        let fits = modules.len() <= MODULES
            && ranks.all(|other| other == rank)
            && rank > 0
            && rank.is_multiple_of(WIDE)
            && inner.is_multiple_of(WORD)
            && !x.is_empty()
            // A stream's blocks are of eight elements.
            && u32::try_from(x.len() / 8).is_ok()
            && modules.iter().all(|m| m.weight.matrix_dims().0.is_multiple_of(WIDE))
            && modules[1..].iter().all(alike);
        fits.then_some(Self {
            modules,
            rows,
            inner,
            rank,
        })
    }

    /// A of all modules below each other, and each B, in bf16.
    pub(super) fn factors(
        &self,
        cuda: &CudaDevice,
        adapters: &[[&Tensor; 2]],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let count = self.modules.len();
        let a = cuda.alloc(DType::Bf16, count * self.rank * self.inner)?;
        let size_a = (self.rank * self.inner) as u64;
        let mut args = FactorArgs {
            a: a.address(),
            size_a,
            modules: extent(NAME, count)?,
            ..FactorArgs::zeroed()
        };
        let (mut total, mut kept, mut all_b) = (count as u64 * size_a, Vec::new(), Vec::new());
        for (i, [a, b]) in adapters.iter().enumerate() {
            let [from_a, from_b] = [cuda.resident(a, DType::F32)?, cuda.resident(b, DType::F32)?];
            let rounded = cuda.alloc(DType::Bf16, b.len())?;
            args.b[i] = rounded.address();
            args.size_b[i] = b.len() as u64;
            total += args.size_b[i];
            for (to, from) in [(&mut args.from_a, &from_a), (&mut args.from_b, &from_b)] {
                to[i] = from.cuda().map_or(0, CudaBuffer::address);
            }
            all_b.push(Tensor::from_cuda(rounded, b.shape())?);
            kept.push([from_a, from_b]);
        }
        let grid = Grid::over((total as usize).div_ceil(WIDE));
        let args = [Arg::Struct(bytemuck::cast(args))];
        // SAFETY: the factors are f32 in device memory, A [rank, in] and B of as many values as
        // stated, all multiples of eight; what is written is as large, in bf16.
        unsafe { cuda.launch(kernel("lora_factors_bf16"), grid, &args) }?;
        let a = Tensor::from_cuda(a, [count * self.rank, self.inner])?;
        Ok((a, all_b))
    }

    /// U of all modules side by side, times `scale`, and what dropout kept. `a`: as
    /// [`Self::factors`] makes it.
    pub(super) fn forward(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        a: &Tensor,
        scale: f32,
    ) -> Result<(Tensor, Option<Masks>)> {
        let ranks = self.modules.len() * self.rank;
        let words = self.modules.len() * x.len() / WORD;
        let masks = match threshold(&self.modules[0]) {
            0 => None,
            _ => Some(Masks(cuda.alloc(DType::U32, words)?)),
        };
        let dropout = self.modules[0].dropout.as_ref();
        let step = dropout.map(|dropout| dropout.resident_step(cuda));
        let step = step.transpose()?.flatten();
        let (slices, blocks) = self.slices(self.rows, self.inner);
        let shares = cuda.alloc(DType::F32, slices * self.rows * ranks)?;
        let mut args = self.args(&shares, x, a, masks.as_ref(), slices)?;
        let step = step.as_ref().and_then(Tensor::cuda);
        args.step = step.map_or(0, CudaBuffer::address);
        let functions = [
            "lora_down_forward_1",
            "lora_down_forward_2",
            "lora_down_forward_3",
        ];
        let extent = EXTENT + self.modules.len() * RANKS;
        let shared = STAGES * extent * STAGE * DType::Bf16.size();
        let grid = Grid::of_blocks(blocks, THREADS, shared);
        let args = [Arg::Struct(bytemuck::cast(args))];
        let function = functions[self.modules.len() - 1];
        // SAFETY: x is [rows, in] and a [modules rank, in], bf16; shares and masks are as large as
        // stated, the step is two u32; shared memory holds the stages.
        unsafe { cuda.launch(kernel(function), grid, &args) }?;
        let u = cuda.alloc(DType::Bf16, self.rows * ranks)?;
        let alpha = scale * self.modules[0].keep();
        let args = [
            Arg::from(&u),
            Arg::from(&shares),
            Arg::size(NAME, slices)?,
            Arg::U64(u.len() as u64),
            Arg::F32(alpha),
        ];
        // SAFETY: the shares are [slices, rows, ranks] and u [rows, ranks], a multiple of eight.
        unsafe {
            cuda.launch(
                kernel("lora_sum_bf16"),
                Grid::over(u.len().div_ceil(4)),
                &args,
            )
        }?;
        Ok((Tensor::from_cuda(u, [self.rows, ranks])?, masks))
    }

    /// dA of each module. `du`: dU of all modules side by side.
    pub(super) fn backward(
        &self,
        cuda: &CudaDevice,
        x: &Tensor,
        du: &Tensor,
        masks: Option<&Masks>,
    ) -> Result<Vec<Tensor>> {
        let (count, size) = (self.modules.len(), self.rank * self.inner);
        let (slices, blocks) = self.slices(self.inner, self.rows);
        let shares = cuda.alloc(DType::F32, slices * count * size)?;
        let args = self.args(&shares, x, du, masks, slices)?;
        let functions = [
            "lora_down_backward_1",
            "lora_down_backward_2",
            "lora_down_backward_3",
        ];
        let bits = count * STAGE * EXTENT / 8;
        let stage = (EXTENT + count * RANKS) * STAGE * DType::Bf16.size() + bits;
        let grid = Grid::of_blocks(blocks, THREADS, STAGES * stage);
        let args = [Arg::Struct(bytemuck::cast(args))];
        // SAFETY: x is [rows, in] and du [rows, modules rank], bf16; masks, where there are some,
        // are those that forward left, the shares as large as stated; shared memory holds the
        // stages.
        unsafe { cuda.launch(kernel(functions[count - 1]), grid, &args) }?;
        let da = (0..count).map(|_| cuda.alloc(DType::F32, size));
        let da = da.collect::<Result<Vec<_>>>()?;
        let to = |module: usize| da.get(module).map_or(Arg::Pointer(0), Arg::from);
        let args = [
            to(0),
            to(1),
            to(2),
            Arg::from(&shares),
            Arg::size(NAME, slices)?,
            Arg::size(NAME, count)?,
            Arg::U64(size as u64),
            Arg::F32(self.modules[0].keep()),
        ];
        let grid = Grid::over((count * size).div_ceil(4));
        // SAFETY: the shares are [slices, modules, size], each dA is of `size` f32.
        unsafe { cuda.launch(kernel("lora_down_sum"), grid, &args) }?;
        let shape = [self.rank, self.inner];
        da.into_iter()
            .map(|da| Tensor::from_cuda(da, shape))
            .collect()
    }

    /// Slices of the reduction over `depth`, and blocks for them and for `extent` rows or columns
    /// of X: as many as fill a device, unless filling their rings would take the time. Constants,
    /// so that the order of a sum does not depend on the device.
    fn slices(&self, extent: usize, depth: usize) -> (usize, usize) {
        const BLOCKS: usize = 128;
        const LEAST_STAGES: usize = 4;
        let tiles = extent.div_ceil(EXTENT) * self.rank.div_ceil(RANKS);
        let stages = depth.div_ceil(STAGE);
        let wanted = BLOCKS.div_ceil(tiles).min(stages / LEAST_STAGES).max(1);
        // Without slices that would get no stage.
        let slices = stages.div_ceil(stages.div_ceil(wanted));
        (slices, slices * tiles)
    }

    fn args(
        &self,
        shares: &CudaBuffer,
        x: &Tensor,
        with: &Tensor,
        masks: Option<&Masks>,
        slices: usize,
    ) -> Result<DownArgs> {
        let address = |t: &Tensor| t.cuda().map_or(0, CudaBuffer::address);
        let mut streams = [[0; 5]; MODULES];
        for (to, module) in streams.iter_mut().zip(self.modules) {
            if let Some(dropout) = &module.dropout {
                let ([key0, key1], [high0, high1, high2]) = dropout.stream.parts();
                *to = [key0, key1, high0, high1, high2];
            }
        }
        Ok(DownArgs {
            shares: shares.address(),
            x: address(x),
            with: address(with),
            masks: masks.map_or(0, |masks| masks.0.address()),
            rows: extent(NAME, self.rows)?,
            inner: extent(NAME, self.inner)?,
            rank: extent(NAME, self.rank)?,
            slices: extent(NAME, slices)?,
            threshold: threshold(&self.modules[0]),
            streams,
            ..DownArgs::zeroed()
        })
    }

    /// A module's rows of all A, and its columns of all U and dU.
    pub(super) fn ranks_of(&self, module: usize) -> Range<usize> {
        module * self.rank..(module + 1) * self.rank
    }
}

/// 0 where nothing is dropped.
fn threshold(module: &Frozen) -> u32 {
    module.dropout.as_ref().map_or(0, Dropout::threshold)
}

fn step(module: &Frozen) -> Option<&Tensor> {
    module.dropout.as_ref()?.step.as_ref()
}

/// Whether both streams take their step from the same memory, or both from themselves.
fn is_same(a: Option<&Tensor>, b: Option<&Tensor>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => match (a.cuda(), b.cuda()) {
            (Some(a), Some(b)) => a.address() == b.address(),
            _ => false,
        },
        (None, None) => true,
        _ => false,
    }
}
