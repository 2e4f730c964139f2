//! Products of bf16 values with sums in f32.
//!
//! Operands are packed by all threads: the activations once for a product or for several, the
//! weights, stored as their file has them, some columns at a time, and so a weight exists once in
//! memory whatever way round it is used. Rows of bf16 that run along the reduction already lie as a
//! left operand is read, and nothing of it is packed; with a weight's (X Wᵀ) the product is made as
//! that of the transpose, W Xᵀ. A sum runs over the reduction in order, block by block, whatever the
//! tasks are and whichever side is left: results do not depend on the number of threads, nor on how
//! many other rows are computed along.

mod left;
mod output;
mod pack;
mod panels;
mod tile;
mod widened;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use output::copy_transposed;
pub(crate) use pack::{Operand, Side, Values};
pub(crate) use panels::{Packed, Panels};
pub(crate) use tile::{COLS, Level, Multiplier, ROWS, Tile};

use super::{Kept, Start};
use crate::device::Device;
use left::{LeftPanels, Lines};
use output::{Output, finish_streams};
use tile::{PAIRS, Step};

/// Most steps of the reduction that are packed at a time.
const STEPS: usize = 48;
/// Bytes of the panels of a task that stay in a core's L2 cache while those of the other side go by.
const HELD_BYTES: usize = 768 << 10;
/// Bytes of the second operand's panels that are packed at a time: they are used from the caches.
const PACKED_BYTES: usize = 4 << 20;

/// out \[m, n\] = start + alpha · (a · bᵀ + low rank) with sums over k values: `a` has m outer
/// indices, `b` n.
pub(crate) struct Product<'a> {
    pub a: Operand<'a>,
    /// The same packed, where that has been done.
    pub packed: Option<&'a Packed>,
    pub b: Operand<'a>,
    /// As for `a`.
    pub packed_b: Option<&'a Packed>,
    /// Left out where k is 0: it is made of the same values.
    pub low_rank: Option<LowRank<'a>>,
    /// m, n and k.
    pub dims: [usize; 3],
    pub alpha: f32,
    pub start: Start<'a>,
    /// Whether tiles are those of the transpose, b · aᵀ.
    pub turned: bool,
    pub level: Level,
}

/// a · bᵀ with sums over `rank` values, which are few; zero or scaled where dropout has been at it.
pub(crate) struct LowRank<'a> {
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    pub rank: usize,
    pub kept: Option<Kept<'a>>,
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
    left: LeftPanels<'a>,
    right: &'a Panels,
    low_rank: Option<(LeftPanels<'a>, &'a Panels)>,
    /// What dropout kept of the low-rank product.
    kept: Option<Kept<'a>>,
    /// Whether the left ones come from memory when they are first used.
    in_place: bool,
    /// Row and column of the product that the first tile begins at.
    first: (usize, usize),
}

impl Product<'_> {
    /// Computes on the current thread pool. `out` holds m rows of n values, `stride` apart.
    ///
    /// # Panics
    /// When the operands, the start or `out` hold less than `dims` says, or dropout came to the
    /// low-rank part of a product that is `turned`; callers check.
    pub(crate) fn run(&self, device: &Device, out: &mut [f32], stride: usize) {
        let [m, n, k] = self.dims;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            // The sums have no terms.
            return self.start.write(out, n, stride);
        }
        let (side_a, side_b) = match self.turned {
            false => (Side::Left, Side::Right),
            true => (Side::Right, Side::Left),
        };
        let pack = |operand: &Operand, side, outer, block| {
            Panels::in_parallel(device, self.level, (operand, side), outer, block)
        };
        for (i, block) in blocks(k).enumerate() {
            let [a_in_place, b_in_place] = [(&self.a, side_a, m), (&self.b, side_b, n)]
                .map(|(operand, side, outer)| operand.in_place(side, outer, block.clone()));
            let [packed_a, packed_b] = [(self.packed, side_a), (self.packed_b, side_b)]
                .map(|(packed, side)| packed.and_then(|packed| packed.block(side, i)));
            let own;
            let a = match a_in_place.or(packed_a.map(|a| a.on(side_a))) {
                Some(a) => a,
                None => {
                    own = pack(&self.a, side_a, 0..m, block.clone());
                    own.on(side_a)
                }
            };
            let low_rank = self.low_rank.as_ref().filter(|l| i == 0 && l.rank > 0);
            let low_rank = low_rank.map(|l| (l, pack(&l.a, side_a, 0..m, 0..l.rank)));
            let kept = low_rank.as_ref().and_then(|(l, _)| l.kept);
            let start = if i == 0 { self.start } else { Start::Output };
            let out = Output::new(
                out,
                start,
                [m, n, stride],
                self.alpha,
                self.turned,
                self.level,
            );
            let panel_bytes = block.len().div_ceil(2 * PAIRS) * size_of::<Step>();
            let ready = b_in_place.or(packed_b.map(|b| b.on(side_b)));
            let at_a_time = match ready {
                Some(_) => n,
                None => (PACKED_BYTES / panel_bytes).max(1) * COLS,
            };
            for from in (0..n).step_by(at_a_time) {
                let outer = from..n.min(from + at_a_time);
                let pack = |operand: &Operand, block| pack(operand, side_b, outer.clone(), block);
                let low_rank = low_rank.as_ref().map(|(l, a)| (a, pack(&l.b, 0..l.rank)));
                let own;
                let b = match ready {
                    Some(b) => b,
                    None => {
                        own = pack(&self.b, block.clone());
                        own.on(side_b)
                    }
                };
                let (left, right) = sides(a, b);
                let block = Block {
                    left,
                    right,
                    low_rank: low_rank
                        .as_ref()
                        .map(|(a, b)| sides(a.on(side_a), b.on(side_b))),
                    kept,
                    in_place: a_in_place.or(b_in_place).is_some(),
                    first: if self.turned { (from, 0) } else { (0, from) },
                };
                self.tasks([left.len(), right.len()], panel_bytes, device.threads())
                    .par_iter()
                    .with_max_len(1)
                    .for_each(|task| self.tiles(task, &block, &out));
            }
        }
    }

    /// Cuts the panels of the two sides, of so many bytes each, into tasks.
    fn tasks(&self, [left, right]: [usize; 2], bytes: usize, threads: usize) -> Vec<Task> {
        let most = (HELD_BYTES / bytes).max(1);
        let ranges = |n: usize, step: usize| (0..n).step_by(step).map(move |i| i..n.min(i + step));
        let cut = |held, other| {
            let [held_step, other_step] = task_sides([held, other], most, threads);
            // Those that share what is held are neighbours.
            ranges(held, held_step).flat_map(move |held| {
                ranges(other, other_step).map(move |other| (held.clone(), other))
            })
        };
        match self.level.streams_left() {
            true => cut(right, left)
                .map(|(right, left)| Task { left, right })
                .collect(),
            false => cut(left, right)
                .map(|(left, right)| Task { left, right })
                .collect(),
        }
    }

    /// A task's tiles for one block of the reduction.
    fn tiles(&self, task: &Task, block: &Block, out: &Output) {
        let [m, n, _] = self.dims;
        let mut multiplier = Multiplier::new(self.level);
        let streams_left = self.level.streams_left();
        let group = if streams_left { 1 } else { task.left.len() };
        let mut tiles = vec![Tile::ZERO; group];
        for from in task.left.clone().step_by(group) {
            let lefts = from..task.left.end;
            let tiles = &mut tiles[..group.min(lefts.len())];
            let first_row = block.first.0 + from * ROWS;
            let rows = if self.turned { n } else { m } - first_row;
            // The next one may be another task's, but of those this thread's own next is likely.
            let next = (streams_left && from + 1 < block.left.len()).then(|| from + 1);
            let mut lines = next.map(|i| Lines::new(block.left.panel(i), task.right.len()));
            for j in task.right.clone() {
                let place = |i| {
                    let (row, col) = (first_row + i * ROWS, block.first.1 + j * COLS);
                    if self.turned { (col, row) } else { (row, col) }
                };
                if let Some((left, right)) = &block.low_rank {
                    let panels = (left.range(lefts.clone()), right.panel(j));
                    let sums = (&mut *tiles, false);
                    multiply(&mut multiplier, panels, rows, sums, Ahead::Nothing, |_| ());
                }
                if let Some(kept) = &block.kept {
                    assert!(!self.turned);
                    for (i, tile) in tiles.iter_mut().enumerate() {
                        kept.drop_tile(tile, place(i), [m, n]);
                    }
                }
                let panels = (block.left.range(lefts.clone()), block.right.panel(j));
                let sums = (&mut *tiles, block.low_rank.is_some());
                let ahead = match &mut lines {
                    Some(lines) => Ahead::Lines(lines),
                    None if block.in_place && j == task.right.start => Ahead::Panels,
                    None => Ahead::Nothing,
                };
                multiply(&mut multiplier, panels, rows, sums, ahead, |i| {
                    out.prefetch(place(i))
                });
                for (i, tile) in tiles.iter().enumerate() {
                    // SAFETY: no other task has this tile.
                    unsafe { out.write(tile, place(i)) };
                }
            }
        }
        finish_streams();
    }
}

/// An operand as one of the sides.
#[derive(Clone, Copy)]
enum Sided<'p> {
    Left(LeftPanels<'p>),
    Right(&'p Panels),
}

/// The left and the right one of two operands.
fn sides<'p>(a: Sided<'p>, b: Sided<'p>) -> (LeftPanels<'p>, &'p Panels) {
    match (a, b) {
        (Sided::Left(left), Sided::Right(right)) | (Sided::Right(right), Sided::Left(left)) => {
            (left, right)
        }
        _ => unreachable!("each of the two sides is given to one of them"),
    }
}

/// What is asked for while panels are multiplied.
enum Ahead<'l, 'a> {
    Nothing,
    /// Each left panel while the one before it is used.
    Panels,
    /// Some of these lines at a time.
    Lines(&'l mut Lines<'a>),
}

/// Sets the tiles to the products of the first left panels, of which `rows` rows are used, with a
/// right one, or adds these: part by part of the reduction, so that the part of the right panel stays
/// in the L1 cache, or widened in L2. `before_last` is called with the index of each tile before its
/// last part.
fn multiply<'r>(
    multiplier: &mut Multiplier<'r>,
    (left, right): (LeftPanels, &'r [Step]),
    rows: usize,
    (tiles, add): (&mut [Tile], bool),
    mut ahead: Ahead,
    before_last: impl Fn(usize),
) {
    let most = multiplier.part_steps();
    let len = right.len().div_ceil(right.len().div_ceil(most));
    let part = |from: usize| from..right.len().min(from + len);
    for from in (0..right.len()).step_by(len) {
        let last = from + len >= right.len();
        multiplier.set_right(&right[part(from)]);
        let count = tiles.len();
        for (i, tile) in tiles.iter_mut().enumerate() {
            let lines = match &mut ahead {
                Ahead::Nothing => None,
                Ahead::Panels => {
                    if i + 1 < count {
                        left.panel(i + 1).part(part(from)).prefetch();
                    } else if !last {
                        left.panel(0).part(part(from + len)).prefetch();
                    }
                    None
                }
                Ahead::Lines(lines) => Some(&mut **lines),
            };
            if last {
                before_last(i);
            }
            let rows = ROWS.min(rows - i * ROWS);
            let left = left.panel(i).part(part(from));
            multiplier.multiply(left, (tile, add || from > 0), rows, lines);
        }
    }
}

/// The left and right panels whose tiles one task computes.
struct Task {
    left: Range<usize>,
    right: Range<usize>,
}

/// How many panels of either side a task has: of the side that it holds in the cache `most` at most,
/// of the other so many that there are enough tasks for each thread that a core which other work slows
/// down does not hold up the rest for long. Where the other side has too few for that, less is held.
fn task_sides([held, other]: [usize; 2], most: usize, threads: usize) -> [usize; 2] {
    let wanted = 12 * threads;
    let blocks = held.div_ceil(most);
    let others = wanted.div_ceil(blocks).min(other);
    let blocks = blocks.max(wanted.div_ceil(others)).min(held);
    [held.div_ceil(blocks), other.div_ceil(others)]
}

#[cfg(test)]
mod tests;
