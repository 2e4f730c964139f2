//! Operands cut into panels of bf16 pairs, as [`tile`](super::tile) reads them.

use half::bf16;

use crate::device::simd::vectorized;

/// One side of a product, seen as outer index x reduction index.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub values: Values<'a>,
    /// Distance of two rows of the stored matrix.
    pub stride: usize,
    /// Whether a stored row runs along the reduction (as in X and W of X Wᵀ) or across it.
    pub along: bool,
}

/// The elements of an operand, row-major.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Operand<'_> {
    /// Packs outer indices `outer..outer + P` and `out.len()` pairs of the reduction from index
    /// `from` on, up to the ends `outer_end` and `end`; what is beyond them is zero.
    pub(super) fn pack<const P: usize>(
        &self,
        out: &mut [[u32; P]],
        (outer, outer_end): (usize, usize),
        (from, end): (usize, usize),
    ) {
        let width = P.min(outer_end - outer);
        let len = (end - from).min(2 * out.len());
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
fn pack_along<'a, T: Copy + 'a, const P: usize>(
    out: &mut [[u32; P]],
    width: usize,
    len: usize,
    rows: impl Fn(usize) -> &'a [T],
    pair: impl Fn(T, T) -> u32,
) where
    T: Default,
{
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
        let low = if 2 * p < len { rows(2 * p) } else { &zeros[..width] };
        let high = if 2 * p + 1 < len { rows(2 * p + 1) } else { &zeros[..width] };
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
pub(super) fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() { bits | 0x0040_0000 } else { rounded }
}
