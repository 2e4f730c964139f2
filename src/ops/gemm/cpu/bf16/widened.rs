//! Tiles on machines without fast instructions for bf16: panels are widened to f32, the right one
//! once for all left ones, and strips of the tile stay in registers.

use super::left::LeftPanel;
use super::tile::{COLS, PAIRS, ROWS, Step, Tile};

/// Rows and columns of a strip: with AVX2 twelve accumulators, which hide the latency of a fused
/// multiply-add. With AVX-512 a strip is 8 rows of all columns, sixteen accumulators.
const STRIP: usize = 6;
const WIDTH: usize = 16;
const _: () = assert!(ROWS % STRIP == REST && COLS.is_multiple_of(WIDTH));
/// Rows of the last strip.
const REST: usize = 2;

/// Steps of a left and of a right panel in f32: the lower values of all pairs, then the upper ones.
#[derive(Default)]
pub(super) struct Widened {
    left: Vec<Aligned<[[[f32; PAIRS]; 2]; ROWS]>>,
    right: Vec<Aligned<[[[f32; COLS]; PAIRS]; 2]>>,
}

/// In whole cache lines, so that no vector lies in two.
#[derive(Clone)]
#[repr(align(64))]
struct Aligned<T>(T);

impl Widened {
    #[inline(always)]
    pub(super) fn set_right(&mut self, steps: &[Step]) {
        self.right
            .resize(steps.len(), Aligned([[[0.0; COLS]; PAIRS]; 2]));
        for (Aligned([lows, highs]), step) in self.right.iter_mut().zip(steps) {
            let rows = lows.iter_mut().zip(highs).zip(step.as_chunks::<COLS>().0);
            for ((lows, highs), pairs) in rows {
                (*lows, *highs) = (pairs.map(low), pairs.map(high));
            }
        }
    }

    #[inline(always)]
    fn set_left(&mut self, left: LeftPanel) {
        self.left
            .resize(left.steps(), Aligned([[[0.0; PAIRS]; 2]; ROWS]));
        for (step, Aligned(wide)) in self.left.iter_mut().enumerate() {
            for (row, wide) in wide.iter_mut().enumerate() {
                let pairs = left.pairs(row, step);
                *wide = [pairs.map(low), pairs.map(high)];
            }
        }
    }

    /// The product of a left panel's steps with the right one's; rows from `rows` on may stay as
    /// they are.
    #[inline(always)]
    pub(super) fn multiply<const FUSED: bool>(
        &mut self,
        left: LeftPanel,
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

    /// The same with AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply_avx512(
        &mut self,
        left: LeftPanel,
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        use std::arch::x86_64::{
            __m512, __m512i, _mm512_and_si512, _mm512_fmadd_ps, _mm512_set1_epi32, _mm512_set1_ps,
            _mm512_setzero_ps, _mm512_slli_epi32,
        };
        const STRIP: usize = 8;
        type Vectors = [__m512; COLS / 16];
        // As `set_left`, of which the compiler makes gathers and scatters across the rows.
        self.left
            .resize(left.steps(), Aligned([[[0.0; PAIRS]; 2]; ROWS]));
        for (step, Aligned(wide)) in self.left.iter_mut().enumerate() {
            for (row, wide) in wide.iter_mut().enumerate() {
                // SAFETY: 16 words or f32 on either side, of which every bit pattern is a value.
                unsafe {
                    let pairs = std::mem::transmute::<[u32; PAIRS], __m512i>(left.pairs(row, step));
                    let highs = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    let halves = [_mm512_slli_epi32::<16>(pairs), highs];
                    *wide = std::mem::transmute::<[__m512i; 2], [[f32; PAIRS]; 2]>(halves);
                }
            }
        }
        let strips = tile.0.as_chunks_mut::<STRIP>().0.iter_mut();
        for (s, strip) in strips.enumerate().take(rows.div_ceil(STRIP)) {
            let mut sums = [[_mm512_setzero_ps(); COLS / 16]; STRIP];
            if add {
                // SAFETY: 8 x 32 f32 on either side, row by row, here and below.
                sums = unsafe {
                    std::mem::transmute::<[[f32; COLS]; STRIP], [Vectors; STRIP]>(*strip)
                };
            }
            for (Aligned(left), Aligned(right)) in self.left.iter().zip(&self.right) {
                let left = &left.as_chunks::<STRIP>().0[s];
                for (k, right) in right.as_flattened().iter().enumerate() {
                    // SAFETY: 32 f32 on either side, of which every bit pattern is a value.
                    let right: Vectors = unsafe { std::mem::transmute(*right) };
                    for (sums, left) in sums.iter_mut().zip(left) {
                        let left = _mm512_set1_ps(left.as_flattened()[k]);
                        for (sum, right) in sums.iter_mut().zip(right) {
                            *sum = _mm512_fmadd_ps(left, right, *sum);
                        }
                    }
                }
            }
            // SAFETY: as above.
            *strip = unsafe { std::mem::transmute::<[Vectors; STRIP], [[f32; COLS]; STRIP]>(sums) };
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
        for (Aligned(left), Aligned(right)) in self.left.iter().zip(&self.right) {
            let left = &left[row..][..N];
            for (k, right) in right.as_flattened().iter().enumerate() {
                let right = &right[col..][..WIDTH];
                for (sums, left) in sums.iter_mut().zip(left) {
                    for (sum, &right) in sums.iter_mut().zip(right) {
                        *sum = add_product::<FUSED>(*sum, left.as_flattened()[k], right);
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
