//! Wide SIMD in a binary that is built for the baseline instruction set: the hot loops are
//! written in plain Rust, compiled once for each level, and the level is chosen at run time.
//!
//! Rust never fuses a multiplication with an addition on its own, so that a loop gives the same
//! bits at every level.

#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

/// Instruction sets that loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Elsewhere nothing makes the levels of x86-64.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) enum Simd {
    /// What every machine of the target has.
    Baseline,
    /// 256-bit vectors.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

/// The widest instruction set of this machine (the standard library remembers the answer).
#[inline]
pub(crate) fn level() -> Simd {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            return Simd::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Simd::Avx2;
        }
    }
    Simd::Baseline
}

/// Whether this machine multiplies bf16 values itself (`vdpbf16ps`).
#[inline]
pub(crate) fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether it does so in less time than it would take to widen them and to multiply in f32. Intel's
/// processors with AVX512_FP16 are those with AMX; their `vdpbf16ps` starts every other cycle, while
/// two fused multiply-adds of half the work start in each.
#[inline]
pub(crate) fn multiplies_bf16_faster() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static FASTER: LazyLock<bool> =
            LazyLock::new(|| !(is_intel() && is_x86_feature_detected!("avx512fp16")));
        multiplies_bf16() && *FASTER
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx]
        .map(u32::to_le_bytes)
        .concat()
        == b"GenuineIntel"
}

/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;

/// Where a cache line is wanted.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    /// In the first-level cache, soon.
    L1,
    /// In the second-level cache, in a while.
    L2,
    /// In the first-level cache, and in no other: it is used once.
    Once,
}

/// Asks for the cache line at an address, of which it may be known soon that it is needed; any
/// address will do. On other processors than x86-64 nothing is asked for.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T, wanted: Fetch) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_NTA, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: an instruction of every such processor, which never faults.
        unsafe {
            match wanted {
                Fetch::L1 => _mm_prefetch::<_MM_HINT_T0>(address.cast()),
                Fetch::L2 => _mm_prefetch::<_MM_HINT_T1>(address.cast()),
                Fetch::Once => _mm_prefetch::<_MM_HINT_NTA>(address.cast()),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, wanted);
}

/// Evaluates an expression compiled for every level of [`Simd`], in the version for this machine.
/// What the expression calls must be `#[inline(always)]` to be compiled for that level too.
macro_rules! vectorized {
    ($work:expr) => {
        $crate::device::simd::at_widest_level(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorized;

/// What [`vectorized`] calls. `work` is a closure that is `#[inline(always)]`: one that is not
/// inlined is compiled for the baseline.
#[inline(always)]
pub(crate) fn at_widest_level<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
        fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        match level() {
            // SAFETY: `level` has seen that this machine has these instructions.
            Simd::Avx512 => return unsafe { avx512(work) },
            // SAFETY: as above.
            Simd::Avx2 => return unsafe { avx2(work) },
            Simd::Baseline => {}
        }
    }
    work()
}

#[cfg(test)]
mod tests {
    #[inline(always)]
    fn scaled_sum(values: &mut [f32], scale: f32) -> f32 {
        let mut sum = 0.0;
        for v in values {
            *v = *v * scale + 1.0 / *v;
            sum += *v;
        }
        sum
    }

    #[test]
    fn the_widest_level_gives_the_bits_of_the_baseline() {
        let mut narrow: Vec<f32> = (1..1000).map(|i| 0.37 * i as f32).collect();
        let mut wide = narrow.clone();
        let sums = [
            scaled_sum(&mut narrow, 0.1),
            vectorized!(scaled_sum(&mut wide, 0.1)),
        ];
        assert_eq!(sums[0].to_bits(), sums[1].to_bits());
        assert_eq!(narrow, wide);
    }
}
