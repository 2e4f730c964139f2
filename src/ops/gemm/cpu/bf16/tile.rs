//! The innermost product: a tile of [`ROWS`] x [`COLS`] sums over packed panels.
//!
//! The register tile and the panels follow Goto and van de Geijn 2008 ("Anatomy of high-performance
//! matrix multiplication"). 24 accumulators of 16 sums fill the 32 vector registers of AVX-512 and
//! keep more products in flight than the instruction's latency asks for.

#[cfg(target_arch = "x86_64")]
use crate::device::simd::{self, Simd};

/// Rows of a tile: values of the left panel at one pair of the reduction.
pub(crate) const ROWS: usize = 12;
/// Columns of a tile: values of the right panel at one pair of the reduction.
pub(crate) const COLS: usize = 32;

/// The sums of a tile, row by row.
pub(crate) type Tile = [[f32; COLS]; ROWS];

/// The instructions that a tile is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// `vdpbf16ps`: two products of bf16 and their sum in f32, for 16 sums at once.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// Widened to f32, with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Widened to f32, in plain Rust.
    Plain,
}

impl Level {
    /// The best level of this machine (the standard library remembers the answer).
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if simd::multiplies_bf16() {
                return Self::Avx512Bf16;
            }
            if simd::level() != Simd::Baseline {
                return Self::Avx2;
            }
        }
        Self::Plain
    }
}

#[cfg(test)]
impl Level {
    /// All levels of this machine.
    pub(super) fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        match Self::best() {
            Self::Avx512Bf16 => return vec![Self::Avx512Bf16, Self::Avx2, Self::Plain],
            Self::Avx2 => return vec![Self::Avx2, Self::Plain],
            Self::Plain => {}
        }
        vec![Self::Plain]
    }
}

/// tile\[i\]\[j\] = Σ_p a\[p\]\[i\] · b\[p\]\[j\], each product being that of two pairs of bf16
/// (the lower index of the reduction in the lower half) and the sum of its two terms.
pub(super) fn multiply(level: Level, a: &[[u32; ROWS]], b: &[[u32; COLS]], tile: &mut Tile) {
    match level {
        // SAFETY: `Level::best` has seen that this machine has these instructions, and no other
        // code makes this level.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { x86::multiply_avx512_bf16(a, b, tile) },
        // SAFETY: as above; a machine with AVX-512 has AVX2 and FMA as well.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::multiply_avx2(a, b, tile) },
        Level::Plain => multiply_widened::<false>(a, b, tile),
    }
}

/// Widens to f32, for a strip of the tile at a time so that its sums stay in registers.
#[inline(always)]
fn multiply_widened<const FUSED: bool>(a: &[[u32; ROWS]], b: &[[u32; COLS]], tile: &mut Tile) {
    const STRIP: usize = 3;
    const WIDTH: usize = 16;
    for first_row in (0..ROWS).step_by(STRIP) {
        for first_col in (0..COLS).step_by(WIDTH) {
            let mut sums = [[0.0f32; WIDTH]; STRIP];
            for (a, b) in a.iter().zip(b) {
                for (sums, &a) in sums.iter_mut().zip(&a[first_row..][..STRIP]) {
                    for (sum, &b) in sums.iter_mut().zip(&b[first_col..][..WIDTH]) {
                        *sum = add_product::<FUSED>(*sum, low(a), low(b));
                        *sum = add_product::<FUSED>(*sum, high(a), high(b));
                    }
                }
            }
            for (row, sums) in tile[first_row..].iter_mut().zip(&sums) {
                row[first_col..][..WIDTH].copy_from_slice(sums);
            }
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    };

    use super::{COLS, ROWS, Tile};

    const VECTOR: usize = 16;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply_avx512_bf16(a: &[[u32; ROWS]], b: &[[u32; COLS]], tile: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); COLS / VECTOR]; ROWS];
        for (a, b) in a.iter().zip(b) {
            // SAFETY: arrays of 32 u32 and of two vectors of 512 bits have the same size, and
            // every bit pattern is a value of both.
            let b: [__m512bh; COLS / VECTOR] = unsafe { std::mem::transmute(*b) };
            for (sums, &a) in sums.iter_mut().zip(a) {
                let a = pairs(_mm512_set1_epi32(a as i32));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
        }
        // SAFETY: as above; both are 12 x 32 f32, row by row.
        *tile = unsafe { std::mem::transmute::<[[__m512; COLS / VECTOR]; ROWS], Tile>(sums) };
    }

    #[inline(always)]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: two names of the same 512 bits.
        unsafe { std::mem::transmute(bits) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply_avx2(a: &[[u32; ROWS]], b: &[[u32; COLS]], tile: &mut Tile) {
        super::multiply_widened::<true>(a, b, tile);
    }
}
