use resa_engine::Device;
use resa_engine::ops::swiglu::SwiGlu;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;

use super::harness::{check, random};

fn reference(inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let pairs = inputs[0].iter().zip(&inputs[1]);
    vec![pairs.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()]
}

#[test]
fn odd_shapes_agree_with_float64() {
    for shape in [[1, 1], [1, 31], [7, 33], [3, 5461], [2, 8192]] {
        for scale in [1.0, 20.0] {
            let inputs = [random(4, &shape, scale), random(5, &shape, 1.0)];
            check(|| SwiGlu, &inputs, reference, 1e-6);
        }
    }
}

#[test]
fn a_gate_far_from_zero_gives_zero_or_the_identity() {
    let device = Device::cpu(1).unwrap();
    let gate = Tensor::from_vec(vec![-200.0, -90.0, 90.0, 200.0], [4]).unwrap();
    let up = Tensor::from_vec(vec![2.0; 4], [4]).unwrap();
    let y = Tape::new(&device)
        .apply(SwiGlu, &[&Var::constant(gate), &Var::constant(up)])
        .unwrap();
    let y = y.value().f32s().unwrap();
    assert!(y[0] == 0.0 && y[1].abs() < 1e-36, "{y:?}");
    assert_eq!(y[2..], [180.0, 400.0]);
}

#[test]
fn operands_of_different_shapes_are_an_error() {
    let device = Device::cpu(1).unwrap();
    let gate = Var::constant(random(1, &[2, 3], 1.0));
    let up = Var::constant(random(1, &[3, 2], 1.0));
    assert!(Tape::new(&device).apply(SwiGlu, &[&gate, &up]).is_err());
}
