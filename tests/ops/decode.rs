use half::{bf16, f16};

use resa_engine::device::{Device, Precision};
use resa_engine::ops::decode::{Batch, Heads, KvCache, Map, add_low_rank, linear, logits};
use resa_engine::ops::rope::RopeTable;
use resa_engine::tensor::{DType, Tensor};

use super::harness::{
    assert_least_traffic, cuda, devices, half_tensor, random, relative_error, round_bf16, rounded,
    to_f64,
};

fn bits(tensor: &Tensor) -> Vec<u32> {
    let tensor = tensor.to_f32().unwrap();
    tensor.f32s().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn rows(tensor: &Tensor, first: usize, rows: usize) -> Tensor {
    let (_, cols) = tensor.matrix_dims();
    let data = tensor.f32s().unwrap()[first * cols..][..rows * cols].to_vec();
    Tensor::from_vec(data, [rows, cols]).unwrap()
}

/// Whether the device computes in bf16, and the values as it holds them.
fn held(device: &Device, tensor: &Tensor) -> Tensor {
    let wide = tensor.to_f32().unwrap();
    match device.precision() {
        Precision::Bf16 => round_bf16(&wide),
        Precision::F32 => wide,
    }
}

/// In f32 within `tolerance`; in bf16 within twice what `plain`, the textbook's computation with
/// its steps rounded to bf16, is off by.
fn assert_close(
    device: &Device,
    got: &Tensor,
    want: &[f64],
    plain: &[f64],
    tolerance: f64,
    what: &str,
) {
    let limit = match device.precision() {
        Precision::Bf16 => 2.0 * relative_error(plain, want) + 1e-6,
        Precision::F32 => tolerance,
    };
    let error = relative_error(&to_f64(got), want);
    let device = device.name();
    assert!(
        error < limit,
        "{what} on {device}: off by {error:e}, allowed is {limit:e}"
    );
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
            for batch in [1, 2, 4, 5, 11, 35] {
                for device in devices("decode") {
                    let x = held(&device, &random(3, &[batch, cols], 1.0));
                    let bias = held(&device, &bias);
                    let narrow = to_f64(&held(&device, weight));
                    let want = product(&to_f64(&x), &narrow, &to_f64(&bias), cols);
                    let map = Map {
                        weight,
                        bias: Some(&bias),
                    };
                    // More maps than go into one launch.
                    let y = device.run(|| linear(&device, &x, &[map; 4])).unwrap();
                    assert_eq!(y[0].shape(), [batch, out]);
                    assert!(y.iter().all(|other| bits(other) == bits(&y[0])));
                    let what = format!("{out} x {cols}, {batch} rows");
                    assert_close(&device, &y[0], &want, &rounded(&want), 1e-6, &what);
                    let plain = product(&to_f64(&x), &narrow, &vec![0.0; out], cols);
                    let y = device.run(|| logits(&device, &x, weight)).unwrap();
                    let error = relative_error(&to_f64(&y), &plain);
                    assert!(
                        error < 2e-6,
                        "logits, {what} on {}: {error:e}",
                        device.name()
                    );
                }
            }
        }
    }
}

#[test]
fn what_an_adapter_adds_matches_the_reference() {
    for (batch, cols, r, out) in [(1, 5, 1, 3), (3, 40, 7, 33), (18, 96, 32, 256)] {
        for device in devices("decode") {
            let held = |seed, shape: &[usize]| held(&device, &random(seed, shape, 1.0));
            let (x, y) = (held(1, &[batch, cols]), held(2, &[batch, out]));
            let (a, b) = (held(3, &[r, cols]), held(4, &[out, r]));
            let low = product(&to_f64(&x), &to_f64(&a), &vec![0.0; r], cols);
            let low: Vec<f64> = low.iter().map(|v| v * 0.75).collect();
            let with = |low: &[f64]| {
                let delta = product(low, &to_f64(&b), &vec![0.0; out], r);
                let sums = delta.iter().zip(to_f64(&y)).map(|(d, y)| d + y);
                sums.collect::<Vec<_>>()
            };
            let (want, plain) = (with(&low), rounded(&with(&rounded(&low))));
            let mut sum = on(&device, &y);
            device
                .run(|| add_low_rank(&device, &mut sum, &x, [&a, &b], 0.75))
                .unwrap();
            assert_close(&device, &sum, &want, &plain, 2e-6, &format!("rank {r}"));
        }
    }
}

/// The tensor where the device's operators leave theirs.
fn on(device: &Device, tensor: &Tensor) -> Tensor {
    match device {
        Device::Cuda(cuda) => cuda.resident(tensor, DType::Bf16).unwrap(),
        Device::Cpu(_) => tensor.clone(),
    }
}

#[test]
fn a_row_of_a_product_has_the_same_bits_beside_others_and_on_any_number_of_threads() {
    for (out, cols) in [(301, 77), (50, 200)] {
        let weight = random(1, &[out, cols], 1.0);
        let x = random(2, &[35, cols], 1.0);
        let map = Map {
            weight: &weight,
            bias: None,
        };
        let run = |device: &Device, x: &Tensor| {
            let y = device.run(|| linear(device, x, &[map])).unwrap();
            bits(&y[0])
        };
        let all = devices("decode");
        let on_host = run(&all[0], &x);
        for device in &all {
            let whole = run(device, &x);
            assert!(device.name() != "cpu" || whole == on_host);
            for count in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33] {
                let found = run(device, &rows(&x, 0, count));
                assert_eq!(found, whole[..count * out], "{count} rows");
            }
        }
    }
}

/// The heads of `row` turned by the angles of a position.
fn turned(row: &[f64], dim: usize, position: usize, theta: f64) -> Vec<f64> {
    let mut row = row.to_vec();
    for head in row.chunks_mut(dim) {
        for i in 0..dim / 2 {
            let angle = position as f64 * theta.powf(-2.0 * i as f64 / dim as f64);
            let (a, b) = (head[i], head[i + dim / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + dim / 2] = b * angle.cos() + a * angle.sin();
        }
    }
    row
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

/// The keys and values of a sequence before its new token, and that token's query, key and value.
struct Case {
    keys: Tensor,
    values: Tensor,
    new: [Tensor; 3],
}

const THETA: f64 = 100.0;

fn case(device: &Device, heads: Heads, tokens: usize) -> Case {
    let Heads { queries, kv, dim } = heads;
    let make = |seed: u64, rows: usize, cols: usize, scale| {
        held(
            device,
            &random(seed + 7 * tokens as u64, &[rows, cols], scale),
        )
    };
    Case {
        keys: make(1, tokens - 1, kv * dim, 1.0),
        values: make(2, tokens - 1, kv * dim, 1.0),
        new: [
            make(3, 1, queries * dim, 3.0),
            make(4, 1, kv * dim, 1.0),
            make(5, 1, kv * dim, 1.0),
        ],
    }
}

/// Attention of the cases' new tokens, as one batch, in layer 1 of caches that have their tokens.
fn attend(device: &Device, heads: Heads, cases: &[&Case]) -> (Tensor, Vec<KvCache>) {
    let stacked = |i: usize| {
        let rows = cases.iter().flat_map(|c| c.new[i].f32s().unwrap().to_vec());
        let cols = cases[0].new[i].len();
        on(
            device,
            &Tensor::from_vec(rows.collect(), [cases.len(), cols]).unwrap(),
        )
    };
    let rope = RopeTable::new(700, heads.dim, THETA).unwrap();
    let mut caches: Vec<KvCache> = cases
        .iter()
        .map(|case| {
            let mut cache = KvCache::new(device, 2, heads.kv * heads.dim);
            for layer in [0, 1] {
                let (keys, values) = (on(device, &case.keys), on(device, &case.values));
                cache.extend(device, layer, &keys, &values).unwrap();
            }
            cache
        })
        .collect();
    let out = device.run(|| {
        let mut held: Vec<&mut KvCache> = caches.iter_mut().collect();
        let mut batch = Batch::new(device, heads, &rope, &mut held, 0).unwrap();
        batch.attention(1, stacked(0), stacked(1), &stacked(2))
    });
    (out.unwrap(), caches)
}

#[test]
fn attention_over_caches_of_different_lengths_matches_the_reference() {
    let on_every_device = [(6, 2, 16), (9, 3, 64), (12, 2, 128), (20, 2, 72), (1, 1, 8)];
    let on_host_alone = [(1, 1, 2), (4, 4, 34)];
    for (queries, kv, dim) in on_every_device.into_iter().chain(on_host_alone) {
        let heads = Heads { queries, kv, dim };
        // A split of 128 keys less one, full, and more of them.
        let lengths = [1, 2, 33, 127, 128, 129, 300];
        for device in devices("decode") {
            if device.name() == "cuda" && dim % 8 != 0 {
                continue;
            }
            let cases = lengths.map(|n| case(&device, heads, n));
            let (together, caches) = attend(&device, heads, &cases.iter().collect::<Vec<_>>());
            assert!(
                caches
                    .iter()
                    .zip(lengths)
                    .all(|(c, n)| c.tokens(1) == n && c.tokens(0) == n - 1)
            );
            let together = together.to_f32().unwrap();
            for (i, (case, n)) in cases.iter().zip(lengths).enumerate() {
                let (alone, _) = attend(&device, heads, &[case]);
                let own = rows(&together, i, 1);
                assert_eq!(
                    bits(&alone),
                    bits(&own),
                    "{heads:?}, {n} tokens: alone and beside others"
                );
                let [q, k, v] = case.new.each_ref().map(to_f64);
                let turn = |row: &[f64]| turned(row, dim, n - 1, THETA);
                let with = |q: &[f64], k: &[f64]| {
                    let keys = [to_f64(&case.keys), k.to_vec()].concat();
                    let values = [to_f64(&case.values), v.clone()].concat();
                    reference(q, &keys, &values, heads)
                };
                let want = with(&turn(&q), &turn(&k));
                let plain = rounded(&with(&rounded(&turn(&q)), &rounded(&turn(&k))));
                assert_close(
                    &device,
                    &own,
                    &want,
                    &plain,
                    2e-6,
                    &format!("{heads:?}, {n} tokens"),
                );
            }
        }
    }
}

#[test]
fn a_clone_of_a_cache_and_what_it_came_from_go_on_each_for_itself() {
    let heads = Heads {
        queries: 2,
        kv: 1,
        dim: 16,
    };
    for device in devices("decode") {
        // So many tokens that the next one does not fit the memory they are in.
        for tokens in [20, 65] {
            let case = case(&device, heads, tokens);
            let (_, caches) = attend(&device, heads, &[&case]);
            let rope = RopeTable::new(700, heads.dim, THETA).unwrap();
            let step = |cache: &mut KvCache, value: f32| {
                let row = |cols| {
                    let row = Tensor::from_vec(vec![value; cols], [1, cols]).unwrap();
                    on(&device, &row)
                };
                let mut held = [cache];
                let mut batch = Batch::new(&device, heads, &rope, &mut held, 1).unwrap();
                let out = batch.attention(1, row(32), row(16), &row(16)).unwrap();
                bits(&out)
            };
            device.run(|| {
                let mut one = caches[0].clone();
                let mut other = one.clone();
                let first = step(&mut one, 0.5);
                assert_ne!(step(&mut other, -0.5), first);
                let mut again = caches[0].clone();
                assert_eq!(step(&mut again, 0.5), first);
                assert_eq!(step(&mut one, 0.25), step(&mut again, 0.25));
                assert_eq!(caches[0].tokens(1), tokens);
                one.truncate(tokens);
                assert_eq!(step(&mut one, 0.5), first);
            });
        }
    }
}

#[test]
fn weights_and_caches_are_read_once() {
    let Some(device) = cuda() else { return };
    let (out, cols) = (512, 1024);
    let weight = on(device, &random(1, &[out, cols], 1.0));
    let map = Map {
        weight: &weight,
        bias: None,
    };
    let x = on(device, &random(2, &[1, cols], 1.0));
    linear(device, &x, &[map]).unwrap();
    assert_least_traffic(2 * (out * cols + cols + out));

    let heads = Heads {
        queries: 12,
        kv: 2,
        dim: 128,
    };
    let Heads { queries, kv, dim } = heads;
    let rope = RopeTable::new(128, dim, THETA).unwrap();
    let rows = |seed, rows, cols| on(device, &random(seed, &[rows, cols], 1.0));
    let mut cache = KvCache::new(device, 1, kv * dim);
    let (keys, values) = (rows(3, 127, kv * dim), rows(4, 127, kv * dim));
    cache.extend(device, 0, &keys, &values).unwrap();
    let mut held = [&mut cache];
    let mut batch = Batch::new(device, heads, &rope, &mut held, 0).unwrap();
    let [q, k, v] = [queries, kv, kv].map(|n| rows(n as u64, 1, n * dim));
    batch.attention(0, q, k, &v).unwrap();
    assert_least_traffic(2 * (2 * 128 * kv * dim + 2 * queries * dim));
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    for device in devices("decode") {
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
        let mut y = on(&device, &random(2, &[2, 4], 1.0));
        let (a, b) = (random(1, &[3, 5], 1.0), random(1, &[4, 2], 1.0));
        assert!(add_low_rank(&device, &mut y, &x, [&a, &b], 1.0).is_err());

        let rope = RopeTable::new(1, 8, THETA).unwrap();
        let row = |cols| on(&device, &random(4, &[1, cols], 1.0));
        let mut cache = KvCache::new(&device, 1, 8);
        let attend = |cache: &mut KvCache, heads: [usize; 3], layer, [q, k, v]: [usize; 3]| {
            let [queries, kv, dim] = heads;
            let heads = Heads { queries, kv, dim };
            let mut held = [cache];
            let out = Batch::new(&device, heads, &rope, &mut held, 0)
                .and_then(|mut batch| batch.attention(layer, row(q), row(k), &row(v)));
            out.map(drop).map_err(|e| e.to_string())
        };
        for (heads, layer, cols) in [
            ([3, 2, 8], 0, [24, 16, 16]),
            ([2, 0, 8], 0, [16, 8, 8]),
            // Keys of another width than the cache has.
            ([2, 2, 8], 0, [16, 16, 16]),
            ([1, 1, 4], 0, [4, 4, 4]),
            ([2, 1, 8], 1, [16, 8, 8]),
            ([2, 1, 8], 0, [8, 8, 8]),
            ([2, 1, 8], 0, [16, 16, 8]),
            ([2, 1, 8], 0, [16, 8, 16]),
        ] {
            // Refused before any kernel is launched.
            let error = attend(&mut cache, heads, layer, cols).unwrap_err();
            assert!(
                error.contains("decode") && !error.contains("cuda:"),
                "{error}"
            );
        }
        let fitting = ([2, 1, 8], 0, [16, 8, 8]);
        attend(&mut cache, fitting.0, fitting.1, fitting.2).unwrap();
        let error = attend(&mut cache, fitting.0, fitting.1, fitting.2).unwrap_err();
        assert!(error.contains("positions below 1"), "{error}");
        if device.name() == "cuda" {
            let rope = RopeTable::new(1, 12, THETA).unwrap();
            let heads = Heads {
                queries: 1,
                kv: 1,
                dim: 12,
            };
            let mut cache = KvCache::new(&device, 1, 12);
            let mut held = [&mut cache];
            let mut batch = Batch::new(&device, heads, &rope, &mut held, 0).unwrap();
            let error = batch.attention(0, row(12), row(12), &row(12)).unwrap_err();
            assert!(error.to_string().contains("multiples of 8"), "{error}");
        }
    }
}
