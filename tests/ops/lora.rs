use half::bf16;
use resa_engine::device::Device;
use resa_engine::ops::Operator;
use resa_engine::ops::lora::{Dropout, Frozen, LoraLinear};
use resa_engine::rng::{Purpose, Stream};

use crate::gemm::affine;
use crate::harness::{check_in_steps, cuda, random, relative_error, round_bf16, to_f64};

const SCALE: f32 = 1.5;

/// The frozen part of a module in float64, and what dropout multiplies each input by.
struct Case<'a> {
    w: &'a [f64],
    bias: &'a [f64],
    kept: &'a [f64],
    k: usize,
    r: usize,
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn scaled(a: &[f64]) -> Vec<f64> {
    a.iter().map(|v| v * f64::from(SCALE)).collect()
}

/// A matrix of rows of `cols` values, turned.
fn transposed(a: &[f64], cols: usize) -> Vec<f64> {
    let column = |c: usize| a.iter().skip(c).step_by(cols);
    (0..cols).flat_map(column).copied().collect()
}

impl Case<'_> {
    /// Y of the inputs X, A, B and, if there is one, the residual; `round` is applied to the
    /// result of each step. Also the dropped inputs and U.
    fn forward(
        &self,
        i: &[Vec<f64>],
        round: impl Fn(Vec<f64>) -> Vec<f64>,
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let dropped = round(times(&i[0], self.kept));
        let u = round(affine(&dropped, &i[1], None, None, self.k));
        let low_rank = round(scaled(&round(affine(&u, &i[2], None, None, self.r))));
        let frozen = round(affine(&i[0], self.w, Some(self.bias), None, self.k));
        let mut y = round(plus(&frozen, &low_rank));
        if let Some(residual) = i.get(3) {
            y = round(plus(&y, residual));
        }
        (y, dropped, u)
    }

    /// Forward and backward as a framework does them in bf16, a rounding after each step.
    fn in_bf16(&self, i: &[Vec<f64>], dy: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let round =
            |v: Vec<f64>| -> Vec<f64> { v.iter().map(|&v| bf16::from_f64(v).to_f64()).collect() };
        (vec![self.forward(i, round).0], self.gradients(i, dy, round))
    }

    /// The gradients of the inputs.
    fn gradients(
        &self,
        i: &[Vec<f64>],
        dy: &[Vec<f64>],
        round: impl Fn(Vec<f64>) -> Vec<f64>,
    ) -> Vec<Vec<f64>> {
        let (_, dropped, u) = self.forward(i, &round);
        let (dy, n, rows) = (&dy[0], self.bias.len(), i[0].len() / self.k);
        let dy_scaled = round(scaled(dy));
        let du = round(affine(
            &dy_scaled,
            &transposed(&i[2], self.r),
            None,
            None,
            n,
        ));
        let through = |d: &[f64], other: &[f64], cols: usize, other_cols: usize| {
            round(affine(
                &transposed(d, cols),
                &transposed(other, other_cols),
                None,
                None,
                rows,
            ))
        };
        let da = through(&du, &dropped, self.r, self.k);
        let db = through(&dy_scaled, &u, n, self.r);
        let low_rank = round(affine(&du, &transposed(&i[1], self.k), None, None, self.r));
        let frozen = round(affine(dy, &transposed(self.w, self.k), None, None, n));
        let dx = round(plus(&frozen, &round(times(&low_rank, self.kept))));
        let mut grads = vec![dx, da, db];
        grads.extend(i.get(3).map(|_| dy.clone()));
        grads
    }
}

/// What dropout with this probability multiplies each of n inputs by: 16 bits of the stream an
/// element, against p in 2^-16ths.
fn kept(stream: Stream, p: f32, n: usize) -> Vec<f64> {
    let threshold = (f64::from(p) * 65536.0).round();
    let factor = |i: usize| {
        let word = stream.word(i as u64 / 2);
        let half = if i.is_multiple_of(2) {
            word & 0xffff
        } else {
            word >> 16
        };
        match f64::from(half) < threshold {
            true => 0.0,
            false => 1.0 / (1.0 - threshold / 65536.0),
        }
    };
    (0..n).map(factor).collect()
}

#[test]
fn lora_matches_float64_with_and_without_dropout_and_residual() {
    // Every tensor has so many values that its error is not one lucky or unlucky rounding. On a GPU
    // one kernel draws, drops and multiplies where inputs are in 32s, ranks and outputs in eights.
    for (t, k, n, r) in [
        (1, 40, 24, 2),
        (7, 13, 5, 3),
        (33, 31, 65, 4),
        (19, 24, 40, 8),
        (19, 32, 40, 8),
        (131, 160, 24, 40),
    ] {
        let [w, bias] = [random(3, &[n, k], 1.0), random(4, &[n], 1.0)].map(|t| round_bf16(&t));
        let (w64, bias64) = (to_f64(&w), to_f64(&bias));
        for p in [0.0f32, 0.4] {
            let stream = Stream::new(9, Purpose::Dropout, 2, 11);
            let kept = kept(stream, p, t * k);
            let make = || LoraLinear {
                modules: vec![Frozen {
                    weight: w.clone(),
                    bias: Some(bias.clone()),
                    dropout: (p > 0.0).then_some(Dropout {
                        p,
                        stream,
                        step: None,
                    }),
                }],
                scale: SCALE,
            };
            let (w, bias, kept) = (&w64[..], &bias64[..], &kept[..]);
            let case = Case {
                w,
                bias,
                kept,
                k,
                r,
            };
            let x = random(5, &[t, k], 1.0);
            let (a, b) = (random(6, &[r, k], 1.0), random(7, &[n, r], 1.0));
            let residual = random(8, &[t, n], 1.0);
            for inputs in [
                vec![x.clone(), a.clone(), b.clone()],
                vec![x, a, b, residual],
            ] {
                check_in_steps(
                    make,
                    &inputs,
                    |i| vec![case.forward(i, |v| v).0],
                    2e-6,
                    |i, dy| case.in_bf16(i, dy),
                );
            }
        }
    }
}

#[test]
fn dropout_zeroes_the_stated_share() {
    use resa_engine::tensor::Tensor;
    // With W = 0, A = B = 1 and scale 1 the output is the sum of the kept inputs.
    let (t, k, p) = (1, 100_000, 0.05);
    let ones = |shape: [usize; 2]| Tensor::from_vec(vec![1.0; shape[0] * shape[1]], shape).unwrap();
    let op = LoraLinear {
        modules: vec![Frozen {
            weight: Tensor::from_vec(vec![0.0; k], [1, k]).unwrap(),
            bias: None,
            dropout: Some(Dropout {
                p,
                stream: Stream::new(1, Purpose::Dropout, 0, 0),
                step: None,
            }),
        }],
        scale: 1.0,
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

/// Three modules on one X, whose U come from one launch on a GPU where the shapes allow it.
#[test]
fn modules_on_one_input_match_float64_and_add_up_their_gradients() {
    let t = 21;
    // Inputs in 32s, ranks and outputs in eights, and each of them not.
    for (k, outs, r, p) in [
        (32, [40, 16, 24], 8, 0.0),
        (96, [40, 16, 24], 40, 0.4),
        (24, [40, 16, 24], 8, 0.4),
        (32, [40, 16, 24], 3, 0.0),
        (32, [40, 13, 24], 8, 0.4),
    ] {
        let stream = |module: usize| Stream::new(9, Purpose::Dropout, 2, 11 + module as u32);
        let frozen: Vec<_> = (0..3u64)
            .map(|i| round_bf16(&random(30 + i, &[outs[i as usize], k], 1.0)))
            .collect();
        let bias: Vec<_> = (0..3u64)
            .map(|i| round_bf16(&random(40 + i, &[outs[i as usize]], 1.0)))
            .collect();
        let make = || LoraLinear {
            modules: std::iter::zip(&frozen, &bias)
                .enumerate()
                .map(|(module, (weight, bias))| Frozen {
                    weight: weight.clone(),
                    bias: Some(bias.clone()),
                    dropout: (p > 0.0).then_some(Dropout {
                        p,
                        stream: stream(module),
                        step: None,
                    }),
                })
                .collect(),
            scale: SCALE,
        };
        let (w64, bias64): (Vec<_>, Vec<_>) = std::iter::zip(&frozen, &bias)
            .map(|(w, b)| (to_f64(w), to_f64(b)))
            .unzip();
        let kept: Vec<_> = (0..3).map(|m| kept(stream(m), p, t * k)).collect();
        let cases: Vec<Case> = std::iter::zip(&w64, &bias64)
            .zip(&kept)
            .map(|((w, bias), kept)| Case {
                w,
                bias,
                kept,
                k,
                r,
            })
            .collect();
        let of = |i: &[Vec<f64>], module: usize| -> Vec<Vec<f64>> {
            vec![
                i[0].clone(),
                i[1 + 2 * module].clone(),
                i[2 + 2 * module].clone(),
            ]
        };
        let mut inputs = vec![random(5, &[t, k], 1.0)];
        for (i, &out) in (0..).zip(&outs) {
            inputs.extend([random(6 + i, &[r, k], 1.0), random(16 + i, &[out, r], 1.0)]);
        }
        check_in_steps(
            make,
            &inputs,
            |i| {
                let each = cases.iter().enumerate();
                each.map(|(m, case)| case.forward(&of(i, m), |v| v).0)
                    .collect()
            },
            2e-6,
            |i, dy| {
                let (mut outputs, mut grads) = (Vec::new(), vec![vec![0.0; t * k]]);
                for (m, case) in cases.iter().enumerate() {
                    let (y, own) = case.in_bf16(&of(i, m), &dy[m..]);
                    outputs.extend(y);
                    grads[0] = plus(&grads[0], &own[0])
                        .iter()
                        .map(|&v| bf16::from_f64(v).to_f64())
                        .collect();
                    grads.extend(own.into_iter().skip(1));
                }
                (outputs, grads)
            },
        );
    }
}

/// Longer than a block's rows, wider than its columns, of a higher rank than it sums at a time.
#[test]
fn gradients_of_many_rows_and_columns_are_those_of_float64() {
    let Some(device) = cuda() else { return };
    let (t, k, n, r) = (1100, 16, 584, 40);
    let [w, bias] = [random(3, &[n, k], 1.0), random(4, &[n], 1.0)].map(|t| round_bf16(&t));
    let (w64, bias64, kept) = (to_f64(&w), to_f64(&bias), vec![1.0; t * k]);
    let case = Case {
        w: &w64,
        bias: &bias64,
        kept: &kept,
        k,
        r,
    };
    let op = LoraLinear {
        modules: vec![Frozen {
            weight: w,
            bias: Some(bias),
            dropout: None,
        }],
        scale: SCALE,
    };
    let inputs = [
        random(5, &[t, k], 1.0),
        random(6, &[r, k], 1.0),
        random(7, &[n, r], 1.0),
    ];
    let inputs = inputs.map(|t| round_bf16(&t));
    let dy = round_bf16(&random(8, &[t, n], 1.0));
    let saved = op
        .forward(device, &inputs.each_ref(), &[true; 3])
        .unwrap()
        .1;
    let got = op
        .backward(device, saved, vec![Some(dy.clone())], &[true; 3])
        .unwrap();
    let inputs = inputs.map(|t| to_f64(&t));
    let dy = [to_f64(&dy)];
    let want = case.gradients(&inputs, &dy, |v| v);
    let rounded = case.in_bf16(&inputs, &dy).1;
    for ((got, want), rounded) in got.iter().zip(&want).zip(&rounded) {
        let error = relative_error(&to_f64(got.as_ref().unwrap()), want);
        let allowed = 2.0 * relative_error(rounded, want);
        assert!(error < allowed, "{error:e}, allowed is {allowed:e}");
    }
}

/// A number in the GPU's memory draws the mask of the stream that has it as its step.
#[test]
fn dropout_reads_its_step_from_memory_on_the_gpu() {
    let Some(device) = cuda() else { return };
    for k in [24, 32] {
        reads_its_step_from_memory(device, k);
    }
}

fn reads_its_step_from_memory(device: &Device, k: usize) {
    use resa_engine::tensor::Tensor;
    let (t, n, r) = (33, 40, 8);
    let w = random(3, &[n, k], 1.0);
    let inputs = [
        random(5, &[t, k], 1.0),
        random(6, &[r, k], 1.0),
        random(7, &[n, r], 1.0),
    ];
    let dy = random(8, &[t, n], 1.0);
    let run = |step: u64, in_memory: Option<u64>| {
        let words = |step: u64| vec![step as u32, (step >> 32) as u32];
        let op = LoraLinear {
            modules: vec![Frozen {
                weight: w.clone(),
                bias: None,
                dropout: Some(Dropout {
                    p: 0.5,
                    stream: Stream::new(9, Purpose::Dropout, step, 11),
                    step: in_memory.map(|step| Tensor::from_u32(words(step), [2]).unwrap()),
                }),
            }],
            scale: SCALE,
        };
        let (y, saved) = op.forward(device, &inputs.each_ref(), &[true; 3]).unwrap();
        let grads = op.backward(device, saved, vec![Some(dy.clone())], &[true; 3]);
        let all = y.into_iter().chain(grads.unwrap().into_iter().flatten());
        all.map(|tensor| to_f64(&tensor)).collect::<Vec<_>>()
    };
    let want = run(3 << 32 | 2, None);
    assert_eq!(run(0, Some(3 << 32 | 2)), want);
    assert_ne!(run(3 << 32 | 2, Some(2)), want);
}
