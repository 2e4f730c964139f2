//! CUDA's warp matrix API, compiled by nvcc, against a plain product.

mod common;

use std::sync::Arc;

use common::{compiled, config, context, function, noise};
use cudarc::driver::{CudaStream, DeviceRepr, PushKernelArg, ValidAsZeroBits};
use half::{bf16, f16};

/// A kernel's shape, and whether A and B lie row by row.
struct Tile {
    name: &'static str,
    shape: [usize; 3],
    rows: [bool; 2],
}

/// Runs a tile: A and B as values with their encoding, C likewise; D is decoded.
fn run<T: DeviceRepr, A: DeviceRepr + ValidAsZeroBits + Copy + Default>(
    stream: &Arc<CudaStream>,
    tile: &Tile,
    encode: impl Fn(f32) -> (T, f64),
    (encode_c, decode): (impl Fn(f32) -> A, impl Fn(A) -> f64),
    scale: f32,
) {
    let [m, n, k] = tile.shape;
    let value = |seed: u64, count: usize| -> Vec<f32> {
        noise(seed, count)
            .iter()
            .map(|x| (x * scale).trunc())
            .collect()
    };
    let (a, b, c) = (value(1, m * k), value(2, k * n), value(3, m * n));
    let (mut image_a, mut image_b) = (Vec::new(), Vec::new());
    for i in 0..m * k {
        let at = if tile.rows[0] { i } else { i % m * k + i / m };
        image_a.push(encode(a[at]).0);
    }
    for i in 0..k * n {
        let at = if tile.rows[1] { i } else { i % k * n + i / k };
        image_b.push(encode(b[at]).0);
    }
    let image_c: Vec<A> = c.iter().map(|&x| encode_c(x)).collect();
    let kernel = function(&compiled(stream.context(), "wmma"), tile.name);
    let (da, db) = (
        stream.clone_htod(&image_a).unwrap(),
        stream.clone_htod(&image_b).unwrap(),
    );
    let dc = stream.clone_htod(&image_c).unwrap();
    let mut dd = stream.alloc_zeros::<A>(m * n).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&da).arg(&db).arg(&dc).arg(&mut dd);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config(1, 32)) }
        .unwrap_or_else(|e| panic!("{}: {e:?}: {}", tile.name, common::emu().last_finding()));
    for (i, got) in stream.clone_dtoh(&dd).unwrap().into_iter().enumerate() {
        let (row, column) = (i / n, i % n);
        let products = (0..k).map(|d| encode(a[row * k + d]).1 * encode(b[d * n + column]).1);
        // Small integers: every format here holds the sums exactly.
        let exact = 2.0 * f64::from(c[i]) + products.sum::<f64>();
        assert_eq!(decode(got), exact, "{} ({row}, {column})", tile.name);
    }
}

#[test]
fn warp_matrices_of_every_type_and_shape_multiply() {
    let context = context();
    let stream = context.default_stream();
    let f32s = || (|x: f32| x, |x: f32| f64::from(x));
    let half = |x: f32| (f16::from_f32(x).to_bits(), f64::from(x));
    let brain = |x: f32| (bf16::from_f32(x).to_bits(), f64::from(x));
    let tile = |name, shape, rows| Tile { name, shape, rows };
    run(
        &stream,
        &tile("f16_16x16", [16, 16, 16], [true, false]),
        half,
        f32s(),
        9.0,
    );
    run(
        &stream,
        &tile("f16_32x8", [32, 8, 16], [false, true]),
        half,
        f32s(),
        9.0,
    );
    let halves = (
        |x: f32| f16::from_f32(x).to_bits(),
        |x: u16| f16::from_bits(x).to_f64(),
    );
    run(
        &stream,
        &tile("f16_half", [8, 32, 16], [true, true]),
        half,
        halves,
        5.0,
    );
    run(
        &stream,
        &tile("bf16_16x16", [16, 16, 16], [true, false]),
        brain,
        f32s(),
        9.0,
    );
    run(
        &stream,
        &tile("bf16_8x32", [8, 32, 16], [false, false]),
        brain,
        f32s(),
        9.0,
    );
    let single = |x: f32| (x, f64::from(x));
    run(
        &stream,
        &tile("tf32_16x16", [16, 16, 8], [true, false]),
        single,
        f32s(),
        100.0,
    );
    let integers = || (|x: f32| x as i32, |x: i32| f64::from(x));
    let signed = |x: f32| (x as i8, f64::from(x as i8));
    run(
        &stream,
        &tile("s8_16x16", [16, 16, 16], [true, false]),
        signed,
        integers(),
        127.0,
    );
    let unsigned = |x: f32| (x.abs() as u8, f64::from(x.abs() as u8));
    run(
        &stream,
        &tile("u8_32x8", [32, 8, 16], [true, false]),
        unsigned,
        integers(),
        255.0,
    );
}
