use resa_engine::device::Device;
use resa_engine::error::Error;
use resa_engine::ops::fvu::{Fvu, fvu_without, mse, sinks, token_mean};
use resa_engine::tensor::Tensor;

use crate::harness::{check, random, relative_error, to_f64};

fn squared_error(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum()
}

fn mean(x: &[f64], d: usize) -> Vec<f64> {
    let tokens = (x.len() / d) as f64;
    let column = |c| x.iter().skip(c).step_by(d).sum::<f64>() / tokens;
    (0..d).map(column).collect()
}

fn fvu(x: &[f64], y: &[f64], d: usize) -> f64 {
    let tokens = x.len() / d;
    squared_error(x, y) / squared_error(x, &mean(x, d).repeat(tokens))
}

#[test]
fn value_and_gradient_agree_with_float64() {
    let device = Device::cpu(1).unwrap();
    for (t, d) in [(2, 1), (3, 5), (67, 33), (130, 64)] {
        let mut x = random(1, &[t, d], 1.0);
        // A mean far from zero, as real activations have.
        x.f32s_mut().unwrap().iter_mut().for_each(|v| *v += 30.0);
        let x64 = to_f64(&x);
        let reference = |inputs: &[Vec<f64>]| vec![vec![fvu(&x64, &inputs[0], d)]];
        let mut guess = random(2, &[t, d], 1.0);
        guess
            .f32s_mut()
            .unwrap()
            .iter_mut()
            .for_each(|v| *v += 30.0);
        check(|| Fvu::new(&device, &x).unwrap(), &[guess], reference, 1e-5);
    }
}

#[test]
fn a_target_without_variance_is_an_error() {
    let device = Device::cpu(1).unwrap();
    let same = Tensor::from_vec(vec![1.5; 12], [4, 3]).unwrap();
    let error = Fvu::new(&device, &same).err().unwrap().to_string();
    assert!(error.contains("variance of zero"), "{error}");
    let nan = Tensor::from_vec(vec![1.0, f32::NAN], [2, 1]).unwrap();
    let error = Fvu::new(&device, &nan).err().unwrap();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
}

#[test]
fn tokens_of_ten_times_the_median_norm_are_left_out() {
    let (t, d) = (70, 6);
    let mut x = random(1, &[t, d], 1.0);
    let values = x.f32s_mut().unwrap();
    values[3 * d..4 * d].fill(900.0);
    values[65 * d..66 * d].fill(-40.0);
    let y = random(2, &[t, d], 1.0);
    let marks = sinks(&x).unwrap();
    let marked: Vec<usize> = (0..t).filter(|&t| marks[t]).collect();
    assert_eq!(marked, [3, 65]);

    let rest = |v: &Tensor| -> Vec<f64> {
        let rows = to_f64(v);
        let kept = rows.chunks(d).enumerate().filter(|(t, _)| !marks[*t]);
        kept.flat_map(|(_, row)| row.to_vec()).collect()
    };
    let want = fvu(&rest(&x), &rest(&y), d);
    let got = fvu_without(&x, &y, &marks).unwrap().unwrap();
    assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
    assert_eq!(fvu_without(&x, &y, &vec![true; t]).unwrap(), None);
    assert!(fvu_without(&x, &y, &[false]).is_err());
}

#[test]
fn mean_squared_error_and_token_mean_agree_with_float64() {
    let (t, d) = (131, 7);
    let (x, y) = (random(1, &[t, d], 1.0), random(2, &[t, d], 1.0));
    let want = squared_error(&to_f64(&x), &to_f64(&y)) / (t * d) as f64;
    let got = mse(&x, &y).unwrap().unwrap();
    assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
    let got = to_f64(&token_mean(&x).unwrap());
    assert!(relative_error(&got, &mean(&to_f64(&x), d)) < 1e-6);
    let empty = Tensor::from_vec(vec![], [0, 3]).unwrap();
    assert_eq!(mse(&empty, &empty).unwrap(), None);
}
