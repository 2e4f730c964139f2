//! Conversions to and from fp8, and matrix products of 8-bit operands and of f64. Those of fp8 run
//! as the tests of Hopper's instructions do.

mod common;

use std::sync::Arc;

use common::hopper::on_hopper;
use common::{config, context, function, module, noise};
use cudarc::driver::{CudaStream, PushKernelArg};
use half::f16;

/// Value of an 8-bit float by OFP8's tables: fraction bits, bias; NaN and infinities apart.
fn table(bits: u32, fraction: u32, bias: i32) -> f64 {
    let (field, rest) = (
        bits >> fraction & (0x7f >> fraction),
        bits & ((1 << fraction) - 1),
    );
    let scale = f64::from(1u32 << fraction);
    let magnitude = if field == 0 {
        f64::from(rest) / scale * 2f64.powi(1 - bias)
    } else {
        (1.0 + f64::from(rest) / scale) * 2f64.powi(field as i32 - bias)
    };
    if bits >> 7 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

fn e4m3(bits: u32) -> f64 {
    if bits & 0x7f == 0x7f {
        f64::NAN
    } else {
        table(bits, 3, 7)
    }
}

fn e5m2(bits: u32) -> f64 {
    match bits & 0x7f {
        0x7c if bits >> 7 == 1 => f64::NEG_INFINITY,
        0x7c => f64::INFINITY,
        n if n > 0x7c => f64::NAN,
        _ => table(bits, 2, 15),
    }
}

/// Runs PTX per 32-bit input `%x` with a second one `%y`; `body` leaves `%r`.
fn run(stream: &Arc<CudaStream>, body: &str, inputs: &[[u32; 2]]) -> Vec<u32> {
    let ptx = format!(
        ".version 8.4
.target sm_89
.address_size 64
.visible .entry probe(.param .u64 input, .param .u64 output, .param .u32 count)
{{
    .reg .b64 %in, %out;
    .reg .b32 %i, %n, %t, %x, %y, %r;
    .reg .b16 %h;
    .reg .pred %done;
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    ld.param.u32 %n, [count];
    mov.u32 %i, %ctaid.x;
    mov.u32 %t, %tid.x;
    mad.lo.u32 %i, %i, 128, %t;
    setp.ge.u32 %done, %i, %n;
    @%done ret;
    mad.wide.u32 %in, %i, 8, %in;
    mad.wide.u32 %out, %i, 4, %out;
    ld.global.v2.b32 {{%x, %y}}, [%in];
    {body}
    st.global.b32 [%out], %r;
    ret;
}}
"
    );
    let kernel = function(&module(stream.context(), &ptx), "probe");
    let flat: Vec<u32> = inputs.iter().flatten().copied().collect();
    let data = stream.clone_htod(&flat).unwrap();
    let mut out = stream.alloc_zeros::<u32>(inputs.len()).unwrap();
    let count = inputs.len() as u32;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&data).arg(&mut out).arg(&count);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(count.div_ceil(128), 128)) }
        .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    stream.clone_dtoh(&out).unwrap()
}

#[test]
fn every_fp8_widens_exactly() {
    on_hopper("every_fp8_widens_exactly", |stream| {
        let inputs: Vec<[u32; 2]> = (0..256).map(|x| [x | (255 - x) << 8, 0]).collect();
        for (name, value) in [("e4m3x2", e4m3 as fn(u32) -> f64), ("e5m2x2", e5m2)] {
            let body = format!("cvt.u16.u32 %h, %x;\n    cvt.rn.f16x2.{name} %r, %h;");
            for (x, got) in (0..256).zip(run(stream, &body, &inputs)) {
                for (bits, half) in [(x, got & 0xffff), (255 - x, got >> 16)] {
                    let (got, expected) = (f16::from_bits(half as u16).to_f64(), value(bits));
                    let same = got == expected || got.is_nan() && expected.is_nan();
                    assert!(same, "{name} {bits:#x}: {got}, {expected}");
                }
            }
        }
    });
}

/// The 8-bit float nearest to `x`, found by looking at all of them; ties to the even one, and
/// beyond the largest the largest.
fn nearest(x: f64, value: fn(u32) -> f64) -> u32 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    (0..0x7f)
        .filter(|&bits| value(bits).is_finite())
        .min_by(|&a, &b| {
            let distance = |bits: u32| (value(bits) - x.abs()).abs();
            distance(a)
                .total_cmp(&distance(b))
                .then((a & 1).cmp(&(b & 1)))
        })
        .unwrap()
        | sign
}

#[test]
fn floats_narrow_to_the_nearest_fp8() {
    on_hopper("floats_narrow_to_the_nearest_fp8", |stream| {
        for (name, value) in [("e4m3x2", e4m3 as fn(u32) -> f64), ("e5m2x2", e5m2)] {
            // Every value, every midpoint, and the f32 on both sides of each.
            let mut inputs = Vec::new();
            for bits in (0..0x7f).filter(|&b| value(b).is_finite()) {
                let next = value(bits + 1);
                let midpoint = if next.is_finite() {
                    (value(bits) + next) / 2.0
                } else {
                    value(bits) * 4.0
                };
                for x in [value(bits) as f32, midpoint as f32] {
                    for n in [x.to_bits().wrapping_sub(1), x.to_bits(), x.to_bits() + 1] {
                        inputs.push([n, (-f32::from_bits(n)).to_bits()]);
                    }
                }
            }
            let body = format!("cvt.rn.satfinite.{name}.f32 %h, %x, %y;\n    cvt.u32.u16 %r, %h;");
            for ([x, y], got) in inputs.iter().zip(run(stream, &body, &inputs)) {
                for (bits, got) in [(*x, got >> 8), (*y, got & 0xff)] {
                    let x = f64::from(f32::from_bits(bits));
                    let expected = if x.is_nan() { 0x7f } else { nearest(x, value) };
                    assert_eq!(got, expected, "{name} {x}");
                }
            }
        }
    });
}

/// A kernel of one warp around an `mma`: each lane loads its fragments, 32-bit words of A, B and
/// C one after the other, and stores its four words of D.
fn product(
    stream: &Arc<CudaStream>,
    opcode: &str,
    counts: [usize; 3],
    fragments: &[u32],
) -> Vec<u32> {
    let list = |name: &str, n: usize| -> String {
        let names: Vec<String> = (0..n).map(|i| format!("%{name}{i}")).collect();
        names.join(", ")
    };
    let [a, b, c] = counts;
    let words = a + b + c;
    let mut loads = String::new();
    for (i, (name, n)) in [("a", a), ("b", b), ("c", c)]
        .iter()
        .flat_map(|&(name, count)| (0..count).map(move |n| (name, n)))
        .enumerate()
    {
        loads += &format!("    ld.global.b32 %{name}{n}, [%in+{}];\n", 4 * i);
    }
    let stores: String = (0..c)
        .map(|i| format!("    st.global.b32 [%out+{}], %d{i};\n", 4 * i))
        .collect();
    let target = if opcode.contains("e4m3") || opcode.contains("e5m2") {
        "sm_89"
    } else {
        "sm_80"
    };
    let ptx = format!(
        ".version 8.4
.target {target}
.address_size 64
.visible .entry product(.param .u64 input, .param .u64 output)
{{
    .reg .b64 %in, %out;
    .reg .b32 %t, %a<4>, %b<2>, %c<4>, %d<4>;
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    mov.u32 %t, %tid.x;
    mad.wide.u32 %in, %t, {}, %in;
    mad.wide.u32 %out, %t, {}, %out;
{loads}    {opcode} {{{}}}, {{{}}}, {{{}}}, {{{}}};
{stores}    ret;
}}
",
        4 * words,
        4 * c,
        list("d", c),
        list("a", a),
        list("b", b),
        list("c", c),
    );
    let kernel = function(&module(stream.context(), &ptx), "product");
    let data = stream.clone_htod(fragments).unwrap();
    let mut out = stream.alloc_zeros::<u32>(32 * c).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&data).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }
        .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    stream.clone_dtoh(&out).unwrap()
}

/// Fragments of A (16 x k) and B (k x 8, by columns) and of C, by the PTX ISA's figures for 8-bit
/// operands.
fn fragments(a: &[u8], b: &[u8], c: &[u32], k: usize) -> Vec<u32> {
    let mut out = Vec::new();
    for lane in 0..32 {
        let (group, within) = (lane / 4, lane % 4);
        for register in 0..k / 8 {
            let (row, depth) = (
                group + 8 * (register & 1),
                4 * within + 16 * (register >> 1),
            );
            let bytes = &a[row * k + depth..][..4];
            out.push(u32::from_le_bytes(bytes.try_into().unwrap()));
        }
        for register in 0..k / 16 {
            let bytes = &b[group * k + 4 * within + 16 * register..][..4];
            out.push(u32::from_le_bytes(bytes.try_into().unwrap()));
        }
        for i in 0..4 {
            out.push(c[(group + 8 * (i >> 1)) * 8 + 2 * within + (i & 1)]);
        }
    }
    out
}

/// Deterministic bytes.
fn bytes(seed: u64, count: usize) -> Vec<u8> {
    noise(seed, count)
        .iter()
        .map(|x| (x * 128.0) as i8 as u8)
        .collect()
}

#[test]
fn integer_products_are_exact_and_saturate_when_asked() {
    let stream = context().default_stream();
    for (k, types, saturate) in [
        (32, ["s8", "s8"], false),
        (32, ["u8", "s8"], false),
        (16, ["s8", "u8"], false),
        (32, ["u8", "u8"], true),
    ] {
        let (a, b) = (bytes(1, 16 * k), bytes(2, 8 * k));
        let start = if saturate {
            i32::MAX - 1000
        } else {
            i32::MAX - 7
        };
        let c: Vec<u32> = (0..128).map(|i| (start - 17 * i) as u32).collect();
        let opcode = format!(
            "mma.sync.aligned.m16n8k{k}.row.col{}.s32.{}.{}.s32",
            if saturate { ".satfinite" } else { "" },
            types[0],
            types[1]
        );
        let out = product(
            &stream,
            &opcode,
            [k / 8, k / 16, 4],
            &fragments(&a, &b, &c, k),
        );
        let widen = |x: u8, ty: &str| {
            if ty == "s8" {
                i64::from(x as i8)
            } else {
                i64::from(x)
            }
        };
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let products = (0..k)
                    .map(|d| widen(a[row * k + d], types[0]) * widen(b[column * k + d], types[1]));
                let exact = products.sum::<i64>() + i64::from(c[row * 8 + column] as i32);
                let expected = if saturate {
                    exact.clamp(i32::MIN.into(), i32::MAX.into()) as u32
                } else {
                    exact as u32
                };
                assert_eq!(out[lane * 4 + i], expected, "{opcode} ({row}, {column})");
            }
        }
    }
}

#[test]
fn fp8_products_agree_with_float64() {
    on_hopper("fp8_products_agree_with_float64", |stream| {
        for (name, value) in [("e4m3", e4m3 as fn(u32) -> f64), ("e5m2", e5m2)] {
            // Small exponents, so that no value is a NaN or an infinity.
            let tame = |x: u8| x & 0xbf;
            let a: Vec<u8> = bytes(3, 16 * 32).into_iter().map(tame).collect();
            let b: Vec<u8> = bytes(4, 8 * 32).into_iter().map(tame).collect();
            let c = noise(5, 128);
            let words: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
            let opcode = format!("mma.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32");
            let out = product(stream, &opcode, [4, 2, 4], &fragments(&a, &b, &words, 32));
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                    let products = (0..32)
                        .map(|d| value(a[row * 32 + d].into()) * value(b[column * 32 + d].into()));
                    let exact = products.sum::<f64>() + f64::from(c[row * 8 + column]);
                    let got = f64::from(f32::from_bits(out[lane * 4 + i]));
                    assert!(
                        (got - exact).abs() <= 1e-4 * (1.0 + exact.abs()),
                        "{name}: {got} {exact}"
                    );
                }
            }
        }
    });
}

#[test]
fn double_products_agree_with_a_plain_one() {
    let stream = context().default_stream();
    let ptx = ".version 8.0
.target sm_80
.address_size 64
.visible .entry product(.param .u64 input, .param .u64 output)
{
    .reg .b64 %in, %out, %a, %b, %c0, %c1, %d0, %d1;
    .reg .b32 %t;
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    mov.u32 %t, %tid.x;
    mad.wide.u32 %in, %t, 32, %in;
    mad.wide.u32 %out, %t, 16, %out;
    ld.global.v2.b64 {%a, %b}, [%in];
    ld.global.v2.b64 {%c0, %c1}, [%in+16];
    mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a}, {%b}, {%c0, %c1};
    st.global.v2.b64 [%out], {%d0, %d1};
    ret;
}
";
    let value = |seed: u64, count: usize| -> Vec<f64> {
        noise(seed, count).into_iter().map(f64::from).collect()
    };
    // A is 8 x 4, B 4 x 8 by columns, C 8 x 8.
    let (a, b, c) = (value(1, 32), value(2, 32), value(3, 64));
    let mut words = Vec::new();
    for lane in 0..32 {
        let (group, within) = (lane / 4, lane % 4);
        words.extend([a[group * 4 + within], b[group * 4 + within]]);
        words.extend([c[group * 8 + 2 * within], c[group * 8 + 2 * within + 1]]);
    }
    let kernel = function(&module(stream.context(), ptx), "product");
    let data = stream.clone_htod(&words).unwrap();
    let mut out = stream.alloc_zeros::<f64>(64).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&data).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }
        .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    // Lane by lane, the accumulators lie in row-major order.
    for (i, got) in stream.clone_dtoh(&out).unwrap().into_iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let exact = c[i]
            + (0..4)
                .map(|k| a[row * 4 + k] * b[column * 4 + k])
                .sum::<f64>();
        assert!(
            (got - exact).abs() < 1e-14,
            "({row}, {column}): {got} {exact}"
        );
    }
}
