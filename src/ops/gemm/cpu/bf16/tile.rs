//! The innermost product: a tile of [`ROWS`] x [`COLS`] sums over packed panels.
//!
//! The register tiles and the panels follow Goto and van de Geijn 2008 ("Anatomy of
//! high-performance matrix multiplication"). With AMX four accumulators of 16 x 16 sums make the
//! tile, so that each operand that is loaded is used twice; with AVX-512 a strip of 8 rows is
//! 16 accumulators of 16 sums, in flight together.

#[cfg(target_arch = "x86_64")]
use crate::device::{
    amx::{self, Tiles},
    simd::{self, Simd},
};

/// Rows of a tile: outer indices of a left panel.
pub(crate) const ROWS: usize = 32;
/// Columns of a tile: outer indices of a right panel.
pub(crate) const COLS: usize = 32;
/// Pairs of the reduction in a step.
pub(super) const PAIRS: usize = 16;

/// So many pairs of each outer index of a panel: row by row in a left panel, pair by pair in a
/// right one, as AMX reads its operands.
pub(super) type Step = [u32; ROWS * PAIRS];
const _: () = assert!(ROWS == COLS);

/// The sums of a tile.
#[repr(align(64))]
#[derive(Clone)]
pub(crate) struct Tile(pub [[f32; COLS]; ROWS]);

impl Tile {
    pub(crate) const ZERO: Self = Self([[0.0; COLS]; ROWS]);
}

/// The instructions that a tile is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// `tdpbf16ps`: two products of bf16 and their sum in f32, 16 times for 16 x 16 sums.
    #[cfg(target_arch = "x86_64")]
    Amx,
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
    /// The best level of this machine (the answer is remembered).
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if amx::available() {
                return Self::Amx;
            }
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
        {
            let all = [Self::Amx, Self::Avx512Bf16, Self::Avx2, Self::Plain];
            let best = all.iter().position(|&level| level == Self::best());
            all[best.unwrap()..].to_vec()
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Self::Plain]
    }
}

/// Where the sums of a tile are: [`ROWS`] rows of [`COLS`] values.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub first: *mut f32,
    /// Distance of two rows.
    pub stride: usize,
}

impl From<&mut Tile> for Sums {
    fn from(tile: &mut Tile) -> Self {
        Self {
            first: tile.0.as_flattened_mut().as_mut_ptr(),
            stride: COLS,
        }
    }
}

/// Computes tiles on this thread.
pub(super) struct Multiplier {
    level: Level,
    #[cfg(target_arch = "x86_64")]
    _tiles: Option<Tiles>,
}

impl Multiplier {
    pub(super) fn new(level: Level) -> Self {
        Self {
            level,
            // SAFETY: `Level::best` has asked, and no other code makes this level.
            #[cfg(target_arch = "x86_64")]
            _tiles: (level == Level::Amx).then(|| unsafe { Tiles::new() }),
        }
    }

    /// sums\[i\]\[j\] (+)= Σ_p a\[i\]\[p\] · b\[p\]\[j\], each product being that of two pairs of
    /// bf16 (the lower index of the reduction in the lower half) and the sum of its two terms.
    /// Rows from `rows` on may stay as they are.
    ///
    /// # Safety
    /// All rows of `sums` are there, and nobody else reads or writes them meanwhile.
    pub(super) unsafe fn add(&self, a: &[Step], b: &[Step], sums: Sums, rows: usize, add: bool) {
        let b = &b[..a.len()];
        // SAFETY: the caller's promise; `Level::best` has seen that this machine has the level's
        // instructions, and no other code makes a level. A machine with AVX-512 has AVX2 and FMA
        // as well. The tiles are configured for as long as `self` lives.
        unsafe {
            match self.level {
                #[cfg(target_arch = "x86_64")]
                Level::Amx => x86::multiply_amx(a, b, sums, add),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Bf16 => x86::multiply_avx512_bf16(a, b, sums, rows, add),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => x86::multiply_avx2(a, b, sums, rows, add),
                Level::Plain => multiply_widened::<false>(a, b, sums, rows, add),
            }
        }
    }
}

/// Widens to f32, for a strip of the tile at a time so that its sums stay in registers.
///
/// # Safety
/// As [`Multiplier::add`].
#[inline(always)]
unsafe fn multiply_widened<const FUSED: bool>(
    a: &[Step],
    b: &[Step],
    out: Sums,
    rows: usize,
    add: bool,
) {
    const STRIP: usize = 4;
    const WIDTH: usize = 16;
    for first_row in (0..rows).step_by(STRIP) {
        for first_col in (0..COLS).step_by(WIDTH) {
            let place = |row| {
                let offset = (first_row + row) * out.stride + first_col;
                out.first.wrapping_add(offset).cast::<[f32; WIDTH]>()
            };
            let mut sums = [[0.0f32; WIDTH]; STRIP];
            if add {
                // SAFETY: the caller's promise.
                sums = std::array::from_fn(|row| unsafe { *place(row) });
            }
            for (a, b) in a.iter().zip(b) {
                let a: [&[u32]; STRIP] =
                    std::array::from_fn(|row| &a[(first_row + row) * PAIRS..][..PAIRS]);
                for (p, b) in b.as_chunks::<COLS>().0.iter().enumerate() {
                    for (sums, a) in sums.iter_mut().zip(a) {
                        for (sum, &b) in sums.iter_mut().zip(&b[first_col..][..WIDTH]) {
                            *sum = add_product::<FUSED>(*sum, low(a[p]), low(b));
                            *sum = add_product::<FUSED>(*sum, high(a[p]), high(b));
                        }
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { *place(row) = *sums };
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
    use std::arch::asm;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{COLS, PAIRS, Step, Sums};

    const VECTOR: usize = 16;

    /// Four accumulators: the halves of the left panel's rows by those of the right one's columns.
    ///
    /// # Safety
    /// As [`super::Multiplier::add`]; this thread's tiles are configured, and there are as many
    /// steps in `b` as in `a`.
    pub(super) unsafe fn multiply_amx(a: &[Step], b: &[Step], sums: Sums, add: bool) {
        if a.is_empty() {
            // SAFETY: the caller's promise.
            return unsafe { super::multiply_widened::<false>(a, b, sums, super::ROWS, add) };
        }
        let stride = sums.stride * size_of::<f32>();
        // SAFETY: reads as many steps as `a` and `b` hold, 2 KiB each, and reads and writes sums
        // that the caller says are there. No other code uses the tiles between the first line
        // and the last.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{upper} + {stride}]",
                "tileloadd tmm1, [{upper} + {stride} + 64]",
                "tileloadd tmm2, [{lower} + {stride}]",
                "tileloadd tmm3, [{lower} + {stride} + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm6, [{b} + {b_row}]",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {a_row} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{upper} + {stride}], tmm0",
                "tilestored [{upper} + {stride} + 64], tmm1",
                "tilestored [{lower} + {stride}], tmm2",
                "tilestored [{lower} + {stride} + 64], tmm3",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) a.len() => _,
                upper = in(reg) sums.first,
                lower = in(reg) sums.first.add(16 * sums.stride),
                stride = in(reg) stride,
                a_row = in(reg) PAIRS * size_of::<u32>(),
                b_row = in(reg) COLS * size_of::<u32>(),
                add = in(reg) usize::from(add),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// # Safety
    /// As [`super::Multiplier::add`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply_avx512_bf16(
        a: &[Step],
        b: &[Step],
        out: Sums,
        rows: usize,
        add: bool,
    ) {
        const STRIP: usize = 8;
        for first in (0..rows).step_by(STRIP) {
            let place = |row: usize, part: usize| {
                let offset = (first + row) * out.stride + part * VECTOR;
                out.first.wrapping_add(offset)
            };
            let mut sums = [[_mm512_setzero_ps(); COLS / VECTOR]; STRIP];
            if add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (part, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        *sum = unsafe { _mm512_loadu_ps(place(row, part)) };
                    }
                }
            }
            for (a, b) in a.iter().zip(b) {
                let strip: &[u32; STRIP * PAIRS] = a[first * PAIRS..]
                    .first_chunk()
                    .expect("strips divide the rows of a tile");
                for (p, b) in b.as_chunks::<COLS>().0.iter().enumerate() {
                    // SAFETY: arrays of 32 u32 and of two vectors of 512 bits have the same
                    // size, and every bit pattern is a value of both.
                    let b: [__m512bh; COLS / VECTOR] = unsafe { std::mem::transmute(*b) };
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = pairs(_mm512_set1_epi32(strip[row * PAIRS + p] as i32));
                        for (sum, &b) in sums.iter_mut().zip(&b) {
                            *sum = _mm512_dpbf16_ps(*sum, a, b);
                        }
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (part, &sum) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { _mm512_storeu_ps(place(row, part), sum) };
                }
            }
        }
    }

    #[inline(always)]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: two names of the same 512 bits.
        unsafe { std::mem::transmute(bits) }
    }

    /// # Safety
    /// As [`super::Multiplier::add`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply_avx2(a: &[Step], b: &[Step], out: Sums, rows: usize, add: bool) {
        // SAFETY: the caller's promise.
        unsafe { super::multiply_widened::<true>(a, b, out, rows, add) };
    }
}
