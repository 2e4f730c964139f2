use half::{bf16, f16};

use resa_engine::device::Device;
use resa_engine::ops::decode::{Heads, Map, attention, linear};
use resa_engine::tensor::{DType, Tensor};

use super::harness::{devices, half_tensor, random, relative_error, round_bf16, to_f64};

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.f32s().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn first_rows(tensor: &Tensor, rows: usize) -> Tensor {
    let (_, cols) = tensor.matrix_dims();
    let data = tensor.f32s().unwrap()[..rows * cols].to_vec();
    Tensor::from_vec(data, [rows, cols]).unwrap()
}

fn product(x: &[f64], w: &[f64], bias: &[f64], cols: usize) -> Vec<f64> {
    let rows = x.chunks(cols).flat_map(|x| {
        let sums = w.chunks(cols).zip(bias).map(|(w, b)| {
            let terms = x.iter().zip(w).map(|(x, w)| x * w);
            terms.sum::<f64>() + b
        });
        sums.collect::<Vec<_>>()
    });
    rows.collect()
}

#[test]
fn linear_maps_match_the_reference_in_every_type_for_one_row_and_many() {
    for (out, cols) in [(1, 1), (3, 5), (4, 16), (37, 33), (130, 96), (257, 1000)] {
        let wide = random(1, &[out, cols], 1.0);
        let weights = [
            wide.clone(),
            half_tensor(&wide, |v| bf16::from_f32(v).to_le_bytes(), DType::Bf16),
            half_tensor(&wide, |v| f16::from_f32(v).to_le_bytes(), DType::F16),
        ];
        let bias = random(2, &[out], 1.0);
        for weight in &weights {
            for batch in [1, 2, 4, 5, 11] {
                let x = random(3, &[batch, cols], 1.0);
                let want = product(&to_f64(&x), &to_f64(weight), &to_f64(&bias), cols);
                for device in devices("decode") {
                    let map = Map {
                        weight,
                        bias: Some(&bias),
                    };
                    let y = device.run(|| linear(&device, &x, &[map, map])).unwrap();
                    assert_eq!(y[0].shape(), [batch, out]);
                    assert_eq!(bits(&y[0]), bits(&y[1]));
                    let error = relative_error(&to_f64(&y[0]), &want);
                    assert!(error < 1e-6, "{out} x {cols}, {batch} rows: {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_row_of_a_product_has_the_same_bits_beside_others_and_on_any_number_of_threads() {
    let weight = random(1, &[301, 77], 1.0);
    let x = random(2, &[9, 77], 1.0);
    let map = Map {
        weight: &weight,
        bias: None,
    };
    let run = |device: &Device, x: &Tensor| {
        let y = device.run(|| linear(device, x, &[map])).unwrap();
        bits(&y[0])
    };
    let all = devices("decode");
    let whole = run(&all[0], &x);
    for device in &all {
        for rows in 1..=9 {
            assert_eq!(
                run(device, &first_rows(&x, rows)),
                whole[..rows * 301],
                "{rows} rows"
            );
        }
    }
}

/// Plain softmax attention of the last position, in float64.
fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads) -> Vec<f64> {
    let Heads { queries, kv, dim } = heads;
    let n = k.len() / (kv * dim);
    let mut out = vec![0.0; queries * dim];
    for h in 0..queries {
        let at = |t: usize| (t * kv + h / (queries / kv)) * dim;
        let scores: Vec<f64> = (0..n)
            .map(|t| (0..dim).map(|i| q[h * dim + i] * k[at(t) + i]).sum::<f64>())
            .map(|s| (s / (dim as f64).sqrt()).exp())
            .collect();
        let sum: f64 = scores.iter().sum();
        for (t, score) in scores.iter().enumerate() {
            for i in 0..dim {
                out[h * dim + i] += score / sum * v[at(t) + i];
            }
        }
    }
    out
}

#[test]
fn attention_over_caches_of_different_lengths_matches_the_reference() {
    for (queries, kv, dim) in [(1, 1, 2), (6, 2, 16), (9, 3, 64), (4, 4, 33)] {
        let heads = Heads { queries, kv, dim };
        let lengths = [1, 2, 33, 150];
        let q = random(1, &[lengths.len(), queries * dim], 3.0);
        let cache = |seed| lengths.map(|n| random(seed + n as u64, &[n, kv * dim], 1.0));
        let (keys, values) = (cache(10), cache(1000));
        let held: Vec<_> = keys
            .iter()
            .zip(&values)
            .map(|(k, v)| (k.f32s().unwrap(), v.f32s().unwrap()))
            .collect();
        for device in devices("decode") {
            let o = device.run(|| attention(&device, &q, &held, heads)).unwrap();
            let (o, q) = (to_f64(&o), to_f64(&q));
            let width = queries * dim;
            for i in 0..lengths.len() {
                let rows = i * width..(i + 1) * width;
                let want = reference(
                    &q[rows.clone()],
                    &to_f64(&keys[i]),
                    &to_f64(&values[i]),
                    heads,
                );
                let error = relative_error(&o[rows], &want);
                assert!(error < 1e-6, "{heads:?}, {} tokens: {error:e}", lengths[i]);
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let device = Device::cpu(1).unwrap();
    let weight = random(1, &[4, 6], 1.0);
    let x = random(2, &[2, 5], 1.0);
    let map = Map {
        weight: &weight,
        bias: None,
    };
    let error = linear(&device, &x, &[map]).unwrap_err().to_string();
    assert!(error.contains("a last extent of 6"), "{error}");
    let bias = round_bf16(&random(3, &[5], 1.0));
    let with_bias = Map {
        weight: &weight,
        bias: Some(&bias),
    };
    assert!(linear(&device, &random(2, &[2, 6], 1.0), &[with_bias]).is_err());
    let empty = Tensor::from_vec(vec![], [0, 6]).unwrap();
    assert!(linear(&device, &empty, &[map]).is_err());

    let q = random(4, &[1, 8], 1.0);
    let heads = |queries, kv, dim| Heads { queries, kv, dim };
    let (k, short) = ([0.5f32; 8], [0.5f32; 4]);
    let attend = |held: &[(&[f32], &[f32])], heads| attention(&device, &q, held, heads).map(|_| ());
    assert!(attend(&[(&k, &k)], heads(2, 1, 4)).is_ok());
    for (held, heads) in [
        ((&k[..], &short[..]), heads(2, 1, 4)),
        ((&k[..0], &k[..0]), heads(2, 1, 4)),
        ((&k[..7], &k[..7]), heads(2, 1, 4)),
        ((&k[..], &k[..]), heads(3, 2, 4)),
        ((&k[..], &k[..]), heads(2, 0, 4)),
        ((&k[..], &k[..]), heads(4, 1, 4)),
    ] {
        assert!(attend(&[held], heads).is_err(), "{heads:?}");
    }
}
