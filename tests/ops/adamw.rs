use resa_engine::optim::{AdamW, AdamWConfig, Update};
use resa_engine::tensor::Tensor;

use crate::harness::{
    assert_least_traffic, cuda, devices, random, relative_error, remove_parallel, to_f64, unit_rows,
};

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
    // The longest rows are more than a block of a GPU keeps beside it.
    for (rows, cols) in [(37, 45), (5, 64), (3, 7001), (2, 7004)] {
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
}

/// Parameters that differ in all that a step can depend on.
fn parameters() -> Vec<Tensor> {
    let mut parameters: Vec<Tensor> = [[1, 1], [0, 3], [3, 8192], [1, 20_001]]
        .iter()
        .map(|shape| random(1, shape, 1.0))
        .collect();
    parameters.insert(2, unit_rows(2, 33, 61));
    parameters.push(unit_rows(3, 5, 128));
    parameters
}

fn updates(values: &mut [Tensor]) -> Vec<Update<'_>> {
    let updates = values.iter_mut().map(|value| Update {
        grad: random(9, value.shape(), 1.0),
        unit_rows: [33, 5].contains(&value.shape()[0]),
        value,
    });
    updates.collect()
}

#[test]
fn many_parameters_at_once_move_as_each_of_them_alone() {
    for device in devices("adamw") {
        let mut together = parameters();
        let mut adamw = AdamW::new(AdamWConfig::default(), &together).unwrap();
        let mut alone = parameters();
        let mut steps: Vec<_> = alone.iter().map(|p| optimizer(0.01, p)).collect();
        for _ in 0..3 {
            let updates_of_all = updates(&mut together);
            let step = || adamw.step(&device, LR, updates_of_all);
            device.run(step).unwrap();
            let pairs = steps.iter_mut().zip(alone.chunks_mut(1));
            for (adamw, value) in pairs {
                let update = updates(value);
                device.run(|| adamw.step(&device, LR, update)).unwrap();
            }
        }
        for (one, other) in together.iter().zip(&alone) {
            assert_eq!(to_f64(one), to_f64(other));
        }
    }
}

#[test]
fn other_owners_of_the_values_keep_what_they_have() {
    for device in devices("adamw") {
        let mut value = random(1, &[3, 5], 1.0);
        let mut adamw = optimizer(0.01, &value);
        let mut step = |value: &mut Tensor| {
            let update = update(value, random(2, &[3, 5], 1.0), false);
            device.run(|| adamw.step(&device, LR, update)).unwrap();
        };
        step(&mut value);
        let (kept, before) = (value.clone(), to_f64(&value));
        step(&mut value);
        assert_eq!(to_f64(&kept), before);
        assert_ne!(to_f64(&value), before);
    }
}

#[test]
fn a_step_moves_each_value_once_in_and_once_out_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let mut values = [unit_rows(5, 40, 1536), random(2, &[1, 50_000], 1.0)];
    values[0] = values[0].reshape([5, 8, 1536]).unwrap();
    let len: usize = values.iter().map(Tensor::len).sum();
    let mut adamw = AdamW::new(AdamWConfig::default(), &values).unwrap();
    adamw.step(device, LR, updates(&mut values)).unwrap();
    // Value and both moments in and out, the gradient in.
    assert_least_traffic(28 * len);
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
