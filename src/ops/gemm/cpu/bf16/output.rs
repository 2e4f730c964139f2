//! Where the sums of tiles go.

use std::marker::PhantomData;

use super::super::Start;
#[cfg(target_arch = "x86_64")]
use super::pack::x86::transposed;
use super::tile::{COLS, Level, ROWS, Tile};
use crate::device::simd::{Fetch, prefetch, vectorized};

/// Outputs from this size on, which a core's L2 cache does not hold, are written past the caches:
/// a line that is written in a cache is read from memory first. It saved a tenth to a half of the
/// time of a product.
const STREAMED_BYTES: usize = 2 << 20;
/// Values of a vector of 512 bits, which is a cache line.
const VECTOR: usize = 16;

/// A matrix that tasks write disjoint blocks of.
pub(super) struct Output<'a> {
    first: *mut f32,
    /// What is added to: its first value, and how far its rows are apart.
    start: Option<(*const f32, usize)>,
    rows: usize,
    cols: usize,
    stride: usize,
    alpha: f32,
    /// Whether tiles are those of the transpose.
    turned: bool,
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
    /// Whether blocks are written past the caches.
    streamed: bool,
    _borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks reach the data by way of blocks alone, of which they write none twice.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `rows` of `cols` values, `stride` apart, that the start and alpha times the sums are written
    /// to. The rows of a matrix to start from are as far apart.
    ///
    /// # Panics
    /// When `values` or the start holds less.
    pub(super) fn new(
        values: &'a mut [f32],
        start: Start<'a>,
        [rows, cols, stride]: [usize; 3],
        alpha: f32,
        turned: bool,
        level: Level,
    ) -> Self {
        let least = (rows - 1) * stride + cols;
        assert!(cols <= stride && least <= values.len());
        let large = size_of_val(values) >= STREAMED_BYTES;
        let aligned = values.as_ptr().addr().is_multiple_of(64) && stride.is_multiple_of(16);
        let is_read = matches!(start, Start::Output);
        let first = values.as_mut_ptr();
        let start = match start {
            Start::Zero => None,
            Start::Output => Some((first.cast_const(), stride)),
            Start::Matrix(start) => Some((start[..least].as_ptr(), stride)),
            Start::Row(start) => Some((start[..cols].as_ptr(), 0)),
        };
        Self {
            first,
            start,
            rows,
            cols,
            stride,
            alpha,
            turned,
            #[cfg(target_arch = "x86_64")]
            avx512: level.has_avx512(),
            streamed: large && aligned && !is_read && level.has_avx512(),
            _borrowed: PhantomData,
        }
    }

    /// Has what is read and written of a tile brought into the cache, while the sums are computed.
    pub(super) fn prefetch(&self, (row, col): (usize, usize)) {
        let block = self.block(row, col);
        if let Some((start, stride)) = block.start {
            block.prefetch(start, stride);
        }
        if !self.streamed {
            block.prefetch(block.first, self.stride);
        }
    }

    /// Writes the tile that begins at that row and column.
    ///
    /// # Safety
    /// Nobody else reads or writes the block meanwhile.
    pub(super) unsafe fn write(&self, tile: &Tile, (row, col): (usize, usize)) {
        let block = self.block(row, col);
        // SAFETY: the block lies within the output, and the caller says that it is ours. The
        // machine has AVX-512 where that is said, and the alignment has been checked.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.avx512 && block.cols == COLS {
                return match (self.turned, self.streamed) {
                    (false, false) => block.write_avx512::<false, false>(tile, self.alpha),
                    (false, true) => block.write_avx512::<false, true>(tile, self.alpha),
                    (true, false) => block.write_avx512::<true, false>(tile, self.alpha),
                    (true, true) => block.write_avx512::<true, true>(tile, self.alpha),
                };
            }
            match self.turned {
                false => vectorized!(block.write(tile, self.alpha)),
                true => vectorized!(block.write(&tile.transposed(), self.alpha)),
            }
        }
    }

    /// The first value of the tile that begins at that row and column, if all of it is there.
    pub(super) fn whole(&self, (row, col): (usize, usize)) -> Option<*mut f32> {
        let block = self.block(row, col);
        ((block.rows, block.cols) == (ROWS, COLS)).then_some(block.first)
    }

    fn block(&self, row: usize, col: usize) -> Block {
        assert!(row < self.rows && col < self.cols);
        // SAFETY: within the values that `new` has counted.
        let at = |(start, stride): (*const f32, usize)| unsafe {
            (start.add(row * stride + col), stride)
        };
        Block {
            // SAFETY: as above.
            first: unsafe { self.first.add(row * self.stride + col) },
            stride: self.stride,
            start: self.start.map(at),
            rows: ROWS.min(self.rows - row),
            cols: COLS.min(self.cols - col),
        }
    }
}

/// Some rows and columns of an output.
struct Block {
    first: *mut f32,
    stride: usize,
    /// As the output's, from the block's first value on.
    start: Option<(*const f32, usize)>,
    rows: usize,
    cols: usize,
}

impl Block {
    #[inline(always)]
    fn prefetch(&self, first: *const f32, stride: usize) {
        for r in 0..self.rows {
            for col in (0..self.cols).step_by(VECTOR) {
                prefetch(first.wrapping_add(r * stride + col), Fetch::L1);
            }
        }
    }

    /// Writes the start and alpha times the tile's sums.
    ///
    /// # Safety
    /// The block lies within the output and the start, and nobody else reads or writes it
    /// meanwhile.
    #[inline(always)]
    unsafe fn write(&self, tile: &Tile, alpha: f32) {
        for (r, sums) in tile.0.iter().enumerate().take(self.rows) {
            let mut before = [0.0; COLS];
            if let Some((start, stride)) = self.start {
                let start = start.wrapping_add(r * stride);
                for (c, before) in before.iter_mut().enumerate().take(self.cols) {
                    // SAFETY: the caller's promise.
                    *before = unsafe { *start.add(c) };
                }
            }
            // SAFETY: the caller's promise.
            let row = unsafe {
                std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.cols)
            };
            for ((out, before), sum) in row.iter_mut().zip(before).zip(sums) {
                *out = before + alpha * sum;
            }
        }
    }

    /// The same for a block of all columns, of the tile or its transpose, `STREAM`ed past the
    /// caches: then [`finish_streams`] comes before anybody reads.
    ///
    /// # Safety
    /// As above; the machine has AVX-512, and rows that are streamed begin cache lines.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn write_avx512<const TURNED: bool, const STREAM: bool>(&self, tile: &Tile, alpha: f32) {
        use std::arch::x86_64::{
            _mm512_add_ps, _mm512_castsi512_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
            _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_stream_ps,
        };
        let alpha = _mm512_set1_ps(alpha);
        for row in (0..self.rows).step_by(VECTOR) {
            for col in (0..COLS).step_by(VECTOR) {
                let (first, second) = if TURNED { (col, row) } else { (row, col) };
                let mut square = [_mm512_setzero_si512(); VECTOR];
                for (line, sums) in square.iter_mut().zip(&tile.0[first..][..VECTOR]) {
                    // SAFETY: a vector of the sums.
                    *line = unsafe { _mm512_loadu_si512(sums[second..][..VECTOR].as_ptr().cast()) };
                }
                if TURNED {
                    square = transposed(square);
                }
                for (r, line) in (row..self.rows).zip(square) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let mut sum = _mm512_mul_ps(alpha, _mm512_castsi512_ps(line));
                        if let Some((start, stride)) = self.start {
                            sum = _mm512_add_ps(_mm512_loadu_ps(start.add(r * stride + col)), sum);
                        }
                        let place = self.first.add(r * self.stride + col);
                        match STREAM {
                            true => _mm512_stream_ps(place, sum),
                            false => _mm512_storeu_ps(place, sum),
                        }
                    }
                }
            }
        }
    }
}

/// to \[cols, rows\] = `scale` times the transpose of a matrix of so many rows and columns. The rows of
/// `to` are `stride` apart.
///
/// # Panics
/// When `from` or `to` holds less, or nothing.
pub(crate) fn copy_transposed(
    from: &[f32],
    [rows, cols]: [usize; 2],
    (to, stride): (&mut [f32], usize),
    scale: f32,
) {
    let dims = [cols, rows, stride];
    let out = Output::new(to, Start::Zero, dims, scale, true, Level::best());
    let mut tile = Tile::ZERO;
    for row in (0..rows).step_by(ROWS) {
        for col in (0..cols).step_by(COLS) {
            for (i, line) in tile.0[..ROWS.min(rows - row)].iter_mut().enumerate() {
                let from = &from[(row + i) * cols..][col..cols.min(col + COLS)];
                line[..from.len()].copy_from_slice(from);
            }
            // SAFETY: `to` is borrowed for this alone.
            unsafe { out.write(&tile, (col, row)) };
        }
    }
    finish_streams();
}

/// Makes what was written past the caches visible to other threads, as other writes are.
pub(super) fn finish_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every machine of the target has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
