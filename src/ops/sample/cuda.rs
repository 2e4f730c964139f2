//! The launches of `kernels/sample.cu`.

use bytemuck::{Pod, Zeroable};

use super::{Filter, NAME};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, extent};
use crate::error::Result;
use crate::tensor::{CudaBuffer, DType, Tensor};

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "sample",
        function,
    }
}

const BEST: Kernel = kernel("sample_best");
const BINS: Kernel = kernel("sample_bins");
const SUMS: Kernel = kernel("sample_sums");
const DRAW: Kernel = kernel("sample_draw");

/// Threads of a block, and logits that it reads.
const THREADS: u32 = 256;
const CHUNK: usize = 4096;
/// `State` of kernels/sample.cu in words: weight and count of each of 312 bins, and two more.
const STATE: usize = 312 * 3 + 2;

/// `Args` of kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Args {
    logits: u64,
    words: u64,
    ids: u64,
    best: u64,
    sums: u64,
    states: u64,
    lists: u64,
    vocab: u32,
    chunks: u32,
    top_k: u32,
    top_p: f32,
    scale: f32,
    unused: u32,
    unused_words: [u64; 6],
}

/// The tokens \[rows\]; shapes and settings checked before.
pub(super) fn sample(
    cuda: &CudaDevice,
    logits: &Tensor,
    filter: Filter,
    words: &[u64],
) -> Result<Tensor> {
    let (rows, vocab) = logits.matrix_dims();
    let logits = cuda.resident(logits, DType::F32)?;
    let chunks = vocab.div_ceil(CHUNK);
    let scale = filter.scale();
    let cut = scale.is_some() && filter.cuts(vocab);
    // Two words make a number of the kernels.
    let memory = |wanted: bool, len| wanted.then(|| cuda.alloc(DType::U32, len)).transpose();
    let ids = cuda.alloc(DType::U32, rows)?;
    let best = cuda.alloc(DType::U32, 2 * rows * chunks)?;
    let sums = memory(scale.is_some(), 2 * rows * chunks)?;
    let states = memory(cut, STATE * rows)?;
    let lists = memory(cut, 2 * rows * vocab)?;
    let halves = words.iter().flat_map(|&w| [w as u32, (w >> 32) as u32]);
    let words = Tensor::from_u32(halves.collect(), [rows, 2])?;
    let words = scale
        .map(|_| cuda.resident(&words, DType::U32))
        .transpose()?;
    let address = |buffer: Option<&CudaBuffer>| buffer.map_or(0, CudaBuffer::address);
    let args = Args {
        logits: address(logits.cuda()),
        words: address(words.as_ref().and_then(Tensor::cuda)),
        ids: ids.address(),
        best: best.address(),
        sums: address(sums.as_ref()),
        states: address(states.as_ref()),
        lists: address(lists.as_ref()),
        vocab: extent(NAME, vocab)?,
        chunks: extent(NAME, chunks)?,
        // As many as there are take all.
        top_k: extent(NAME, filter.top_k.min(vocab))?,
        top_p: filter.top_p,
        scale: scale.unwrap_or(0.0),
        unused: 0,
        unused_words: [0; 6],
    };
    let args = [Arg::Struct(bytemuck::cast(args))];
    let each_chunk = Grid::of_blocks(rows * chunks, THREADS, 0);
    let steps = [
        (true, BEST, each_chunk),
        (cut, BINS, each_chunk),
        (scale.is_some(), SUMS, each_chunk),
        (true, DRAW, Grid::of_blocks(rows, THREADS, 0)),
    ];
    for (_, kernel, grid) in steps.into_iter().filter(|(wanted, ..)| *wanted) {
        // SAFETY: the logits are [rows, vocab] f32, all held until after the launches; the others
        // have the sizes that the kernels' `Args` states, and those that are null are not used
        // without a scale or a cut. Each kernel reads what those before it wrote.
        unsafe { cuda.launch(kernel, grid, &args) }?;
    }
    Tensor::from_cuda(ids, [rows])
}
