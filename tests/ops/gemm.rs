use half::{bf16, f16};
use resa_engine::ops::gemm::Linear;
use resa_engine::tensor::Tensor;

use crate::harness::{check, half_tensor, random, round_bf16, to_f64};

/// Y = R + X Wᵀ + b in float64.
pub fn affine(
    x: &[f64],
    w: &[f64],
    b: Option<&[f64]>,
    residual: Option<&[f64]>,
    k: usize,
) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = Vec::new();
    for (t, x) in x.chunks(k).enumerate() {
        for (o, w) in w.chunks(k).enumerate() {
            let product: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            y.push(product + b.map_or(0.0, |b| b[o]) + residual.map_or(0.0, |r| r[t * n + o]));
        }
    }
    y
}

#[test]
fn linear_matches_float64_with_and_without_bias_and_residual() {
    for (t, k, n) in [(1, 1, 1), (7, 13, 5), (65, 31, 129), (2, 128, 3)] {
        let (x, r) = (random(1, &[t, k], 1.0), random(2, &[t, n], 1.0));
        let [w, b] = [random(3, &[n, k], 1.0), random(4, &[n], 1.0)].map(|t| round_bf16(&t));
        let (w64, b64) = (to_f64(&w), to_f64(&b));
        let linear = |bias: bool| Linear {
            weight: w.clone(),
            bias: bias.then(|| b.clone()),
        };
        for bias in [false, true] {
            let b64 = bias.then_some(&b64[..]);
            check(
                || linear(bias),
                std::slice::from_ref(&x),
                |i| vec![affine(&i[0], &w64, b64, None, k)],
                1e-6,
            );
            check(
                || linear(bias),
                &[x.clone(), r.clone()],
                |i| vec![affine(&i[0], &w64, b64, Some(&i[1]), k)],
                1e-6,
            );
        }
    }
}

#[test]
fn weights_of_16_bits_give_what_their_widened_values_give() {
    // Wide enough that the widening goes panel by panel.
    let (t, k, n) = (3, 1031, 2050);
    let x = random(5, &[t, k], 1.0);
    // As bf16 holds them, also after rounding to f16: a GPU takes them over unchanged.
    let values = round_bf16(&random(6, &[n, k], 1.0));
    let half = [
        half_tensor(
            &values,
            |v| bf16::from_f32(v).to_le_bytes(),
            resa_engine::tensor::DType::Bf16,
        ),
        half_tensor(
            &values,
            |v| f16::from_f32(v).to_le_bytes(),
            resa_engine::tensor::DType::F16,
        ),
    ];
    for weight in half {
        let w64 = to_f64(&weight);
        let inputs = [Tensor::from_vec(x.f32s().unwrap()[..k].to_vec(), [1, k]).unwrap()];
        check(
            || Linear {
                weight: weight.clone(),
                bias: None,
            },
            &inputs,
            |i| vec![affine(&i[0], &w64, None, None, k)],
            2e-6,
        );
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    use resa_engine::{device::Device, ops::Operator};
    let device = Device::cpu(1).unwrap();
    let linear = Linear {
        weight: random(1, &[4, 3], 1.0),
        bias: None,
    };
    let error = linear
        .forward(&device, &[&random(2, &[2, 5], 1.0)], &[true])
        .unwrap_err();
    assert!(error.to_string().contains("gemm"), "{error}");
    let residual = random(3, &[2, 3], 1.0);
    assert!(
        linear
            .forward(&device, &[&random(2, &[2, 3], 1.0), &residual], &[true; 2])
            .is_err()
    );
}
