//! The forward pass: which values are kept of a product that is too large for memory.

use std::ops::Range;

use super::{NAME, NULL, check_k, kernel};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::error::Result;
use crate::ops::gemm::cuda::{Layout, Matrix, Product};
use crate::ops::gemm::hopper;
use crate::ops::topk::not_finite;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// Threads of a selection's block and pre-activations of one of its rounds.
const THREADS: u32 = 256;
const ROUND: usize = 1024;
const KEY_BYTES: usize = 8;
/// Pre-activations that are in memory at a time: 64 MB.
const WORKSPACE: usize = 1 << 24;
/// Tokens that have lists at a time.
const LISTED_TOKENS: usize = 1024;
/// The shortest list, and the longest that fits the shared memory of a block.
const LENGTH: Range<usize> = 1024..4097;
/// A list's keys for each of k. As many latents go first as leave an eighth of them on average.
const KEYS_PER_K: usize = 32;
const FIRST_SHARE: usize = 8;
/// The tile of kernels/topk.cu's own product, its threads and the shared memory of its ring.
const TILE: [usize; 2] = [128, 256];
const TILE_THREADS: u32 = 256;
const TILE_SHARED: usize = 3 * 64 * (TILE[0] + TILE[1]) * 2;
/// bf16 values that a row of this product must be a multiple of: 16 bytes.
const ALIGNED: usize = 8;

/// What the latents are selected from, and the result on its way.
pub(super) struct Selection<'a> {
    pub(super) cuda: &'a CudaDevice,
    /// \[T, d\] bf16
    pub(super) x: &'a Tensor,
    /// \[n, d\] bf16 and \[n\] f32: the encoder of the candidates, centred.
    pub(super) weights: Tensor,
    pub(super) bias: Tensor,
    /// \[n\] u32: which latents they are; the first n where `None`.
    pub(super) among: Option<Tensor>,
    pub(super) k: usize,
}

/// The result: acts and indices \[T, k\], and what was found on the way.
struct Outputs {
    acts: CudaBuffer,
    indices: CudaBuffer,
    /// \[2\] u32: the largest ~t of a token t with a value that is not finite; 1 where a list
    /// had no room.
    bad: CudaBuffer,
}

/// How many latents go first, and how long the lists for the others are.
#[derive(Clone, Copy)]
struct Plan {
    first: usize,
    length: usize,
}

impl Selection<'_> {
    /// acts \[T, k\] f32 and indices \[T, k\] u32.
    ///
    /// # Errors
    /// A k that does not fit shared memory, a pre-activation that is NaN or +inf.
    pub(super) fn run(&self) -> Result<(Tensor, Tensor)> {
        check_k(self.k)?;
        let tokens = self.tokens();
        let mut out = Outputs {
            acts: self.cuda.alloc(DType::F32, tokens * self.k)?,
            indices: self.cuda.alloc(DType::U32, tokens * self.k)?,
            bad: self.cuda.alloc(DType::U32, 2)?,
        };
        out.bad.clear()?;
        let mut found = [0, 1];
        if let Some(plan) = self.plan() {
            self.by_lists(plan, &out)?;
            found = out.found()?;
        }
        if found == [0, 1] {
            // No lists, or one without room: every pre-activation is looked at.
            self.by_rows(&out)?;
            found = out.found()?;
        }
        if found[0] != 0 {
            return Err(not_finite(!found[0] as usize));
        }
        Ok((
            Tensor::from_cuda(out.acts, [tokens, self.k])?,
            Tensor::from_cuda(out.indices, [tokens, self.k])?,
        ))
    }

    fn tokens(&self) -> usize {
        self.x.matrix_dims().0
    }

    /// `None` where the candidates are few, k large, or the tile too large for the device.
    fn plan(&self) -> Option<Plan> {
        let (candidates, d) = self.weights.matrix_dims();
        let first = (candidates / FIRST_SHARE).next_multiple_of(TILE[1]);
        let length = (KEYS_PER_K * self.k).max(LENGTH.start);
        let fits = LENGTH.contains(&length) && first + TILE[1] <= candidates;
        let fits = fits && TILE_SHARED <= self.cuda.most_shared();
        let worth_it = d.is_multiple_of(ALIGNED) && 2 * self.k <= first;
        (fits && worth_it).then_some(Plan { first, length })
    }

    /// The pre-activations of some tokens and the first `latents` candidates: \[rows, latents\].
    fn products(&self, rows: Range<usize>, latents: usize, out: &CudaBuffer) -> Result<()> {
        let lhs = Matrix::of(self.x)?.rows(rows)?;
        let rhs = Matrix::of(&self.weights)?.rows(0..latents)?;
        let bias = self.bias_of(latents)?;
        let mut product = Product::new(Layout::Nt, lhs, rhs);
        product.bias = Some(&bias);
        product.run_into(self.cuda, out, 0, false)
    }

    /// The bias of the first `latents` candidates.
    fn bias_of(&self, latents: usize) -> Result<Tensor> {
        let bias = match self.bias.cuda() {
            Some(bias) if latents < self.bias.len() => bias,
            _ => return Ok(self.bias.clone()),
        };
        let mut part = self.cuda.alloc(DType::F32, latents)?;
        part.copy_from(0, bias, 0..latents)?;
        Tensor::from_cuda(part, [latents])
    }

    fn among(&self) -> Result<Arg> {
        self.among.as_ref().map_or(Ok(NULL), Tensor::arg)
    }

    fn by_rows(&self, out: &Outputs) -> Result<()> {
        let (candidates, tokens) = (self.bias.len(), self.tokens());
        let chunk = (WORKSPACE / candidates).clamp(1, tokens.max(1));
        let products = self.cuda.alloc(DType::F32, chunk * candidates)?;
        let capacity = self.k + 2 * ROUND;
        for first in (0..tokens).step_by(chunk) {
            let rows = first..tokens.min(first + chunk);
            self.products(rows.clone(), candidates, &products)?;
            let args = [
                Arg::from(&out.acts),
                Arg::from(&out.indices),
                Arg::from(&out.bad),
                Arg::from(&products),
                self.among()?,
                Arg::size(NAME, first)?,
                Arg::size(NAME, candidates)?,
                Arg::size(NAME, self.k)?,
                Arg::size(NAME, capacity)?,
            ];
            let grid = Grid::of_blocks(rows.len(), THREADS, capacity * KEY_BYTES);
            // SAFETY: products has a row of `candidates` for each block, acts and indices one of
            // k for each token up to `first` + blocks, `among` is [candidates]; shared memory
            // holds `capacity` keys.
            unsafe { self.cuda.launch(kernel("topk_select"), grid, &args) }?;
        }
        Ok(())
    }

    fn by_lists(&self, plan: Plan, out: &Outputs) -> Result<()> {
        let tokens = self.tokens();
        let chunk = (WORKSPACE / plan.first).clamp(1, LISTED_TOKENS.min(tokens.max(1)));
        let products = self.cuda.alloc(DType::F32, chunk * plan.first)?;
        let lists = Lists {
            keys: self
                .cuda
                .alloc(DType::U32, chunk * plan.length * KEY_BYTES / 4)?,
            counts: self.cuda.alloc(DType::U32, chunk)?,
            thresholds: self.cuda.alloc(DType::F32, chunk)?,
        };
        for first in (0..tokens).step_by(chunk) {
            let rows = first..tokens.min(first + chunk);
            self.products(rows.clone(), plan.first, &products)?;
            self.begin(plan, &lists, &products, rows.clone(), out)?;
            self.extend(plan, &lists, rows.clone())?;
            self.finish(plan, &lists, rows, out)?;
        }
        Ok(())
    }

    fn begin(
        &self,
        plan: Plan,
        lists: &Lists,
        products: &CudaBuffer,
        rows: Range<usize>,
        out: &Outputs,
    ) -> Result<()> {
        let capacity = self.k + 2 * ROUND;
        let [keys, counts, thresholds] = lists.args();
        let args = [
            keys,
            counts,
            thresholds,
            Arg::from(&out.bad),
            Arg::from(products),
            Arg::size(NAME, rows.start)?,
            Arg::size(NAME, plan.first)?,
            Arg::size(NAME, self.k)?,
            Arg::size(NAME, capacity)?,
            Arg::size(NAME, plan.length)?,
        ];
        let grid = Grid::of_blocks(rows.len(), THREADS, capacity * KEY_BYTES);
        // SAFETY: products has a row of `first` values and the lists one of `length` keys, at
        // least k, for each block; shared memory holds `capacity` keys.
        unsafe { self.cuda.launch(kernel("topk_begin_lists"), grid, &args) }
    }

    fn extend(&self, plan: Plan, lists: &Lists, rows: Range<usize>) -> Result<()> {
        let (candidates, d) = self.weights.matrix_dims();
        let [keys, counts, thresholds] = lists.args();
        let x = Matrix::of(self.x)?.rows(rows.clone())?;
        let mut args = vec![
            keys,
            counts,
            thresholds,
            self.bias.arg()?,
            Arg::size(NAME, rows.len())?,
            Arg::size(NAME, plan.first)?,
            Arg::size(NAME, candidates)?,
            Arg::size(NAME, d)?,
            Arg::size(NAME, plan.length)?,
        ];
        let extents = [rows.len(), candidates - plan.first];
        let (kernel, grid) = match hopper::wide_grid(self.cuda, extents) {
            Some(grid) => {
                let w = Matrix::of(&self.weights)?.rows(plan.first..candidates)?;
                args.extend([x.block_map(self.cuda)?, w.block_map(self.cuda)?]);
                let kernel = Kernel {
                    stem: "topk_sm90a",
                    function: "topk_extend_lists_wgmma_128x192",
                };
                (kernel, grid)
            }
            None => {
                args.extend([Arg::Pointer(x.address()), self.weights.arg()?]);
                let blocks = extents[0].div_ceil(TILE[0]) * extents[1].div_ceil(TILE[1]);
                let grid = Grid::of_blocks(blocks, TILE_THREADS, TILE_SHARED);
                (kernel("topk_extend_lists"), grid)
            }
        };
        // SAFETY: x is [rows, d] and the weights [candidates, d], both bf16 with rows at multiples
        // of 16 bytes, the bias [candidates] f32; the lists are those of `rows` tokens.
        unsafe { self.cuda.launch(kernel, grid, &args) }
    }

    fn finish(&self, plan: Plan, lists: &Lists, rows: Range<usize>, out: &Outputs) -> Result<()> {
        let [keys, counts, _] = lists.args();
        let args = [
            Arg::from(&out.acts),
            Arg::from(&out.indices),
            Arg::from(&out.bad),
            keys,
            counts,
            self.among()?,
            Arg::size(NAME, rows.start)?,
            Arg::size(NAME, self.k)?,
            Arg::size(NAME, plan.length)?,
        ];
        let grid = Grid::of_blocks(rows.len(), THREADS, plan.length * KEY_BYTES);
        // SAFETY: acts and indices have a row of k for each token up to `rows.end`, the lists one
        // of `length` keys for each block, as shared memory has.
        unsafe { self.cuda.launch(kernel("topk_finish_lists"), grid, &args) }
    }
}

/// For each token the keys that may be among its k largest.
struct Lists {
    /// \[tokens, length\] keys of 8 bytes
    keys: CudaBuffer,
    /// \[tokens\] u32: how many there are, or would be with enough room.
    counts: CudaBuffer,
    /// \[tokens\] f32: what later values must exceed.
    thresholds: CudaBuffer,
}

impl Lists {
    fn args(&self) -> [Arg; 3] {
        [&self.keys, &self.counts, &self.thresholds].map(Arg::from)
    }
}

impl Outputs {
    /// What was found, on the host.
    fn found(&self) -> Result<[u32; 2]> {
        Ok(bytemuck::pod_read_unaligned(&self.bad.read(0, 2)?))
    }
}
