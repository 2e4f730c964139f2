//! Products on the GPU that no operator needs in all combinations: layouts, dtypes, row ranges,
//! accumulation, slices of K.

use std::process::Command;

use cuda_emulator::{Backend, Counters};

use super::cuda::{Kept, Layout, LowRank, Matrix, Product};
use crate::device::CudaDevice;
use crate::rng::{Purpose, Stream};
use crate::tensor::{DType, Tensor};

/// A bf16 matrix on the device.
fn random(cuda: &CudaDevice, seed: u64, rows: usize, cols: usize) -> Tensor {
    let stream = Stream::new(seed, Purpose::Init, 0, 0);
    let values = (0..(rows * cols) as u64).map(|i| 2.0 * stream.uniform(i) - 1.0);
    let tensor = Tensor::from_vec(values.collect(), [rows, cols]).unwrap();
    cuda.resident(&tensor, DType::Bf16).unwrap()
}

fn host(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_f32().unwrap();
    tensor.f32s().unwrap().iter().map(|&v| v.into()).collect()
}

/// The product in float64, and the sum of its terms' magnitudes.
fn reference(layout: Layout, lhs: &[f64], rhs: &[f64], [m, n, k]: [usize; 3]) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for i in 0..m {
        for j in 0..n {
            let terms = (0..k).map(|p| {
                let l = if layout == Layout::Tn {
                    lhs[p * m + i]
                } else {
                    lhs[i * k + p]
                };
                let r = if layout == Layout::Nt {
                    rhs[j * k + p]
                } else {
                    rhs[p * n + j]
                };
                l * r
            });
            out.push(terms.fold((0.0, 0.0), |(s, a), t: f64| (s + t, a + t.abs())));
        }
    }
    out
}

fn dims(layout: Layout, [m, n, k]: [usize; 3]) -> [(usize, usize); 2] {
    match layout {
        Layout::Nt => [(m, k), (n, k)],
        Layout::Nn => [(m, k), (k, n)],
        Layout::Tn => [(k, m), (k, n)],
    }
}

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// Sums of fp32 terms: the error is below k roundings of the sum of magnitudes.
fn assert_close(what: &str, got: &[f64], want: &[(f64, f64)], k: usize, relative: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, (want, size))) in got.iter().zip(want).enumerate() {
        let limit = size * (k as f64 + 2.0) * f64::from(f32::EPSILON) + want.abs() * relative;
        assert!((got - want).abs() <= limit, "{what}, {i}: {got} for {want}");
    }
}

#[test]
fn every_layout_and_shape_agrees_with_float64() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    let shapes = [
        [1, 1, 1],
        [3, 5, 7],
        [129, 33, 65],
        [127, 31, 63],
        [8, 16, 24],
        [136, 264, 72],
        [128, 128, 64],
        [40, 24, 200],
        // Short sides with K in slices.
        [32, 200, 1000],
        [200, 32, 1032],
        [13, 1, 1031],
        // Rows enough for Hopper's kernels: K in a ring more than once around, and in part.
        [264, 200, 65],
        [400, 72, 648],
        [136, 328, 24],
        // Few enough results on a long K for slices of it there too.
        [264, 104, 4080],
    ];
    for layout in LAYOUTS {
        for shape @ [m, n, k] in shapes {
            let [(lr, lc), (rr, rc)] = dims(layout, shape);
            let (lhs, rhs) = (random(&cuda, 1, lr, lc), random(&cuda, 2, rr, rc));
            let want = reference(layout, &host(&lhs), &host(&rhs), shape);
            let product =
                Product::new(layout, Matrix::of(&lhs).unwrap(), Matrix::of(&rhs).unwrap());
            for (dtype, relative) in [(DType::F32, 0.0), (DType::Bf16, 1.0 / 256.0)] {
                let run = || {
                    let out = product.run(&cuda, dtype).unwrap();
                    host(&Tensor::from_cuda(out, [m, n]).unwrap())
                };
                let got = run();
                assert_eq!(got, run(), "{layout:?} {shape:?}: two runs differ in bits");
                assert_close(
                    &format!("{layout:?} {shape:?} {dtype:?}"),
                    &got,
                    &want,
                    k,
                    relative,
                );
            }
        }
    }
}

#[test]
fn the_widest_tile_agrees_with_float64() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    // More than a hundred tiles of 128 x 256, the last of them in part; on Hopper two for each
    // block, and the ring more than once around.
    let shapes = [
        ([1, 100 * 256 - 56, 8], &[Layout::Nt, Layout::Nn][..]),
        ([264, 66 * 256 - 8, 24], &LAYOUTS),
        ([136, 34 * 256 - 8, 264], &[Layout::Nt]),
    ];
    for (shape @ [m, n, k], layouts) in shapes {
        for &layout in layouts {
            let [(lr, lc), (rr, rc)] = dims(layout, shape);
            let (lhs, rhs) = (random(&cuda, 1, lr, lc), random(&cuda, 2, rr, rc));
            let want = reference(layout, &host(&lhs), &host(&rhs), shape);
            let (l, r) = (Matrix::of(&lhs).unwrap(), Matrix::of(&rhs).unwrap());
            let out = Product::new(layout, l, r).run(&cuda, DType::F32).unwrap();
            let got = host(&Tensor::from_cuda(out, [m, n]).unwrap());
            assert_close(&format!("{layout:?} {shape:?}"), &got, &want, k, 0.0);
        }
    }
}

#[test]
fn a_low_rank_product_is_added_and_dropped_where_the_mask_says() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    let cases = [
        ([9, 16, 24], 8),
        ([13, 11, 10], 3),
        ([136, 264, 72], 8),
        ([264, 72, 200], 136),
        // The widest tile, by words of the mask; on Hopper more tiles than blocks.
        ([136, 12_960, 16], 16),
    ];
    let scale = 1.25;
    for (layout, masked) in [
        (Layout::Nt, false),
        (Layout::Nn, false),
        (Layout::Nn, true),
        (Layout::Tn, false),
    ] {
        for (shape @ [m, n, k], r) in cases {
            let operands = |seed, shape| {
                let [(lr, lc), (rr, rc)] = dims(layout, shape);
                (random(&cuda, seed, lr, lc), random(&cuda, seed + 1, rr, rc))
            };
            let (lhs, rhs) = operands(1, shape);
            let (low_lhs, low_rhs) = operands(3, [m, n, r]);
            let stream = Stream::new(5, Purpose::Dropout, 0, 0);
            let kept: Vec<bool> = (0..(m * n) as u64)
                .map(|i| stream.uniform(i) < 0.6)
                .collect();
            let bytes = kept.chunks(8);
            let bytes = bytes.map(|b| (0..b.len()).map(|i| u8::from(b[i]) << i).sum());
            let mut bytes: Vec<u8> = bytes.collect();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            let mut mask = cuda.alloc(DType::U32, bytes.len() / 4).unwrap();
            mask.write(0, &bytes).unwrap();
            let low_rank = LowRank {
                lhs: Matrix::of(&low_lhs).unwrap(),
                rhs: Matrix::of(&low_rhs).unwrap(),
                dropout: masked.then_some(Kept {
                    mask: &mask,
                    first: 0,
                    scale,
                }),
            };
            let (l, r_) = (Matrix::of(&lhs).unwrap(), Matrix::of(&rhs).unwrap());
            let product = Product::new(layout, l, r_);
            let out = product.run_with(&cuda, DType::F32, &low_rank).unwrap();
            let got = host(&Tensor::from_cuda(out, [m, n]).unwrap());
            let whole = reference(layout, &host(&lhs), &host(&rhs), shape);
            let low = reference(layout, &host(&low_lhs), &host(&low_rhs), [m, n, r]);
            let factors = kept.iter().map(|&kept| match (masked, kept) {
                (false, _) => 1.0,
                (true, false) => 0.0,
                (true, true) => f64::from(scale),
            });
            let want: Vec<(f64, f64)> = whole
                .iter()
                .zip(&low)
                .zip(factors)
                .map(|((w, l), f)| (w.0 + f * l.0, w.1 + f * l.1))
                .collect();
            let what = format!("{layout:?} {shape:?} {r} masked: {masked}");
            assert_close(&what, &got, &want, k + r, 0.0);
        }
    }
}

/// What the last kernel did, and the totals of all kernels; `None` on a real GPU.
fn counted() -> Option<(Counters, String)> {
    let on_emulator = cuda_emulator::install() == Ok(Backend::Emulator);
    let emulator = on_emulator.then(|| cuda_emulator::emulator().unwrap())?;
    Some((emulator.last_counters().unwrap(), emulator.totals()))
}

#[test]
fn on_hopper_wgmma_does_what_is_useful_and_a_pair_of_blocks_loads_the_right_operand_once() {
    let Some(cuda) = CudaDevice::for_tests(1).filter(|cuda| cuda.capability() == (9, 0)) else {
        return;
    };
    // Two by three tiles.
    let shape @ [m, n, k] = [256, 384, 544];
    for (layout, kernel) in [
        (Layout::Nt, "gemm_nt_wgmma_128x128"),
        (Layout::Nn, "gemm_nn_wgmma_128x128"),
        (Layout::Tn, "gemm_tn_wgmma_128x128"),
    ] {
        let [(lr, lc), (rr, rc)] = dims(layout, shape);
        let (lhs, rhs) = (random(&cuda, 1, lr, lc), random(&cuda, 2, rr, rc));
        let (l, r) = (Matrix::of(&lhs).unwrap(), Matrix::of(&rhs).unwrap());
        let out = Product::new(layout, l, r).run(&cuda, DType::Bf16);
        drop(out.unwrap());
        let Some((last, totals)) = counted() else {
            return;
        };
        assert!(totals.contains(kernel), "{kernel} was not launched");
        assert_eq!(last.mma_flop, 2 * (m * n * k) as u64, "{kernel}");
        assert_eq!(last.shared_bank_conflicts, 0, "{kernel}");
        let loaded = 2 * (m * k * 3 + n * k) as u64;
        assert_eq!(last.global_load_bytes, loaded, "{kernel}");
        assert_eq!(32 * last.global_load_sectors, loaded, "{kernel}");
        assert_eq!(32 * last.global_store_sectors, 2 * (m * n) as u64);
    }
}

/// The tests of this file once more in a process that emulates a Hopper, under the schedule that
/// this one has.
#[test]
fn gemm_tests_pass_on_an_emulated_hopper() {
    let emulated =
        CudaDevice::for_tests(1).is_some() && cuda_emulator::install() == Ok(Backend::Emulator);
    if !emulated || std::env::var_os("CUDA_EMU_DEVICE").is_some() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["ops::gemm::tests", "--skip", "emulated_hopper"]);
    let output = child.env("CUDA_EMU_DEVICE", "h100").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    // Without its tests the child would end well too.
    assert!(text.contains("7 passed"), "{text}");
}

#[test]
fn a_result_is_added_to_and_takes_bias_residual_and_alpha() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    // The last two with K in slices.
    for shape @ [m, n, k] in [[9, 12, 40], [65, 131, 33], [32, 136, 600], [70, 11, 555]] {
        let (lhs, rhs) = (random(&cuda, 1, m, k), random(&cuda, 2, n, k));
        let residual = random(&cuda, 3, m, n);
        let bias = random(&cuda, 4, 1, n).reshape([n]).unwrap();
        let before = random(&cuda, 5, m + 2, n);
        let alpha = -0.75;
        let terms = reference(Layout::Nt, &host(&lhs), &host(&rhs), shape);
        let (bias64, residual64) = (host(&bias), host(&residual));
        for bias in [cuda.cast(&bias, DType::F32).unwrap(), bias] {
            let product = Product {
                alpha,
                bias: Some(&bias),
                residual: Some(&residual),
                ..Product::new(
                    Layout::Nt,
                    Matrix::of(&lhs).unwrap(),
                    Matrix::of(&rhs).unwrap(),
                )
            };
            for add in [false, true] {
                // A copy of its own, that the product may write to.
                let values = Tensor::from_vec(
                    before.to_f32().unwrap().f32s().unwrap().to_vec(),
                    [m + 2, n],
                );
                let out = cuda.resident(&values.unwrap(), DType::F32).unwrap();
                product
                    .run_into(&cuda, out.cuda().unwrap(), 1, add)
                    .unwrap();
                let (got, old) = (host(&out), host(&before));
                assert_eq!(got[..n], old[..n], "the row before");
                assert_eq!(got[(m + 1) * n..], old[(m + 1) * n..], "the row after");
                let want: Vec<(f64, f64)> = terms
                    .iter()
                    .enumerate()
                    .map(|(i, (sum, size))| {
                        let old = if add { old[n + i] } else { 0.0 };
                        let sum = f64::from(alpha) * sum + bias64[i % n] + residual64[i] + old;
                        (sum, size + 3.0)
                    })
                    .collect();
                assert_close(&format!("{shape:?}"), &got[n..(m + 1) * n], &want, k, 0.0);
            }
        }
    }
}

#[test]
fn a_range_of_rows_is_a_matrix_of_its_own() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    let [m, n, k] = [5, 9, 24];
    let (lhs, rhs) = (random(&cuda, 1, m + 7, k), random(&cuda, 2, n + 3, k));
    let want = reference(
        Layout::Nt,
        &host(&lhs)[3 * k..(3 + m) * k],
        &host(&rhs)[2 * k..(2 + n) * k],
        [m, n, k],
    );
    let part = |t, range| Matrix::of(t).unwrap().rows(range).unwrap();
    let product = Product::new(Layout::Nt, part(&lhs, 3..3 + m), part(&rhs, 2..2 + n));
    let out = product.run(&cuda, DType::F32).unwrap();
    let got = host(&Tensor::from_cuda(out, [m, n]).unwrap());
    assert_close("a part", &got, &want, k, 0.0);
    assert!(Matrix::of(&lhs).unwrap().rows(9..13).is_err());
}

#[test]
fn operands_that_do_not_fit_are_errors_that_name_the_shapes() {
    let Some(cuda) = CudaDevice::for_tests(1) else {
        return;
    };
    let (lhs, rhs) = (random(&cuda, 1, 4, 8), random(&cuda, 2, 4, 6));
    let matrices = || (Matrix::of(&lhs).unwrap(), Matrix::of(&rhs).unwrap());
    let (l, r) = matrices();
    let error = Product::new(Layout::Nt, l, r).run(&cuda, DType::F32);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("[4, 8] and [4, 6]"), "{error}");
    let product = Product::new(Layout::Tn, l, r);
    let out = cuda.alloc(DType::Bf16, 48).unwrap();
    assert!(
        product.run_into(&cuda, &out, 0, true).is_err(),
        "bf16 is not added to"
    );
    assert!(
        product.run_into(&cuda, &out, 1, false).is_err(),
        "too few rows"
    );
    let wide = cuda.cast(&lhs, DType::F32).unwrap();
    let error = Matrix::of(&wide).unwrap_err().to_string();
    assert!(error.contains("float32 on cuda:0"), "{error}");
}
