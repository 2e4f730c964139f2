//! Tiles on machines without instructions for bf16: panels are widened to f32, the right one once
//! for all left ones, and strips of the tile stay in registers.

use super::tile::{COLS, PAIRS, ROWS, Step, Tile};

/// Indices of the reduction in a step.
const DEPTH: usize = 2 * PAIRS;
/// Rows and columns of a strip: with AVX2 twelve accumulators, which hide the latency of a fused
/// multiply-add.
const STRIP: usize = 6;
const WIDTH: usize = 16;
const _: () = assert!(ROWS % STRIP == REST && COLS.is_multiple_of(WIDTH));
/// Rows of the last strip.
const REST: usize = 2;

/// Steps of a left and of a right panel in f32.
#[derive(Default)]
pub(super) struct Widened {
    left: Vec<[[f32; DEPTH]; ROWS]>,
    right: Vec<[[f32; COLS]; DEPTH]>,
}

impl Widened {
    #[inline(always)]
    pub(super) fn set_right(&mut self, steps: &[Step]) {
        self.right.resize(steps.len(), [[0.0; COLS]; DEPTH]);
        for (wide, step) in self.right.iter_mut().zip(steps) {
            let rows = wide.as_chunks_mut::<2>().0.iter_mut();
            for ([lows, highs], pairs) in rows.zip(step.as_chunks::<COLS>().0) {
                lows.iter_mut().zip(pairs).for_each(|(v, &p)| *v = low(p));
                highs.iter_mut().zip(pairs).for_each(|(v, &p)| *v = high(p));
            }
        }
    }

    #[inline(always)]
    fn set_left(&mut self, steps: &[Step]) {
        self.left.resize(steps.len(), [[0.0; DEPTH]; ROWS]);
        for (wide, step) in self.left.iter_mut().zip(steps) {
            for (row, pairs) in wide.iter_mut().zip(step.as_chunks::<PAIRS>().0) {
                for (values, &pair) in row.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                    *values = [low(pair), high(pair)];
                }
            }
        }
    }

    /// The product of a left panel's steps with the right one's; rows from `rows` on may stay as
    /// they are.
    #[inline(always)]
    pub(super) fn multiply<const FUSED: bool>(
        &mut self,
        left: &[Step],
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        self.set_left(left);
        for col in (0..COLS).step_by(WIDTH) {
            for row in (0..rows.min(ROWS - REST)).step_by(STRIP) {
                self.strip::<FUSED, STRIP>(tile, (row, col), add);
            }
            if rows > ROWS - REST {
                self.strip::<FUSED, REST>(tile, (ROWS - REST, col), add);
            }
        }
    }

    /// N rows of the tile from (row, col) on.
    #[inline(always)]
    fn strip<const FUSED: bool, const N: usize>(
        &self,
        tile: &mut Tile,
        (row, col): (usize, usize),
        add: bool,
    ) {
        let rows = &mut tile.0[row..][..N];
        let mut sums = [[0.0f32; WIDTH]; N];
        if add {
            for (sums, row) in sums.iter_mut().zip(&*rows) {
                sums.copy_from_slice(&row[col..][..WIDTH]);
            }
        }
        for (left, right) in self.left.iter().zip(&self.right) {
            let left = &left[row..][..N];
            for (k, right) in right.iter().enumerate() {
                let right = &right[col..][..WIDTH];
                for (sums, left) in sums.iter_mut().zip(left) {
                    for (sum, &right) in sums.iter_mut().zip(right) {
                        *sum = add_product::<FUSED>(*sum, left[k], right);
                    }
                }
            }
        }
        for (row, sums) in rows.iter_mut().zip(&sums) {
            row[col..][..WIDTH].copy_from_slice(sums);
        }
    }
}

#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

/// Fused where the target has the instruction; elsewhere fusing would be a call of the library.
#[inline(always)]
fn add_product<const FUSED: bool>(sum: f32, a: f32, b: f32) -> f32 {
    if FUSED {
        a.mul_add(b, sum)
    } else {
        sum + a * b
    }
}
