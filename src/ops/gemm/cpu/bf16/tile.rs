//! The innermost product: a tile of [`ROWS`] x [`COLS`] sums over packed panels.
//!
//! The register tiles and the panels follow Goto and van de Geijn 2008 ("Anatomy of
//! high-performance matrix multiplication"). With AMX four accumulators of 16 x 16 sums make the
//! tile, so that each operand that is loaded is used twice; with AVX-512 a strip of 8 rows is
//! 16 accumulators of 16 sums, in flight together.

use super::widened::Widened;
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
    pub(super) const ZERO: Self = Self([[0.0; COLS]; ROWS]);
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

    /// Whether a machine of this level has AVX-512 with bf16, whatever tiles are computed with.
    pub(super) fn has_avx512(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self, Self::Amx | Self::Avx512Bf16);
        #[cfg(not(target_arch = "x86_64"))]
        return false;
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

    /// Makes `wide` hold the steps of a right panel, where the level widens.
    pub(super) fn widen(&self, b: &[Step], wide: &mut Widened) {
        match self.level {
            // SAFETY: a machine of this level has AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::widen_avx2(wide, b) },
            Level::Plain => wide.set_right(b),
            #[cfg(target_arch = "x86_64")]
            Level::Amx | Level::Avx512Bf16 => {}
        }
    }

    /// tile\[i\]\[j\] (+)= Σ_p a\[i\]\[p\] · b\[p\]\[j\], each product being that of two pairs of
    /// bf16 (the lower index of the reduction in the lower half) and the sum of its two terms.
    /// Rows from `rows` on may stay as they are. `wide` holds `b` where the level widens.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn multiply(
        &self,
        a: &[Step],
        (b, wide): (&[Step], &mut Widened),
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        let b = &b[..a.len()];
        match self.level {
            // SAFETY: the tiles are configured for as long as `self` lives, and there are as many
            // steps of one side as of the other.
            #[cfg(target_arch = "x86_64")]
            Level::Amx => unsafe { x86::multiply_amx(a, b, tile, add) },
            // SAFETY: `Level::best` has seen that this machine has these instructions, and no
            // other code makes this level.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => unsafe { x86::multiply_avx512_bf16(a, b, tile, rows, add) },
            // SAFETY: as above; a machine with AVX-512 has AVX2 and FMA as well.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::multiply_avx2(wide, a, tile, rows, add) },
            Level::Plain => wide.multiply::<false>(a, tile, rows, add),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    };

    use super::{COLS, PAIRS, Step, Tile, Widened};

    const VECTOR: usize = 16;

    /// Four accumulators: the halves of the left panel's rows by those of the right one's columns.
    ///
    /// # Safety
    /// This thread's tiles are configured, and there are as many steps in `b` as in `a`.
    pub(super) unsafe fn multiply_amx(a: &[Step], b: &[Step], tile: &mut Tile, add: bool) {
        if a.is_empty() {
            if !add {
                *tile = Tile::ZERO;
            }
            return;
        }
        // SAFETY: reads as many steps as `a` and `b` hold, 2 KiB each, and reads and writes the
        // 4 KiB of `tile`. No other code uses the registers between the first line and the last.
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
                "tileloadd tmm4, [{a} + {narrow}]",
                "tileloadd tmm6, [{b} + {wide}]",
                "tileloadd tmm7, [{b} + {wide} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {narrow} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {wide}], tmm0",
                "tilestored [{sums} + {wide} + 64], tmm1",
                "tilestored [{sums} + {wide} + 2048], tmm2",
                "tilestored [{sums} + {wide} + 2112], tmm3",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) a.len() => _,
                sums = in(reg) tile,
                // Bytes of a row of 16 pairs, and of 32 pairs or sums.
                narrow = in(reg) PAIRS * size_of::<u32>(),
                wide = in(reg) COLS * size_of::<u32>(),
                add = in(reg) usize::from(add),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply_avx512_bf16(
        a: &[Step],
        b: &[Step],
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        const STRIP: usize = 8;
        let strips = tile.0.as_chunks_mut::<STRIP>().0.iter_mut();
        for (s, strip) in strips.enumerate().take(rows.div_ceil(STRIP)) {
            let mut sums = [[_mm512_setzero_ps(); COLS / VECTOR]; STRIP];
            if add {
                // SAFETY: 8 x 32 f32 on either side, row by row, as below.
                sums = unsafe {
                    std::mem::transmute::<[[f32; COLS]; STRIP], [[__m512; COLS / VECTOR]; STRIP]>(
                        *strip,
                    )
                };
            }
            for (a, b) in a.iter().zip(b) {
                let a = &a.as_chunks::<{ STRIP * PAIRS }>().0[s];
                for (p, b) in b.as_chunks::<COLS>().0.iter().enumerate() {
                    // SAFETY: arrays of 32 u32 and of two vectors of 512 bits have the same
                    // size, and every bit pattern is a value of both.
                    let b: [__m512bh; COLS / VECTOR] = unsafe { std::mem::transmute(*b) };
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = pairs(_mm512_set1_epi32(a[row * PAIRS + p] as i32));
                        for (sum, &b) in sums.iter_mut().zip(&b) {
                            *sum = _mm512_dpbf16_ps(*sum, a, b);
                        }
                    }
                }
            }
            // SAFETY: as above.
            *strip = unsafe {
                std::mem::transmute::<[[__m512; COLS / VECTOR]; STRIP], [[f32; COLS]; STRIP]>(sums)
            };
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
        a: &[Step],
        tile: &mut Tile,
        rows: usize,
        add: bool,
    ) {
        wide.multiply::<true>(a, tile, rows, add);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn widen_avx2(wide: &mut Widened, b: &[Step]) {
        wide.set_right(b);
    }
}
