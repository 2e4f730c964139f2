//! Warp-level opcodes: matrix fragments against a plain product, matrix loads, shuffles, votes
//! and barriers with reductions.

mod common;

use common::{config, context, evaluate32, function, module, noise};
use cudarc::driver::PushKernelArg;
use half::{bf16, f16};

/// Runs a body on one warp; each lane has ten input words in `%w0` to `%w9` and leaves four in
/// `%d0` to `%d3`.
fn run_warp(body: &str, inputs: &[[u32; 10]; 32]) -> Vec<[u32; 4]> {
    let loads: String = (0..10)
        .map(|i| format!("    ld.global.b32 %w{i}, [%in+{}];\n", 4 * i))
        .collect();
    let ptx = format!(
        ".version 8.0
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 input, .param .u64 output)
{{
    .reg .b64 %in, %out;
    .reg .b32 %w<10>, %d<4>, %lane, %s;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    mov.u32 %lane, %laneid;
    mad.wide.u32 %in, %lane, 40, %in;
    mad.wide.u32 %out, %lane, 16, %out;
{loads}
    mov.b32 %d0, 0;
    mov.b32 %d1, 0;
    mov.b32 %d2, 0;
    mov.b32 %d3, 0;
{body}
    st.global.v4.b32 [%out], {{%d0, %d1, %d2, %d3}};
    ret;
}}
"
    );
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&module(&context, &ptx), "probe");
    let flat: Vec<u32> = inputs.iter().flatten().copied().collect();
    let input = stream.clone_htod(&flat).unwrap();
    let mut output = stream.alloc_zeros::<u32>(128).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&input).arg(&mut output);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }.unwrap();
    stream
        .clone_dtoh(&output)
        .unwrap()
        .chunks(4)
        .map(|c| [c[0], c[1], c[2], c[3]])
        .collect()
}

/// Formats of matrix operands.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    F16,
    Bf16,
    Tf32,
}

/// Rounds a value to the format and gives it with its bits.
fn quantize(format: Format, x: f32) -> (f64, u32) {
    match format {
        Format::F16 => (f16::from_f32(x).to_f64(), f16::from_f32(x).to_bits().into()),
        Format::Bf16 => (
            bf16::from_f32(x).to_f64(),
            bf16::from_f32(x).to_bits().into(),
        ),
        Format::Tf32 => {
            let bits = x.to_bits() & 0xffff_e000;
            (f64::from(f32::from_bits(bits)), bits)
        }
    }
}

/// Element positions of the PTX ISA's fragment figures for lane `l`: (row, k) of A by register
/// and half, (k, column) of B, (row, column) of C.
fn a_position(format: Format, l: usize, register: usize, half: usize) -> (usize, usize) {
    let (group, thread) = (l >> 2, l & 3);
    let row = if register.is_multiple_of(2) {
        group
    } else {
        group + 8
    };
    match format {
        Format::Tf32 => (row, if register < 2 { thread } else { thread + 4 }),
        _ => (row, thread * 2 + half + if register >= 2 { 8 } else { 0 }),
    }
}

fn b_position(format: Format, l: usize, register: usize, half: usize) -> (usize, usize) {
    let (group, thread) = (l >> 2, l & 3);
    match format {
        Format::Tf32 => (thread + 4 * register, group),
        _ => (thread * 2 + half + 8 * register, group),
    }
}

fn check_mma(shape: &str, types: &str, format: Format, k: usize, half_accumulate: bool) {
    let halves = if format == Format::Tf32 { 1 } else { 2 };
    let (a_count, b_count) = (16 * k / 32 / halves, 8 * k / 32 / halves);
    let (a, b, c) = (noise(1, 16 * k), noise(2, k * 8), noise(3, 128));
    let mut inputs = [[0u32; 10]; 32];
    let c_value = |x: f32| {
        if half_accumulate {
            f16::from_f32(x).to_f64()
        } else {
            f64::from(x)
        }
    };
    for (l, words) in inputs.iter_mut().enumerate() {
        for (register, half) in (0..a_count).flat_map(|r| (0..halves).map(move |h| (r, h))) {
            let (row, depth) = a_position(format, l, register, half);
            words[register] |= quantize(format, a[row * k + depth]).1 << (16 * half);
        }
        for (register, half) in (0..b_count).flat_map(|r| (0..halves).map(move |h| (r, h))) {
            let (depth, column) = b_position(format, l, register, half);
            words[4 + register] |= quantize(format, b[depth * 8 + column]).1 << (16 * half);
        }
        for i in 0..4 {
            let value = c[((l >> 2) + 8 * (i / 2)) * 8 + (l & 3) * 2 + i % 2];
            if half_accumulate {
                words[6 + i / 2] |= u32::from(f16::from_f32(value).to_bits()) << (16 * (i % 2));
            } else {
                words[6 + i] = value.to_bits();
            }
        }
    }
    let list = |name: &str, first: usize, count: usize| {
        let names: Vec<String> = (first..first + count)
            .map(|i| format!("%{name}{i}"))
            .collect();
        format!("{{{}}}", names.join(", "))
    };
    let c_count = if half_accumulate { 2 } else { 4 };
    let body = format!(
        "    mma.sync.aligned.{shape}.row.col.{types} {}, {}, {}, {};",
        list("d", 0, c_count),
        list("w", 0, a_count),
        list("w", 4, b_count),
        list("w", 6, c_count)
    );
    let got = run_warp(&body, &inputs);
    for (l, words) in got.iter().enumerate() {
        for i in 0..4 {
            let (row, column) = ((l >> 2) + 8 * (i / 2), (l & 3) * 2 + i % 2);
            let product = |d: usize| {
                quantize(format, a[row * k + d]).0 * quantize(format, b[d * 8 + column]).0
            };
            let exact = c_value(c[row * 8 + column]) + (0..k).map(product).sum::<f64>();
            let (value, error) = if half_accumulate {
                (
                    f16::from_bits((words[i / 2] >> (16 * (i % 2))) as u16).to_f64(),
                    1e-3,
                )
            } else {
                (f64::from(f32::from_bits(words[i])), 1e-6)
            };
            assert!(
                (value - exact).abs() <= error * (1.0 + exact.abs()),
                "{shape} {types} ({row}, {column}): {value}, {exact}"
            );
        }
    }
}

#[test]
fn mma_fragments_form_the_matrix_product_in_every_shape_and_type() {
    check_mma("m16n8k16", "f32.bf16.bf16.f32", Format::Bf16, 16, false);
    check_mma("m16n8k16", "f32.f16.f16.f32", Format::F16, 16, false);
    check_mma("m16n8k16", "f16.f16.f16.f16", Format::F16, 16, true);
    check_mma("m16n8k8", "f32.bf16.bf16.f32", Format::Bf16, 8, false);
    check_mma("m16n8k8", "f32.f16.f16.f32", Format::F16, 8, false);
    check_mma("m16n8k8", "f32.tf32.tf32.f32", Format::Tf32, 8, false);
    check_mma("m16n8k4", "f32.tf32.tf32.f32", Format::Tf32, 4, false);
}

/// Fills shared memory with 512 halfwords numbered from 0, then runs the rest.
fn with_numbers(rest: &str) -> Vec<[u32; 4]> {
    let mut inputs = [[0u32; 10]; 32];
    for (l, words) in inputs.iter_mut().enumerate() {
        for (i, word) in words.iter_mut().take(8).enumerate() {
            let first = (l * 8 + i) as u32 * 2;
            *word = first | (first + 1) << 16;
        }
    }
    let body = format!(
        "    mov.u32 %s, tile;
    mad.lo.u32 %s, %lane, 32, %s;
    st.shared.v4.b32 [%s], {{%w0, %w1, %w2, %w3}};
    st.shared.v4.b32 [%s+16], {{%w4, %w5, %w6, %w7}};
    bar.warp.sync 0xffffffff;
    mov.u32 %s, tile;
    mad.lo.u32 %s, %lane, 16, %s;
{rest}"
    );
    run_warp(&body, &inputs)
}

#[test]
fn ldmatrix_gives_lanes_their_pairs_plain_and_transposed() {
    // Matrix m has rows of 8 halfwords; row r holds the numbers 64 m + 8 r to + 7.
    let list = "{%d0, %d1, %d2, %d3}";
    let plain = with_numbers(&format!(
        "    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {list}, [%s];"
    ));
    let transposed = with_numbers(&format!(
        "    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {list}, [%s];"
    ));
    for l in 0..32u32 {
        for m in 0..4 {
            let first = 64 * m + 8 * (l / 4) + 2 * (l % 4);
            assert_eq!(plain[l as usize][m as usize], first | (first + 1) << 16);
            let upper = 64 * m + 8 * (2 * (l % 4)) + l / 4;
            assert_eq!(
                transposed[l as usize][m as usize],
                upper | (upper + 8) << 16
            );
        }
    }
    let two = with_numbers("    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%d0, %d1}, [%s];");
    assert_eq!(two[5], [plain[5][0], plain[5][1], 0, 0]);
}

#[test]
fn shuffles_follow_the_definition_with_segments() {
    let lanes: Vec<[u32; 3]> = (0..32).map(|l| [l + 100, 0, 0]).collect();
    let run = |instruction: &str| {
        let body = format!(
            "    .reg .pred %p;
    shfl.sync.{instruction}, 0xffffffff;
    @!%p or.b32 %r, %r, 0x1000;"
        );
        evaluate32(&body, &lanes)
    };
    let out = |value: u32, inside: bool| {
        if inside {
            value + 100
        } else {
            (value + 100) | 0x1000
        }
    };
    for l in 0..32u32 {
        let at = l as usize;
        assert_eq!(
            run("down.b32 %r|%p, %x, 3, 31")[at],
            if l + 3 < 32 {
                out(l + 3, true)
            } else {
                out(l, false)
            }
        );
        assert_eq!(
            run("up.b32 %r|%p, %x, 3, 0")[at],
            if l >= 3 {
                out(l - 3, true)
            } else {
                out(l, false)
            }
        );
        assert_eq!(run("bfly.b32 %r|%p, %x, 5, 31")[at], out(l ^ 5, true));
        // Segments of eight lanes: c = (32 - 8) << 8 | 31.
        assert_eq!(
            run("idx.b32 %r|%p, %x, 2, 0x181f")[at],
            out(l / 8 * 8 + 2, true)
        );
        let inside = l % 8 + 2 < 8;
        assert_eq!(
            run("down.b32 %r|%p, %x, 2, 0x181f")[at],
            out(if inside { l + 2 } else { l }, inside)
        );
    }
}

#[test]
fn votes_matches_and_reductions_see_the_whole_warp() {
    let lanes: Vec<[u32; 3]> = (0..32).map(|l| [l % 5, l, 0]).collect();
    let of = |value: u32| {
        (0..32)
            .filter(|l| l % 5 == value)
            .fold(0u32, |m, l| m | 1 << l)
    };
    let predicate = "    .reg .pred %p, %q;\n    setp.eq.u32 %p, %x, 2;\n";
    let ballot = evaluate32(
        &format!("{predicate}    vote.sync.ballot.b32 %r, %p, 0xffffffff;"),
        &lanes,
    );
    assert_eq!(ballot, [of(2); 32]);
    for (mode, expected) in [("any", 1), ("all", 0), ("uni", 0)] {
        let body = format!(
            "{predicate}    vote.sync.{mode}.pred %q, %p, 0xffffffff;\n    selp.b32 %r, 1, 0, %q;"
        );
        assert_eq!(evaluate32(&body, &lanes), [expected; 32], "{mode}");
    }
    let same = evaluate32("    match.any.sync.b32 %r, %x, 0xffffffff;", &lanes);
    assert!(same.iter().enumerate().all(|(l, &m)| m == of(l as u32 % 5)));
    let all = evaluate32(
        "    .reg .pred %p;\n    match.all.sync.b32 %r|%p, %x, 0xffffffff;",
        &lanes,
    );
    assert_eq!(all, [0; 32]);
    for (op, expected) in [
        ("add.u32", 496),
        ("max.s32", 31),
        ("min.u32", 0),
        ("xor.b32", 0),
        ("or.b32", 31),
    ] {
        assert_eq!(
            evaluate32(&format!("    redux.sync.{op} %r, %y, 0xffffffff;"), &lanes),
            [expected; 32],
            "{op}"
        );
    }
}

#[test]
fn barrier_reductions_count_and_combine_predicates() {
    let threads: Vec<[u32; 3]> = (0..256).map(|t| [t, 0, 0]).collect();
    let predicate = "    .reg .pred %p, %q;\n    setp.lt.u32 %p, %x, 70;\n";
    let counted = evaluate32(
        &format!("{predicate}    barrier.red.popc.u32 %r, 0, !%p;"),
        &threads,
    );
    assert_eq!(counted, [186; 256]);
    let any = format!("{predicate}    bar.red.or.pred %q, 1, 256, %p;\n    selp.b32 %r, 1, 0, %q;");
    assert_eq!(evaluate32(&any, &threads), [1; 256]);
    assert_eq!(
        evaluate32(&any.replace("or.pred", "and.pred"), &threads),
        [0; 256]
    );
}

#[test]
fn indexed_branches_reach_their_targets() {
    let lanes: Vec<[u32; 3]> = (0..32).map(|l| [l % 3, l, 0]).collect();
    let body = "    table: .branchtargets L0, L1, L2;
    brx.idx %x, table;
L0: add.u32 %r, %y, 100;
    bra.uni END;
L1: mul.lo.u32 %r, %y, 2;
    bra.uni END;
L2: mov.b32 %r, 7;
END:";
    let expected: Vec<u32> = (0..32)
        .map(|l| [l + 100, 2 * l, 7][l as usize % 3])
        .collect();
    assert_eq!(evaluate32(body, &lanes), expected);
}
