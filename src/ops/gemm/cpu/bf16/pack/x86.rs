//! Lines of 16 pairs in vectors of AVX-512 with bf16.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_permutexvar_epi16, _mm512_shuffle_i32x4,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::{Line, Matrix, PAIRS, Side, Step, Tile, Value};

pub(super) type Vector = __m512i;
type Square = [Vector; PAIRS];

/// As [`super::pack`].
///
/// # Safety
/// The machine has AVX-512 with bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack<T: Value>(
    matrix: Matrix<T>,
    along: bool,
    side: Side,
    out: (&mut [Step], usize),
) {
    // SAFETY: the caller's promise.
    unsafe { super::pack::<Vector, T>(matrix, along, side, out) }
}

/// As [`super::pack_tile`].
///
/// # Safety
/// The machine has AVX-512 with bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack_tile(side: Side, tile: &Tile, out: &mut Step) {
    // SAFETY: the caller's promise.
    unsafe { super::pack_sums::<Vector>(side, tile, out) }
}

impl Line for Vector {
    // SAFETY: every pattern of bits is a value.
    const ZERO: Self = unsafe { std::mem::zeroed() };

    #[inline(always)]
    unsafe fn neighbours<T: Value>(values: &[T; 2 * PAIRS]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { T::neighbours(values) }
    }

    #[inline(always)]
    unsafe fn zipped<T: Value>(low: &[T; PAIRS], high: &[T; PAIRS]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { T::zipped(low, high) }
    }

    #[inline(always)]
    unsafe fn transposed(square: Square) -> Square {
        // SAFETY: the caller's promise.
        unsafe { transposed(square) }
    }

    #[inline(always)]
    unsafe fn pairs(self) -> [u32; PAIRS] {
        // SAFETY: both are 64 bytes, of which every pattern is a value.
        unsafe { std::mem::transmute(self) }
    }
}

/// 32 values rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn rounded(low: &[f32; PAIRS], high: &[f32; PAIRS]) -> Vector {
    // SAFETY: an array of 16 f32 has the size of a vector of 512 bits, one of 32 bf16 that
    // of 16 pairs, and every pattern of bits is a value of each.
    unsafe {
        let [low, high]: [__m512; 2] = std::mem::transmute([*low, *high]);
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// Pairs of value i and value 16 + i.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn zipped_halves(values: Vector) -> Vector {
    const ORDER: [u16; 2 * PAIRS] = {
        let mut order = [0; 2 * PAIRS];
        let mut i = 0;
        while i < PAIRS {
            order[2 * i] = i as u16;
            order[2 * i + 1] = (PAIRS + i) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: both are 64 bytes, of which every pattern is a value.
    let order = unsafe { std::mem::transmute::<[u16; 2 * PAIRS], __m512i>(ORDER) };
    _mm512_permutexvar_epi16(order, values)
}

/// Exchanges pairs of rows, then pairs of those, within 128 bits, then whole lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in super::super) fn transposed(rows: Square) -> Square {
    let mut pairs = rows;
    for i in (0..PAIRS).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Lane l of fours[4 i + j] holds rows 4 i to 4 i + 3 of column 4 l + j.
    let mut fours = pairs;
    for i in (0..PAIRS).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut columns = fours;
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x44>(fours[j], fours[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xee>(fours[j], fours[4 + j]);
        let later_low = _mm512_shuffle_i32x4::<0x44>(fours[8 + j], fours[12 + j]);
        let later_high = _mm512_shuffle_i32x4::<0xee>(fours[8 + j], fours[12 + j]);
        columns[j] = _mm512_shuffle_i32x4::<0x88>(low, later_low);
        columns[4 + j] = _mm512_shuffle_i32x4::<0xdd>(low, later_low);
        columns[8 + j] = _mm512_shuffle_i32x4::<0x88>(high, later_high);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, later_high);
    }
    columns
}
