//! Narrowing of f32 to f16 and bf16 in every rounding direction: every value of the target, the
//! midpoints between neighbours, and the f32 next to each of these; and random values.

mod common;

use std::sync::Arc;

use common::{config, context, function, module};
use cudarc::driver::PushKernelArg;
use half::{bf16, f16};
use proptest::prelude::*;

/// A 16-bit target.
#[derive(Clone, Copy)]
struct Target {
    name: &'static str,
    /// Bits of the fraction.
    fraction: u32,
    /// Exponent of the smallest normal number.
    min_exponent: i32,
    /// Bits of infinity.
    infinity: u32,
    widen: fn(u16) -> f32,
    nearest: fn(f32) -> u16,
}

const F16: Target = Target {
    name: "f16",
    fraction: 10,
    min_exponent: -14,
    infinity: 0x7c00,
    widen: |bits| f16::from_bits(bits).to_f32(),
    nearest: |x| f16::from_f32(x).to_bits(),
};
const BF16: Target = Target {
    name: "bf16",
    fraction: 7,
    min_exponent: -126,
    infinity: 0x7f80,
    widen: |bits| bf16::from_bits(bits).to_f32(),
    nearest: |x| bf16::from_f32(x).to_bits(),
};

/// What PTX says `cvt` in this direction gives, in integers alone. NaN becomes 0x7fff.
fn model(bits: u32, target: Target, mode: &str) -> u32 {
    let (negative, field, fraction) = (bits >> 31 == 1, bits >> 23 & 0xff, bits & 0x7f_ffff);
    let sign = if negative { 0x8000 } else { 0 };
    if field == 0xff {
        return if fraction == 0 {
            sign | target.infinity
        } else {
            0x7fff
        };
    }
    // The value is `integer` times 2^`unit`.
    let (integer, unit) = match field {
        0 => (u64::from(fraction), -149),
        _ => (u64::from(fraction | 0x80_0000), field as i32 - 150),
    };
    let exponent = (unit + 23).max(target.min_exponent);
    let dropped = ((exponent - target.fraction as i32) - unit).min(40) as u32;
    let (kept, rest, half) = (
        integer >> dropped,
        integer & ((1 << dropped) - 1),
        1 << (dropped - 1),
    );
    let away = match mode {
        "rn" => rest > half || rest == half && kept & 1 == 1,
        "rz" => false,
        "rm" => negative && rest > 0,
        _ => !negative && rest > 0,
    };
    let biased = (exponent - target.min_exponent) as u32;
    let magnitude = (biased << target.fraction) + kept as u32 + u32::from(away);
    let to_infinity = match mode {
        "rn" => true,
        "rz" => false,
        "rm" => negative,
        _ => !negative,
    };
    if magnitude >= target.infinity && !to_infinity {
        return sign | (target.infinity - 1);
    }
    sign | magnitude.min(target.infinity)
}

/// `cvt.<mode>.<target>.f32` of every value.
fn narrow(values: &[u32], target: Target, mode: &str) -> Vec<u16> {
    let name = target.name;
    let ptx = format!(
        ".version 8.0
.target sm_80
.address_size 64
.visible .entry narrow(.param .u64 input, .param .u64 output, .param .u32 count)
{{
    .reg .b64 %in, %out;
    .reg .b32 %i, %n, %t;
    .reg .f32 %x;
    .reg .b16 %h;
    .reg .pred %done;
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    ld.param.u32 %n, [count];
    mov.u32 %i, %ctaid.x;
    mov.u32 %t, %tid.x;
    mad.lo.u32 %i, %i, 256, %t;
    setp.ge.u32 %done, %i, %n;
    @%done ret;
    mad.wide.u32 %in, %i, 4, %in;
    mad.wide.u32 %out, %i, 2, %out;
    ld.global.f32 %x, [%in];
    cvt.{mode}.{name}.f32 %h, %x;
    st.global.b16 [%out], %h;
    ret;
}}
"
    );
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&module(&context, &ptx), "narrow");
    let input = stream.clone_htod(values).unwrap();
    let mut output = stream.alloc_zeros::<u16>(values.len()).unwrap();
    let count = values.len() as u32;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&input).arg(&mut output).arg(&count);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(count.div_ceil(256), 256)) }.unwrap();
    stream.clone_dtoh(&output).unwrap()
}

/// Every value of the target and every midpoint, with the f32 on both sides of each.
fn boundaries(target: Target) -> Vec<u32> {
    let mut out = Vec::new();
    for bits in 0..=0xffffu16 {
        let value = (target.widen)(bits);
        let next = (target.widen)(bits.wrapping_add(1));
        // Exact: the midpoint needs one bit more than the target has.
        let midpoint = ((f64::from(value) + f64::from(next)) / 2.0) as f32;
        for x in [value, midpoint] {
            let x = x.to_bits();
            out.extend([x.wrapping_sub(1), x, x.wrapping_add(1)]);
        }
    }
    out
}

fn check(values: &[u32], target: Target, mode: &str) {
    let got = narrow(values, target, mode);
    for (&bits, got) in values.iter().zip(got) {
        let expected = model(bits, target, mode);
        let name = target.name;
        assert_eq!(u32::from(got), expected, "cvt.{mode}.{name}.f32 {bits:#x}");
    }
}

#[test]
fn the_model_is_the_half_crate_in_nearest() {
    for target in [F16, BF16] {
        for bits in boundaries(target) {
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                let expected = u32::from((target.nearest)(value));
                assert_eq!(model(bits, target, "rn"), expected, "{bits:#x}");
            }
        }
    }
}

#[test]
fn every_boundary_narrows_as_the_model_says_in_every_direction() {
    for (target, modes) in [
        (F16, &["rn", "rz", "rm", "rp"][..]),
        (BF16, &["rn", "rz"][..]),
    ] {
        let values = boundaries(target);
        for mode in modes {
            check(&values, target, mode);
        }
    }
}

/// Compute capability 8.0 has the same conversions in the packed form.
#[test]
fn packed_narrowing_is_two_single_ones() {
    let values = Arc::new(boundaries(BF16));
    let pairs: Vec<[u32; 3]> = values
        .iter()
        .step_by(7)
        .zip(values.iter().skip(3).step_by(11))
        .map(|(&x, &y)| [x, y, 0])
        .collect();
    for (target, mode) in [(F16, "rn"), (F16, "rz"), (BF16, "rn"), (BF16, "rz")] {
        let body = format!("    cvt.{mode}.{}x2.f32 %r, %x, %y;", target.name);
        for ([x, y, _], got) in pairs.iter().zip(common::evaluate32(&body, &pairs)) {
            let expected = model(*x, target, mode) << 16 | model(*y, target, mode);
            assert_eq!(got, expected, "{mode} {} {x:#x} {y:#x}", target.name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_values_narrow_as_the_model_says(values in prop::collection::vec(any::<u32>(), 4096)) {
        for (target, mode) in [(F16, "rn"), (F16, "rz"), (F16, "rm"), (F16, "rp"), (BF16, "rn"), (BF16, "rz")] {
            check(&values, target, mode);
        }
    }
}
