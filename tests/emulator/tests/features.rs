//! Language features of CUDA C++ and NVIDIA's own headers, compiled by nvcc.

mod common;

use common::{compiled, config, context, function, noise};
use cudarc::driver::{CudaContext, CudaFunction, LaunchConfig, PushKernelArg};
use half::bf16;
use std::sync::Arc;

fn kernel(name: &str) -> (Arc<CudaContext>, CudaFunction) {
    let context = context();
    let kernel = function(&compiled(&context, "features"), name);
    (context, kernel)
}

/// Runs a kernel on one block with one array in place.
fn in_place<T: cudarc::driver::DeviceRepr + Clone + Default>(
    name: &str,
    block: u32,
    data: &[T],
) -> Vec<T> {
    let (context, kernel) = kernel(name);
    let stream = context.default_stream();
    let mut x = stream.clone_htod(data).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut x);
    // SAFETY: the argument matches the kernel's parameter.
    unsafe { launch.launch(config(1, block)) }.unwrap();
    stream.clone_dtoh(&x).unwrap()
}

#[test]
fn calls_pass_values_and_pointers_to_locals() {
    let x: Vec<f32> = (0..32).map(|i| i as f32 / 8.0).collect();
    let got = in_place("calls", 32, &x);
    for (got, x) in got.iter().zip(&x) {
        let sum = ((x + 2.0) * x + 3.0) * x + 4.0;
        assert!((got - (2.0 * sum - 1.0)).abs() < 1e-4, "{got} at {x}");
    }
}

#[test]
fn recursion_diverges_and_returns() {
    let got = in_place("recursion", 16, &[0i32; 16]);
    assert_eq!(
        got,
        [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610]
    );
}

#[test]
fn lanes_call_different_functions_through_pointers() {
    let x: Vec<i32> = (0..40).collect();
    let expected: Vec<i32> = x
        .iter()
        .map(|&v| [v + 1, 2 * v, -v][v as usize % 3])
        .collect();
    assert_eq!(in_place("pointers_to_functions", 40, &x), expected);
}

#[test]
fn global_variables_start_with_their_values_and_keep_changes() {
    let (context, kernel) = kernel("globals");
    let stream = context.default_stream();
    let mut x = stream.alloc_zeros::<i32>(32).unwrap();
    for expected in [10, 13] {
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&mut x);
        // SAFETY: the argument matches the kernel's parameter.
        unsafe { launch.launch(config(1, 32)) }.unwrap();
        assert_eq!(stream.clone_dtoh(&x).unwrap(), [expected; 32]);
    }
}

#[test]
fn local_arrays_belong_to_each_thread() {
    let (context, kernel) = kernel("local_array");
    let stream = context.default_stream();
    let mut x = stream.alloc_zeros::<i32>(32).unwrap();
    let n = 3;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut x).arg(&n);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }.unwrap();
    let expected: Vec<i32> = (0..32).map(|t| (t % 16) * (t % 16) + 100).collect();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), expected);
}

#[test]
fn switches_take_every_branch() {
    let x = [0, 1, 2, 3, 4, 5, 6, -3];
    assert_eq!(
        in_place("choices", 8, &x),
        [11, 12, 2, 33, -1, 99, 1000, 1000]
    );
}

#[test]
fn printf_formats_its_arguments() {
    const CHILD: &str = "CUDA_EMULATOR_TEST_PRINTF";
    if std::env::var_os(CHILD).is_some() {
        let (context, kernel) = kernel("prints");
        let n = 42;
        let stream = context.default_stream();
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&n);
        // SAFETY: the argument matches the kernel's parameter.
        unsafe { launch.launch(config(1, 32)) }.unwrap();
        stream.synchronize().unwrap();
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "printf_formats_its_arguments", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("n=42 f=1.50 s=text u=7 x=00ff %\n"), "{text}");
}

#[test]
fn cooperative_groups_reduce_over_their_tiles() {
    let (context, kernel) = kernel("group_reductions");
    let stream = context.default_stream();
    let x: Vec<i32> = (0..64).map(|i| (i * 37 + 11) % 23).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let mut out = stream.alloc_zeros::<i32>(320).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&dx).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 64)) }.unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    for t in 0..64 {
        let (warp, eight) = (t / 32 * 32, t / 8 * 8);
        assert_eq!(out[t], x[warp..warp + 32].iter().sum::<i32>());
        assert_eq!(out[t + 64], *x[eight..eight + 8].iter().max().unwrap());
        if t % 8 < 6 {
            assert_eq!(out[t + 128], x[t + 2]);
        }
        assert_eq!(out[t + 192], x.iter().filter(|&&v| v > 10).count() as i32);
        let even: i32 = x[warp..warp + 32].iter().step_by(2).sum();
        assert_eq!(
            out[t + 256],
            if t % 2 == 1 {
                1600 + (t as i32 % 32) / 2
            } else {
                even
            }
        );
    }
}

#[test]
fn atomics_of_all_types_add_up_over_blocks() {
    let (context, kernel) = kernel("atomics");
    let stream = context.default_stream();
    let mut i = stream.clone_htod(&[0i32, -100, 0]).unwrap();
    let mut u = stream.clone_htod(&[0u32, 5, 0, 0]).unwrap();
    let mut f = stream.alloc_zeros::<f32>(1).unwrap();
    let mut d = stream.alloc_zeros::<f64>(1).unwrap();
    let mut l = stream.alloc_zeros::<u64>(1).unwrap();
    let mut h = stream.alloc_zeros::<u32>(1).unwrap();
    let mut b = stream.alloc_zeros::<u16>(2).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch
        .arg(&mut i)
        .arg(&mut u)
        .arg(&mut f)
        .arg(&mut d)
        .arg(&mut l)
        .arg(&mut h)
        .arg(&mut b);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(2, 64)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&i).unwrap(), [128, 58, -63]);
    // 128 increments modulo 21; 128 decrements from 5 modulo 10; four flips; twice 0 + ... + 63.
    assert_eq!(stream.clone_dtoh(&u).unwrap(), [128 % 21, 7, 0, 4032]);
    assert_eq!(stream.clone_dtoh(&f).unwrap(), [64.0]);
    assert_eq!(stream.clone_dtoh(&d).unwrap(), [32.0]);
    assert_eq!(stream.clone_dtoh(&l).unwrap(), [63 << 33]);
    // 128 and 256 in f16; 128 in bf16.
    assert_eq!(stream.clone_dtoh(&h).unwrap(), [0x5800 | 0x5c00 << 16]);
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [0x4300, 0]);
}

#[test]
fn lanes_of_a_warp_take_turns_with_a_spin_lock() {
    let (context, kernel) = kernel("spin_lock");
    let stream = context.default_stream();
    let mut lock = stream.alloc_zeros::<i32>(1).unwrap();
    let mut count = stream.alloc_zeros::<i32>(1).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut lock).arg(&mut count);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(2, 64)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&count).unwrap(), [128]);
}

#[test]
fn bf16_header_agrees_with_float64() {
    let (context, kernel) = kernel("bf16_header");
    let stream = context.default_stream();
    let n = 512;
    let make = |seed: u64| -> Vec<bf16> {
        noise(seed, n)
            .into_iter()
            .map(|x| bf16::from_f32(x * 50.0))
            .collect()
    };
    let (a, b) = (make(1), make(2));
    let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
    let (da, db) = (
        stream.clone_htod(&bits(&a)).unwrap(),
        stream.clone_htod(&bits(&b)).unwrap(),
    );
    let mut out = stream.alloc_zeros::<f32>(8 * n).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&da).arg(&db).arg(&mut out);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(4, 128)) }.unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    let rounded = |x: f64| bf16::from_f64(x).to_f32();
    for i in 0..n {
        let (x, y) = (a[i].to_f64(), b[i].to_f64());
        let expected = [
            rounded(x + y),
            rounded(x * y),
            x.max(y) as f32,
            if x < y { 1.0 } else { 0.0 },
            x.trunc() as f32,
            rounded(x - y),
            rounded(y - x),
            -x as f32,
        ];
        for (column, expected) in expected.into_iter().enumerate() {
            assert_eq!(out[i + column * n], expected, "column {column} of {x}, {y}");
        }
    }
}

#[test]
fn math_library_stays_within_its_documented_error() {
    let (context, kernel) = kernel("math");
    let stream = context.default_stream();
    let x: Vec<f32> = noise(6, 128).iter().map(|v| v * 1.9).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let mut out = stream.alloc_zeros::<f32>(8 * 128).unwrap();
    let n = 128;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&dx).arg(&mut out).arg(&n);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 128)) }.unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    let ulp = f64::from(f32::EPSILON);
    for (i, &x) in x.iter().enumerate() {
        let v = f64::from(x);
        let check = |column: usize, expected: f64, ulps: f64| {
            let got = f64::from(out[i + column * 128]);
            assert!(
                (got - expected).abs() <= ulps * ulp * expected.abs() + 1e-12,
                "column {column} of {v}: {got}, {expected}"
            );
        };
        // Maximum errors of the CUDA programming guide's table, in units in the last place.
        check(0, v.exp(), 2.0);
        check(1, f64::from(x + 3.0).ln(), 2.0);
        check(2, v.tanh(), 2.0);
        check(4, f64::from(1000.0 * x).sin(), 2.0);
        check(5, v.exp(), 1.0);
        check(6, f64::from(x + 2.0).powf(2.5), 4.0);
        check(7, v % f64::from(0.3f32), 0.0);
    }
}

#[test]
fn three_dimensional_indices_cover_the_grid() {
    let (context, kernel) = kernel("wide_index");
    let stream = context.default_stream();
    let mut x = stream.alloc_zeros::<u8>(48).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut x);
    let config = LaunchConfig {
        grid_dim: (1, 3, 2),
        block_dim: (2, 2, 2),
        shared_mem_bytes: 0,
    };
    // SAFETY: the argument matches the kernel's parameter.
    unsafe { launch.launch(config) }.unwrap();
    let expected: Vec<u8> = (0..48)
        .map(|i| (i / 24 * 100 + i / 8 % 3 * 10 + i % 8) as u8)
        .collect();
    assert_eq!(stream.clone_dtoh(&x).unwrap(), expected);
}

#[test]
fn blocks_of_a_cooperative_grid_wait_for_each_other() {
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&compiled(&context, "features"), "grid_sum");
    let x: Vec<i32> = (0..40).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let run = |blocks: u32| {
        let mut partial = stream.alloc_zeros::<i32>(blocks as usize).unwrap();
        let mut total = stream.alloc_zeros::<i32>(2 * blocks as usize).unwrap();
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&dx).arg(&mut partial).arg(&mut total);
        // SAFETY: the arguments match the kernel's parameters.
        unsafe { launch.launch_cooperative(config(blocks, 64)) }?;
        stream.clone_dtoh(&total)
    };
    let total = run(40).unwrap_or_else(|e| panic!("{e:?}: {}", common::emu().last_finding()));
    assert_eq!(total, [780, 820].repeat(40));
    let too_many = run(1 << 20).unwrap_err();
    assert_eq!(
        too_many.0,
        cudarc::driver::sys::CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
    );
}
