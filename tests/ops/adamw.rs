use resa_engine::optim::{AdamW, AdamWConfig, Update};
use resa_engine::tensor::Tensor;

use crate::harness::{devices, random, relative_error, remove_parallel, to_f64, unit_rows};

const LR: f64 = 0.01;

/// Parameters and moments after each step, in float64, by the formulas of PyTorch's
/// documentation of `torch.optim.AdamW`.
struct Reference {
    weight_decay: f64,
    value: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Reference {
    fn new(value: &Tensor, weight_decay: f64) -> Self {
        Self {
            weight_decay,
            value: to_f64(value),
            first: vec![0.0; value.len()],
            second: vec![0.0; value.len()],
        }
    }

    fn step(&mut self, n: i32, g: &[f64]) {
        let state = self.first.iter_mut().zip(&mut self.second);
        for ((w, g), (m, v)) in self.value.iter_mut().zip(g).zip(state) {
            *w -= LR * self.weight_decay * *w;
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            let m_hat = *m / (1.0 - 0.9f64.powi(n));
            let v_hat = *v / (1.0 - 0.999f64.powi(n));
            *w -= LR * m_hat / (v_hat.sqrt() + 1e-8);
        }
    }
}

fn optimizer(weight_decay: f64, value: &Tensor) -> AdamW {
    let config = AdamWConfig {
        weight_decay,
        ..AdamWConfig::default()
    };
    AdamW::new(config, [value]).unwrap()
}

fn update(value: &mut Tensor, grad: Tensor, unit_rows: bool) -> Vec<Update<'_>> {
    vec![Update {
        value,
        grad,
        unit_rows,
    }]
}

/// Gradient of step n; some elements are zero in every step.
fn gradient(n: i32, shape: &[usize]) -> Tensor {
    let mut g = random(100 + n as u64, shape, 1.0);
    let some = g.len() / 5;
    g.f32s_mut().unwrap()[..some].fill(0.0);
    g
}

#[test]
fn steps_follow_the_published_formulas_in_float64() {
    for device in devices("adamw") {
        for shape in [[1, 1], [37, 45], [1, 40_001]] {
            for weight_decay in [0.0, 0.3] {
                let mut value = random(7, &shape, 1.0);
                let mut adamw = optimizer(weight_decay, &value);
                let mut want = Reference::new(&value, weight_decay);
                for n in 1..8 {
                    let g = gradient(n, &shape);
                    want.step(n, &to_f64(&g));
                    let step = || adamw.step(&device, LR, update(&mut value, g, false));
                    device.run(step).unwrap();
                }
                assert_eq!(adamw.steps(), 7);
                let (first, second) = adamw.moments();
                assert!(relative_error(&to_f64(&value), &want.value) < 1e-6);
                assert!(relative_error(&to_f64(&first[0]), &want.first) < 1e-6);
                assert!(relative_error(&to_f64(&second[0]), &want.second) < 1e-6);
            }
        }
    }
}

#[test]
fn a_gradient_along_unit_rows_does_not_act() {
    let (rows, cols) = (37, 45);
    for device in devices("adamw") {
        let mut value = unit_rows(7, rows, cols);
        let mut adamw = optimizer(0.0, &value);
        let mut want = Reference::new(&value, 0.0);
        for n in 1..6 {
            let g = random(100 + n as u64, &[rows, cols], 1.0);
            let mut across = to_f64(&g);
            remove_parallel(&mut across, &want.value, cols);
            want.step(n, &across);
            let step = || adamw.step(&device, LR, update(&mut value, g, true));
            device.run(step).unwrap();
        }
        assert!(relative_error(&to_f64(&value), &want.value) < 1e-5);
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let device = resa_engine::Device::cpu(1).unwrap();
    let mut value = random(1, &[3, 5], 1.0);
    let before = to_f64(&value);
    let mut adamw = optimizer(0.01, &value);
    let transposed = update(&mut value, random(2, &[5, 3], 1.0), false);
    assert!(adamw.step(&device, LR, transposed).is_err());
    assert!(adamw.step(&device, LR, Vec::new()).is_err());
    let moment = |rows| vec![random(3, &[rows, 5], 1.0)];
    assert!(adamw.restore(4, moment(3), moment(2)).is_err());
    assert!(adamw.restore(4, Vec::new(), Vec::new()).is_err());
    assert_eq!((adamw.steps(), to_f64(&value)), (0, before));
    assert!(adamw.restore(4, moment(3), moment(3)).is_ok());
    assert_eq!(adamw.steps(), 4);
}
