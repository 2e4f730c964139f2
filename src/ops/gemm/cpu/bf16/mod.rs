//! Products of bf16 values with sums in f32.
//!
//! The left operand (activations) is packed once for a product, blocks of the right one (a
//! weight, stored as its file has it) by the task that uses them: packing costs a few hundredths of a
//! nanosecond a value, which some hundred rows of the other side pay for, and so a weight exists
//! once in memory whatever way round it is used. A sum runs over the reduction in order, block
//! by block, whatever the tasks are: results do not depend on the number of threads, nor on how
//! many other rows are computed along.

mod pack;
mod tile;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use pack::{Operand, Values};
pub(crate) use tile::Level;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::tensor::Buffer;
use tile::Tile;
pub(crate) use tile::{COLS, ROWS};

/// Pairs of the reduction that are packed at a time: a right panel of 32 columns takes 40 KiB.
const PAIRS: usize = 400;
/// Right panels of a task at most: 160 KiB of a core's L2 cache.
const TASK_PANELS: usize = 4;
/// Left panels that go through a task's right panels in turn: 240 KiB of the L2 cache.
const GROUP_PANELS: usize = 16;
/// Values of a vector of 512 bits.
const ALIGN: usize = 16;

/// out \[m, n\] (+)= alpha · a · bᵀ with sums over k values: `a` has m outer indices, `b` n.
pub(crate) struct Product<'a> {
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    /// m, n and k.
    pub dims: [usize; 3],
    pub alpha: f32,
    /// Whether the product is added to what is in `out`.
    pub add: bool,
    pub level: Level,
}

impl Product<'_> {
    /// Computes on the current thread pool. `out` holds m rows of n values, `stride` apart.
    ///
    /// # Panics
    /// When the operands or `out` hold less than `dims` says; callers check.
    pub(crate) fn run(&self, device: &Device, out: &mut [f32], stride: usize) {
        let [m, n, k] = self.dims;
        if m == 0 || n == 0 {
            return;
        }
        assert!(n <= stride && (m - 1) * stride + n <= out.len());
        if k == 0 {
            if !self.add {
                out.chunks_mut(stride).for_each(|row| row[..n].fill(0.0));
            }
            return;
        }
        let pairs = k.div_ceil(2);
        let pairs = pairs.div_ceil(pairs.div_ceil(PAIRS));
        let left_panels = m.div_ceil(ROWS);
        let mut left = Panels::<ROWS>::new(device, left_panels * pairs);
        let tasks = tasks(left_panels, n.div_ceil(COLS), device.threads());
        let out = SharedOut {
            first: out.as_mut_ptr(),
            stride,
        };
        for from in (0..k).step_by(2 * pairs) {
            let block = (from, k.min(from + 2 * pairs));
            left.pairs()
                .par_chunks_mut(pairs)
                .with_min_len(4)
                .enumerate()
                .for_each(|(i, panel)| self.a.pack(self.level, panel, (i * ROWS, m), block));
            let left: &[_] = left.pairs();
            tasks.par_iter().with_max_len(1).for_each(|task| {
                let mut right = Panels::<COLS>::new(device, TASK_PANELS * pairs);
                let right = &mut right.pairs()[..task.right.len() * pairs];
                for (panel, j) in right.chunks_mut(pairs).zip(task.right.clone()) {
                    self.b.pack(self.level, panel, (j * COLS, n), block);
                }
                self.tiles(task, left, right, pairs, (self.add || from > 0, &out));
            });
        }
    }

    /// A task's tiles for one block of the reduction.
    fn tiles(
        &self,
        task: &Task,
        left: &[[u32; ROWS]],
        right: &[[u32; COLS]],
        pairs: usize,
        (add, out): (bool, &SharedOut),
    ) {
        let [m, n, _] = self.dims;
        let mut tile: Tile = [[0.0; COLS]; ROWS];
        for group in task.left.clone().step_by(GROUP_PANELS) {
            for (j, right) in task.right.clone().zip(right.chunks_exact(pairs)) {
                for i in group..task.left.end.min(group + GROUP_PANELS) {
                    let left = &left[i * pairs..][..pairs];
                    tile::multiply(self.level, left, right, &mut tile);
                    let (row, col) = (i * ROWS, j * COLS);
                    let block = Block {
                        // SAFETY: row < m and col < n, which `run` has checked to lie within.
                        first: unsafe { out.first.add(row * out.stride + col) },
                        stride: out.stride,
                        rows: ROWS.min(m - row),
                        cols: COLS.min(n - col),
                    };
                    // SAFETY: the block lies within the output, and no other task has it.
                    vectorized!(unsafe { block.write(&tile, self.alpha, add) });
                }
            }
        }
    }
}

/// An output that tasks write disjoint blocks of.
struct SharedOut {
    first: *mut f32,
    stride: usize,
}

// SAFETY: tasks reach the data by way of blocks alone, of which no two overlap.
unsafe impl Sync for SharedOut {}

/// Some rows and columns of an output.
struct Block {
    first: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
}

impl Block {
    /// Writes or adds the tile's sums.
    ///
    /// # Safety
    /// The block lies within the output, and nobody else reads or writes it meanwhile.
    #[inline(always)]
    unsafe fn write(&self, tile: &Tile, alpha: f32, add: bool) {
        for (r, sums) in tile.iter().enumerate().take(self.rows) {
            // SAFETY: the caller's promise.
            let row = unsafe {
                std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.cols)
            };
            // The whole width is a case of its own so that its loops have no remainder.
            match <&mut [f32; COLS]>::try_from(&mut *row) {
                Ok(row) => write_row(row, sums, alpha, add),
                Err(_) => write_row(row, sums, alpha, add),
            }
        }
    }
}

#[inline(always)]
fn write_row(row: &mut [f32], sums: &[f32; COLS], alpha: f32, add: bool) {
    if add {
        for (out, sum) in row.iter_mut().zip(sums) {
            *out += alpha * sum;
        }
    } else {
        for (out, sum) in row.iter_mut().zip(sums) {
            *out = alpha * sum;
        }
    }
}

/// The left and right panels whose tiles one task computes.
struct Task {
    left: Range<usize>,
    right: Range<usize>,
}

/// Cuts the panels into tasks: columns first, since each task packs its own right panels, and
/// rows where the columns alone would leave threads idle.
fn tasks(left: usize, right: usize, threads: usize) -> Vec<Task> {
    let wanted = 4 * threads;
    let cols = right.div_ceil(wanted).clamp(1, TASK_PANELS);
    let row_blocks = wanted
        .div_ceil(right.div_ceil(cols))
        .min(left.div_ceil(GROUP_PANELS));
    let rows = left.div_ceil(row_blocks.max(1));
    let ranges = |n: usize, step: usize| (0..n).step_by(step).map(move |i| i..n.min(i + step));
    ranges(right, cols)
        .flat_map(|right| {
            ranges(left, rows).map(move |left| Task {
                left,
                right: right.clone(),
            })
        })
        .collect()
}

/// An operand packed whole, for a use of the product tile by tile.
pub(crate) struct Packed<const P: usize> {
    panels: Panels<P>,
    /// Pairs of the reduction in a panel.
    pairs: usize,
}

impl<const P: usize> Packed<P> {
    /// `outer` indices of `k` values, at least one each.
    pub(crate) fn new(device: &Device, operand: &Operand, outer: usize, k: usize) -> Self {
        let mut packed = Self::empty(device, outer, k);
        let panels = packed.panels.pairs().chunks_mut(packed.pairs);
        for (i, panel) in panels.enumerate() {
            operand.pack(Level::best(), panel, (i * P, outer), (0, k));
        }
        packed
    }

    /// The same by all threads of the current pool.
    pub(crate) fn in_parallel(device: &Device, operand: &Operand, outer: usize, k: usize) -> Self {
        let mut packed = Self::empty(device, outer, k);
        let panels = packed.panels.pairs().par_chunks_mut(packed.pairs);
        panels.enumerate().for_each(|(i, panel)| {
            operand.pack(Level::best(), panel, (i * P, outer), (0, k));
        });
        packed
    }

    fn empty(device: &Device, outer: usize, k: usize) -> Self {
        let pairs = k.div_ceil(2);
        let panels = Panels::new(device, outer.div_ceil(P) * pairs);
        Self { panels, pairs }
    }
}

impl Packed<COLS> {
    /// Calls `use_tile` with the first row, the first column and the sums of each tile of
    /// left · selfᵀ; what lies beyond the operands is zero. Columns ascend.
    pub(crate) fn for_each_tile<E>(
        &self,
        left: &Packed<ROWS>,
        mut use_tile: impl FnMut(usize, usize, &Tile) -> Result<(), E>,
    ) -> Result<(), E> {
        let level = Level::best();
        let mut tile: Tile = [[0.0; COLS]; ROWS];
        for (j, right) in self.panels.chunks(self.pairs).enumerate() {
            for (i, left) in left.panels.chunks(left.pairs).enumerate() {
                tile::multiply(level, left, right, &mut tile);
                use_tile(i * ROWS, j * COLS, &tile)?;
            }
        }
        Ok(())
    }
}

/// Memory for packed panels of `P` outer indices, aligned to the vectors that read it.
struct Panels<const P: usize> {
    memory: Buffer,
    skip: usize,
    pairs: usize,
}

impl<const P: usize> Panels<P> {
    fn new(device: &Device, pairs: usize) -> Self {
        let memory = device.buffer(pairs * P + ALIGN);
        let skip = memory.as_ptr().align_offset(ALIGN * size_of::<f32>());
        Self {
            memory,
            skip: skip.min(ALIGN),
            pairs,
        }
    }

    /// Panels of `pairs` pairs each.
    fn chunks(&self, pairs: usize) -> impl Iterator<Item = &[[u32; P]]> {
        let words = &self.memory[self.skip..][..self.pairs * P];
        let words = bytemuck::cast_slice::<f32, u32>(words).as_chunks().0;
        words.chunks(pairs)
    }

    fn pairs(&mut self) -> &mut [[u32; P]] {
        let words = &mut self.memory[self.skip..][..self.pairs * P];
        bytemuck::cast_slice_mut::<f32, u32>(words)
            .as_chunks_mut()
            .0
    }
}

#[cfg(test)]
mod tests;
