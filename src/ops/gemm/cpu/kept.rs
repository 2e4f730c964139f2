//! What dropout kept of a matrix, as products and copies need it.

use rayon::prelude::*;

use super::bf16::{COLS, ROWS, Tile};
use crate::device::simd::vectorized;
use crate::ops::stored::Stored;

/// Elements that a byte of the mask decides on.
const ELEMENTS: usize = 8;
/// Bytes of the mask for one task.
const CHUNK: usize = 1 << 11;

/// What dropout kept of a matrix, row-major.
#[derive(Clone, Copy)]
pub(crate) struct Kept<'a> {
    /// Bit i % 8 of byte i / 8 says whether element i is kept.
    pub(crate) mask: &'a [u8],
    /// The factor on what was kept.
    pub(crate) scale: f32,
}

impl Kept<'_> {
    /// Writes `x` with what is dropped zero and the rest scaled.
    pub(crate) fn copy<T: Stored>(&self, out: &mut [T], x: &[T]) {
        self.for_each(out, x, |out, x| *out = T::of(x));
    }

    /// Adds the same to `sum`.
    pub(super) fn add(&self, sum: &mut [f32], x: &[f32]) {
        self.for_each(sum, x, |sum, x| *sum += x);
    }

    fn for_each<T: Stored>(&self, out: &mut [T], x: &[T], write: impl Fn(&mut T, f32) + Sync) {
        let outs = out.par_chunks_mut(CHUNK * ELEMENTS);
        let xs = x.par_chunks(CHUNK * ELEMENTS);
        let mask = self.mask.par_chunks(CHUNK);
        outs.zip(xs).zip(mask).for_each(|((out, x), mask)| {
            vectorized!({
                let (outs, last_out) = out.as_chunks_mut::<ELEMENTS>();
                let (xs, last_x) = x.as_chunks::<ELEMENTS>();
                for ((out, x), &mask) in outs.iter_mut().zip(xs).zip(mask) {
                    for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
                        write(out, self.dropped(x.get(), u32::from(mask), i));
                    }
                }
                let mask = mask.get(outs.len()).copied().unwrap_or(0);
                for (i, (out, x)) in last_out.iter_mut().zip(last_x).enumerate() {
                    write(out, self.dropped(x.get(), u32::from(mask), i));
                }
            })
        });
    }

    /// Drops and scales the tile at that row and column of a matrix of `rows` rows and `cols`
    /// columns.
    pub(super) fn drop_tile(
        &self,
        tile: &mut Tile,
        (row, col): (usize, usize),
        [rows, cols]: [usize; 2],
    ) {
        vectorized!({
            for (r, sums) in tile.0.iter_mut().enumerate().take(ROWS.min(rows - row)) {
                let bits = self.bits((row + r) * cols + col);
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = self.dropped(*sum, bits, c);
                }
            }
        });
    }

    /// The bits of [`COLS`] elements from the first on; there may be fewer.
    #[inline(always)]
    fn bits(&self, first: usize) -> u32 {
        const { assert!(COLS == u32::BITS as usize) };
        let mut bytes = [0; size_of::<u64>()];
        let mask = self.mask.get(first / ELEMENTS..).unwrap_or(&[]);
        match mask.first_chunk() {
            Some(mask) => bytes = *mask,
            None => bytes[..mask.len()].copy_from_slice(mask),
        }
        (u64::from_le_bytes(bytes) >> (first % ELEMENTS)) as u32
    }

    /// Without a branch, also for a value that is no number.
    #[inline(always)]
    fn dropped(&self, x: f32, mask: u32, i: usize) -> f32 {
        let all = (mask >> i & 1).wrapping_neg();
        f32::from_bits((x * self.scale).to_bits() & all)
    }
}
