//! Operands that are packed.

use std::ops::Range;

use rayon::prelude::*;

use super::left::LeftPanels;
use super::output::{Output, finish_streams};
use super::tile::{COLS, Level, Multiplier, PAIRS, ROWS, Step, Tile};
use super::{Ahead, Operand, Side, Sided, Start, blocks, multiply, pack};
use crate::device::Device;
use crate::tensor::Buffer;

/// An operand of products, packed for any number of them.
pub(crate) struct Packed {
    side: Side,
    /// For each block of the reduction.
    blocks: Vec<Panels>,
}

impl Packed {
    /// All of an operand with `outer` outer indices and a reduction of k values. `None` where products
    /// read it in place.
    pub(crate) fn new(
        device: &Device,
        (operand, side): (&Operand, Side),
        [outer, k]: [usize; 2],
    ) -> Option<Self> {
        if operand.in_place(side, outer, 0..k).is_some() {
            return None;
        }
        let pack =
            |block| Panels::in_parallel(device, Level::best(), (operand, side), 0..outer, block);
        let blocks = blocks(k).map(pack).collect();
        Some(Self { side, blocks })
    }

    /// The panels for a block of the reduction, if they are for that side.
    pub(super) fn block(&self, side: Side, i: usize) -> Option<&Panels> {
        self.blocks.get(i).filter(|_| side == self.side)
    }
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
        let outer = (outer.start, outer.end);
        operand.pack(level, side, (panels, steps), outer, reduction);
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
        /// Panels that are packed together: where stored rows run across the reduction, so many
        /// cache lines of a row are read in succession.
        const SIDE_BY_SIDE: usize = 4;
        let mut packed = Self::with_capacity(device, outer.len(), reduction.len());
        let (steps, panels) = packed.lay_out(&outer, &reduction);
        let least = (LEAST / reduction.len()).div_ceil(ROWS).max(SIDE_BY_SIDE);
        let group = (panels.len() / steps)
            .div_ceil(4 * device.threads())
            .max(least);
        let reduction = (reduction.start, reduction.end);
        panels
            .par_chunks_mut(group * steps)
            .enumerate()
            .for_each(|(i, panels)| {
                let outer = (outer.start + i * group * ROWS, outer.end);
                operand.pack(level, side, (panels, steps), outer, reduction);
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

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// As a side of a product.
    pub(super) fn on(&self, side: Side) -> Sided<'_> {
        match side {
            Side::Left => Sided::Left(self.lefts()),
            Side::Right => Sided::Right(self),
        }
    }

    /// As the left one.
    pub(super) fn lefts(&self) -> LeftPanels<'_> {
        LeftPanels::packed(self.as_steps(), self.steps)
    }

    pub(super) fn panel(&self, i: usize) -> &[Step] {
        &self.as_steps()[i * self.steps..][..self.steps]
    }

    fn as_steps(&self) -> &[Step] {
        &bytemuck::cast_slice(&self.memory)[..self.count * self.steps]
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

    /// Has the panels be of these many outer indices and a reduction of that length. What they hold
    /// is for [`Panels::set`] to say.
    ///
    /// # Panics
    /// When there is no memory for so many.
    pub(crate) fn resize(&mut self, outer: usize, reduction: usize) {
        self.lay_out(&(0..outer), &(0..reduction));
    }

    /// Packs a tile as a step of a panel on this thread: its rows as outer indices of a left panel,
    /// its columns as those of a right one.
    ///
    /// # Panics
    /// When there is no such step.
    pub(crate) fn set(
        &mut self,
        level: Level,
        side: Side,
        (panel, step): (usize, usize),
        tile: &Tile,
    ) {
        assert!(panel < self.count && step < self.steps);
        let steps: &mut [Step] = bytemuck::cast_slice_mut(&mut self.memory);
        pack::pack_tile(level, side, tile, &mut steps[panel * self.steps + step]);
    }

    /// out \[m, n\] (+)= left · rightᵀ on this thread, with the panels `which` on the left. `out`
    /// holds m rows of n values, `stride` apart. The reduction is the right side's, which may go on
    /// beyond the left one's values.
    ///
    /// # Panics
    /// When the panels hold more than that or the left ones a shorter reduction, or `out` less.
    pub(crate) fn multiply(
        &self,
        level: Level,
        which: Range<usize>,
        right: Part<'_>,
        (out, [m, n, stride]): (&mut [f32], [usize; 3]),
        add: bool,
    ) {
        let start = if add { Start::Output } else { Start::Zero };
        let out = Output::new(out, start, [m, n, stride], 1.0, false, level);
        let lefts = self.lefts().range(which);
        let mut tile = Tile::ZERO;
        let mut multiplier = Multiplier::new(level);
        for (j, panel) in right.which.enumerate() {
            multiplier.set_right(&right.panels.panel(panel)[right.steps.clone()]);
            for i in 0..lefts.len() {
                let place = (i * ROWS, j * COLS);
                let left = lefts.panel(i).part(0..right.steps.len());
                // SAFETY: `out` is borrowed for this product, and this thread alone writes to it.
                unsafe {
                    match out
                        .whole(place)
                        .filter(|_| multiplier.multiplies_in_place())
                    {
                        Some(first) => {
                            let sums = (first, stride, add);
                            multiplier.multiply_in_place(left, sums);
                        }
                        None => {
                            let sums = (&mut tile, false);
                            multiplier.multiply(left, sums, m - place.0, None);
                            out.write(&tile, place);
                        }
                    }
                }
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
        let left = self.lefts();
        let rows = left.len() * ROWS;
        let mut tiles = vec![Tile::ZERO; left.len()];
        let mut multiplier = Multiplier::new(level);
        for j in 0..right.len() {
            let panels = (left, right.panel(j));
            multiply(
                &mut multiplier,
                panels,
                rows,
                (&mut tiles, false),
                Ahead::Nothing,
                |_| (),
            );
            for (i, tile) in tiles.iter().enumerate() {
                use_tile(i * ROWS, j * COLS, tile)?;
            }
        }
        Ok(())
    }
}

/// Single tiles of panels that are packed.
impl<'r> Multiplier<'r> {
    /// Takes a right panel.
    pub(crate) fn set_right_panel(&mut self, panels: &'r Panels, i: usize) {
        self.set_right(panels.panel(i));
    }

    /// Sets the tile to the product of a left panel with the right one that was taken.
    pub(crate) fn tile(&mut self, left: &Panels, i: usize, tile: &mut Tile) {
        self.multiply(left.lefts().panel(i), (tile, false), ROWS, None);
    }
}
