//! Hopper's instructions: mbarrier, bulk copies, tensor maps and wgmma. The tests run in child
//! processes with `CUDA_EMU_DEVICE=h100`; on a GPU, only if it is a Hopper.

mod common;

use std::sync::Arc;

use common::hopper::{SWIZZLE_32, SWIZZLE_64, SWIZZLE_128, SWIZZLE_NONE, map, on_hopper};
use common::{config, emulated, finding, function, module, noise};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

/// Launches one of the file's GEMM kernels; gives the product if it ends well.
fn gemm(stream: &Arc<CudaStream>, name: &str) -> Result<(), cudarc::driver::DriverError> {
    let (m, n, k) = (256usize, 128usize, 320usize);
    let kernel = function(
        &module(stream.context(), &common::compile("hopper", "compute_90a")),
        name,
    );
    let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.set_attribute(limit, 131_072)?;
    let make = |seed: u64, count: usize| -> Vec<bf16> {
        noise(seed, count).into_iter().map(bf16::from_f32).collect()
    };
    let (a, b) = (make(1, m * k), make(2, n * k));
    let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
    let (da, db) = (stream.clone_htod(&bits(&a))?, stream.clone_htod(&bits(&b))?);
    let dc = stream.alloc_zeros::<u16>(m * n)?;
    let ma = map(stream, &da, &[k as u64, m as u64], &[64, 128], SWIZZLE_128);
    let mb = map(stream, &db, &[k as u64, n as u64], &[64, 128], SWIZZLE_128);
    let mc = map(
        stream,
        &dc,
        &[n as u64, m as u64],
        &[128, 128],
        SWIZZLE_NONE,
    );
    let depth = k as i32;
    let grid_dim = (n.div_ceil(128) as u32, m.div_ceil(128) as u32, 1);
    let config = LaunchConfig {
        grid_dim,
        block_dim: (384, 1, 1),
        shared_mem_bytes: 131_072,
    };
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&ma).arg(&mb).arg(&mc).arg(&depth);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config) }?;
    let c = stream.clone_dtoh(&dc)?;
    for (i, &got) in c.iter().enumerate() {
        let (row, column) = (i / n, i % n);
        let products = (0..k).map(|d| a[row * k + d].to_f64() * b[column * k + d].to_f64());
        let exact: f64 = products.sum();
        let got = bf16::from_bits(got).to_f64();
        assert!(
            (got - exact).abs() < exact.abs() / 200.0 + 1e-3,
            "({row}, {column}): {got}, {exact}"
        );
    }
    Ok(())
}

#[test]
fn tma_and_wgmma_gemm_agrees_with_a_plain_product() {
    on_hopper("tma_and_wgmma_gemm_agrees_with_a_plain_product", |stream| {
        gemm(stream, "gemm_hopper")
            .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
        if emulated() {
            assert_eq!(common::counters().mma_flop, 2 * 256 * 128 * 320);
        }
    });
}

#[test]
fn missing_wait_on_an_mbarrier_is_caught() {
    on_hopper("missing_wait_on_an_mbarrier_is_caught", |stream| {
        if emulated() {
            let text = finding(
                gemm(stream, "missing_barrier_wait"),
                CUresult::CUDA_ERROR_LAUNCH_FAILED,
            );
            let expected = text.starts_with("asynchronous copy not waited for")
                || text.starts_with("uninitialized read");
            assert!(expected && text.contains("hopper.cu:"), "{text}");
        }
    });
}

/// PTX that loads a box by tensor map, waits, and copies shared memory out as it lies there.
fn tile_ptx(rank: usize, words: usize) -> String {
    let coordinates: String = (0..rank)
        .map(|i| format!("%c{i}"))
        .collect::<Vec<_>>()
        .join(", ");
    let load: String = (0..rank)
        .map(|i| format!("    ld.param.b32 %c{i}, [start+{}];\n", 4 * i))
        .collect();
    format!(
        ".version 8.0
.target sm_90a
.address_size 64
.visible .entry tile(.param .align 64 .b8 map[128], .param .align 4 .b8 start[20], .param .u64 out)
{{
    .reg .b64 %map, %out;
    .reg .b32 %c<5>, %t, %s, %v, %n, %bar;
    .reg .pred %p;
    .shared .align 1024 .b8 box[{bytes}];
    .shared .align 8 .b64 bar;
    mov.b64 %map, map;
    cvta.param.u64 %map, %map;
    ld.param.u64 %out, [out];
{load}
    mov.u32 %t, %tid.x;
    mov.u32 %s, box;
    mov.u32 %bar, bar;
    setp.ne.u32 %p, %t, 0;
    @%p bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {bytes};
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%map, {{{coordinates}}}], [%bar];
READY:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p, [%bar], 0;
    @!%p bra WAIT;
    mov.u32 %n, %t;
    setp.ge.u32 %p, %n, {words};
    @%p ret;
COPY:
    mad.lo.u32 %s, %n, 4, 0;
    mov.u32 %v, box;
    add.u32 %s, %s, %v;
    ld.shared.b32 %v, [%s];
    mad.wide.u32 %map, %n, 4, %out;
    st.global.b32 [%map], %v;
    add.u32 %n, %n, 32;
    setp.lt.u32 %p, %n, {words};
    @%p bra COPY;
    ret;
}}
",
        bytes = 4 * words,
    )
}

/// Five coordinates as a parameter.
#[repr(C)]
#[derive(Clone, Copy)]
struct Start([i32; 5]);
// SAFETY: kernels take the 20 bytes by value.
unsafe impl DeviceRepr for Start {}

/// Loads a box and compares shared memory with what tensor, coordinates and swizzle say.
fn check_tile(
    stream: &Arc<CudaStream>,
    dims: &[u64],
    boxed: &[u32],
    start: &[i32],
    swizzle: sys::CUtensorMapSwizzle,
) {
    let total: u64 = dims.iter().product();
    let values: Vec<u16> = (0..total).map(|i| i as u16 + 1).collect();
    let data = stream.clone_htod(&values).unwrap();
    let elements = boxed.iter().product::<u32>() as usize;
    let kernel = function(
        &module(stream.context(), &tile_ptx(dims.len(), elements / 2)),
        "tile",
    );
    let mut out = stream.alloc_zeros::<u16>(elements).unwrap();
    let map = map(stream, &data, dims, boxed, swizzle);
    let mut five = [0; 5];
    five[..start.len()].copy_from_slice(start);
    let five = Start(five);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&map).arg(&five).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }
        .unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    let out = stream.clone_dtoh(&out).unwrap();
    let row_bits = match swizzle {
        SWIZZLE_32 => 1,
        SWIZZLE_64 => 3,
        SWIZZLE_128 => 7,
        _ => 0,
    };
    for n in 0..elements {
        let (mut rest, mut index, mut pitch, mut inside) = (n as u64, 0u64, 1u64, true);
        for (d, &size) in dims.iter().enumerate() {
            let at = i64::from(start[d]) + (rest % u64::from(boxed[d])) as i64;
            rest /= u64::from(boxed[d]);
            inside &= at >= 0 && (at as u64) < size;
            index = index.wrapping_add((at as u64).wrapping_mul(pitch));
            pitch *= size;
        }
        let byte = 2 * n;
        let swizzled = byte ^ ((byte >> 7 & row_bits) << 4);
        let expected = if inside { values[index as usize] } else { 0 };
        assert_eq!(
            out[swizzled / 2],
            expected,
            "element {n} of {dims:?} {boxed:?} {start:?} {swizzle:?}"
        );
    }
}

#[test]
fn tensor_copies_of_every_rank_and_swizzle_land_where_they_should() {
    on_hopper(
        "tensor_copies_of_every_rank_and_swizzle_land_where_they_should",
        |stream| {
            check_tile(stream, &[64], &[32], &[8], SWIZZLE_NONE);
            check_tile(stream, &[64, 20], &[64, 16], &[0, 3], SWIZZLE_128);
            check_tile(stream, &[64, 20], &[32, 16], &[16, 8], SWIZZLE_64);
            check_tile(stream, &[64, 20], &[16, 16], &[-8, 12], SWIZZLE_32);
            check_tile(stream, &[32, 6, 5], &[16, 4, 2], &[24, -1, 4], SWIZZLE_NONE);
            check_tile(
                stream,
                &[16, 4, 3, 3],
                &[8, 2, 2, 2],
                &[8, 3, 0, 1],
                SWIZZLE_NONE,
            );
            check_tile(
                stream,
                &[16, 3, 3, 2, 2],
                &[8, 2, 2, 2, 2],
                &[4, 1, 1, 0, 1],
                SWIZZLE_NONE,
            );
        },
    );
}

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
