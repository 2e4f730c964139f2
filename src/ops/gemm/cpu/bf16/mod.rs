//! Products of bf16 values with sums in f32.
//!
//! Operands are packed by all threads: the left one (activations) once for a product, the right
//! one (a weight, stored as its file has it) some columns at a time. Packing costs a few
//! hundredths of a nanosecond a value, which some hundred rows of the other side pay for, and so
//! a weight exists once in memory whatever way round it is used. A sum runs over the reduction in
//! order, block by block, whatever the tasks are: results do not depend on the number of threads,
//! nor on how many other rows are computed along.

mod output;
mod pack;
mod tile;
mod widened;

use std::ops::Range;
use std::slice::ChunksExact;

use rayon::prelude::*;

pub(crate) use pack::{Operand, Side, Values};
pub(crate) use tile::{COLS, Level, ROWS, Tile};

use super::{Kept, Start};
use crate::device::Device;
use crate::tensor::Buffer;
use output::{Output, finish_streams};
use tile::{Multiplier, PAIRS, Step};

/// Most steps of the reduction that are packed at a time.
const STEPS: usize = 48;
/// Most steps of a right panel that all left panels of a task go by in turn: 20 KiB.
const PART: usize = 10;
/// Bytes of the left panels of a task, which stay in a core's L2 cache while the right ones go by.
const LEFT_BYTES: usize = 768 << 10;
/// Bytes of right panels that are packed at a time: they are used from the caches.
const RIGHT_BYTES: usize = 4 << 20;

/// out \[m, n\] = start + alpha · (a · bᵀ + low rank) with sums over k values: `a` has m outer
/// indices, `b` n.
pub(crate) struct Product<'a> {
    pub a: Operand<'a>,
    /// The same as [`packed`] gives it, where that has been done.
    pub packed: Option<&'a [Panels]>,
    pub b: Operand<'a>,
    /// Left out where k is 0: it is made of the same values.
    pub low_rank: Option<LowRank<'a>>,
    /// m, n and k.
    pub dims: [usize; 3],
    pub alpha: f32,
    pub start: Start<'a>,
    pub level: Level,
}

/// a · bᵀ with sums over `rank` values, which are few; zero or scaled where dropout has been at it.
pub(crate) struct LowRank<'a> {
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    pub rank: usize,
    pub kept: Option<Kept<'a>>,
}

/// A left operand of `rows` outer indices and a reduction of k values, packed for products with any
/// number of right ones.
pub(crate) fn packed(device: &Device, operand: &Operand, [rows, k]: [usize; 2]) -> Vec<Panels> {
    let side = (operand, Side::Left);
    blocks(k)
        .map(|block| Panels::in_parallel(device, Level::best(), side, 0..rows, block))
        .collect()
}

/// The blocks of a reduction of k values that are packed at a time.
fn blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let steps = k.div_ceil(2 * PAIRS);
    let steps = steps.div_ceil(steps.div_ceil(STEPS).max(1)).max(1);
    let len = 2 * PAIRS * steps;
    (0..k).step_by(len).map(move |from| from..k.min(from + len))
}

/// The panels of both sides for one block of the reduction, and of a low-rank product that is
/// computed along with it.
struct Block<'a> {
    left: &'a Panels,
    right: Panels,
    low_rank: Option<(&'a Panels, Panels)>,
    /// What dropout kept of the low-rank product.
    kept: Option<Kept<'a>>,
}

impl Product<'_> {
    /// Computes on the current thread pool. `out` holds m rows of n values, `stride` apart.
    ///
    /// # Panics
    /// When the operands, the start or `out` hold less than `dims` says; callers check.
    pub(crate) fn run(&self, device: &Device, out: &mut [f32], stride: usize) {
        let [m, n, k] = self.dims;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            // The sums have no terms.
            return self.start.write(out, n, stride);
        }
        let pack = |operand: &Operand, side, outer, block| {
            Panels::in_parallel(device, self.level, (operand, side), outer, block)
        };
        for (i, block) in blocks(k).enumerate() {
            let own = match self.packed {
                Some(_) => None,
                None => Some(pack(&self.a, Side::Left, 0..m, block.clone())),
            };
            let Some(left) = own.as_ref().or_else(|| self.packed?.get(i)) else {
                unreachable!("as many blocks are packed as there are")
            };
            let low_rank = self.low_rank.as_ref().filter(|l| i == 0 && l.rank > 0);
            let low_rank = low_rank.map(|low_rank| {
                let left = pack(&low_rank.a, Side::Left, 0..m, 0..low_rank.rank);
                (low_rank, left)
            });
            let start = if i == 0 { self.start } else { Start::Output };
            let out = Output::new(out, start, [m, n, stride], self.alpha, self.level);
            let panel_bytes = left.steps * size_of::<Step>();
            let right_panels = (RIGHT_BYTES / panel_bytes).max(1);
            for col in (0..n).step_by(right_panels * COLS) {
                let cols = col..n.min(col + right_panels * COLS);
                let block = Block {
                    left,
                    right: pack(&self.b, Side::Right, cols.clone(), block.clone()),
                    low_rank: low_rank.as_ref().map(|(low_rank, left)| {
                        let rank = 0..low_rank.rank;
                        (left, pack(&low_rank.b, Side::Right, cols, rank))
                    }),
                    kept: low_rank.as_ref().and_then(|(low_rank, _)| low_rank.kept),
                };
                let most = (LEFT_BYTES / panel_bytes).max(1);
                tasks(left.len(), block.right.len(), most, device.threads())
                    .par_iter()
                    .with_max_len(1)
                    .for_each(|task| self.tiles(task, &block, col, &out));
            }
        }
    }

    /// A task's tiles for one block of the reduction. The first of the right panels has column
    /// `first_col`.
    fn tiles(&self, task: &Task, block: &Block, first_col: usize, out: &Output) {
        let [m, n, _] = self.dims;
        let first_row = task.left.start * ROWS;
        let rows = m - first_row;
        let left = block.left.range(task.left.clone());
        let mut tiles = vec![Tile::ZERO; left.len()];
        let mut multiplier = Multiplier::new(self.level);
        for j in task.right.clone() {
            let place = |i| (first_row + i * ROWS, first_col + j * COLS);
            if let Some((left, right)) = &block.low_rank {
                let panels = (left.range(task.left.clone()), right.panel(j));
                multiply(&mut multiplier, panels, rows, &mut tiles, false, |_| ());
            }
            if let Some(kept) = &block.kept {
                for (i, tile) in tiles.iter_mut().enumerate() {
                    kept.drop_tile(tile, place(i), [m, n]);
                }
            }
            let panels = (left.clone(), block.right.panel(j));
            let add = block.low_rank.is_some();
            multiply(&mut multiplier, panels, rows, &mut tiles, add, |i| {
                out.prefetch(place(i))
            });
            for (i, tile) in tiles.iter().enumerate() {
                // SAFETY: no other task has this tile.
                unsafe { out.write(tile, place(i)) };
            }
        }
        finish_streams();
    }
}

/// Sets the tiles to the products of left panels, of which `rows` rows are used, with a right one,
/// or adds these: part by part of the reduction, so that the part of the right panel stays in the
/// L1 cache, or widened in L2. `before_last` is called with the index of each tile before its last
/// part.
fn multiply<'r>(
    multiplier: &mut Multiplier<'r>,
    (left, right): (ChunksExact<Step>, &'r [Step]),
    rows: usize,
    tiles: &mut [Tile],
    add: bool,
    before_last: impl Fn(usize),
) {
    let part = right.len().div_ceil(right.len().div_ceil(PART));
    for from in (0..right.len()).step_by(part) {
        let part = from..right.len().min(from + part);
        let last = part.end == right.len();
        multiplier.set_right(&right[part.clone()]);
        for ((i, left), tile) in left.clone().enumerate().zip(&mut *tiles) {
            if last {
                before_last(i);
            }
            let rows = ROWS.min(rows - i * ROWS);
            multiplier.multiply(&left[part.clone()], tile, rows, add || from > 0);
        }
    }
}

/// The left and right panels whose tiles one task computes.
struct Task {
    left: Range<usize>,
    right: Range<usize>,
}

/// Cuts the panels into tasks of at most `most` left panels, so many for each thread that a core
/// which other work slows down does not hold up the rest for long. Those that share left panels are
/// neighbours.
fn tasks(left: usize, right: usize, most: usize, threads: usize) -> Vec<Task> {
    let wanted = 12 * threads;
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

/// Some panels, and some steps of each.
pub(crate) struct Part<'a> {
    panels: &'a Panels,
    which: Range<usize>,
    steps: Range<usize>,
}

/// An operand's panels for some of its outer indices and a block of the reduction.
pub(crate) struct Panels {
    memory: Buffer,
    /// Panels that are packed.
    count: usize,
    /// Steps of a panel.
    steps: usize,
}

impl Panels {
    /// Packs on this thread.
    pub(crate) fn new(
        device: &Device,
        level: Level,
        operand: (&Operand, Side),
        outer: Range<usize>,
        reduction: Range<usize>,
    ) -> Self {
        let mut panels = Self::with_capacity(device, outer.len(), reduction.len());
        panels.pack(level, operand, outer, reduction);
        panels
    }

    /// Memory for panels of so many outer indices and a reduction of that length; none is packed.
    pub(crate) fn with_capacity(device: &Device, outer: usize, reduction: usize) -> Self {
        let steps = outer.div_ceil(ROWS) * reduction.div_ceil(2 * PAIRS);
        Self {
            memory: device.buffer(steps * size_of::<Step>() / size_of::<f32>()),
            count: 0,
            steps: 0,
        }
    }

    /// Packs on this thread, in place of what was there.
    ///
    /// # Panics
    /// When the panels have more steps than there is memory for.
    pub(crate) fn pack(
        &mut self,
        level: Level,
        (operand, side): (&Operand, Side),
        outer: Range<usize>,
        reduction: Range<usize>,
    ) {
        let (steps, panels) = self.lay_out(&outer, &reduction);
        let reduction = (reduction.start, reduction.end);
        for (i, panel) in panels.chunks_mut(steps).enumerate() {
            let outer = (outer.start + i * ROWS, outer.end);
            operand.pack(level, side, panel, outer, reduction);
        }
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
        let mut packed = Self::with_capacity(device, outer.len(), reduction.len());
        let (steps, panels) = packed.lay_out(&outer, &reduction);
        let least = (LEAST / reduction.len()).div_ceil(ROWS).max(1);
        let reduction = (reduction.start, reduction.end);
        panels
            .par_chunks_mut(steps)
            .with_min_len(least)
            .enumerate()
            .for_each(|(i, panel)| {
                let outer = (outer.start + i * ROWS, outer.end);
                operand.pack(level, side, panel, outer, reduction);
            });
        packed
    }

    /// Panels to be packed, and the steps of one.
    fn lay_out(&mut self, outer: &Range<usize>, reduction: &Range<usize>) -> (usize, &mut [Step]) {
        self.count = outer.len().div_ceil(ROWS);
        self.steps = reduction.len().div_ceil(2 * PAIRS);
        let steps = self.count * self.steps;
        (
            self.steps,
            &mut bytemuck::cast_slice_mut(&mut self.memory)[..steps],
        )
    }

    fn len(&self) -> usize {
        self.count
    }

    fn range(&self, panels: Range<usize>) -> ChunksExact<'_, Step> {
        let steps = panels.start * self.steps..panels.end * self.steps;
        self.steps()[steps].chunks_exact(self.steps)
    }

    fn panel(&self, i: usize) -> &[Step] {
        &self.steps()[i * self.steps..][..self.steps]
    }

    fn steps(&self) -> &[Step] {
        bytemuck::cast_slice(&self.memory)
    }

    /// The panels of these outer indices, with these indices of the reduction, both counted from
    /// the first that is packed. Each range begins with a panel or a step.
    pub(crate) fn part(&self, outer: &Range<usize>, reduction: &Range<usize>) -> Part<'_> {
        assert!(outer.start.is_multiple_of(ROWS) && reduction.start.is_multiple_of(2 * PAIRS));
        Part {
            panels: self,
            which: outer.start / ROWS..outer.end.div_ceil(ROWS),
            steps: reduction.start / (2 * PAIRS)..reduction.end.div_ceil(2 * PAIRS),
        }
    }

    /// out \[m, n\] (+)= alpha · self · rightᵀ on this thread. `out` holds m rows of n values,
    /// `stride` apart. The right side may go on beyond the reduction where the left one is zero.
    ///
    /// # Panics
    /// When the panels hold more than that or another reduction, or `out` less.
    pub(crate) fn multiply(
        &self,
        level: Level,
        right: Part<'_>,
        (out, [m, n, stride]): (&mut [f32], [usize; 3]),
        alpha: f32,
        add: bool,
    ) {
        let start = if add { Start::Output } else { Start::Zero };
        let out = Output::new(out, start, [m, n, stride], alpha, level);
        let mut tile = Tile::ZERO;
        let mut multiplier = Multiplier::new(level);
        for (j, panel) in right.which.enumerate() {
            multiplier.set_right(&right.panels.panel(panel)[right.steps.clone()]);
            for (i, left) in self.range(0..self.len()).enumerate() {
                let place = (i * ROWS, j * COLS);
                multiplier.multiply(left, &mut tile, m - i * ROWS, false);
                // SAFETY: `out` is borrowed for this product, and this thread alone writes to it.
                unsafe { out.write(&tile, place) };
            }
        }
        finish_streams();
    }

    /// Calls `use_tile` with the first row, the first column and the sums of each tile of
    /// self · rightᵀ; what lies beyond the operands is zero. Columns ascend.
    pub(crate) fn for_each_tile<E>(
        &self,
        level: Level,
        right: &Panels,
        mut use_tile: impl FnMut(usize, usize, &Tile) -> Result<(), E>,
    ) -> Result<(), E> {
        let left = self.range(0..self.len());
        let rows = self.len() * ROWS;
        let mut tiles = vec![Tile::ZERO; left.len()];
        let mut multiplier = Multiplier::new(level);
        for j in 0..right.len() {
            let panels = (left.clone(), right.panel(j));
            multiply(&mut multiplier, panels, rows, &mut tiles, false, |_| ());
            for (i, tile) in tiles.iter().enumerate() {
                use_tile(i * ROWS, j * COLS, tile)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
