//! Compiled kernels through cudarc: the path every user takes.

mod common;

use common::{compiled, config, context, function, noise};
use cudarc::driver::PushKernelArg;

#[test]
fn vector_add_adds_every_element_and_nothing_else() {
    let context = context();
    let stream = context.default_stream();
    let add = function(&compiled(&context, "basics"), "vector_add");
    let n = 1000;
    let (a, b) = (noise(1, n), noise(2, n));
    let (da, db) = (
        stream.clone_htod(&a).unwrap(),
        stream.clone_htod(&b).unwrap(),
    );
    let mut dc = stream.alloc_zeros::<f32>(1024).unwrap();
    let count = n as i32;
    let mut launch = stream.launch_builder(&add);
    launch.arg(&da).arg(&db).arg(&mut dc).arg(&count);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(8, 128)) }.unwrap();
    let c = stream.clone_dtoh(&dc).unwrap();
    for i in 0..n {
        assert_eq!(c[i], a[i] + b[i], "element {i}");
    }
    assert!(c[n..].iter().all(|&x| x == 0.0));
}

#[test]
fn block_reduction_sums_its_part() {
    let context = context();
    let stream = context.default_stream();
    let sum = function(&compiled(&context, "basics"), "block_sum");
    let n = 10_000;
    let x: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let mut out = stream.alloc_zeros::<f32>(4).unwrap();
    let count = n;
    let mut launch = stream.launch_builder(&sum);
    launch.arg(&dx).arg(&mut out).arg(&count);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(4, 256)) }.unwrap();
    let total: f32 = stream.clone_dtoh(&out).unwrap().iter().sum();
    // Small integers add exactly in any order.
    assert_eq!(total, x.iter().sum::<f32>());
}

#[test]
fn last_block_sees_the_other_blocks_partial_sums() {
    let context = context();
    let stream = context.default_stream();
    let sum = function(&compiled(&context, "basics"), "grid_sum");
    let x: Vec<i32> = (0..5000).collect();
    let dx = stream.clone_htod(&x).unwrap();
    let mut partial = stream.alloc_zeros::<i32>(16).unwrap();
    let mut done = stream.alloc_zeros::<u32>(1).unwrap();
    let mut out = stream.alloc_zeros::<i32>(1).unwrap();
    let n = 5000;
    let mut launch = stream.launch_builder(&sum);
    launch
        .arg(&dx)
        .arg(&mut partial)
        .arg(&mut done)
        .arg(&mut out)
        .arg(&n);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(16, 256)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [x.iter().sum::<i32>()]);
}
