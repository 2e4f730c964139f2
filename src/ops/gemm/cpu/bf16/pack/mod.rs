//! Operands cut into panels of bf16 pairs, as [`tile`](super::tile) reads them.
//!
//! Squares of 16 outer indices by 16 pairs are read as the operand is stored, turned where the
//! panel wants them the other way round, and written.

#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use std::ops::Range;

use half::bf16;

use super::Sided;
use super::left::LeftPanels;
use super::tile::{COLS, Level, PAIRS, Step, Tile};
use crate::device::simd::{Fetch, multiplies_bf16, prefetch, vectorized};
use crate::error::{Error, Result};
use crate::ops::math::rounded_to_bf16;
use crate::tensor::{DType, Tensor};

/// Which side of a product a panel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// A step is row by row.
    Left,
    /// A step is pair by pair.
    Right,
}

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

impl<'a> Values<'a> {
    /// A tensor's elements; an error where they are of another type or in another memory.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let found = || Error::operand("gemm", "f32 or bf16 in host memory", tensor.found());
        match tensor.dtype() {
            DType::Bf16 => tensor.bf16s().map(Self::Bf16).ok_or_else(found),
            _ => tensor.f32s().map(Self::F32).map_err(|_| found()),
        }
    }

    pub(crate) fn len(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// The elements of an operand that is to be multiplied in f32.
    pub(crate) fn f32s(self) -> Result<&'a [f32]> {
        match self {
            Self::F32(values) => Ok(values),
            Self::Bf16(_) => Err(Error::operand("gemm", "f32 for products in f32", "bf16")),
        }
    }
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

    /// As that side, where it lies so: whole panels of pairs, for the left one.
    pub(super) fn in_place(
        &self,
        side: Side,
        outer: usize,
        block: Range<usize>,
    ) -> Option<Sided<'a>> {
        match (self.values, side) {
            (Values::Bf16(values), Side::Left) if self.along => {
                LeftPanels::in_place(values, self.stride, outer, block).map(Sided::Left)
            }
            _ => None,
        }
    }

    /// Packs panels of `steps` steps each: outer indices from `outer` on and the reduction from
    /// index `from` on, up to the ends `outer_end` and `end`; what is beyond them is zero.
    pub(super) fn pack(
        &self,
        level: Level,
        side: Side,
        (out, steps): (&mut [Step], usize),
        outer: (usize, usize),
        reduction: (usize, usize),
    ) {
        let out = (out, steps);
        match self.values {
            Values::F32(values) => self.pack_values(values, level, side, out, outer, reduction),
            Values::Bf16(values) => self.pack_values(values, level, side, out, outer, reduction),
        }
    }

    fn pack_values<T: Value>(
        &self,
        values: &[T],
        level: Level,
        side: Side,
        out: (&mut [Step], usize),
        (outer, outer_end): (usize, usize),
        (from, end): (usize, usize),
    ) {
        let along = self.along;
        let (line, offset) = if along { (outer, from) } else { (from, outer) };
        let matrix = Matrix {
            values: &values[line * self.stride + offset..],
            stride: self.stride,
            outer: outer_end - outer,
            len: end - from,
        };
        if level.has_avx512() && multiplies_bf16() {
            // SAFETY: the machine has been seen to have the instructions.
            #[cfg(target_arch = "x86_64")]
            return unsafe { x86::pack(matrix, along, side, out) };
        }
        // SAFETY: plain vectors need no instructions.
        vectorized!(unsafe { pack::<Plain, T>(matrix, along, side, out) });
    }
}

/// The part of an operand that a panel is packed from, beginning at its first value.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    values: &'a [T],
    /// Distance of two stored rows.
    stride: usize,
    /// Outer indices there are; a panel may have more.
    outer: usize,
    /// Values of the reduction there are; a panel may have more.
    len: usize,
}

impl<T> Matrix<'_, T> {
    /// The first value of a block of stored rows, all of whose values may be read.
    ///
    /// # Panics
    /// When it goes beyond the values.
    #[inline(always)]
    fn block(&self, (row, col): (usize, usize), [rows, cols]: [usize; 2]) -> *const T {
        let first = &self.values[row * self.stride + col..];
        assert!((rows - 1) * self.stride + cols <= first.len());
        first.as_ptr()
    }
}

/// Values that are read as pairs of bf16.
trait Value: Copy + Default {
    fn pair(low: Self, high: Self) -> u32;

    /// Pairs of neighbours.
    ///
    /// # Safety
    /// The machine has AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn neighbours(values: &[Self; 2 * PAIRS]) -> x86::Vector;

    /// Pairs of one value of each.
    ///
    /// # Safety
    /// As above.
    #[cfg(target_arch = "x86_64")]
    unsafe fn zipped(low: &[Self; PAIRS], high: &[Self; PAIRS]) -> x86::Vector;
}

/// What a line of a square is held in while it is packed, with the instructions for it. All
/// functions ask for a machine that has them.
trait Line: Copy {
    const ZERO: Self;
    unsafe fn neighbours<T: Value>(values: &[T; 2 * PAIRS]) -> Self;
    unsafe fn zipped<T: Value>(low: &[T; PAIRS], high: &[T; PAIRS]) -> Self;
    unsafe fn transposed(square: [Self; PAIRS]) -> [Self; PAIRS];
    unsafe fn pairs(self) -> [u32; PAIRS];
}

/// Packs stored rows in the order in which they lie: panel by panel where they run along the
/// reduction, else step by step.
///
/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn pack<L: Line, T: Value>(
    matrix: Matrix<T>,
    along: bool,
    side: Side,
    (out, steps): (&mut [Step], usize),
) {
    let panels = out.len().checked_div(steps).unwrap_or(0);
    for i in 0..out.len() {
        let (panel, step) = match along {
            true => (i / steps, i % steps),
            false => (i % panels, i / panels),
        };
        let out = &mut out[panel * steps + step];
        let (outer, from) = (panel * COLS, 2 * PAIRS * step);
        // SAFETY: the caller's promise.
        unsafe {
            pack_step::<L, T>(matrix, along, side, out, (outer, from));
        }
    }
}

/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn pack_step<L: Line, T: Value>(
    matrix: Matrix<T>,
    along: bool,
    side: Side,
    out: &mut Step,
    (outer, from): (usize, usize),
) {
    for half in [0, PAIRS] {
        let place = (outer + half, from);
        // SAFETY: the caller's promise.
        unsafe {
            let mut square = match along {
                true => read_along::<L, T>(matrix, place),
                false => read_across::<L, T>(matrix, place),
            };
            if along == (side == Side::Right) {
                square = L::transposed(square);
            }
            let (first, stride) = match side {
                Side::Left => (half * PAIRS, PAIRS),
                Side::Right => (half, COLS),
            };
            for (i, line) in square.into_iter().enumerate() {
                out[first + i * stride..][..PAIRS].copy_from_slice(&line.pairs());
            }
        }
    }
}

/// Packs a tile as a step: its rows are outer indices of a left panel, its columns those of a right
/// one.
pub(super) fn pack_tile(level: Level, side: Side, tile: &Tile, out: &mut Step) {
    if level.has_avx512() && multiplies_bf16() {
        // SAFETY: the machine has been seen to have the instructions.
        #[cfg(target_arch = "x86_64")]
        return unsafe { x86::pack_tile(side, tile, out) };
    }
    // SAFETY: plain vectors need no instructions.
    vectorized!(unsafe { pack_sums::<Plain>(side, tile, out) });
}

/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn pack_sums<L: Line>(side: Side, Tile(sums): &Tile, out: &mut Step) {
    let lines = out.as_chunks_mut::<PAIRS>().0;
    match side {
        Side::Left => {
            for (line, row) in lines.iter_mut().zip(sums) {
                // SAFETY: the caller's promise.
                *line = unsafe { L::neighbours(row).pairs() };
            }
        }
        Side::Right => {
            let pairs = sums.as_chunks::<2>().0;
            for (lines, [low, high]) in lines.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                let halves = [low, high].map(|row| row.as_chunks::<PAIRS>().0);
                for (i, line) in lines.iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    *line = unsafe { L::zipped(&halves[0][i], &halves[1][i]).pairs() };
                }
            }
        }
    }
}

/// A square from stored rows that run along the reduction: a line for each outer index. The same
/// square of the next panel is asked for: a row is too short for the machine to see where this
/// leads.
///
/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn read_along<L: Line, T: Value>(
    matrix: Matrix<T>,
    (outer, from): (usize, usize),
) -> [L; PAIRS] {
    let mut square = [L::ZERO; PAIRS];
    if outer + PAIRS <= matrix.outer && from + 2 * PAIRS <= matrix.len {
        let first = matrix.block((outer, from), [PAIRS, 2 * PAIRS]);
        for (i, line) in square.iter_mut().enumerate() {
            // SAFETY: the caller's promise, and the block's.
            unsafe {
                let row = first.add(i * matrix.stride);
                let next = row.wrapping_add(COLS * matrix.stride);
                prefetch(next, Fetch::L2);
                prefetch(next.wrapping_add(PAIRS), Fetch::L2);
                *line = L::neighbours::<T>(&*row.cast());
            }
        }
        return square;
    }
    let width = PAIRS.min(matrix.outer.saturating_sub(outer));
    for (i, line) in square.iter_mut().enumerate().take(width) {
        let row = &matrix.values[(outer + i) * matrix.stride..][..matrix.len];
        // SAFETY: the caller's promise.
        *line = unsafe { L::neighbours(chunk(row, from, &mut [T::default(); _])) };
    }
    square
}

/// A square from stored rows that run across the reduction: a line for each pair of rows. The same
/// square of the next step is asked for.
///
/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn read_across<L: Line, T: Value>(
    matrix: Matrix<T>,
    (outer, from): (usize, usize),
) -> [L; PAIRS] {
    let mut square = [L::ZERO; PAIRS];
    if outer + PAIRS <= matrix.outer && from + 2 * PAIRS <= matrix.len {
        let first = matrix.block((from, outer), [2 * PAIRS, PAIRS]);
        for (p, line) in square.iter_mut().enumerate() {
            // SAFETY: the caller's promise, and the block's.
            unsafe {
                let low = first.add(2 * p * matrix.stride);
                let high = low.add(matrix.stride);
                prefetch(low.wrapping_add(2 * PAIRS * matrix.stride), Fetch::L2);
                prefetch(high.wrapping_add(2 * PAIRS * matrix.stride), Fetch::L2);
                *line = L::zipped::<T>(&*low.cast(), &*high.cast());
            }
        }
        return square;
    }
    let row = |i: usize| match i < matrix.len {
        true => &matrix.values[i * matrix.stride..][..matrix.outer],
        false => &[],
    };
    for (p, line) in square.iter_mut().enumerate() {
        let [low, high] = [0, 1].map(|i| row(from + 2 * p + i));
        // SAFETY: the caller's promise.
        *line = unsafe {
            L::zipped(
                chunk(low, outer, &mut [T::default(); _]),
                chunk(high, outer, &mut [T::default(); _]),
            )
        };
    }
    square
}

/// N values of a row from `from` on, in place or, where it has fewer, padded with zeros.
#[inline(always)]
fn chunk<'a, T: Copy, const N: usize>(
    row: &'a [T],
    from: usize,
    zeros: &'a mut [T; N],
) -> &'a [T; N] {
    let rest = row.get(from..).unwrap_or(&[]);
    match rest.first_chunk() {
        Some(values) => values,
        None => {
            zeros[..rest.len()].copy_from_slice(rest);
            zeros
        }
    }
}

impl Value for f32 {
    #[inline(always)]
    fn pair(low: f32, high: f32) -> u32 {
        rounded_to_bf16(low) >> 16 | rounded_to_bf16(high) & 0xffff_0000
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn neighbours(values: &[f32; 2 * PAIRS]) -> x86::Vector {
        let [low, high] = [0, PAIRS].map(|i| values[i..].first_chunk().expect("half of them"));
        // SAFETY: the caller's promise.
        unsafe { x86::rounded(low, high) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn zipped(low: &[f32; PAIRS], high: &[f32; PAIRS]) -> x86::Vector {
        // SAFETY: the caller's promise.
        unsafe { x86::zipped_halves(x86::rounded(low, high)) }
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn pair(low: bf16, high: bf16) -> u32 {
        u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn neighbours(values: &[bf16; 2 * PAIRS]) -> x86::Vector {
        // SAFETY: both are 64 bytes, of which every pattern is a value.
        unsafe { std::mem::transmute(*values) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn zipped(low: &[bf16; PAIRS], high: &[bf16; PAIRS]) -> x86::Vector {
        // SAFETY: both are 64 bytes, of which every pattern is a value, and the caller's promise.
        unsafe {
            let values = std::mem::transmute::<[[bf16; PAIRS]; 2], x86::Vector>([*low, *high]);
            x86::zipped_halves(values)
        }
    }
}

/// What the compiler makes vectors of.
#[derive(Clone, Copy)]
struct Plain([u32; PAIRS]);

impl Line for Plain {
    const ZERO: Self = Self([0; PAIRS]);

    #[inline(always)]
    unsafe fn neighbours<T: Value>(values: &[T; 2 * PAIRS]) -> Self {
        Self(std::array::from_fn(|i| {
            T::pair(values[2 * i], values[2 * i + 1])
        }))
    }

    #[inline(always)]
    unsafe fn zipped<T: Value>(low: &[T; PAIRS], high: &[T; PAIRS]) -> Self {
        Self(std::array::from_fn(|i| T::pair(low[i], high[i])))
    }

    #[inline(always)]
    unsafe fn transposed(square: [Self; PAIRS]) -> [Self; PAIRS] {
        std::array::from_fn(|i| Self(std::array::from_fn(|j| square[j].0[i])))
    }

    #[inline(always)]
    unsafe fn pairs(self) -> [u32; PAIRS] {
        self.0
    }
}
