//! Operands cut into panels of bf16 pairs, as [`tile`](super::tile) reads them.

use half::bf16;

use super::tile::Level;
use crate::device::simd::vectorized;

/// One side of a product, seen as outer index x reduction index.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    values: Values<'a>,
    /// Distance of two rows of the stored matrix.
    stride: usize,
    /// Whether a stored row runs along the reduction (as in X and W of X Wᵀ) or across it.
    along: bool,
}

/// The elements of an operand, row-major.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Operand<'a> {
    /// A matrix whose rows of `cols` values run along the reduction.
    pub(crate) fn rows(values: Values<'a>, cols: usize) -> Self {
        let along = true;
        Self {
            values,
            stride: cols,
            along,
        }
    }

    /// A matrix whose columns run along the reduction; its rows have `cols` values.
    pub(crate) fn columns(values: Values<'a>, cols: usize) -> Self {
        let along = false;
        Self {
            values,
            stride: cols,
            along,
        }
    }

    /// Packs outer indices `outer..outer + P` and `out.len()` pairs of the reduction from index
    /// `from` on, up to the ends `outer_end` and `end`; what is beyond them is zero.
    pub(super) fn pack<const P: usize>(
        &self,
        level: Level,
        out: &mut [[u32; P]],
        (outer, outer_end): (usize, usize),
        (from, end): (usize, usize),
    ) {
        let width = P.min(outer_end - outer);
        let len = (end - from).min(2 * out.len());
        #[cfg(target_arch = "x86_64")]
        if level == Level::Avx512Bf16 && self.along && width == P {
            let (first, stride) = (outer * self.stride + from, self.stride);
            match self.values {
                // SAFETY: the level says that the machine has the instructions.
                Values::F32(v) => unsafe { x86::pack_along(out, &v[first..], stride, len) },
                // SAFETY: as above.
                Values::Bf16(v) => unsafe { x86::pack_along(out, &v[first..], stride, len) },
            }
            return;
        }
        match self.values {
            Values::F32(v) if self.along => {
                let rows = |i| &v[(outer + i) * self.stride + from..][..len];
                vectorized!(pack_along(out, width, len, rows, pair_of_f32))
            }
            Values::F32(v) => {
                let rows = |p| &v[(from + p) * self.stride + outer..][..width];
                vectorized!(pack_across(out, width, len, rows, pair_of_f32))
            }
            Values::Bf16(v) if self.along => {
                let rows = |i| &v[(outer + i) * self.stride + from..][..len];
                vectorized!(pack_along(out, width, len, rows, pair_of_bf16))
            }
            Values::Bf16(v) => {
                let rows = |p| &v[(from + p) * self.stride + outer..][..width];
                vectorized!(pack_across(out, width, len, rows, pair_of_bf16))
            }
        }
    }
}

/// Rows along the reduction: row i gives column i of the panel.
#[inline(always)]
fn pack_along<'a, T: Copy + Default + 'a, const P: usize>(
    out: &mut [[u32; P]],
    width: usize,
    len: usize,
    rows: impl Fn(usize) -> &'a [T],
    pair: impl Fn(T, T) -> u32,
) {
    if width < P || len < 2 * out.len() {
        out.as_flattened_mut().fill(0);
    }
    for i in 0..width {
        let (pairs, rest) = rows(i).as_chunks::<2>();
        for (out, &[low, high]) in out.iter_mut().zip(pairs) {
            out[i] = pair(low, high);
        }
        if let (Some(&low), Some(out)) = (rest.first(), out.get_mut(len / 2)) {
            out[i] = pair(low, T::default());
        }
    }
}

/// Rows across the reduction: rows 2p and 2p + 1 give row p of the panel.
#[inline(always)]
fn pack_across<'a, T: Copy + Default + 'a, const P: usize>(
    out: &mut [[u32; P]],
    width: usize,
    len: usize,
    rows: impl Fn(usize) -> &'a [T],
    pair: impl Fn(T, T) -> u32,
) {
    let zeros = [T::default(); P];
    for (p, out) in out.iter_mut().enumerate() {
        let low = if 2 * p < len {
            rows(2 * p)
        } else {
            &zeros[..width]
        };
        let high = if 2 * p + 1 < len {
            rows(2 * p + 1)
        } else {
            &zeros[..width]
        };
        if let (Ok(low), Ok(high)) = (<&[T; P]>::try_from(low), <&[T; P]>::try_from(high)) {
            for i in 0..P {
                out[i] = pair(low[i], high[i]);
            }
        } else {
            out.fill(0);
            for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
                *out = pair(low, high);
            }
        }
    }
}

#[inline(always)]
fn pair_of_f32(low: f32, high: f32) -> u32 {
    round(low) >> 16 | round(high) & 0xffff_0000
}

#[inline(always)]
fn pair_of_bf16(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// The bits of `value` rounded to the nearest bf16, ties to even, in the upper half. NaN stays
/// one: its highest mantissa bit is set, so that no carry can reach the exponent.
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    }
}

/// Packing by transposing squares of 16 x 16 pairs in registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use half::bf16;

    /// Rows and columns of a square.
    const SIDE: usize = 16;
    type Square = [__m512i; SIDE];

    /// Values that are read as pairs of bf16.
    pub(super) trait Source: Copy + Default {
        /// 16 pairs from 32 values.
        ///
        /// # Safety
        /// The machine has AVX-512 with bf16.
        unsafe fn pairs(values: &[Self; 2 * SIDE]) -> __m512i;
    }

    impl Source for bf16 {
        #[inline(always)]
        unsafe fn pairs(values: &[Self; 2 * SIDE]) -> __m512i {
            // SAFETY: both are 64 bytes, of which every pattern is a value.
            unsafe { std::mem::transmute(*values) }
        }
    }

    impl Source for f32 {
        #[inline(always)]
        unsafe fn pairs(values: &[Self; 2 * SIDE]) -> __m512i {
            // SAFETY: an array of 32 f32 has the size of two vectors of 16, one of 32 bf16 that
            // of 16 pairs; the caller has checked for the instruction.
            unsafe {
                let [low, high]: [__m512; 2] = std::mem::transmute(*values);
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            }
        }
    }

    /// As [`super::pack_along`] for a panel of full width: its rows are `stride` apart, begin
    /// with the first of `values` and have `len` values.
    ///
    /// # Safety
    /// The machine has AVX-512 with bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pack_along<T: Source, const P: usize>(
        out: &mut [[u32; P]],
        values: &[T],
        stride: usize,
        len: usize,
    ) {
        for (s, out) in out.chunks_mut(SIDE).enumerate() {
            let from = 2 * SIDE * s;
            for first in (0..P).step_by(SIDE) {
                let width = SIDE.min(P - first);
                let mut square = [_mm512_setzero_si512(); SIDE];
                for (i, pairs) in square.iter_mut().enumerate().take(width) {
                    let row = &values[(first + i) * stride..][..len];
                    let padded;
                    let row = match row.get(from..).and_then(|r| r.first_chunk()) {
                        Some(values) => values,
                        None => {
                            padded = with_zeros(row, from);
                            &padded
                        }
                    };
                    // SAFETY: this function's caller has checked for the instructions.
                    *pairs = unsafe { T::pairs(row) };
                }
                for (out, column) in out.iter_mut().zip(transposed(square)) {
                    // SAFETY: both are 64 bytes, of which every pattern is a value.
                    let column: [u32; SIDE] = unsafe { std::mem::transmute(column) };
                    out[first..first + width].copy_from_slice(&column[..width]);
                }
            }
        }
    }

    /// The last values of a row, and zeros.
    fn with_zeros<T: Source>(row: &[T], from: usize) -> [T; 2 * SIDE] {
        let mut values = [T::default(); 2 * SIDE];
        for (to, &value) in values.iter_mut().zip(row.iter().skip(from)) {
            *to = value;
        }
        values
    }

    /// Exchanges pairs of rows, then pairs of those, within 128 bits, then whole lanes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transposed(rows: Square) -> Square {
        let mut pairs = rows;
        for i in (0..SIDE).step_by(2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Lane l of fours[4 i + j] holds rows 4 i to 4 i + 3 of column 4 l + j.
        let mut fours = pairs;
        for i in (0..SIDE).step_by(4) {
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
}
