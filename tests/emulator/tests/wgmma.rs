//! `wgmma` in every layout of its operands, against a plain product. Run as the tests of Hopper's
//! other instructions are.

mod common;

use std::sync::Arc;

use common::hopper::on_hopper;
use common::{config, emulated, finding, function, module, noise};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaStream, DriverError, PushKernelArg};
use half::{bf16, f16};

/// A wgmma variant.
#[derive(Clone, Copy)]
struct Variant {
    n: usize,
    ty: &'static str,
    /// Type of the accumulators.
    to: &'static str,
    a_in_registers: bool,
    transpose: bool,
    /// Swizzle mode of the descriptors.
    mode: u64,
    /// Add to the accumulators instead of replacing them.
    keep: bool,
    /// An instruction between the product and the wait for it.
    between: &'static str,
}

const PLAIN: Variant = Variant {
    n: 64,
    ty: "bf16",
    to: "f32",
    a_in_registers: false,
    transpose: false,
    mode: 1,
    keep: true,
    between: "",
};

impl Variant {
    /// Bytes of an element.
    fn size(&self) -> usize {
        if self.ty == "tf32" { 4 } else { 2 }
    }

    /// An element's value and bits.
    fn encode(&self, x: f32) -> (f64, u32) {
        match self.ty {
            "f16" => (f16::from_f32(x).to_f64(), f16::from_f32(x).to_bits().into()),
            "bf16" => (
                bf16::from_f32(x).to_f64(),
                bf16::from_f32(x).to_bits().into(),
            ),
            _ => {
                let bits = x.to_bits() & !0x1fff;
                (f64::from(f32::from_bits(bits)), bits)
            }
        }
    }
}

/// Offset of an element of a matrix, by CUTLASS's canonical layouts; `major` is for 16-bit elements.
fn shared_offset(outer: usize, k: usize, size: usize, major: bool, mode: u64) -> usize {
    let (row, byte) = ([16, 128, 64, 32][mode as usize], k * size);
    let at = if major {
        // Tiles of `row` bytes along the outer index, then eight deep; the second half of the
        // depth lies behind all tiles.
        let (tile, inner) = (2 * outer / row, 2 * outer % row);
        tile * (8 * row) + inner + k % 8 * row + k / 8 * 8192
    } else if mode == 0 {
        outer / 8 * 256 + outer % 8 * 16 + byte / 16 * 128 + byte % 16
    } else {
        outer / 8 * (8 * row) + outer % 8 * row + byte
    };
    at ^ ((at >> 7 & (row / 16 - 1)) << 4)
}

fn check_wgmma(stream: &Arc<CudaStream>, v: &Variant) {
    try_wgmma(stream, v).unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
}

/// Runs a variant and checks what it computes, if it runs to the end.
fn try_wgmma(stream: &Arc<CudaStream>, v: &Variant) -> Result<(), DriverError> {
    let (size, k) = (v.size(), 32 / v.size());
    let (a, b) = (noise(1, 64 * k), noise(2, v.n * k));
    // A at 0, B at 16 KiB; 48 KiB in all.
    let mut image = vec![0u8; 49152];
    let mut put = |at: usize, x: f32| {
        image[at..at + size].copy_from_slice(&v.encode(x).1.to_le_bytes()[..size])
    };
    let a_major = v.transpose && !v.a_in_registers;
    for d in 0..k {
        for row in 0..64 {
            put(shared_offset(row, d, size, a_major, v.mode), a[row * k + d]);
        }
        for column in 0..v.n {
            let at = shared_offset(column, d, size, v.transpose, v.mode);
            put(16384 + at, b[column * k + d]);
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
    let half = v.to == "f16";
    let (count, one) = match half {
        true => (v.n / 4, "0x3c003c00"),
        false => (v.n / 2, "0x3f800000"),
    };
    let registers: Vec<String> = (0..count).map(|i| format!("%f{i}")).collect();
    let mut flags = match (v.a_in_registers, v.transpose) {
        (true, t) => format!(", {}", u8::from(t)),
        (false, t) => format!(", {0}, {0}", u8::from(t)),
    };
    if v.ty == "tf32" {
        flags.clear();
    }
    let a_operand = match v.a_in_registers {
        true => "{%r0, %r1, %r2, %r3}",
        false => "%da",
    };
    let stores: String = (0..count)
        .map(|i| format!("    st.global.b32 [%out+{}], %f{i};\n", 4 * i))
        .collect();
    let ones: String = (0..count)
        .map(|i| format!("    mov.b32 %f{i}, {one};\n"))
        .collect();
    let ptx = format!(
        ".version 8.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 image, .param .u64 fragments, .param .u64 out)
{{
    .reg .b64 %in, %fr, %out, %da, %db, %base;
    .reg .b32 %t, %s, %i, %v, %r<4>, %x, %f<{count}>;
    .reg .pred %p, %keep;
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
    mov.u32 %x, {keep};
    setp.ne.u32 %keep, %x, 0;
{ones}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{to}.{ty}.{ty} {{{list}}}, {a_operand}, %db, %keep, 1, -1{flags};
    wgmma.commit_group.sync.aligned;
    {between}
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %out, %t, {bytes}, %out;
{stores}
    ret;
}}
",
        keep = u8::from(v.keep),
        between = v.between,
        n = v.n,
        to = v.to,
        ty = v.ty,
        list = registers.join(", "),
        bytes = 4 * count,
    );
    // Thread, register: the fragment of A that the PTX ISA's figures show.
    let fragment = |t: usize, i: usize| {
        let row = t / 32 * 16 + t % 32 / 4 + 8 * (i % 2);
        if size == 4 {
            return v.encode(a[row * k + t % 4 + 4 * (i / 2)]).1;
        }
        let depth = 2 * (t % 4) + 8 * (i / 2);
        v.encode(a[row * k + depth]).1 | v.encode(a[row * k + depth + 1]).1 << 16
    };
    let fragments: Vec<u32> = (0..512).map(|n| fragment(n / 4, n % 4)).collect();
    let kernel = function(&module(stream.context(), &ptx), "product");
    let (image, fragments) = (
        stream.clone_htod(&image).unwrap(),
        stream.clone_htod(&fragments).unwrap(),
    );
    let mut out = stream.alloc_zeros::<u32>(128 * count).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&image).arg(&fragments).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 128)) }?;
    let out = stream.clone_dtoh(&out).unwrap();
    let start = if v.keep { 1.0 } else { 0.0 };
    // f16 accumulators are rounded to 11 bits.
    let error = if half { 2f64.powi(-11) } else { 0.0 };
    for t in 0..128 {
        for i in 0..v.n / 2 {
            let row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2);
            let column = i / 4 * 8 + 2 * (t % 4) + i % 2;
            let product: f64 = (0..k)
                .map(|d| v.encode(a[row * k + d]).0 * v.encode(b[column * k + d]).0)
                .sum();
            let exact = start - product;
            let got = if half {
                f16::from_bits((out[t * count + i / 2] >> (16 * (i % 2))) as u16).to_f64()
            } else {
                f64::from(f32::from_bits(out[t * count + i]))
            };
            assert!(
                (got - exact).abs() < 1e-5 + error * exact.abs(),
                "n{} {} ({row}, {column}): {got}, {exact}",
                v.n,
                v.ty
            );
        }
    }
    Ok(())
}

#[test]
fn wgmma_multiplies_in_every_layout() {
    on_hopper("wgmma_multiplies_in_every_layout", |stream| {
        for mode in 0..4 {
            for a_in_registers in [false, true] {
                let layout = Variant {
                    a_in_registers,
                    mode,
                    ..PLAIN
                };
                for ty in ["bf16", "f16", "tf32"] {
                    check_wgmma(stream, &Variant { ty, ..layout });
                }
                if mode > 0 {
                    let transpose = true;
                    check_wgmma(
                        stream,
                        &Variant {
                            transpose,
                            ..layout
                        },
                    );
                }
            }
        }
    });
}

#[test]
fn wgmma_multiplies_at_every_width() {
    on_hopper("wgmma_multiplies_at_every_width", |stream| {
        for n in (8..=256).step_by(8) {
            let a_in_registers = n % 16 == 0;
            check_wgmma(
                stream,
                &Variant {
                    n,
                    a_in_registers,
                    ..PLAIN
                },
            );
        }
    });
}

#[test]
fn wgmma_accumulates_in_f16_and_replaces_when_told() {
    on_hopper(
        "wgmma_accumulates_in_f16_and_replaces_when_told",
        |stream| {
            for (ty, to, keep) in [
                ("f16", "f16", true),
                ("f16", "f16", false),
                ("bf16", "f32", false),
                ("tf32", "f32", false),
            ] {
                check_wgmma(
                    stream,
                    &Variant {
                        ty,
                        to,
                        keep,
                        ..PLAIN
                    },
                );
            }
        },
    );
}

#[test]
fn registers_of_a_written_before_the_wait_are_caught() {
    on_hopper(
        "registers_of_a_written_before_the_wait_are_caught",
        |stream| {
            let variant = |between| Variant {
                a_in_registers: true,
                between,
                ..PLAIN
            };
            // Reading them, or writing others, changes nothing.
            check_wgmma(stream, &variant("mov.b32 %v, %r3;"));
            if emulated() {
                let result = try_wgmma(stream, &variant("mov.b32 %r3, 0;"));
                let text = finding(result, CUresult::CUDA_ERROR_LAUNCH_FAILED);
                assert!(
                    text.starts_with("asynchronous copy not waited for: write to registers of A")
                        && text.contains("mov.b32 %r3, 0;"),
                    "{text}"
                );
            }
        },
    );
}
