//! The launches of `kernels/decode.cu`.

use std::f32::consts::LOG2_E;

use bytemuck::{Pod, Zeroable};

use super::{Heads, KvCache, Map, NAME};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel, WIDE, extent};
use crate::error::{Error, Result};
use crate::ops::rope::RopeTable;
use crate::tensor::{CudaBuffer, DType, Tensor};

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "decode",
        function,
    }
}

const LINEAR_8: Kernel = kernel("decode_linear_bf16_n8");
const LINEAR_16: Kernel = kernel("decode_linear_bf16_n16");
const LINEAR_32: Kernel = kernel("decode_linear_bf16_n32");
const APPEND: Kernel = kernel("decode_append_bf16");
const ATTEND_64: Kernel = kernel("decode_attend_bf16_d64");
const ATTEND_128: Kernel = kernel("decode_attend_bf16_d128");
const COMBINE: Kernel = kernel("decode_combine_bf16");

/// Rows of W that a block owns, its threads, and the maps of one launch.
const ROWS: usize = 16;
const THREADS: u32 = 256;
const MAPS: usize = 3;
// Flags of the kernel.
const OUT_F32: u32 = 1;
const ADD: u32 = 2;

/// Keys and queries that a block of the attention has, and its threads.
const SPLIT: usize = 128;
const QUERIES: usize = 8;
const ATTEND_THREADS: u32 = 128;
/// The largest head.
const LARGEST: usize = 128;

/// `Map` of kernels/decode.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MapArgs {
    weight: u64,
    bias: u64,
    y: u64,
    out: u32,
    first: u32,
}

/// `LinearArgs` of kernels/decode.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinearArgs {
    x: u64,
    batch: u32,
    cols: u32,
    flags: u32,
    alpha: f32,
    maps: [MapArgs; MAPS],
    unused: u64,
}

/// X Wᵀ + b for each map, in `dtype`, bf16 or f32; shapes checked before.
pub(super) fn linear(
    cuda: &CudaDevice,
    x: &Tensor,
    maps: &[Map],
    dtype: DType,
) -> Result<Vec<Tensor>> {
    let (batch, _) = x.matrix_dims();
    let outputs = maps.iter().map(|map| {
        let out = map.weight.matrix_dims().0;
        Tensor::from_cuda(cuda.alloc(dtype, batch * out)?, [batch, out])
    });
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    for (maps, outputs) in maps.chunks(MAPS).zip(outputs.chunks(MAPS)) {
        launch(cuda, x, maps, outputs, 1.0, 0)?;
    }
    Ok(outputs)
}

/// Y += scale (X Aᵀ) Bᵀ; shapes checked before, Y is nobody else's.
pub(super) fn add_low_rank(
    cuda: &CudaDevice,
    y: &Tensor,
    x: &Tensor,
    [a, b]: [&Tensor; 2],
    scale: f32,
) -> Result<()> {
    let map = |weight| Map { weight, bias: None };
    let low = cuda.alloc(DType::Bf16, x.matrix_dims().0 * a.matrix_dims().0)?;
    let low = Tensor::from_cuda(low, [x.matrix_dims().0, a.matrix_dims().0])?;
    launch(cuda, x, &[map(a)], std::slice::from_ref(&low), scale, 0)?;
    launch(cuda, &low, &[map(b)], std::slice::from_ref(y), 1.0, ADD)
}

/// At most [`MAPS`] maps into tensors of their own.
fn launch(
    cuda: &CudaDevice,
    x: &Tensor,
    maps: &[Map],
    outputs: &[Tensor],
    alpha: f32,
    flags: u32,
) -> Result<()> {
    let (batch, cols) = x.matrix_dims();
    let resident = |tensor: &Tensor| cuda.resident(tensor, DType::Bf16);
    let x = resident(x)?;
    // Kept until the launch.
    let mut operands = Vec::with_capacity(2 * MAPS);
    let mut tiles = 0;
    let mut map_args = [MapArgs {
        first: u32::MAX,
        ..MapArgs::zeroed()
    }; MAPS];
    let float = outputs.iter().any(|y| y.dtype() == DType::F32);
    for ((map, y), args) in maps.iter().zip(outputs).zip(&mut map_args) {
        let weight = resident(map.weight)?;
        let bias = map.bias.map(resident).transpose()?;
        let out = map.weight.matrix_dims().0;
        *args = MapArgs {
            weight: address(&weight),
            bias: bias.as_ref().map_or(0, address),
            y: address(y),
            out: extent(NAME, out)?,
            first: extent(NAME, tiles)?,
        };
        tiles += out.div_ceil(ROWS);
        operands.extend([Some(weight), bias]);
    }
    let args = LinearArgs {
        x: address(&x),
        batch: extent(NAME, batch)?,
        cols: extent(NAME, cols)?,
        flags: flags | if float { OUT_F32 } else { 0 },
        alpha,
        maps: map_args,
        unused: 0,
    };
    let kernel = match batch {
        0..=8 => LINEAR_8,
        9..=16 => LINEAR_16,
        _ => LINEAR_32,
    };
    let grid = Grid::of_blocks(tiles, THREADS, 0);
    // SAFETY: x is [batch, cols], each weight [out, cols], each bias [out], all bf16 and held until
    // after the launch; each y is [batch, out], of the dtype that the flags say.
    unsafe { cuda.launch(kernel, grid, &[Arg::Struct(bytemuck::cast(args))]) }
}

fn address(tensor: &Tensor) -> u64 {
    // What `resident` and `alloc` gave is on the device.
    tensor.cuda().map_or(0, CudaBuffer::address)
}

/// What the kernels know of the sequences: \[B, 4\] u32, cache address, capacity and position of
/// the new token. Makes room for that token.
pub(super) fn table(
    cuda: &CudaDevice,
    caches: &mut [&mut KvCache],
    positions: &[usize],
) -> Result<Tensor> {
    let mut words = Vec::with_capacity(4 * caches.len());
    for (cache, &position) in caches.iter_mut().zip(positions) {
        let (address, capacity) = cache.reserve(cuda, position + 1)?;
        let [low, high] = [address as u32, (address >> 32) as u32];
        words.extend([low, high, extent(NAME, capacity)?, extent(NAME, position)?]);
    }
    cuda.resident(&Tensor::from_u32(words, [caches.len(), 4])?, DType::U32)
}

/// The sequences of a step on the device.
pub(super) struct Sequences<'a> {
    /// As [`table`] made it.
    pub(super) table: &'a Tensor,
    pub(super) positions: &'a [usize],
    pub(super) rope: &'a RopeTable,
    pub(super) heads: Heads,
}

impl Sequences<'_> {
    /// Adds the new key and value to the caches and attends; shapes and positions checked before.
    pub(super) fn attention(
        &self,
        cuda: &CudaDevice,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let Heads { queries, kv, dim } = self.heads;
        if dim > LARGEST || !dim.is_multiple_of(WIDE) {
            let expected = format!("a head size in multiples of {WIDE} up to {LARGEST} on CUDA");
            return Err(Error::operand(NAME, expected, dim.to_string()));
        }
        let [q, k, v] = [q, k, v].map(|t| cuda.resident(t, DType::Bf16));
        let (q, k, v) = (q?, k?, v?);
        let rope = self.rope.resident(cuda)?;
        let batch = self.positions.len();
        let shape = [
            Arg::size(NAME, layer)?,
            Arg::size(NAME, queries)?,
            Arg::size(NAME, kv)?,
            Arg::size(NAME, dim)?,
        ];
        let turned = cuda.alloc(DType::Bf16, q.len())?;
        let mut args = vec![Arg::from(&turned), q.arg()?, k.arg()?, v.arg()?];
        args.extend([self.table.arg()?, rope.arg()?]);
        args.extend(shape);
        // SAFETY: q and its copy are [B, queries d], k and v [B, kv d] bf16; the table has B rows,
        // whose caches have room for the position (`table`), which the f32 angles hold.
        unsafe { cuda.launch(APPEND, Grid::of_blocks(batch, THREADS, 0), &args) }?;

        let longest = self.positions.iter().max().map_or(0, |p| p + 1);
        let splits = longest.div_ceil(SPLIT);
        let rows = batch * queries;
        let out = cuda.alloc(DType::Bf16, q.len())?;
        let partial = match splits {
            0 | 1 => None,
            _ => Some(cuda.alloc(DType::F32, rows * splits * (dim + 2))?),
        };
        let partial_arg = partial.as_ref().map_or(Arg::Pointer(0), Arg::from);
        let mut args = vec![Arg::from(&out), partial_arg, Arg::from(&turned)];
        args.push(self.table.arg()?);
        args.extend(shape);
        args.push(Arg::F32(LOG2_E / (dim as f32).sqrt()));
        args.push(Arg::size(NAME, splits)?);
        let parts = (queries / kv).div_ceil(QUERIES);
        let grid = Grid::of_blocks(batch * kv * parts * splits, ATTEND_THREADS, 0);
        let attend = if dim <= 64 { ATTEND_64 } else { ATTEND_128 };
        // SAFETY: as above; every position up to the new one is written in the caches; the partial
        // results are [rows, splits, d + 2] f32 where there is more than one split.
        unsafe { cuda.launch(attend, grid, &args) }?;
        if partial.is_some() {
            let args = [
                Arg::from(&out),
                partial_arg,
                self.table.arg()?,
                Arg::size(NAME, queries)?,
                Arg::size(NAME, dim)?,
                Arg::size(NAME, splits)?,
            ];
            let threads = extent(NAME, dim.next_multiple_of(32))?;
            // SAFETY: the attention has written every split of a sequence's own, which are those
            // that the kernel reads; the result is [rows, d] bf16.
            unsafe { cuda.launch(COMBINE, Grid::of_blocks(rows, threads, 0), &args) }?;
        }
        Tensor::from_cuda(out, q.shape())
    }
}
