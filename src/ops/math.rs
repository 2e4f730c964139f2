//! Arithmetic that several operators share, written so that loops over it vectorise: no
//! branches, no calls, and sums in a fixed order. All of it is `#[inline(always)]`, for use
//! inside [`vectorized!`](crate::device::simd::vectorized).

use super::stored::Stored;

/// Independent partial sums of a reduction: enough to hide the latency of an addition.
pub(crate) const LANES: usize = 32;

/// ⟨a, b⟩.
#[inline(always)]
pub(crate) fn dot<A: Stored>(a: &[A], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

/// ‖a − b‖².
#[inline(always)]
pub(crate) fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| (a - b) * (a - b))
}

/// Σ_i term(a_i, b_i), in an order that depends on the length alone. Every index into the
/// partial sums is a constant, so that they stay in vector registers.
#[inline(always)]
fn sum_of<A: Stored>(a: &[A], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += term(a[i].get(), b[i]);
        }
    }
    let mut rest = 0.0;
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        rest += term(a.get(), b);
    }
    add_up(lanes) + rest
}

/// `out += scale * row`.
#[inline(always)]
pub(crate) fn add_scaled(out: &mut [f32], scale: f32, row: &[f32]) {
    for (o, r) in out.iter_mut().zip(row) {
        *o += scale * r;
    }
}

/// The sum of the lanes, by halves. The halves pass through memory once: from the narrow vectors
/// of the last additions the compiler otherwise concludes that the whole loop before them, which
/// is where the time goes, should use such vectors too.
#[inline(always)]
pub(crate) fn add_up(lanes: [f32; LANES]) -> f32 {
    let sixteen: [f32; 16] = std::array::from_fn(|i| lanes[i] + lanes[i + 16]);
    let sixteen = std::hint::black_box(sixteen);
    let eight: [f32; 8] = std::array::from_fn(|i| sixteen[i] + sixteen[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The bits of `value` rounded to the nearest bf16, ties to even, in the upper half. NaN stays
/// one: its highest mantissa bit is set, so that no carry can reach the exponent.
#[inline(always)]
pub(crate) fn rounded_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    }
}

/// 1.5 * 2^23: adding it rounds to the nearest integer, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// e^x with a relative error below 1.3e-7 wherever the result is a normal number; 0 below
/// -104, infinity above 89.
///
/// Range reduction after Cody and Waite (ln 2 in two parts, the first short enough for the
/// product to be exact), then a polynomial through the Chebyshev nodes.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Written so that NaN passes through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let (r, power) = reduced(x);
    // 2^n in two factors: n may lie outside the exponents of normal numbers.
    let half = power >> 1;
    exp_near_zero(r) * power_of_two(half) * power_of_two(power - half)
}

/// The same for x <= 0; 0 below -87.
#[inline(always)]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    let clamped = if x < -87.0 { -87.0 } else { x };
    let (r, power) = reduced(clamped);
    let y = exp_near_zero(r) * power_of_two(power);
    if x < -87.0 { 0.0 } else { y }
}

/// r and n with x = r + n ln(2), |r| <= ln(2) / 2.
#[inline(always)]
fn reduced(x: f32) -> (f32, i32) {
    const LN2_HIGH: f32 = 0.693_115_23;
    const LN2_LOW: f32 = 3.194_618_3e-5;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    (x - n * LN2_HIGH - n * LN2_LOW, power)
}

/// 2^x for x <= 0, to a relative error below 1.3e-7; 0 below -126.
#[inline(always)]
pub(crate) fn exp2_of_negative(x: f32) -> f32 {
    let clamped = if x < -126.0 { -126.0 } else { x };
    let shifted = clamped + ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let fraction = clamped - (shifted - ROUND);
    let y = exp_near_zero(fraction * std::f32::consts::LN_2) * power_of_two(power);
    if x < -126.0 { 0.0 } else { y }
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// e^r for |r| <= ln(2) / 2; the polynomial alone is off by at most 1.1e-8, relative.
#[inline(always)]
fn exp_near_zero(r: f32) -> f32 {
    let mut p = 1.392_625_1e-3;
    p = p * r + 8.363_233e-3;
    p = p * r + 4.166_655_2e-2;
    p = p * r + 1.666_657_6e-1;
    p = p * r + 0.5;
    p * (r * r) + r + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst_relative_error(
        range: std::ops::Range<f32>,
        got: impl Fn(f32) -> f32,
        want: impl Fn(f64) -> f64,
    ) -> f64 {
        let n = 2_000_000;
        let step = (range.end - range.start) / n as f32;
        (0..n)
            .map(|i| range.start + i as f32 * step)
            .map(|x| (f64::from(got(x)) / want(x.into()) - 1.0).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_its_stated_error() {
        for range in [-87.0..88.7, -1.0..1.0, -0.01..0.01] {
            let error = worst_relative_error(range.clone(), exp, f64::exp);
            assert!(error < 1.3e-7, "{error:e} in {range:?}");
        }
    }

    #[test]
    fn exponentials_of_negative_numbers_are_within_their_stated_error() {
        for range in [-126.0..0.0, -1.0..0.0] {
            let error = worst_relative_error(range.clone(), exp2_of_negative, f64::exp2);
            assert!(error < 1.3e-7, "{error:e} in {range:?}");
        }
        for range in [-87.0..0.0, -1.0..0.0] {
            let error = worst_relative_error(range.clone(), exp_of_negative, f64::exp);
            assert!(error < 1.3e-7, "{error:e} in {range:?}");
        }
    }

    #[test]
    fn exponentials_are_right_at_the_ends_of_their_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        // Subnormal results lose relative, not absolute precision.
        assert!((f64::from(exp(-95.0)) - (-95.0f64).exp()).abs() < 2e-45);
        assert_eq!(exp2_of_negative(0.0), 1.0);
        assert_eq!(exp2_of_negative(-126.0), f32::MIN_POSITIVE);
        assert_eq!(exp2_of_negative(f32::NEG_INFINITY), 0.0);
        assert!(exp2_of_negative(f32::NAN).is_nan());
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-87.01), 0.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert!(exp_of_negative(f32::NAN).is_nan());
    }

    #[test]
    fn products_of_any_length_add_up() {
        for n in [0, 1, 31, 32, 33, 101] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let want: f32 = (0..n).map(|i| (i * i) as f32).sum();
            assert_eq!(dot(&a, &a), want);
        }
    }
}
