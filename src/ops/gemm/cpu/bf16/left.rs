//! Left panels as a product reads them: packed, or rows of a weight where they lie.

use std::ops::Range;

use bytemuck::{cast_slice, pod_read_unaligned};
use half::bf16;

use super::tile::{PAIRS, ROWS, STRIP, Step};
use crate::device::simd::{Fetch, prefetch};

/// A left panel: rows with 16 pairs of the reduction in succession for each step.
#[derive(Clone, Copy)]
pub(super) struct LeftPanel<'a> {
    values: &'a [bf16],
    /// Values from one row to the next.
    row: usize,
    /// Values from one step of a row to the next.
    step: usize,
    steps: usize,
}

impl<'a> LeftPanel<'a> {
    /// # Panics
    /// When `values` holds less: code without checks relies on this one.
    fn new(values: &'a [bf16], [row, step, steps]: [usize; 3]) -> Self {
        if let Some(last) = steps.checked_sub(1) {
            assert!((ROWS - 1) * row + last * step + 2 * PAIRS <= values.len());
        }
        Self {
            values,
            row,
            step,
            steps,
        }
    }

    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    /// Some of its steps.
    pub(super) fn part(&self, steps: Range<usize>) -> Self {
        let values = &self.values[steps.start * self.step..];
        Self::new(values, [self.row, self.step, steps.len()])
    }

    /// The pairs of a row and a step.
    #[inline(always)]
    pub(super) fn pairs(&self, row: usize, step: usize) -> [u32; PAIRS] {
        let first = row * self.row + step * self.step;
        pod_read_unaligned(cast_slice(&self.values[first..][..2 * PAIRS]))
    }

    /// Asks for all of it at once.
    pub(super) fn prefetch(&self) {
        for step in 0..self.steps {
            for row in 0..ROWS {
                let first = row * self.row + step * self.step;
                prefetch(self.values.as_ptr().wrapping_add(first), Fetch::L2);
            }
        }
    }

    /// The first pair; those of all rows and steps can be read from there, by [`Self::distances`].
    #[cfg(target_arch = "x86_64")]
    pub(super) fn as_ptr(&self) -> *const bf16 {
        self.values.as_ptr()
    }

    /// Values from one row, and from one step, to the next.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn distances(&self) -> [usize; 2] {
        [self.row, self.step]
    }
}

/// The cache lines of a left panel in the order of their addresses, to be asked for some at a time
/// while others are used. Asked for in another order or all at once they hold up what is loaded
/// meanwhile: a product with weights in memory took 7 % longer.
pub(super) struct Lines<'a> {
    values: &'a [bf16],
    /// The next line of its piece of memory.
    next: usize,
    /// Lines of a piece.
    len: usize,
    /// Values from one piece to the next.
    distance: usize,
    /// Pieces from that of the next line on.
    pieces: usize,
    at_a_time: usize,
}

impl<'a> Lines<'a> {
    /// To be asked for while so many tiles are computed, some at every step of every strip of rows.
    pub(super) fn new(panel: LeftPanel<'a>, tiles: usize) -> Self {
        let LeftPanel {
            values,
            row,
            step,
            steps,
        } = panel;
        // What is packed lies in one piece, a matrix has one in each row.
        let (len, distance, pieces) = match row < step {
            true => (ROWS * steps, 0, 1),
            false => (steps, row, ROWS),
        };
        Self {
            values,
            next: 0,
            len,
            distance,
            pieces,
            at_a_time: STRIP.div_ceil(tiles.max(1)),
        }
    }

    #[inline(always)]
    pub(super) fn prefetch_some(&mut self) {
        for line in self.take(self.at_a_time) {
            prefetch(line, Fetch::L1);
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = *const bf16;

    #[inline(always)]
    fn next(&mut self) -> Option<*const bf16> {
        if self.next == self.len {
            self.next = 0;
            self.pieces = self.pieces.saturating_sub(1);
            self.values = self.values.get(self.distance..).unwrap_or(&[]);
        }
        if self.pieces == 0 {
            return None;
        }
        let line = self.values.as_ptr().wrapping_add(self.next * 2 * PAIRS);
        self.next += 1;
        Some(line)
    }
}

/// Left panels, one after the other.
#[derive(Clone, Copy)]
pub(super) struct LeftPanels<'a> {
    values: &'a [bf16],
    /// Values from one panel to the next.
    panel: usize,
    /// As a panel has them.
    distances: [usize; 3],
    count: usize,
}

impl<'a> LeftPanels<'a> {
    /// Panels that are packed, with so many steps each.
    pub(super) fn packed(panels: &'a [Step], steps: usize) -> Self {
        let step = 2 * PAIRS * ROWS;
        Self {
            values: cast_slice(panels),
            panel: steps * step,
            distances: [2 * PAIRS, step, steps],
            count: panels.len().checked_div(steps).unwrap_or(0),
        }
    }

    /// Panels that lie in the rows of a matrix, `stride` apart: whole ones of whole steps alone,
    /// since nothing can be added to them. `None` where these are not.
    pub(super) fn in_place(
        values: &'a [bf16],
        stride: usize,
        rows: usize,
        columns: Range<usize>,
    ) -> Option<Self> {
        let whole = rows.is_multiple_of(ROWS) && columns.len().is_multiple_of(2 * PAIRS);
        // The lower half of a pair is to come first.
        (whole && cfg!(target_endian = "little")).then(|| Self {
            values: &values[columns.start..],
            panel: ROWS * stride,
            distances: [stride, 2 * PAIRS, columns.len() / (2 * PAIRS)],
            count: rows / ROWS,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn range(&self, panels: Range<usize>) -> Self {
        assert!(panels.end <= self.count);
        Self {
            values: &self.values[panels.start * self.panel..],
            count: panels.len(),
            ..*self
        }
    }

    pub(super) fn panel(&self, i: usize) -> LeftPanel<'a> {
        assert!(i < self.count);
        LeftPanel::new(&self.values[i * self.panel..], self.distances)
    }
}
