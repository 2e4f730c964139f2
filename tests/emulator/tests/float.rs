//! Floating-point opcodes and conversions against the half crate, f64 arithmetic and PTX's
//! stated error bounds.

mod common;

use common::{evaluate, evaluate32, noise};
use half::{bf16, f16};

/// `body` on every 16-bit pattern as `%x`.
fn all16(body: &str) -> Vec<u32> {
    let inputs: Vec<[u32; 3]> = (0..=0xffff).map(|x| [x, 0, 0]).collect();
    evaluate32(body, &inputs)
}

fn same_f32(got: u32, expected: f32) -> bool {
    if expected.is_nan() {
        f32::from_bits(got).is_nan()
    } else {
        got == expected.to_bits()
    }
}

#[test]
fn every_f16_and_bf16_widens_exactly() {
    let f16s = all16("    .reg .b16 %h;\n    cvt.u16.u32 %h, %x;\n    cvt.f32.f16 %r, %h;");
    let bf16s = all16(
        "    .reg .b16 %h;\n    mov.b16 %h, 0;\n    mov.b32 %r, {%h, %h};\n    cvt.u16.u32 %h, %x;\n    cvt.f32.bf16 %r, %h;",
    );
    for x in 0..=0xffffu16 {
        assert!(
            same_f32(f16s[usize::from(x)], f16::from_bits(x).to_f32()),
            "f16 {x:#x}"
        );
        assert!(
            same_f32(bf16s[usize::from(x)], bf16::from_bits(x).to_f32()),
            "bf16 {x:#x}"
        );
    }
}

/// Every f32 whose upper half is `x`, with lower halves around the rounding boundaries.
fn boundary_inputs() -> Vec<[u32; 3]> {
    let low = [
        0x0000, 0x0001, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff,
    ];
    (0..=0xffffu32)
        .step_by(3)
        .flat_map(|x| low.map(|l| [x << 16 | l, 0, 0]))
        .collect()
}

#[test]
fn f32_narrows_as_the_half_crate_does() {
    let inputs = boundary_inputs();
    let narrow = |ty: &str| {
        let body =
            format!("    .reg .b16 %h;\n    cvt.rn.{ty}.f32 %h, %x;\n    cvt.u32.u16 %r, %h;");
        evaluate32(&body, &inputs)
    };
    let (f16s, bf16s) = (narrow("f16"), narrow("bf16"));
    for (i, [x, ..]) in inputs.iter().enumerate() {
        let value = f32::from_bits(*x);
        let (h, b) = (
            f16::from_bits(f16s[i] as u16),
            bf16::from_bits(bf16s[i] as u16),
        );
        if value.is_nan() {
            assert!(h.is_nan() && b.is_nan(), "{x:#x}");
        } else {
            assert_eq!(h.to_bits(), f16::from_f32(value).to_bits(), "f16 of {x:#x}");
            assert_eq!(
                b.to_bits(),
                bf16::from_f32(value).to_bits(),
                "bf16 of {x:#x}"
            );
        }
    }
}

#[test]
fn packed_conversion_puts_the_first_operand_into_the_upper_half() {
    let got = evaluate32(
        "    cvt.rn.bf16x2.f32 %r, %x, %y;",
        &[[1f32.to_bits(), 2f32.to_bits(), 0]],
    );
    assert_eq!(got, [0x3f80_4000]);
    let got = evaluate32(
        "    cvt.rn.relu.f16x2.f32 %r, %x, %y;",
        &[[(-1f32).to_bits(), 2f32.to_bits(), 0]],
    );
    assert_eq!(got, [0x0000_4000]);
}

#[test]
fn directed_narrowing_brackets_the_value() {
    let inputs = boundary_inputs();
    let run = |mode: &str| {
        let body =
            format!("    .reg .b16 %h;\n    cvt.{mode}.f16.f64 %h, %w;\n    cvt.u32.u16 %r, %h;");
        evaluate32(
            &format!("    .reg .b64 %w;\n    cvt.f64.f32 %w, %x;\n{body}"),
            &inputs,
        )
    };
    let (down, up, zero) = (run("rm"), run("rp"), run("rz"));
    for (i, [x, ..]) in inputs.iter().enumerate() {
        let value = f64::from(f32::from_bits(*x));
        if value.is_nan() {
            continue;
        }
        let half = |bits: u32| f16::from_bits(bits as u16).to_f64();
        let (d, u, z) = (half(down[i]), half(up[i]), half(zero[i]));
        assert!(d <= value && value <= u, "{value}: {d} {u}");
        assert!(
            d == u && d == value || next_f16(d) == u,
            "{value}: {d} and {u} are not neighbours"
        );
        assert_eq!(z, if value < 0.0 { u } else { d }, "{value}");
    }
}

/// The f16 above, with -0 and 0 as one.
fn next_f16(x: f64) -> f64 {
    let bits = f16::from_f64(x).to_bits();
    let up = match bits {
        0x8000 | 0 => 1,
        b if b & 0x8000 != 0 => b - 1,
        b => b + 1,
    };
    f16::from_bits(up).to_f64()
}

#[test]
fn floats_to_integers_clamp_and_nan_gives_zero() {
    let convert = |to: &str, x: f32| {
        evaluate32(&format!("    cvt.{to}.f32 %r, %x;"), &[[x.to_bits(), 0, 0]])[0]
    };
    assert_eq!(convert("rzi.s32", -1.9), (-1i32) as u32);
    assert_eq!(convert("rni.s32", 2.5), 2);
    assert_eq!(convert("rni.s32", 3.5), 4);
    assert_eq!(convert("rmi.s32", -1.1), (-2i32) as u32);
    assert_eq!(convert("rpi.s32", -1.9), (-1i32) as u32);
    assert_eq!(convert("rzi.s32", 3e9), i32::MAX as u32);
    assert_eq!(convert("rzi.u32", -5.0), 0);
    assert_eq!(convert("rzi.u32", f32::INFINITY), u32::MAX);
    assert_eq!(convert("rzi.s32", f32::NAN), 0);
    assert_eq!(convert("rzi.u8", 300.0), 255);
    let integral = |mode: &str, x: f32| f32::from_bits(convert(&format!("{mode}.f32"), x));
    assert_eq!(
        (
            integral("rni", 2.5),
            integral("rmi", -0.5),
            integral("rpi", 0.2)
        ),
        (2.0, -1.0, 1.0)
    );
}

#[test]
fn integers_to_floats_round_in_every_direction() {
    let convert = |mode: &str, x: u64| {
        evaluate(
            &format!("    .reg .b32 %f;\n    cvt.{mode}.f32.s64 %f, %a;\n    cvt.u64.u32 %o, %f;"),
            &[[x, 0, 0]],
        )[0]
    };
    let value = |bits: u64| f32::from_bits(bits as u32);
    // 2^24 + 1 lies between two floats.
    assert_eq!(value(convert("rn", 16_777_217)), 16_777_216.0);
    assert_eq!(value(convert("rp", 16_777_217)), 16_777_218.0);
    assert_eq!(value(convert("rz", (-16_777_217i64) as u64)), -16_777_216.0);
    assert_eq!(value(convert("rm", (-16_777_217i64) as u64)), -16_777_218.0);
    // More than 53 bits: rounding to double first would give the even neighbour.
    let x = (1u64 << 60) + (1 << 36) + 1;
    assert_eq!(value(convert("rn", x)), x as f32);
}

#[test]
fn arithmetic_rounds_in_the_direction_asked_for() {
    let pairs: Vec<[u32; 3]> = noise(1, 300)
        .chunks(3)
        .map(|c| {
            [
                c[0].to_bits(),
                (c[1] * 1e-3).to_bits(),
                (c[2] * 10.0).to_bits(),
            ]
        })
        .collect();
    for (ptx, exact) in [
        ("add", (|a, b, _| a + b) as fn(f64, f64, f64) -> f64),
        ("mul", |a, b, _| a * b),
        ("fma", |a, b, c| a * b + c),
        ("div", |a, b, _| a / b),
    ] {
        let operands = if ptx == "fma" { "%x, %y, %z" } else { "%x, %y" };
        let run = |mode: &str| evaluate32(&format!("    {ptx}.{mode}.f32 %r, {operands};"), &pairs);
        let (down, up, nearest) = (run("rm"), run("rp"), run("rn"));
        for (i, p) in pairs.iter().enumerate() {
            let [a, b, c] = p.map(|x| f64::from(f32::from_bits(x)));
            let (d, u, n) = (
                f32::from_bits(down[i]),
                f32::from_bits(up[i]),
                f32::from_bits(nearest[i]),
            );
            // f64 is exact enough to tell on which side the result lies, but for its last bits.
            let value = exact(a, b, c);
            let slack = value.abs() * 1e-15;
            assert!(
                f64::from(d) <= value + slack && value - slack <= f64::from(u),
                "{ptx} {p:x?}"
            );
            assert!(d == u || d.next_up() == u, "{ptx} {p:x?}: {d} {u}");
            assert!(n == d || n == u);
            assert_eq!(n, value as f32, "{ptx} {p:x?}");
        }
    }
}

#[test]
fn ftz_and_sat_apply_to_inputs_and_results() {
    let tiny = f32::from_bits(1).to_bits();
    let one = |body: &str, x: u32, y: u32| evaluate32(&format!("    {body};"), &[[x, y, 0]])[0];
    assert_eq!(one("add.ftz.f32 %r, %x, %y", tiny, tiny), 0);
    assert_eq!(one("add.f32 %r, %x, %y", tiny, tiny), 2);
    assert_eq!(
        one(
            "mul.ftz.f32 %r, %x, %y",
            1e-30f32.to_bits(),
            (-1e-10f32).to_bits()
        ),
        0x8000_0000
    );
    assert_eq!(
        one(
            "add.sat.f32 %r, %x, %y",
            0.75f32.to_bits(),
            0.75f32.to_bits()
        ),
        1f32.to_bits()
    );
    assert_eq!(one("add.sat.f32 %r, %x, %y", f32::NAN.to_bits(), 0), 0);
    assert_eq!(one("cvt.sat.f32.f32 %r, %x", (-3f32).to_bits(), 0), 0);
}

#[test]
fn minima_order_zeros_and_prefer_numbers() {
    let run = |op: &str, a: f32, b: f32| {
        f32::from_bits(
            evaluate32(
                &format!("    {op}.f32 %r, %x, %y;"),
                &[[a.to_bits(), b.to_bits(), 0]],
            )[0],
        )
    };
    assert_eq!(run("min", f32::NAN, 3.0), 3.0);
    assert_eq!(run("max", 2.0, f32::NAN), 2.0);
    assert!(run("max", f32::NAN, f32::NAN).is_nan());
    assert!(run("max.NaN", 2.0, f32::NAN).is_nan());
    assert!(run("min", 0.0, -0.0).is_sign_negative());
    assert!(run("max", -0.0, 0.0).is_sign_positive());
    assert_eq!(run("max.xorsign.abs", -3.0, 2.0), -3.0);
}

#[test]
fn unordered_comparisons_differ_from_ordered_ones_on_nan() {
    let run = |op: &str, a: f32, b: f32| {
        let body = format!(
            "    .reg .pred %p;\n    setp.{op}.f32 %p, %x, %y;\n    selp.b32 %r, 1, 0, %p;"
        );
        evaluate32(&body, &[[a.to_bits(), b.to_bits(), 0]])[0] == 1
    };
    for op in ["eq", "ne", "lt", "le", "gt", "ge", "num"] {
        assert!(!run(op, f32::NAN, 1.0), "{op}");
    }
    for op in ["equ", "neu", "ltu", "leu", "gtu", "geu", "nan"] {
        assert!(run(op, f32::NAN, 1.0), "{op}");
    }
    assert!(
        run("ltu", 1.0, 2.0)
            && !run("gtu", 1.0, 2.0)
            && run("neu", 1.0, 2.0)
            && run("num", 1.0, 2.0)
    );
}

#[test]
fn setp_combines_and_writes_both_predicates() {
    let body = "    .reg .pred %p, %q, %c;
    setp.ne.u32 %c, %z, 0;
    setp.lt.and.s32 %p|%q, %x, %y, !%c;
    selp.b32 %r, 1, 0, %p;
    @%q add.u32 %r, %r, 2;";
    let got = evaluate32(body, &[[1, 2, 0], [2, 1, 0], [1, 2, 1], [2, 1, 1]]);
    assert_eq!(got, [1, 2, 0, 0]);
}

#[test]
fn half_arithmetic_rounds_once() {
    let values: Vec<u16> = (0..=0xffffu16).step_by(97).collect();
    let inputs: Vec<[u32; 3]> = values
        .iter()
        .enumerate()
        .map(|(i, &a)| {
            [
                a,
                values[(i * 7 + 3) % values.len()],
                values[(i * 13 + 5) % values.len()],
            ]
            .map(u32::from)
        })
        .collect();
    let run = |op: &str, ty: &str| {
        let operands = if op == "fma.rn" {
            "%h, %i, %j"
        } else {
            "%h, %i"
        };
        let body = format!(
            "    .reg .b16 %h, %i, %j;
    cvt.u16.u32 %h, %x;
    cvt.u16.u32 %i, %y;
    cvt.u16.u32 %j, %z;
    {op}.{ty} %h, {operands};
    cvt.u32.u16 %r, %h;"
        );
        evaluate32(&body, &inputs)
    };
    type Op = (&'static str, fn(f64, f64, f64) -> f64);
    // In f64 these are exact for f16, so one rounding of them is the definition.
    let ops: [Op; 3] = [
        ("add", |a, b, _| a + b),
        ("mul", |a, b, _| a * b),
        ("fma.rn", |a, b, c| a * b + c),
    ];
    for (op, exact) in ops {
        let got = run(op, "f16");
        for (i, input) in inputs.iter().enumerate() {
            let [a, b, c] = input.map(|x| f16::from_bits(x as u16).to_f64());
            let expected = f16::from_f64(exact(a, b, c));
            let value = f16::from_bits(got[i] as u16);
            let same = value.is_nan() && expected.is_nan() || value.to_bits() == expected.to_bits();
            assert!(
                same,
                "{op}.f16 of {input:x?}: {value:?}, expected {expected:?}"
            );
        }
    }
    let got = run("add", "bf16");
    for (i, input) in inputs.iter().enumerate() {
        let [a, b, _] = input.map(|x| bf16::from_bits(x as u16).to_f64());
        let (value, expected) = (bf16::from_bits(got[i] as u16), bf16::from_f64(a + b));
        let same = value.is_nan() && expected.is_nan() || value.to_bits() == expected.to_bits();
        assert!(
            same,
            "add.bf16 of {input:x?}: {value:?}, expected {expected:?}"
        );
    }
}

#[test]
fn bf16_fma_is_not_fooled_by_tiny_addends() {
    // 1 + 2^-8 is halfway between two bf16 numbers; the addend decides.
    let (a, half_way, tiny) = (0x3f80u32, 0x3b80u32, 0x0080u32);
    let body = |c: &str| {
        format!(
            "    .reg .b16 %h, %i, %j;
    cvt.u16.u32 %h, %x;
    cvt.u16.u32 %i, %y;
    cvt.u16.u32 %j, %z;
    fma.rn.bf16 %h, %h, %h, %i;
    {c}
    cvt.u32.u16 %r, %h;"
        )
    };
    assert_eq!(evaluate32(&body(""), &[[a, half_way, tiny]]), [0x3f80]);
    // (1 + 2^-7)^2 has 15 bits; halfway cases differ in the bits a double rounding would lose.
    let x = bf16::from_f32(1.0 + 1.0 / 128.0);
    let exact = x.to_f64() * x.to_f64() + bf16::from_bits(0x0080).to_f64();
    let fused = body("").replace("%h, %h, %h, %i", "%h, %h, %h, %j");
    let got = evaluate32(&fused, &[[u32::from(x.to_bits()), 0, tiny]])[0];
    assert_eq!(got, u32::from(bf16::from_f64(exact).to_bits()));
}

#[test]
fn packed_halves_compute_independently() {
    let pair = |lo: f32, hi: f32| {
        u32::from(f16::from_f32(lo).to_bits()) | u32::from(f16::from_f32(hi).to_bits()) << 16
    };
    let got = evaluate32(
        "    fma.rn.f16x2 %r, %x, %y, %z;",
        &[[pair(1.5, -2.0), pair(2.0, 3.0), pair(0.25, 1.0)]],
    );
    assert_eq!(got, [pair(3.25, -5.0)]);
    let got = evaluate32(
        "    max.f16x2 %r, %x, %y;",
        &[[pair(1.5, -2.0), pair(2.0, -3.0), 0]],
    );
    assert_eq!(got, [pair(2.0, -2.0)]);
    let got = evaluate32("    neg.bf16x2 %r, %x;", &[[0x3f80_bf80, 0, 0]]);
    assert_eq!(got, [0xbf80_3f80]);
}

#[test]
fn approximations_stay_within_the_stated_error() {
    let inputs: Vec<[u32; 3]> = noise(3, 2000)
        .iter()
        .map(|x| [(x * 20.0).to_bits(), 0, 0])
        .collect();
    let positive: Vec<[u32; 3]> = noise(4, 2000)
        .iter()
        .map(|x| [(x.abs() * 50.0 + 1e-6).to_bits(), 0, 0])
        .collect();
    let run = |op: &str, inputs: &[[u32; 3]]| evaluate32(&format!("    {op} %r, %x;"), inputs);
    let check =
        |op: &str, inputs: &[[u32; 3]], exact: fn(f64) -> f64, absolute: f64, relative: f64| {
            for (got, [x, ..]) in run(op, inputs).into_iter().zip(inputs) {
                let x = f64::from(f32::from_bits(*x));
                let (got, expected) = (f64::from(f32::from_bits(got)), exact(x));
                assert!(
                    (got - expected).abs() <= absolute + relative * expected.abs(),
                    "{op} of {x}: {got}, {expected}"
                );
            }
        };
    let two = |e: i32| 2f64.powi(e);
    check("ex2.approx.f32", &inputs, f64::exp2, 0.0, two(-22));
    check("lg2.approx.f32", &positive, f64::log2, two(-22), two(-22));
    check(
        "rsqrt.approx.f32",
        &positive,
        |x| 1.0 / x.sqrt(),
        0.0,
        two(-22),
    );
    check("rcp.approx.f32", &positive, f64::recip, 0.0, two(-23));
    check("sqrt.approx.f32", &positive, f64::sqrt, 0.0, two(-23));
    check("tanh.approx.f32", &inputs, f64::tanh, 0.0, two(-11));
    // Stated for [-pi, pi].
    let small: Vec<[u32; 3]> = noise(5, 2000)
        .iter()
        .map(|x| [(x * std::f32::consts::PI).to_bits(), 0, 0])
        .collect();
    check("sin.approx.f32", &small, f64::sin, two(-20), 0.0);
    check("cos.approx.f32", &small, f64::cos, two(-20), 0.0);
    check(
        "sqrt.rn.f32",
        &positive,
        |x| f64::from((x as f32).sqrt()),
        0.0,
        0.0,
    );
    check(
        "rcp.rn.f32",
        &positive,
        |x| f64::from(1.0 / x as f32),
        0.0,
        0.0,
    );
}

#[test]
fn tf32_keeps_ten_bits_of_fraction() {
    let got = evaluate32(
        "    cvt.rna.tf32.f32 %r, %x;",
        &[
            [0x3f80_1000, 0, 0],
            [0x3f80_0fff, 0, 0],
            [0xbf80_3000, 0, 0],
        ],
    );
    assert_eq!(got, [0x3f80_2000, 0x3f80_0000, 0xbf80_4000]);
}
