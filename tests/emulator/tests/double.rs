//! Double precision in every rounding direction, against the processor's own arithmetic in the
//! same direction and against values of IEEE 754's definitions.

mod common;

use common::evaluate;

const MODES: [&str; 4] = ["rn", "rm", "rp", "rz"];

/// `op.mode.f64` of `%a`, `%b` and `%c`.
fn run(op: &str, mode: &str, operands: usize, inputs: &[[f64; 3]]) -> Vec<f64> {
    let bits: Vec<[u64; 3]> = inputs.iter().map(|i| i.map(f64::to_bits)).collect();
    let names = ["%a", "%b", "%c"][..operands].join(", ");
    let got = evaluate(&format!("    {op}.{mode}.f64 %o, {names};"), &bits);
    got.into_iter().map(f64::from_bits).collect()
}

#[track_caller]
fn check(op: &str, mode: &str, inputs: [f64; 3], operands: usize, expected: f64) {
    let got = run(op, mode, operands, &[inputs])[0];
    assert_eq!(
        got.to_bits(),
        expected.to_bits(),
        "{op}.{mode} of {inputs:?}: {got:e}, expected {expected:e}"
    );
}

#[test]
fn directed_double_precision_follows_ieee_754_at_its_limits() {
    let (tiny, min, max) = (f64::from_bits(1), f64::MIN_POSITIVE, f64::MAX);
    let inf = f64::INFINITY;
    for (mode, sum, below) in [
        ("rn", 1.0, 1.0),
        ("rm", 1.0, 1.0f64.next_down()),
        ("rp", 1.0f64.next_up(), 1.0),
        ("rz", 1.0, 1.0f64.next_down()),
    ] {
        check("add", mode, [1.0, tiny, 0.0], 2, sum);
        check("sub", mode, [1.0, tiny, 0.0], 2, below);
        check("fma", mode, [tiny, tiny, 1.0], 3, sum);
    }
    // Beyond the largest number, and below the smallest.
    for (mode, over, under) in [
        ("rn", inf, 0.0),
        ("rm", max, 0.0),
        ("rp", inf, tiny),
        ("rz", max, 0.0),
    ] {
        check("mul", mode, [max, 2.0, 0.0], 2, over);
        check("mul", mode, [min, min, 0.0], 2, under);
        check("div", mode, [max, 0.5, 0.0], 2, over);
        check("add", mode, [max, max, 0.0], 2, over);
    }
    check("mul", "rp", [-max, 2.0, 0.0], 2, -max);
    check("mul", "rm", [-min, min, 0.0], 2, -tiny);
    // A sum of zero from opposite signs is -0 only when rounding down.
    for (mode, zero) in [("rn", 0.0), ("rm", -0.0), ("rp", 0.0), ("rz", 0.0)] {
        check("add", mode, [1.5, -1.5, 0.0], 2, zero);
        check("sub", mode, [1.5, 1.5, 0.0], 2, zero);
        check("fma", mode, [1.5, 2.0, -3.0], 3, zero);
        check("add", mode, [0.0, 0.0, 0.0], 2, 0.0);
    }
    check("div", "rm", [1.0, 0.0, 0.0], 2, inf);
    check("rcp", "rp", [-0.0, 0.0, 0.0], 1, -inf);
    // The double nearest to the root of two lies above it.
    check("sqrt", "rp", [2.0, 0.0, 0.0], 1, 2f64.sqrt());
    check("sqrt", "rm", [2.0, 0.0, 0.0], 1, 2f64.sqrt().next_down());
    check("copysign", "rn", [-2.5, 1.0 / 3.0, 0.0], 2, -1.0 / 3.0);
}

#[test]
fn wide_integers_become_doubles_in_every_direction() {
    let convert = |mode: &str, ty: &str, x: u64| {
        f64::from_bits(evaluate(&format!("    cvt.{mode}.f64.{ty} %o, %a;"), &[[x, 0, 0]])[0])
    };
    // 2^53 + 1 lies between two doubles.
    let (x, low, high) = (
        9_007_199_254_740_993u64,
        9_007_199_254_740_992.0,
        9_007_199_254_740_994.0,
    );
    for (mode, up, down) in [
        ("rn", low, -low),
        ("rm", low, -high),
        ("rp", high, -low),
        ("rz", low, -low),
    ] {
        assert_eq!(convert(mode, "s64", x), up, "{mode}");
        assert_eq!(convert(mode, "s64", x.wrapping_neg()), down, "{mode}");
    }
    assert_eq!(convert("rp", "u64", u64::MAX), 2f64.powi(64));
    assert_eq!(
        convert("rz", "u64", u64::MAX),
        2f64.powi(64) - 2f64.powi(11)
    );
}

#[cfg(target_arch = "x86_64")]
mod processor {
    use super::{MODES, run};
    use proptest::prelude::*;
    use std::arch::asm;

    /// An instruction of the processor under a rounding mode of MXCSR.
    macro_rules! rounded {
        ($mode:expr, $text:literal, $a:expr, $b:expr, $c:expr) => {{
            // All exceptions masked; bits 13 and 14 hold nearest, down, up or toward zero.
            let (set, back): (u32, u32) = (0x1f80 | ($mode as u32) << 13, 0x1f80);
            let mut out: f64 = $a;
            // SAFETY: MXCSR is as Rust expects it again at the end; FMA was detected.
            unsafe {
                asm!(
                    "ldmxcsr [{set}]", $text, "ldmxcsr [{back}]",
                    set = in(reg) &set, back = in(reg) &back,
                    a = inout(xmm_reg) out, b = in(xmm_reg) $b, c = in(xmm_reg) $c,
                    options(nostack)
                );
            }
            out
        }};
    }

    fn expected(op: &str, mode: usize, [a, b, c]: [f64; 3]) -> f64 {
        match op {
            "add" => rounded!(mode, "addsd {a}, {b} /* {c} */", a, b, c),
            "sub" => rounded!(mode, "subsd {a}, {b} /* {c} */", a, b, c),
            "mul" => rounded!(mode, "mulsd {a}, {b} /* {c} */", a, b, c),
            "div" => rounded!(mode, "divsd {a}, {b} /* {c} */", a, b, c),
            "fma" => rounded!(mode, "vfmadd213sd {a}, {b}, {c}", a, b, c),
            "rcp" => rounded!(
                mode,
                "divsd {b}, {a}\nmovapd {a}, {b} /* {c} */",
                a,
                1.0f64,
                c
            ),
            _ => rounded!(mode, "sqrtsd {a}, {a} /* {b} {c} */", a, b, c),
        }
    }

    fn compare(inputs: &[[f64; 3]]) {
        for (op, operands) in [
            ("add", 2),
            ("sub", 2),
            ("mul", 2),
            ("fma", 3),
            ("div", 2),
            ("rcp", 1),
            ("sqrt", 1),
        ] {
            for (mode, name) in MODES.iter().enumerate() {
                for (input, got) in inputs.iter().zip(run(op, name, operands, inputs)) {
                    let expected = expected(op, mode, *input);
                    let same =
                        got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                    assert!(same, "{op}.{name} of {input:?}: {got:e}, {expected:e}");
                }
            }
        }
    }

    /// Values of all magnitudes, and those near limits.
    fn value() -> impl Strategy<Value = f64> {
        let near_one = (
            0x3fe0_0000_0000_0000u64..0x4010_0000_0000_0000,
            any::<bool>(),
        )
            .prop_map(|(bits, negative)| f64::from_bits(bits | u64::from(negative) << 63));
        let special = prop::sample::select(vec![
            0.0,
            -0.0,
            1.0,
            -1.0,
            f64::MAX,
            f64::MIN,
            f64::MIN_POSITIVE,
            f64::from_bits(1),
            f64::from_bits(0x800f_ffff_ffff_ffff),
            f64::INFINITY,
            f64::NAN,
            4_503_599_627_370_497.0,
        ]);
        prop_oneof![any::<u64>().prop_map(f64::from_bits), near_one, special]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn directed_double_precision_is_the_processors(
            inputs in prop::collection::vec(prop::array::uniform3(value()), 4096),
        ) {
            if std::is_x86_feature_detected!("fma") {
                compare(&inputs);
            }
        }
    }
}
