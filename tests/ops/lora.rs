use resa_engine::ops::lora::{Dropout, LoraLinear};
use resa_engine::rng::{Purpose, Stream};

use crate::gemm::affine;
use crate::harness::{check, random, round_bf16, to_f64};

#[test]
fn lora_matches_float64_with_and_without_dropout_and_residual() {
    for (t, k, n, r) in [
        (1, 1, 1, 1),
        (7, 13, 5, 3),
        (33, 31, 65, 4),
        (130, 72, 136, 8),
    ] {
        let [w, bias] = [random(3, &[n, k], 1.0), random(4, &[n], 1.0)].map(|t| round_bf16(&t));
        let (w64, bias64) = (to_f64(&w), to_f64(&bias));
        let scale = 1.5;
        for p in [0.0f32, 0.4] {
            let stream = Stream::new(9, Purpose::Dropout, 2, 11);
            let kept: Vec<f64> = (0..t * k)
                .map(
                    |i| match f64::from(stream.word(i as u64)) < f64::from(p) * 4294967296.0 {
                        true => 0.0,
                        false => 1.0 / (1.0 - f64::from(p)),
                    },
                )
                .collect();
            let make = || LoraLinear {
                weight: w.clone(),
                bias: Some(bias.clone()),
                scale,
                dropout: (p > 0.0).then_some(Dropout { p, stream }),
            };
            let reference = |i: &[Vec<f64>]| {
                let dropped: Vec<f64> = i[0].iter().zip(&kept).map(|(x, m)| x * m).collect();
                let u = affine(&dropped, &i[1], None, None, k);
                let low_rank = affine(&u, &i[2], None, None, r);
                let scaled: Vec<f64> = low_rank.iter().map(|v| v * f64::from(scale)).collect();
                let residual = i.get(3).map(|v| &v[..]);
                let frozen = affine(&i[0], &w64, Some(&bias64), residual, k);
                vec![frozen.iter().zip(&scaled).map(|(a, b)| a + b).collect()]
            };
            let x = random(5, &[t, k], 1.0);
            let (a, b) = (random(6, &[r, k], 1.0), random(7, &[n, r], 1.0));
            check(make, &[x.clone(), a.clone(), b.clone()], reference, 2e-6);
            check(make, &[x, a, b, random(8, &[t, n], 1.0)], reference, 2e-6);
        }
    }
}

#[test]
fn dropout_zeroes_the_stated_share() {
    use resa_engine::{device::Device, ops::Operator, tensor::Tensor};
    // With W = 0, A = B = 1 and scale 1 the output is the sum of the kept inputs.
    let (t, k, p) = (1, 100_000, 0.05);
    let ones = |shape: [usize; 2]| Tensor::from_vec(vec![1.0; shape[0] * shape[1]], shape).unwrap();
    let op = LoraLinear {
        weight: Tensor::from_vec(vec![0.0; k], [1, k]).unwrap(),
        bias: None,
        scale: 1.0,
        dropout: Some(Dropout {
            p,
            stream: Stream::new(1, Purpose::Dropout, 0, 0),
        }),
    };
    let device = Device::cpu(2).unwrap();
    let inputs = [ones([t, k]), ones([1, k]), ones([1, 1])];
    let (out, _) = op
        .forward(&device, &inputs.each_ref(), &[false; 3])
        .unwrap();
    let kept = f64::from(out[0].f32s().unwrap()[0]) * (1.0 - f64::from(p)) / k as f64;
    // Five standard deviations of the mean of 100 000 draws.
    assert!(
        (kept - 0.95).abs() < 5.0 * (0.05f64 * 0.95 / k as f64).sqrt(),
        "{kept}"
    );
}
