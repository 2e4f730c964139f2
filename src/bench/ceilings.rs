//! What the machine can do at most: the rates that measured rates are held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use crate::device::{Device, Precision};
#[cfg(target_arch = "x86_64")]
use crate::device::{amx, simd::multiplies_bf16_faster};

/// Rates of the host's cores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// FLOP a second of f32 fused multiply-adds in registers, one thread.
    pub f32_flop_per_s_one_thread: f64,
    /// The same, all threads.
    pub f32_flop_per_s: f64,
    /// FLOP a second of bf16 products added to f32 (AMX, else AVX512_BF16), one thread, where the
    /// machine has them and they are faster than f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16_flop_per_s_one_thread: Option<f64>,
    /// The same, all threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16_flop_per_s: Option<f64>,
    /// Bytes a second of copying what no cache holds, bytes read and bytes written both counted,
    /// one thread.
    pub copy_bytes_per_s_one_thread: f64,
    /// The same, all threads.
    pub copy_bytes_per_s: f64,
}

/// Each rate is the best of so many tries: whatever else runs can only lower it.
const TRIES: usize = 8;
/// Time of one try of arithmetic.
const TRY: Duration = Duration::from_millis(10);
/// Most bytes of one side of the copy.
const MOST_COPIED: usize = 256 << 20;

impl Ceilings {
    /// Measures the host's cores: about a second. `cache_bytes` is the size of the last cache
    /// before memory.
    pub fn measure(device: &Device, cache_bytes: usize) -> Self {
        // Twice: all tries of a rate lie so close together that one core can be away for all.
        let [one, other] = [(); 2].map(|()| Self::measure_once(device, cache_bytes));
        let better = |rate: fn(&Self) -> f64| rate(&one).max(rate(&other));
        let better_of_some = |rate: fn(&Self) -> Option<f64>| {
            let rates = rate(&one).zip(rate(&other));
            rates.map(|(one, other)| one.max(other))
        };
        Self {
            f32_flop_per_s_one_thread: better(|c| c.f32_flop_per_s_one_thread),
            f32_flop_per_s: better(|c| c.f32_flop_per_s),
            bf16_flop_per_s_one_thread: better_of_some(|c| c.bf16_flop_per_s_one_thread),
            bf16_flop_per_s: better_of_some(|c| c.bf16_flop_per_s),
            copy_bytes_per_s_one_thread: better(|c| c.copy_bytes_per_s_one_thread),
            copy_bytes_per_s: better(|c| c.copy_bytes_per_s),
        }
    }

    fn measure_once(device: &Device, cache_bytes: usize) -> Self {
        let threads = device.threads();
        let rate = |kernel, threads| device.run(|| flop_rate(kernel, threads));
        let bf16 = |threads| bf16_kernel().map(|kernel| rate(kernel, threads));
        let len = (4 * cache_bytes).min(MOST_COPIED) / 8;
        let from = vec![1u64; len];
        let mut to = vec![2u64; len];
        let mut copy = |threads| device.run(|| copy_rate(&from, &mut to, threads));
        Self {
            f32_flop_per_s_one_thread: rate(f32_kernel(), 1),
            f32_flop_per_s: rate(f32_kernel(), threads),
            bf16_flop_per_s_one_thread: bf16(1),
            bf16_flop_per_s: bf16(threads),
            copy_bytes_per_s_one_thread: copy(1),
            copy_bytes_per_s: copy(threads),
        }
    }
}

impl Ceilings {
    /// FLOP a second of matrix products of that precision, all threads.
    pub fn flop_per_s(&self, precision: Precision) -> f64 {
        match (precision, self.bf16_flop_per_s) {
            (Precision::Bf16, Some(rate)) => rate,
            _ => self.f32_flop_per_s,
        }
    }
}

/// Size of the last cache before memory in bytes, as Linux says; 32 MiB where nothing does.
pub fn last_level_cache() -> usize {
    let sizes = (0..8).filter_map(|index| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        let kib: usize = text.trim().strip_suffix('K')?.parse().ok()?;
        kib.checked_mul(1024)
    });
    sizes.max().unwrap_or(32 << 20)
}

/// Name of the processor, where the system says it.
pub fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Bytes a second that `threads` threads copy, both ways counted.
fn copy_rate(from: &[u64], to: &mut [u64], threads: usize) -> f64 {
    let chunk = from.len().div_ceil(threads.max(1)).max(1);
    let mut best = f64::INFINITY;
    for _ in 0..TRIES {
        let began = Instant::now();
        let pairs = to.par_chunks_mut(chunk).zip(from.par_chunks(chunk));
        pairs.for_each(|(to, from)| to.copy_from_slice(from));
        best = best.min(began.elapsed().as_secs_f64());
        black_box(&mut *to);
    }
    2.0 * size_of_val(from) as f64 / best
}

/// Arithmetic in registers.
#[derive(Clone, Copy)]
struct Kernel {
    /// So many rounds; the result depends on all of them.
    run: fn(usize) -> f32,
    /// FLOP of a round.
    flop: usize,
}

/// FLOP a second that `threads` threads do together.
fn flop_rate(kernel: Kernel, threads: usize) -> f64 {
    let mut rounds = 1 << 10;
    let mut best = 0.0f64;
    let mut tries = 0;
    while tries < TRIES {
        let began = Instant::now();
        let sum: f32 = (0..threads)
            .into_par_iter()
            .map(|_| (kernel.run)(rounds))
            .sum();
        let taken = began.elapsed();
        black_box(sum);
        best = best.max((threads * rounds * kernel.flop) as f64 / taken.as_secs_f64().max(1e-9));
        match taken < TRY {
            true => rounds *= 2,
            false => tries += 1,
        }
    }
    best
}

/// Accumulators in flight: enough to hide the latency of an addition in every pipe, and as many as
/// 16 registers allow beside two operands; of more the compiler keeps some on the stack, where a
/// thread is slow or fast as its stack lies.
#[cfg(target_arch = "x86_64")]
const ACCUMULATORS: usize = 12;

fn f32_kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Kernel {
                // SAFETY: the machine has just been seen to have AVX-512F.
                run: |rounds| unsafe { x86::f32_avx512(rounds) },
                flop: ACCUMULATORS * 16 * 2,
            };
        }
        if is_x86_feature_detected!("fma") {
            return Kernel {
                // SAFETY: the machine has just been seen to have FMA.
                run: |rounds| unsafe { x86::f32_fma(rounds) },
                flop: ACCUMULATORS * 8 * 2,
            };
        }
    }
    Kernel {
        run: f32_portable,
        flop: PORTABLE_LANES * 2,
    }
}

fn bf16_kernel() -> Option<Kernel> {
    #[cfg(target_arch = "x86_64")]
    if amx::available() {
        return Some(Kernel {
            // SAFETY: the machine has just been seen to have AMX.
            run: |rounds| unsafe { x86::bf16_amx(rounds) },
            flop: x86::AMX_ACCUMULATORS * 16 * 16 * 32 * 2,
        });
    }
    #[cfg(target_arch = "x86_64")]
    if multiplies_bf16_faster() {
        return Some(Kernel {
            // SAFETY: the machine has just been seen to have AVX512_BF16.
            run: |rounds| unsafe { x86::bf16_avx512(rounds) },
            flop: ACCUMULATORS * 32 * 2,
        });
    }
    None
}

const PORTABLE_LANES: usize = 64;

/// A product and a sum in lanes that the compiler makes vectors of.
fn f32_portable(rounds: usize) -> f32 {
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut lanes = [1.0f32; PORTABLE_LANES];
    for _ in 0..rounds {
        for lane in &mut lanes {
            *lane = *lane * x + y;
        }
    }
    lanes.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{ACCUMULATORS, amx::Tiles};

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_avx512(rounds: usize) -> f32 {
        let (x, y) = (black_box(0.999f32), black_box(0.001f32));
        let (x, y) = (_mm512_set1_ps(x), _mm512_set1_ps(y));
        let mut sums = [_mm512_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        sums.map(|sum| _mm512_reduce_add_ps(sum)).iter().sum()
    }

    #[target_feature(enable = "avx512bf16,avx512f")]
    pub(super) fn bf16_avx512(rounds: usize) -> f32 {
        let (x, y) = (black_box(0.999f32), black_box(0.001f32));
        let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(y));
        let mut sums = [_mm512_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, x);
            }
        }
        sums.map(|sum| _mm512_reduce_add_ps(sum)).iter().sum()
    }

    /// Tiles that are added to; the others hold operands.
    pub(super) const AMX_ACCUMULATORS: usize = 6;

    /// # Safety
    /// [`super::amx::available`] has said yes.
    pub(super) unsafe fn bf16_amx(rounds: usize) -> f32 {
        let mut sums = [0.0f32; 16];
        // SAFETY: the caller's promise.
        let tiles = unsafe { Tiles::new() };
        // SAFETY: writes the 16 values of one row, as the distance of two rows is none; what was
        // in the tiles does not matter, and they are configured.
        unsafe {
            asm!(
                "tilezero tmm6",
                "tilezero tmm7",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "2:",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "tdpbf16ps tmm1, tmm6, tmm7",
                "tdpbf16ps tmm2, tmm6, tmm7",
                "tdpbf16ps tmm3, tmm6, tmm7",
                "tdpbf16ps tmm4, tmm6, tmm7",
                "tdpbf16ps tmm5, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilestored [{sums} + {stride}], tmm0",
                rounds = inout(reg) rounds.max(1) => _,
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) 0usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        drop(tiles);
        sums[0]
    }

    #[target_feature(enable = "avx,fma")]
    pub(super) fn f32_fma(rounds: usize) -> f32 {
        let (x, y) = (black_box(0.999f32), black_box(0.001f32));
        let (x, y) = (_mm256_set1_ps(x), _mm256_set1_ps(y));
        let mut sums = [_mm256_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        sums.map(|sum| _mm256_cvtss_f32(sum)).iter().sum()
    }
}
