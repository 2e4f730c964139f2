//! `wgmma` in every layout of its operands, against a plain product. Run as the tests of Hopper's
//! other instructions are.

mod common;

use std::sync::Arc;

use common::hopper::on_hopper;
use common::{config, function, module, noise};
use cudarc::driver::{CudaStream, PushKernelArg};
use half::{bf16, f16};

/// A wgmma variant.
struct Variant {
    n: usize,
    ty: &'static str,
    a_in_registers: bool,
    transpose: bool,
    /// Swizzle mode of the descriptors.
    mode: u64,
}

/// Offset of an element of a matrix with 16-bit elements, by CUTLASS's canonical layouts.
fn shared_offset(outer: usize, k: usize, major: bool, mode: u64) -> usize {
    let row = [16, 128, 64, 32][mode as usize];
    let at = if major {
        // Tiles of `row` bytes along the outer index, then eight deep; the second half of the
        // depth lies behind all tiles.
        let (tile, inner) = (2 * outer / row, 2 * outer % row);
        tile * (8 * row) + inner + k % 8 * row + k / 8 * 8192
    } else if mode == 0 {
        outer / 8 * 256 + outer % 8 * 16 + k / 8 * 128 + 2 * k % 16
    } else {
        outer / 8 * (8 * row) + outer % 8 * row + 2 * k
    };
    at ^ ((at >> 7 & (row / 16 - 1)) << 4)
}

fn check_wgmma(stream: &Arc<CudaStream>, v: &Variant) {
    let k = 16;
    let (a, b) = (noise(1, 64 * k), noise(2, v.n * k));
    let half = |x: f32| {
        if v.ty == "f16" {
            (f16::from_f32(x).to_f64(), f16::from_f32(x).to_bits())
        } else {
            (bf16::from_f32(x).to_f64(), bf16::from_f32(x).to_bits())
        }
    };
    // A at 0, B at 16 KiB; 48 KiB in all.
    let mut image = vec![0u16; 24576];
    for row in 0..64 {
        for d in 0..k {
            image[shared_offset(row, d, v.transpose && !v.a_in_registers, v.mode) / 2] =
                half(a[row * k + d]).1;
        }
    }
    for column in 0..v.n {
        for d in 0..k {
            image[(16384 + shared_offset(column, d, v.transpose, v.mode)) / 2] =
                half(b[column * k + d]).1;
        }
    }
    let row = [16u64, 128, 64, 32][v.mode as usize];
    let (leading, stride) = match (v.transpose, v.mode) {
        (true, 0) => (8192, 128),
        (true, _) => (8 * row, 8192),
        (false, 0) => (128, 256),
        (false, _) => (16, 8 * row),
    };
    let fields = (leading >> 4) << 16 | (stride >> 4) << 32 | v.mode << 62;
    let a_fields = if v.a_in_registers { 0 } else { fields };
    let registers: Vec<String> = (0..v.n / 2).map(|i| format!("%f{i}")).collect();
    let (a_operand, flags) = match (v.a_in_registers, v.transpose) {
        (true, t) => ("{%r0, %r1, %r2, %r3}", format!("{}", u8::from(t))),
        (false, t) => ("%da", format!("{0}, {0}", u8::from(t))),
    };
    let stores: String = (0..v.n / 2)
        .map(|i| format!("    st.global.f32 [%out+{}], %f{i};\n", 4 * i))
        .collect();
    let zeros: String = (0..v.n / 2)
        .map(|i| format!("    mov.f32 %f{i}, 0f3F800000;\n"))
        .collect();
    let ptx = format!(
        ".version 8.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 image, .param .u64 fragments, .param .u64 out)
{{
    .reg .b64 %in, %fr, %out, %da, %db, %base;
    .reg .b32 %t, %s, %i, %v, %r<4>, %x;
    .reg .f32 %f<{count}>;
    .reg .pred %p;
    .shared .align 1024 .b8 data[49152];
    ld.param.u64 %in, [image];
    ld.param.u64 %fr, [fragments];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %s, data;
    mov.u32 %i, %t;
FILL:
    mad.wide.u32 %base, %i, 4, %in;
    ld.global.b32 %v, [%base];
    mad.lo.u32 %x, %i, 4, %s;
    st.shared.b32 [%x], %v;
    add.u32 %i, %i, 128;
    setp.lt.u32 %p, %i, 12288;
    @%p bra FILL;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mad.wide.u32 %base, %t, 16, %fr;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%base];
    shr.u32 %x, %s, 4;
    cvt.u64.u32 %base, %x;
    or.b64 %da, %base, {a_fields:#x};
    add.u64 %base, %base, 1024;
    or.b64 %db, %base, {fields:#x};
{zeros}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {{{list}}}, {a_operand}, %db, 1, 1, -1, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %out, %t, {bytes}, %out;
{stores}
    ret;
}}
",
        count = v.n / 2,
        n = v.n,
        ty = v.ty,
        list = registers.join(", "),
        bytes = 2 * v.n,
    );
    let fragments: Vec<u32> = (0..128usize)
        .flat_map(|t| (0..4).map(move |i| (t, i)))
        .map(|(t, i)| {
            let (row, depth) = (
                t / 32 * 16 + t % 32 / 4 + 8 * (i % 2),
                2 * (t % 4) + 8 * (i / 2),
            );
            u32::from(half(a[row * k + depth]).1) | u32::from(half(a[row * k + depth + 1]).1) << 16
        })
        .collect();
    let kernel = function(&module(stream.context(), &ptx), "product");
    let (image, fragments) = (
        stream.clone_htod(&image).unwrap(),
        stream.clone_htod(&fragments).unwrap(),
    );
    let mut out = stream.alloc_zeros::<f32>(64 * v.n).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&image).arg(&fragments).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 128)) }
        .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    let out = stream.clone_dtoh(&out).unwrap();
    for t in 0..128 {
        for i in 0..v.n / 2 {
            let row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2);
            let column = i / 4 * 8 + 2 * (t % 4) + i % 2;
            let product: f64 = (0..k)
                .map(|d| half(a[row * k + d]).0 * half(b[column * k + d]).0)
                .sum();
            let got = f64::from(out[t * (v.n / 2) + i]);
            assert!(
                (got - (1.0 - product)).abs() < 1e-5,
                "n{} {} ({row}, {column}): {got}",
                v.n,
                v.ty
            );
        }
    }
}

#[test]
fn wgmma_multiplies_in_every_layout() {
    on_hopper("wgmma_multiplies_in_every_layout", |stream| {
        for mode in 0..4 {
            check_wgmma(
                stream,
                &Variant {
                    n: 64,
                    ty: "bf16",
                    a_in_registers: false,
                    transpose: false,
                    mode,
                },
            );
            check_wgmma(
                stream,
                &Variant {
                    n: 64,
                    ty: "f16",
                    a_in_registers: true,
                    transpose: false,
                    mode,
                },
            );
        }
        for mode in 1..4 {
            check_wgmma(
                stream,
                &Variant {
                    n: 64,
                    ty: "bf16",
                    a_in_registers: false,
                    transpose: true,
                    mode,
                },
            );
        }
        for n in (8..=256).step_by(8) {
            check_wgmma(
                stream,
                &Variant {
                    n,
                    ty: "bf16",
                    a_in_registers: true,
                    transpose: false,
                    mode: 1,
                },
            );
        }
    });
}
