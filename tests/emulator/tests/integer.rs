//! Integer opcodes: hand-computed cases from the PTX ISA's definitions, and random programs
//! against an evaluator in plain Rust.

mod common;

use common::{evaluate, evaluate32};
use proptest::prelude::*;

/// One case: the instruction on %r, %x, %y, %z, the inputs and the expected result.
#[track_caller]
fn check(instruction: &str, inputs: [u32; 3], expected: u32) {
    let got = evaluate32(&format!("    {instruction};"), &[inputs])[0];
    assert_eq!(
        got, expected,
        "{instruction} of {inputs:x?}: {got:#x}, expected {expected:#x}"
    );
}

#[test]
fn shifts_clamp_their_distance() {
    check("shl.b32 %r, %x, %y", [1, 31, 0], 1 << 31);
    check("shl.b32 %r, %x, %y", [1, 32, 0], 0);
    check("shr.u32 %r, %x, %y", [0x8000_0000, 40, 0], 0);
    check("shr.s32 %r, %x, %y", [0x8000_0000, 40, 0], u32::MAX);
    check("shr.s32 %r, %x, %y", [0xffff_fff0, 2, 0], 0xffff_fffc);
    check(
        "shf.l.wrap.b32 %r, %x, %y, %z",
        [0x8000_0001, 0x1234_5678, 36],
        0x2345_6788,
    );
    check(
        "shf.l.clamp.b32 %r, %x, %y, %z",
        [0x8000_0001, 0x1234_5678, 36],
        0x8000_0001,
    );
    check(
        "shf.r.wrap.b32 %r, %x, %y, %z",
        [0x8000_0001, 0x1234_5678, 8],
        0x7880_0000,
    );
    check(
        "shf.r.clamp.b32 %r, %x, %y, %z",
        [0x8000_0001, 0x1234_5678, 99],
        0x1234_5678,
    );
}

#[test]
fn bit_fields_follow_the_definition_at_their_limits() {
    check("bfe.u32 %r, %x, %y, %z", [0xabcd_1234, 8, 8], 0x12);
    check("bfe.s32 %r, %x, %y, %z", [0x0000_f000, 8, 8], 0xffff_fff0);
    check("bfe.s32 %r, %x, %y, %z", [0x8000_0000, 30, 8], 0xffff_fffe);
    check("bfe.u32 %r, %x, %y, %z", [0xffff_ffff, 40, 4], 0);
    check("bfe.s32 %r, %x, %y, %z", [0xffff_ffff, 40, 4], u32::MAX);
    check("bfe.u32 %r, %x, %y, %z", [0xffff_ffff, 0, 0], 0);
    let insert = |len: u32| format!("bfi.b32 %r, %x, %y, %z, {len}");
    check(&insert(8), [0xab, 0x1111_1111, 12], 0x111a_b111);
    check(&insert(0), [0xff, 7, 3], 7);
    check(&insert(16), [0xffff, 0, 24], 0xff00_0000);
    check("bmsk.clamp.b32 %r, %x, %y", [4, 8, 0], 0xff0);
    check("bmsk.clamp.b32 %r, %x, %y", [28, 99, 0], 0xf000_0000);
}

#[test]
fn counting_ops_match_their_definition() {
    check("popc.b32 %r, %x", [0xf0f0_0001, 0, 0], 9);
    check("clz.b32 %r, %x", [0x0000_8000, 0, 0], 16);
    check("clz.b32 %r, %x", [0, 0, 0], 32);
    check("brev.b32 %r, %x", [0x8000_0002, 0, 0], 0x4000_0001);
    check("bfind.u32 %r, %x", [0x0001_0000, 0, 0], 16);
    check("bfind.u32 %r, %x", [0, 0, 0], u32::MAX);
    check("bfind.s32 %r, %x", [0xffff_ff00, 0, 0], 7);
    check("bfind.shiftamt.u32 %r, %x", [0x0001_0000, 0, 0], 15);
    check("bfind.s32 %r, %x", [u32::MAX, 0, 0], u32::MAX);
}

#[test]
fn permutes_choose_bytes_in_every_mode() {
    let (a, b) = (0x3322_1100, 0x7766_5544);
    check("prmt.b32 %r, %x, %y, %z", [a, b, 0x7531], 0x7755_3311);
    check(
        "prmt.b32 %r, %x, %y, %z",
        [0x0000_0080, 0, 0x0088],
        0x8080_ffff,
    );
    check("prmt.b32.f4e %r, %x, %y, %z", [a, b, 1], 0x4433_2211);
    check("prmt.b32.b4e %r, %x, %y, %z", [a, b, 1], 0x6677_0011);
    check("prmt.b32.rc8 %r, %x, %y, %z", [a, b, 2], 0x2222_2222);
    check("prmt.b32.ecl %r, %x, %y, %z", [a, b, 2], 0x3322_2222);
    check("prmt.b32.ecr %r, %x, %y, %z", [a, b, 1], 0x1111_1100);
    check("prmt.b32.rc16 %r, %x, %y, %z", [a, b, 1], 0x3322_3322);
}

#[test]
fn lop3_is_its_truth_table() {
    for table in [0x00u32, 0x80, 0x96, 0xe8, 0xfe, 0x1b, 0xff] {
        let (x, y, z) = (0xf0f0_f0f0, 0xcccc_cccc, 0xaaaa_aaaa);
        // These inputs enumerate the table's rows.
        check(
            &format!("lop3.b32 %r, %x, %y, %z, {table:#x}"),
            [x, y, z],
            table * 0x0101_0101,
        );
    }
}

#[test]
fn products_and_saturation_match_their_definition() {
    check("mul.hi.s32 %r, %x, %y", [0xffff_ffff, 2, 0], u32::MAX);
    check("mul.hi.u32 %r, %x, %y", [0xffff_ffff, 2, 0], 1);
    check("mad.hi.s32 %r, %x, %y, %z", [0x8000_0000, 4, 7], 5);
    check("mul24.lo.u32 %r, %x, %y", [0xff00_0003, 5, 0], 15);
    check("add.sat.s32 %r, %x, %y", [0x7fff_ffff, 1, 0], 0x7fff_ffff);
    check("sub.sat.s32 %r, %x, %y", [0x8000_0000, 1, 0], 0x8000_0000);
    check("sad.s32 %r, %x, %y, %z", [5, 0xffff_fffd, 100], 108);
    check(
        "dp4a.s32.s32 %r, %x, %y, %z",
        [0xff02_0304, 0x0101_0101, 10],
        18,
    );
    check(
        "dp4a.u32.u32 %r, %x, %y, %z",
        [0xff02_0304, 0x0101_0101, 10],
        274,
    );
    check(
        "dp2a.lo.s32.s32 %r, %x, %y, %z",
        [0x0002_ffff, 0x0000_0305, 1],
        2,
    );
    check("abs.s32 %r, %x", [0xffff_fff6, 0, 0], 10);
    check("cnot.b32 %r, %x", [0, 0, 0], 1);
    check("div.s32 %r, %x, %y", [0xffff_fff9, 2, 0], 0xffff_fffd);
    check("rem.s32 %r, %x, %y", [0xffff_fff9, 2, 0], u32::MAX);
}

#[test]
fn carries_chain_over_words() {
    let body = "    .reg .b32 %al, %ah, %bl, %bh, %sl, %sh;
    mov.b64 {%al, %ah}, %a;
    mov.b64 {%bl, %bh}, %b;
    add.cc.u32 %sl, %al, %bl;
    addc.u32 %sh, %ah, %bh;
    mov.b64 %o, {%sl, %sh};";
    let (a, b) = (0x1234_5678_ffff_ffff, 0x0000_0001_0000_0001);
    assert_eq!(evaluate(body, &[[a, b, 0]]), [a + b]);
    let difference = body.replace("add.cc", "sub.cc").replace("addc", "subc");
    assert_eq!(evaluate(&difference, &[[b, a, 0]]), [b.wrapping_sub(a)]);
    let product = "    .reg .b32 %al, %ah, %bl, %bh, %sl, %sh;
    mov.b64 {%al, %ah}, %a;
    mov.b64 {%bl, %bh}, %b;
    mul.lo.u32 %sl, %al, %bl;
    mul.hi.u32 %sh, %al, %bl;
    mad.lo.cc.u32 %sl, %al, %bl, %al;
    madc.hi.u32 %sh, %al, %bl, 0;
    mov.b64 %o, {%sl, %sh};";
    let (a, b) = (0xffff_fff1u64, 0xffff_ffffu64);
    assert_eq!(evaluate(product, &[[a, b, 0]]), [a * b + a]);
}

#[test]
fn sixteen_and_sixty_four_bit_arithmetic_wraps_at_its_width() {
    let narrow = "    .reg .b16 %p, %q;
    .reg .b32 %w;
    cvt.u16.u64 %p, %a;
    cvt.u16.u64 %q, %b;
    OP.s16 %p, %p, %q;
    cvt.s64.s16 %o, %p;";
    let run =
        |op: &str, a: u64, b: u64| evaluate(&narrow.replace("OP", op), &[[a, b, 0]])[0] as i64;
    assert_eq!(run("add", 0x7fff, 1), -32768);
    assert_eq!(run("mul.lo", 300, 300), i64::from(90_000i32 as i16));
    assert_eq!(run("mul.hi", 0x8000, 2), -1);
    assert_eq!(run("min", 0xffff, 5), -1);
    let wide =
        |op: &str, a: u64, b: u64| evaluate(&format!("    {op} %o, %a, %b;"), &[[a, b, 0]])[0];
    assert_eq!(wide("mul.hi.u64", u64::MAX, u64::MAX), u64::MAX - 1);
    assert_eq!(wide("mul.hi.s64", u64::MAX, 7), u64::MAX);
    assert_eq!(wide("div.u64", u64::MAX, 10), u64::MAX / 10);
    assert_eq!(wide("rem.s64", (-17i64) as u64, 5), (-2i64) as u64);
    assert_eq!(wide("max.s64", u64::MAX, 3), 3);
}

/// A random instruction: its PTX and its meaning.
#[derive(Clone, Copy, Debug)]
struct Step {
    op: usize,
    sources: [usize; 3],
    target: usize,
}

/// Ops of random programs: PTX with registers to fill in, and the plain Rust definition.
type Definition = (&'static str, fn(u32, u32, u32) -> u32);
const OPS: [Definition; 24] = [
    ("add.u32 D, A, B", |a, b, _| a.wrapping_add(b)),
    ("sub.s32 D, A, B", |a, b, _| a.wrapping_sub(b)),
    ("mul.lo.s32 D, A, B", |a, b, _| a.wrapping_mul(b)),
    ("mul.hi.u32 D, A, B", |a, b, _| {
        ((u64::from(a) * u64::from(b)) >> 32) as u32
    }),
    ("mul.hi.s32 D, A, B", |a, b, _| {
        ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32
    }),
    ("mad.lo.u32 D, A, B, C", |a, b, c| {
        a.wrapping_mul(b).wrapping_add(c)
    }),
    ("and.b32 D, A, B", |a, b, _| a & b),
    ("or.b32 D, A, B", |a, b, _| a | b),
    ("xor.b32 D, A, B", |a, b, _| a ^ b),
    ("not.b32 D, A", |a, _, _| !a),
    ("shl.b32 D, A, B", |a, b, _| if b > 31 { 0 } else { a << b }),
    ("shr.u32 D, A, B", |a, b, _| if b > 31 { 0 } else { a >> b }),
    ("shr.s32 D, A, B", |a, b, _| {
        ((a as i32) >> b.min(31)) as u32
    }),
    ("min.s32 D, A, B", |a, b, _| (a as i32).min(b as i32) as u32),
    ("max.u32 D, A, B", |a, b, _| a.max(b)),
    ("neg.s32 D, A", |a, _, _| a.wrapping_neg()),
    ("abs.s32 D, A", |a, _, _| (a as i32).wrapping_abs() as u32),
    ("popc.b32 D, A", |a, _, _| a.count_ones()),
    ("clz.b32 D, A", |a, _, _| a.leading_zeros()),
    ("brev.b32 D, A", |a, _, _| a.reverse_bits()),
    ("lop3.b32 D, A, B, C, 0x96", |a, b, c| a ^ b ^ c),
    ("shf.l.wrap.b32 D, A, B, C", |a, b, c| {
        (((u64::from(b) << 32 | u64::from(a)) << (c & 31)) >> 32) as u32
    }),
    ("sad.u32 D, A, B, C", |a, b, c| {
        c.wrapping_add(a.abs_diff(b))
    }),
    ("prmt.b32 D, A, B, 0x1625", |a, b, _| {
        let byte = |v: u32, n: u32| v >> (8 * n) & 0xff;
        byte(b, 1) | byte(a, 2) << 8 | byte(b, 2) << 16 | byte(a, 1) << 24
    }),
];

/// Registers of a random program.
const REGISTERS: usize = 6;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        0..OPS.len(),
        prop::array::uniform3(0..REGISTERS),
        0..REGISTERS,
    )
        .prop_map(|(op, sources, target)| Step {
            op,
            sources,
            target,
        });
    prop::collection::vec(step, 1..40)
}

fn text(steps: &[Step]) -> String {
    let mut out = String::from("    .reg .b32 %v<6>;\n");
    for i in 0..REGISTERS {
        let source = ["%x", "%y", "%z"][i % 3];
        out += &format!("    add.u32 %v{i}, {source}, {i};\n");
    }
    for step in steps {
        let fill = OPS[step.op]
            .0
            .split(' ')
            .map(|word| match word.trim_end_matches(',') {
                "D" => format!("%v{},", step.target),
                "A" => format!("%v{},", step.sources[0]),
                "B" => format!("%v{},", step.sources[1]),
                "C" => format!("%v{},", step.sources[2]),
                _ => word.to_string(),
            });
        let line = fill.collect::<Vec<_>>().join(" ");
        out += &format!("    {};\n", line.trim_end_matches(','));
    }
    out + "    mov.b32 %r, 0;\n"
        + &(0..REGISTERS)
            .map(|i| format!("    mad.lo.u32 %r, %r, 31, %v{i};\n"))
            .collect::<String>()
}

fn model(steps: &[Step], inputs: [u32; 3]) -> u32 {
    let mut v: [u32; REGISTERS] = std::array::from_fn(|i| inputs[i % 3].wrapping_add(i as u32));
    for step in steps {
        let [a, b, c] = step.sources.map(|s| v[s]);
        v[step.target] = OPS[step.op].1(a, b, c);
    }
    v.iter()
        .fold(0u32, |sum, x| sum.wrapping_mul(31).wrapping_add(*x))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_compute_what_the_evaluator_computes(
        steps in steps(),
        inputs in prop::collection::vec(prop::array::uniform3(prop_oneof![any::<u32>(), 0u32..40]), 1..70),
    ) {
        let got = evaluate32(&text(&steps), &inputs);
        let expected: Vec<u32> = inputs.iter().map(|&i| model(&steps, i)).collect();
        prop_assert_eq!(got, expected);
    }
}
