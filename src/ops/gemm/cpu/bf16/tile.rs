//! The innermost product: a tile of [`ROWS`] x [`COLS`] sums over packed panels.
//!
//! The register tiles and the panels follow Goto and van de Geijn 2008 ("Anatomy of
//! high-performance matrix multiplication"). With AMX four accumulators of 16 x 16 sums make the
//! tile, so that each operand that is loaded is used twice; with AVX-512 a strip of 8 rows is
//! 16 accumulators of 16 sums, in flight together.

use super::STEPS;
use super::left::{LeftPanel, Lines};
use super::widened::Widened;
use crate::device::simd::vectorized;
#[cfg(target_arch = "x86_64")]
use crate::device::{
    amx::{self, Tiles},
    simd::{self, Simd},
};

/// Rows of a tile: outer indices of a left panel.
pub(crate) const ROWS: usize = 32;
/// Columns of a tile: outer indices of a right panel.
pub(crate) const COLS: usize = 32;
/// Rows of a tile that AVX-512 with BF16 computes at a time.
pub(super) const STRIP: usize = 8;
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

    /// Rows and columns exchanged.
    #[inline(always)]
    pub(super) fn transposed(&self) -> Self {
        let mut turned = Self::ZERO;
        for (row, sums) in self.0.iter().enumerate() {
            for (col, &sum) in sums.iter().enumerate() {
                turned.0[col][row] = sum;
            }
        }
        turned
    }
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
    /// Widened to f32, with fused multiply-adds of 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Widened to f32, with fused multiply-adds of 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Widened to f32, in plain Rust.
    Plain,
}

impl Level {
    /// All of them, the best first.
    #[cfg(target_arch = "x86_64")]
    const ALL: [Self; 5] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512,
        Self::Avx2,
        Self::Plain,
    ];
    #[cfg(not(target_arch = "x86_64"))]
    const ALL: [Self; 1] = [Self::Plain];

    /// The fastest level of this machine (what the machine has is remembered).
    pub(crate) fn best() -> Self {
        let is_fast = |level: &Self| match level {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => simd::multiplies_bf16_faster(),
            _ => true,
        };
        let mut available = Self::available().filter(is_fast);
        available.next().unwrap_or(Self::Plain)
    }

    /// All levels of this machine.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| match level {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => amx::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => simd::multiplies_bf16(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => simd::level() == Simd::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => simd::level() != Simd::Baseline,
            Self::Plain => true,
        })
    }

    /// Whether left panels go by one at a time, right ones in L2, and each is asked for line by line
    /// while the one before it is multiplied. Weights then come from memory as fast as they are used;
    /// asked for at once, they hold up what is loaded meanwhile. Otherwise right panels go by, each
    /// part of which, in L1 or widened in L2, serves many left ones in L2.
    pub(super) fn streams_left(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Whether a machine of this level has AVX-512, whatever tiles are computed with.
    pub(super) fn has_avx512(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self, Self::Amx | Self::Avx512Bf16 | Self::Avx512);
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }
}

/// Computes tiles of left panels and a right one on this thread.
pub(crate) struct Multiplier<'r> {
    level: Level,
    right: &'r [Step],
    wide: Widened,
    #[cfg(target_arch = "x86_64")]
    _tiles: Option<Tiles>,
}

impl<'r> Multiplier<'r> {
    pub(crate) fn new(level: Level) -> Self {
        Self {
            level,
            right: &[],
            wide: Widened::default(),
            // SAFETY: `Level::available` has asked, and no other code makes this level.
            #[cfg(target_arch = "x86_64")]
            _tiles: (level == Level::Amx).then(|| unsafe { Tiles::new() }),
        }
    }

    /// Most steps of a right panel that left ones go by in turn: half of an L1 cache. Where single
    /// left panels go by, all of them.
    pub(super) fn part_steps(&self) -> usize {
        match self.level.streams_left() {
            true => STEPS,
            false => 10,
        }
    }

    /// Takes these steps of a right panel, widened where the level widens.
    pub(super) fn set_right(&mut self, steps: &'r [Step]) {
        self.right = steps;
        match self.level {
            #[cfg(target_arch = "x86_64")]
            Level::Amx | Level::Avx512Bf16 => {}
            _ => vectorized!(self.wide.set_right(steps)),
        }
    }

    /// tile\[i\]\[j\] (+)= Σ_p left\[i\]\[p\] · right\[p\]\[j\], each product being that of
    /// two pairs of bf16 (the lower index of the reduction in the lower half) and the sum of its two
    /// terms. Rows from `rows` on may stay as they are. Where single left panels go by, the lines
    /// `ahead` are asked for, some at every step of 8 rows.
    ///
    /// # Panics
    /// Where the right panel has other steps than `left`.
    pub(super) fn multiply(
        &mut self,
        left: LeftPanel,
        (tile, add): (&mut Tile, bool),
        rows: usize,
        ahead: Option<&mut Lines>,
    ) {
        assert_eq!(left.steps(), self.right.len());
        #[cfg(not(target_arch = "x86_64"))]
        let _ = ahead;
        let wide = &mut self.wide;
        match self.level {
            // SAFETY: the tiles are configured for as long as `self` lives, and there are as many
            // steps of one side as of the other.
            #[cfg(target_arch = "x86_64")]
            Level::Amx => unsafe { x86::multiply_amx(left, self.right, tile, add) },
            // SAFETY: `Level::available` has seen that this machine has these instructions, and no
            // other code makes this level.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => unsafe {
                let sums = (tile.0.as_mut_ptr().cast(), COLS, add);
                x86::multiply_avx512_bf16(left, self.right, sums, rows, ahead);
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { wide.multiply_avx512(left, tile, rows, add) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::multiply_avx2(wide, left, tile, rows, add) },
            Level::Plain => wide.multiply::<false>(left, tile, rows, add),
        }
    }

    /// Whether [`Self::multiply_in_place`] is there.
    pub(super) fn multiplies_in_place(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.level == Level::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// As [`Self::multiply`] for sums that lie in rows `stride` apart, from `first` on.
    ///
    /// # Safety
    /// [`ROWS`] rows of [`COLS`] values are there, which nobody else reads or writes meanwhile, and
    /// [`Self::multiplies_in_place`] has said yes.
    pub(super) unsafe fn multiply_in_place(
        &self,
        left: LeftPanel,
        (first, stride, add): (*mut f32, usize, bool),
    ) {
        assert_eq!(left.steps(), self.right.len());
        // SAFETY: as for `multiply`, and the caller's promise.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            x86::multiply_avx512_bf16(left, self.right, (first, stride, add), ROWS, None);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("the caller's promise, {first:?} {stride} {add}");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use half::bf16;

    use super::{COLS, LeftPanel, Lines, ROWS, STRIP, Step, Tile, Widened};
    use crate::device::simd::{Fetch, prefetch};

    const VECTOR: usize = 16;

    /// Four accumulators: the halves of the left panel's rows by those of the right one's columns.
    ///
    /// # Safety
    /// This thread's tiles are configured, and there are as many steps in `b` as in `a`.
    pub(super) unsafe fn multiply_amx(a: LeftPanel, b: &[Step], tile: &mut Tile, add: bool) {
        if b.is_empty() {
            if !add {
                *tile = Tile::ZERO;
            }
            return;
        }
        let [row, step] = a.distances().map(|values| values * size_of::<bf16>());
        // SAFETY: reads as many steps as `a` and `b` hold, 32 rows of 64 bytes and 2 KiB each, and
        // reads and writes the 4 KiB of `tile`. No other code uses the registers between the first
        // line and the last.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{sums} + {wide}]",
                "tileloadd tmm1, [{sums} + {wide} + 64]",
                "tileloadd tmm2, [{sums} + {wide} + 2048]",
                "tileloadd tmm3, [{sums} + {wide} + 2112]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{upper} + {row}]",
                "tileloadd tmm6, [{b} + {wide}]",
                "tileloadd tmm7, [{b} + {wide} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, {step}",
                "add {lower}, {step}",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {wide}], tmm0",
                "tilestored [{sums} + {wide} + 64], tmm1",
                "tilestored [{sums} + {wide} + 2048], tmm2",
                "tilestored [{sums} + {wide} + 2112], tmm3",
                // The upper and the lower half of the rows.
                upper = inout(reg) a.as_ptr() => _,
                lower = inout(reg) a.as_ptr().byte_add(ROWS / 2 * row) => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) b.len() => _,
                sums = in(reg) tile,
                row = in(reg) row,
                step = in(reg) step,
                // Bytes of a row of 32 pairs or sums.
                wide = in(reg) COLS * size_of::<u32>(),
                add = in(reg) usize::from(add),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Sums lie in rows so many values apart.
    ///
    /// # Safety
    /// The machine has the instructions, there are as many steps in `b` as in `a`, and 32 sums in each
    /// of as many strips of 8 rows as `rows` need, 4 at most.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply_avx512_bf16(
        a: LeftPanel,
        b: &[Step],
        (first, stride, add): (*mut f32, usize, bool),
        rows: usize,
        mut ahead: Option<&mut Lines>,
    ) {
        let [row, step] = a.distances();
        for s in 0..rows.min(ROWS).div_ceil(STRIP) {
            let mut sums = [[_mm512_setzero_ps(); COLS / VECTOR]; STRIP];
            // SAFETY: the caller's promise, here and below.
            let place = |r, i| unsafe { first.add((s * STRIP + r) * stride + i * VECTOR) };
            if add {
                for r in 0..STRIP {
                    (0..COLS / VECTOR).for_each(|i| prefetch(place(r, i), Fetch::L1));
                }
            }
            for (i, b) in b.iter().enumerate() {
                if let Some(ahead) = &mut ahead {
                    ahead.prefetch_some();
                }
                for (p, b) in b.as_chunks::<COLS>().0.iter().enumerate() {
                    // SAFETY: arrays of 32 u32 and of two vectors of 512 bits have the same
                    // size, and every bit pattern is a value of both.
                    let b: [__m512bh; COLS / VECTOR] = unsafe { std::mem::transmute(*b) };
                    for (r, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: a pair of one of the panel's rows and steps.
                        let a = unsafe {
                            let first = a.as_ptr().add((s * STRIP + r) * row + i * step);
                            first.cast::<i32>().add(p).read_unaligned()
                        };
                        let a = pairs(_mm512_set1_epi32(a));
                        for (sum, &b) in sums.iter_mut().zip(&b) {
                            *sum = _mm512_dpbf16_ps(*sum, a, b);
                        }
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (i, mut sum) in sums.into_iter().enumerate() {
                    unsafe {
                        if add {
                            sum = _mm512_add_ps(_mm512_loadu_ps(place(r, i)), sum);
                        }
                        _mm512_storeu_ps(place(r, i), sum);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: two names of the same 512 bits.
        unsafe { std::mem::transmute(bits) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply_avx2(
        wide: &mut Widened,
        a: LeftPanel,
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        wide.multiply::<true>(a, tile, rows, add);
    }
}
