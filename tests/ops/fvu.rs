use resa_engine::device::Device;
use resa_engine::error::Error;
use resa_engine::ops::fvu::{Fvu, Sinks, fvu_without, mse, residual, token_mean};
use resa_engine::tensor::Tensor;

use crate::harness::{check, devices, random, relative_error, round_bf16, to_f64};

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
        let x = round_bf16(&x);
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
fn a_variance_found_on_any_device_is_that_of_float64() {
    for (t, d) in [(2, 1), (3, 5), (130, 64), (67, 1033)] {
        let mut x = random(1, &[t, d], 1.0);
        x.f32s_mut().unwrap().iter_mut().for_each(|v| *v += 30.0);
        let x64 = to_f64(&x);
        let want = squared_error(&x64, &mean(&x64, d).repeat(t));
        for device in devices("fvu") {
            let got = device.run(|| Fvu::new(&device, &x)).unwrap().variance();
            assert!((got - want).abs() < 1e-5 * want, "{got} {want}");
        }
    }
}

#[test]
fn a_target_without_variance_is_an_error() {
    for device in devices("fvu") {
        let same = Tensor::from_vec(vec![1.5; 12], [4, 3]).unwrap();
        let error = Fvu::new(&device, &same).err().unwrap().to_string();
        assert!(error.contains("variance of zero"), "{error}");
        let nan = Tensor::from_vec(vec![1.0, f32::NAN], [2, 1]).unwrap();
        let error = Fvu::new(&device, &nan).err().unwrap();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    }
}

#[test]
fn tokens_of_ten_times_the_median_norm_are_left_out() {
    for (t, d) in [(70, 6), (71, 8), (600, 3)] {
        let mut x = random(1, &[t, d], 1.0);
        let values = x.f32s_mut().unwrap();
        values[3 * d..4 * d].fill(900.0);
        values[65 * d..66 * d].fill(-40.0);
        let y = random(2, &[t, d], 1.0);
        let rest = |v: &Tensor| -> Vec<f64> {
            let rows = to_f64(v);
            let kept = rows
                .chunks(d)
                .enumerate()
                .filter(|(t, _)| ![3, 65].contains(t));
            kept.flat_map(|(_, row)| row.to_vec()).collect()
        };
        let want = fvu(&rest(&x), &rest(&y), d);
        for device in devices("fvu") {
            let sinks = Sinks::of(&device, &x).unwrap();
            let marks = sinks.marks().unwrap();
            let marked: Vec<usize> = (0..t).filter(|&t| marks[t]).collect();
            assert_eq!((marked, sinks.kept()), (vec![3, 65], t - 2));
            let got = fvu_without(&device, &x, &y, &sinks).unwrap().unwrap();
            assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
            assert_eq!(to_f64(&sinks.without(&device, &x).unwrap()), rest(&x));
            let other = Sinks::none(t - 1).unwrap();
            assert!(fvu_without(&device, &x, &y, &other).is_err());
        }
    }
}

#[test]
fn the_limit_of_a_sink_is_the_lower_median_of_an_even_number() {
    // Norms 1, 2, 3, 10, 25 and 0 have the lower median 2.
    let x = Tensor::from_vec(vec![1.0, -2.0, 3.0, 10.0, 25.0, 0.0], [6, 1]).unwrap();
    for device in devices("fvu") {
        let marks = Sinks::of(&device, &x).unwrap().marks().unwrap();
        assert_eq!(marks, [false, false, false, false, true, false]);
        let zeros = Tensor::from_vec(vec![0.0; 8], [4, 2]).unwrap();
        let sinks = Sinks::of(&device, &zeros).unwrap();
        assert!(!sinks.any());
        // All tokens equal: no variance.
        assert_eq!(fvu_without(&device, &zeros, &zeros, &sinks).unwrap(), None);
    }
}

#[test]
fn errors_means_and_residuals_agree_with_float64() {
    let (t, d) = (132, 7);
    let (x, y) = (random(1, &[t, d], 1.0), random(2, &[t, d], 1.0));
    let (x64, y64) = (to_f64(&x), to_f64(&y));
    for device in devices("fvu") {
        for parts in [1, 3, 132] {
            let got = mse(&device, &x, &y, parts).unwrap();
            let n = t * d / parts;
            let want = x64.chunks(n).zip(y64.chunks(n));
            let want: Vec<f64> = want.map(|(x, y)| squared_error(x, y) / n as f64).collect();
            assert!(relative_error(&got, &want) < 1e-6, "{got:?} {want:?}");
        }
        assert!(mse(&device, &x, &y, 5).is_err());
        let got = to_f64(&token_mean(&device, &x).unwrap());
        assert!(relative_error(&got, &mean(&x64, d)) < 1e-6);
        let got = to_f64(&residual(&device, &x, &y).unwrap());
        let want: Vec<f64> = x64.iter().zip(&y64).map(|(x, y)| x - y).collect();
        assert!(relative_error(&got, &want) < 1e-6);
        let empty = Tensor::from_vec(vec![], [0, 3]).unwrap();
        assert!(mse(&device, &empty, &empty, 2).unwrap()[1].is_nan());
    }
}
