//! Products of bf16 values with sums in f32.
//!
//! Operands are packed by all threads: the left one (activations) once for a product, the right
//! one (a weight, stored as its file has it) some columns at a time. Packing costs a few
//! hundredths of a nanosecond a value, which some hundred rows of the other side pay for, and so
//! a weight exists once in memory whatever way round it is used. A sum runs over the reduction in
//! order, block by block, whatever the tasks are: results do not depend on the number of threads,
//! nor on how many other rows are computed along.

mod pack;
mod tile;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::ops::Range;

use rayon::prelude::*;

pub(crate) use pack::{Operand, Side, Values};
pub(crate) use tile::{COLS, Level, ROWS, Tile};

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::tensor::Buffer;
use tile::{Multiplier, PAIRS, Step, Sums};

/// Most steps of the reduction that are packed at a time.
const STEPS: usize = 48;
/// Bytes of the left panels of a task, which stay in a core's L2 cache while the right ones go by.
const LEFT_BYTES: usize = 1 << 20;
/// Bytes of right panels that are packed at a time: they are used from the caches.
const RIGHT_BYTES: usize = 4 << 20;
/// Values of a vector of 512 bits.
const VECTOR: usize = 16;

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
        let steps = k.div_ceil(2 * PAIRS);
        let steps = steps.div_ceil(steps.div_ceil(STEPS));
        let panel_bytes = steps * size_of::<Step>();
        let right_panels = (RIGHT_BYTES / panel_bytes).max(1);
        let out = SharedOut {
            first: out.as_mut_ptr(),
            stride,
        };
        for from in (0..k).step_by(2 * PAIRS * steps) {
            let block = from..k.min(from + 2 * PAIRS * steps);
            let add = self.add || from > 0;
            let pack = |operand: &Operand, side, outer| {
                Panels::in_parallel(device, self.level, (operand, side), outer, block.clone())
            };
            let left = pack(&self.a, Side::Left, 0..m);
            for col in (0..n).step_by(right_panels * COLS) {
                let cols = col..n.min(col + right_panels * COLS);
                let right = pack(&self.b, Side::Right, cols);
                let most = (LEFT_BYTES / panel_bytes).max(1);
                tasks(left.len(), right.len(), most, device.threads())
                    .par_iter()
                    .with_max_len(1)
                    .for_each(|task| self.tiles(task, &left, &right, (col, add), &out));
            }
        }
    }

    /// A task's tiles for one block of the reduction. The first of the right panels has column
    /// `first_col`.
    fn tiles(
        &self,
        task: &Task,
        left: &Panels,
        right: &Panels,
        (first_col, add): (usize, bool),
        out: &SharedOut,
    ) {
        let [m, n, _] = self.dims;
        let multiplier = Multiplier::new(self.level);
        let mut tile = Tile::ZERO;
        for j in task.right.clone() {
            for i in task.left.clone() {
                let (row, col) = (i * ROWS, first_col + j * COLS);
                let block = Block {
                    // SAFETY: row < m and col < n, which `run` has checked to lie within.
                    first: unsafe { out.first.add(row * out.stride + col) },
                    stride: out.stride,
                    rows: ROWS.min(m - row),
                    cols: COLS.min(n - col),
                };
                let (left, right) = (left.panel(i), right.panel(j));
                block.prefetch();
                // SAFETY: the block lies within the output, no other task has it, and a tile's
                // rows are all there, as are those of a whole block.
                unsafe {
                    if self.alpha != 1.0 {
                        multiplier.add(left, right, Sums::from(&mut tile), block.rows, false);
                        vectorized!(block.write(&tile, |out, sum| match add {
                            true => *out += self.alpha * sum,
                            false => *out = self.alpha * sum,
                        }));
                    } else if block.rows == ROWS && block.cols == COLS {
                        multiplier.add(left, right, block.sums(), ROWS, add);
                    } else {
                        if add {
                            block.read(&mut tile);
                        }
                        multiplier.add(left, right, Sums::from(&mut tile), block.rows, add);
                        vectorized!(block.write(&tile, |out, sum| *out = sum));
                    }
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
    /// Has the block brought into the cache while its sums are computed: products whose output
    /// is larger than the cache spent a fifth of their time waiting for it.
    #[inline(always)]
    fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        for r in 0..self.rows {
            for col in (0..self.cols).step_by(VECTOR) {
                let address = self.first.wrapping_add(r * self.stride + col);
                // SAFETY: a prefetch reads nothing, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(address as *const i8) };
            }
        }
    }

    fn sums(&self) -> Sums {
        Sums {
            first: self.first,
            stride: self.stride,
        }
    }

    /// Copies the block into a tile.
    ///
    /// # Safety
    /// The block lies within the output, and nobody else writes it meanwhile.
    unsafe fn read(&self, tile: &mut Tile) {
        for (r, sums) in tile.0.iter_mut().enumerate().take(self.rows) {
            // SAFETY: the caller's promise.
            let row =
                unsafe { std::slice::from_raw_parts(self.first.add(r * self.stride), self.cols) };
            sums[..self.cols].copy_from_slice(row);
        }
    }

    /// Calls `write` with the values of the block and the tile's sums.
    ///
    /// # Safety
    /// The block lies within the output, and nobody else reads or writes it meanwhile.
    #[inline(always)]
    unsafe fn write(&self, tile: &Tile, write: impl Fn(&mut f32, f32)) {
        for (r, sums) in tile.0.iter().enumerate().take(self.rows) {
            // SAFETY: the caller's promise.
            let row = unsafe {
                std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.cols)
            };
            // The whole width is a case of its own so that its loop has no remainder.
            match <&mut [f32; COLS]>::try_from(&mut *row) {
                Ok(row) => (0..COLS).for_each(|i| write(&mut row[i], sums[i])),
                Err(_) => row
                    .iter_mut()
                    .zip(sums)
                    .for_each(|(out, &sum)| write(out, sum)),
            }
        }
    }
}

/// The left and right panels whose tiles one task computes.
struct Task {
    left: Range<usize>,
    right: Range<usize>,
}

/// Cuts the panels into tasks of at most `most` left panels, several for each thread. Those that
/// share left panels are neighbours.
fn tasks(left: usize, right: usize, most: usize, threads: usize) -> Vec<Task> {
    let wanted = 4 * threads;
    let rows = left.div_ceil(left.div_ceil(most));
    let row_blocks = left.div_ceil(rows);
    let cols = right.div_ceil(wanted.div_ceil(row_blocks).min(right));
    let ranges = |n: usize, step: usize| (0..n).step_by(step).map(move |i| i..n.min(i + step));
    ranges(left, rows)
        .flat_map(|left| {
            ranges(right, cols).map(move |right| Task {
                left: left.clone(),
                right,
            })
        })
        .collect()
}

/// An operand's panels for some of its outer indices and a block of the reduction.
pub(crate) struct Panels {
    memory: Buffer,
    /// Steps of a panel.
    steps: usize,
}

impl Panels {
    /// Packs on this thread.
    pub(crate) fn new(
        device: &Device,
        level: Level,
        (operand, side): (&Operand, Side),
        outer: Range<usize>,
        reduction: Range<usize>,
    ) -> Self {
        let mut panels = Self::empty(device, &outer, &reduction);
        let reduction = (reduction.start, reduction.end);
        let steps = panels.steps;
        for (i, panel) in panels.steps_mut().chunks_mut(steps).enumerate() {
            let outer = (outer.start + i * ROWS, outer.end);
            operand.pack(level, side, panel, outer, reduction);
        }
        panels
    }

    /// Packs on all threads of the current pool.
    pub(crate) fn in_parallel(
        device: &Device,
        level: Level,
        (operand, side): (&Operand, Side),
        outer: Range<usize>,
        reduction: Range<usize>,
    ) -> Self {
        // So many values are packed in a fraction of the time that it takes to wake a thread.
        const LEAST: usize = 1 << 14;
        let mut panels = Self::empty(device, &outer, &reduction);
        let least = (LEAST / reduction.len()).div_ceil(ROWS).max(1);
        let reduction = (reduction.start, reduction.end);
        let steps = panels.steps;
        panels
            .steps_mut()
            .par_chunks_mut(steps)
            .with_min_len(least)
            .enumerate()
            .for_each(|(i, panel)| {
                let outer = (outer.start + i * ROWS, outer.end);
                operand.pack(level, side, panel, outer, reduction);
            });
        panels
    }

    fn empty(device: &Device, outer: &Range<usize>, reduction: &Range<usize>) -> Self {
        let steps = reduction.len().div_ceil(2 * PAIRS);
        let words = outer.len().div_ceil(ROWS) * steps * size_of::<Step>() / size_of::<f32>();
        Self {
            memory: device.buffer(words),
            steps,
        }
    }

    fn len(&self) -> usize {
        self.steps().len() / self.steps
    }

    fn panel(&self, i: usize) -> &[Step] {
        &self.steps()[i * self.steps..][..self.steps]
    }

    fn steps(&self) -> &[Step] {
        bytemuck::cast_slice(&self.memory)
    }

    fn steps_mut(&mut self) -> &mut [Step] {
        bytemuck::cast_slice_mut(&mut self.memory)
    }

    /// Calls `use_tile` with the first row, the first column and the sums of each tile of
    /// self · rightᵀ; what lies beyond the operands is zero. Columns ascend.
    pub(crate) fn for_each_tile<E>(
        &self,
        level: Level,
        right: &Panels,
        mut use_tile: impl FnMut(usize, usize, &Tile) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut tiles = vec![Tile::ZERO; self.len()];
        for j in 0..right.len() {
            let multiplier = Multiplier::new(level);
            for (i, tile) in tiles.iter_mut().enumerate() {
                // SAFETY: the whole tile is there, and ours.
                unsafe {
                    multiplier.add(self.panel(i), right.panel(j), Sums::from(tile), ROWS, false);
                }
            }
            drop(multiplier);
            for (i, tile) in tiles.iter().enumerate() {
                use_tile(i * ROWS, j * COLS, tile)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
