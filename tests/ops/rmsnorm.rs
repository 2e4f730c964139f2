use resa_engine::Device;
use resa_engine::ops::rmsnorm::RmsNorm;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;

use super::harness::{check, random, round_bf16, to_f64};

fn reference(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let d = weight.len();
    let mut y = Vec::new();
    for row in x.chunks(d) {
        let rms = (row.iter().map(|v| v * v).sum::<f64>() / d as f64 + eps).sqrt();
        y.extend(row.iter().zip(weight).map(|(v, w)| v / rms * w));
    }
    y
}

fn agrees_with_float64(rows: usize, d: usize, scale: f32) {
    let weight = round_bf16(&random(1, &[d], 2.0));
    let weight64 = to_f64(&weight);
    let eps = 1e-6f32;
    check(
        || RmsNorm {
            weight: weight.clone(),
            eps,
        },
        &[random(2, &[rows, d], scale)],
        |inputs| vec![reference(&inputs[0], &weight64, eps.into())],
        2e-6,
    );
}

#[test]
fn odd_shapes_agree_with_float64() {
    for (rows, d) in [(1, 2), (17, 31), (16, 32), (15, 33), (5, 576), (33, 127)] {
        agrees_with_float64(rows, d, 1.0);
    }
}

#[test]
fn a_row_of_very_large_values_keeps_its_direction() {
    agrees_with_float64(3, 64, 25_000.0);
}

#[test]
fn eps_decides_where_the_row_is_nearly_zero() {
    let device = Device::cpu(1).unwrap();
    let op = RmsNorm {
        weight: Tensor::from_vec(vec![1.0; 4], [4]).unwrap(),
        eps: 1e-6,
    };
    let x = Var::constant(Tensor::from_vec(vec![0.0; 4], [1, 4]).unwrap());
    let y = Tape::new(&device).apply(op, &[&x]).unwrap();
    assert_eq!(y.value().f32s().unwrap(), &[0.0; 4]);
}

#[test]
fn a_row_of_another_width_is_an_error_that_names_both() {
    let device = Device::cpu(1).unwrap();
    let op = RmsNorm {
        weight: random(1, &[4], 1.0),
        eps: 1e-6,
    };
    let x = Var::constant(random(2, &[3, 5], 1.0));
    let error = Tape::new(&device).apply(op, &[&x]).unwrap_err().to_string();
    assert!(
        error.contains("rmsnorm") && error.contains("[3, 5]"),
        "{error}"
    );
}
