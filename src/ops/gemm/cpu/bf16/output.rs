//! Where the sums of tiles go.

use super::tile::{COLS, Level, ROWS, Tile};
use crate::device::simd::vectorized;

/// Outputs from this size on, which a core's L2 cache does not hold, are written past the caches:
/// a line that is written in a cache is read from memory first. It saved a tenth to a half of the
/// time of a product.
const STREAMED_BYTES: usize = 2 << 20;
/// Values of a vector of 512 bits, which is a cache line.
#[cfg(target_arch = "x86_64")]
const VECTOR: usize = 16;

/// A matrix that tasks write disjoint blocks of.
pub(super) struct Output {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    alpha: f32,
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
    /// Whether blocks are written past the caches where nothing is added to them.
    streamed: bool,
}

// SAFETY: tasks reach the data by way of blocks alone, of which they write none twice.
unsafe impl Sync for Output {}

impl Output {
    /// `rows` of `cols` values, `stride` apart, that alpha times the sums are written to.
    ///
    /// # Panics
    /// When `values` holds less.
    pub(super) fn new(
        values: &mut [f32],
        [rows, cols, stride]: [usize; 3],
        alpha: f32,
        level: Level,
    ) -> Self {
        assert!(cols <= stride && (rows - 1) * stride + cols <= values.len());
        let large = size_of_val(values) >= STREAMED_BYTES;
        let aligned = values.as_ptr().addr().is_multiple_of(64) && stride.is_multiple_of(16);
        Self {
            first: values.as_mut_ptr(),
            rows,
            cols,
            stride,
            alpha,
            #[cfg(target_arch = "x86_64")]
            avx512: level.has_avx512(),
            streamed: large && aligned && level.has_avx512(),
        }
    }

    /// Has the block of a tile brought into the cache, while the sums are computed.
    pub(super) fn prefetch(&self, (row, col): (usize, usize), add: bool) {
        if add || !self.streamed {
            self.block(row, col).prefetch();
        }
    }

    /// Writes the tile that begins at that row and column, or adds it.
    ///
    /// # Safety
    /// Nobody else reads or writes the block meanwhile.
    pub(super) unsafe fn write(&self, tile: &Tile, (row, col): (usize, usize), add: bool) {
        let block = self.block(row, col);
        // SAFETY: the block lies within the output, and the caller says that it is ours. The
        // machine has AVX-512 where that is said, and the alignment has been checked.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.avx512 && block.cols == COLS {
                return match add {
                    true => block.write_avx512::<{ ADD }>(tile, self.alpha),
                    false if self.streamed => block.write_avx512::<{ STREAM }>(tile, self.alpha),
                    false => block.write_avx512::<{ REPLACE }>(tile, self.alpha),
                };
            }
            vectorized!(block.write(tile, self.alpha, add));
        }
    }

    fn block(&self, row: usize, col: usize) -> Block {
        assert!(row < self.rows && col < self.cols);
        Block {
            // SAFETY: within the values that `new` has counted.
            first: unsafe { self.first.add(row * self.stride + col) },
            stride: self.stride,
            rows: ROWS.min(self.rows - row),
            cols: COLS.min(self.cols - col),
        }
    }
}

/// Some rows and columns of an output.
struct Block {
    first: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
}

/// Ways to write a block.
#[cfg(target_arch = "x86_64")]
const REPLACE: u8 = 0;
#[cfg(target_arch = "x86_64")]
const ADD: u8 = 1;
/// Past the caches: [`finish_streams`] comes before anybody reads.
#[cfg(target_arch = "x86_64")]
const STREAM: u8 = 2;

impl Block {
    #[inline(always)]
    fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        for r in 0..self.rows {
            for col in (0..self.cols).step_by(VECTOR) {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                let address = self.first.wrapping_add(r * self.stride + col);
                // SAFETY: a prefetch reads nothing, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(address as *const i8) };
            }
        }
    }

    /// Writes or adds alpha times the tile's sums.
    ///
    /// # Safety
    /// The block lies within the output, and nobody else reads or writes it meanwhile.
    #[inline(always)]
    unsafe fn write(&self, tile: &Tile, alpha: f32, add: bool) {
        for (r, sums) in tile.0.iter().enumerate().take(self.rows) {
            // SAFETY: the caller's promise.
            let row = unsafe {
                std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.cols)
            };
            for (out, sum) in row.iter_mut().zip(sums) {
                let before = if add { *out } else { 0.0 };
                *out = before + alpha * sum;
            }
        }
    }

    /// The same for a block of all columns.
    ///
    /// # Safety
    /// As above; the machine has AVX-512, and rows that are streamed begin cache lines.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn write_avx512<const WAY: u8>(&self, tile: &Tile, alpha: f32) {
        use std::arch::x86_64::{
            _mm512_add_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_storeu_ps,
            _mm512_stream_ps,
        };
        let alpha = _mm512_set1_ps(alpha);
        for (r, sums) in tile.0.iter().enumerate().take(self.rows) {
            for (part, sums) in sums.as_chunks::<VECTOR>().0.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let place = self.first.add(r * self.stride + part * VECTOR);
                    let product = _mm512_mul_ps(alpha, _mm512_loadu_ps(sums.as_ptr()));
                    match WAY {
                        STREAM => _mm512_stream_ps(place, product),
                        ADD => {
                            let sum = _mm512_add_ps(_mm512_loadu_ps(place), product);
                            _mm512_storeu_ps(place, sum);
                        }
                        _ => _mm512_storeu_ps(place, product),
                    }
                }
            }
        }
    }
}

/// Makes what was written past the caches visible to other threads, as other writes are.
pub(super) fn finish_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every machine of the target has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
