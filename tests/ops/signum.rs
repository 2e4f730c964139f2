use resa_engine::optim::{Update, signum::Signum};
use resa_engine::tensor::Tensor;

use crate::harness::{
    assert_least_traffic, cuda, devices, random, relative_error, remove_parallel, to_f64, unit_rows,
};

const ROWS: usize = 37;
const COLS: usize = 45;
const LR: f64 = 0.01;

fn sign(v: f64) -> f64 {
    if v == 0.0 { 0.0 } else { v.signum() }
}

/// Gradients of step n, with zeros in some rows as latents that did not fire have.
fn gradient(n: u64) -> Tensor {
    let mut g = random(100 + n, &[ROWS, COLS], 1.0);
    g.f32s_mut().unwrap()[..5 * COLS].fill(0.0);
    g
}

#[test]
fn steps_follow_the_schedule_free_equations_in_float64() {
    let beta = f64::from(Signum::BETA);
    for device in devices("signum") {
        for unit in [false, true] {
            let mut value = unit_rows(7, ROWS, COLS);
            let mut signum = Signum::new(LR as f32);
            let mut y = to_f64(&value);
            let mut z = y.clone();
            for n in 0..5u64 {
                let mut g = to_f64(&gradient(n));
                if unit {
                    remove_parallel(&mut g, &y, COLS);
                }
                for i in 0..y.len() {
                    let mut x = (y[i] - (1.0 - beta) * z[i]) / beta;
                    z[i] -= LR * sign(g[i]);
                    x += (z[i] - x) / (n + 1) as f64;
                    y[i] = beta * x + (1.0 - beta) * z[i];
                }
                let update = Update {
                    value: &mut value,
                    grad: gradient(n),
                    unit_rows: unit,
                };
                device.run(|| signum.step(&device, vec![update])).unwrap();
                if n == 0 {
                    assert_eq!(to_f64(&value), to_f64(&signum.z()[0]));
                }
            }
            let x: Vec<f64> = y
                .iter()
                .zip(&z)
                .map(|(y, z)| (y - (1.0 - beta) * z) / beta)
                .collect();
            let averaged = signum.averaged(0, &value).unwrap();
            assert!(relative_error(&to_f64(&value), &y) < 1e-6);
            assert!(relative_error(&to_f64(&signum.z()[0]), &z) < 1e-6);
            assert!(relative_error(&to_f64(&averaged), &x) < 1e-6);
        }
    }
}

#[test]
fn gradients_of_another_shape_or_number_are_errors() {
    let device = resa_engine::Device::cpu(1).unwrap();
    let mut signum = Signum::new(0.1);
    let mut value = unit_rows(1, ROWS, COLS);
    let mut step = |grads: Vec<Tensor>| {
        let mut values = vec![value.clone(); grads.len()];
        let pairs = values.iter_mut().zip(grads);
        let updates = pairs.map(|(value, grad)| Update {
            value,
            grad,
            unit_rows: false,
        });
        let result = signum.step(&device, updates.collect());
        value = values.remove(0);
        result
    };
    assert!(step(vec![random(1, &[COLS, ROWS], 1.0)]).is_err());
    assert!(step(vec![gradient(0)]).is_ok());
    assert!(step(vec![gradient(0), gradient(1)]).is_err());
}

#[test]
fn a_step_moves_each_value_once_in_and_once_out_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let mut values = [unit_rows(1, 40, 1536), random(2, &[50_000], 1.0)];
    let len: usize = values.iter().map(Tensor::len).sum();
    let updates = values.iter_mut().enumerate().map(|(i, value)| Update {
        grad: random(3, value.shape(), 1.0),
        value,
        unit_rows: i == 0,
    });
    Signum::new(0.1).step(device, updates.collect()).unwrap();
    // y and z in and out, the gradient in.
    assert_least_traffic(20 * len);
}
