use proptest::prelude::*;
use resa_engine::device::Device;
use resa_engine::ops::Operator;
use resa_engine::ops::sparse_decode::{LatentGroups, SharedGroups, SparseDecode};
use resa_engine::rng::{Purpose, Stream};
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::{DType, Tensor};

use crate::harness::{
    Dot, assert_least_traffic, check, cuda, devices, random, relative_error, round_bf16, to_f64,
};

/// k different latents for each token, in no order.
fn random_indices(seed: u64, t: usize, m: usize, k: usize) -> Tensor {
    let of_token = |token| {
        let order = Stream::new(seed, Purpose::Shuffle, token, 0).permutation(m);
        order.into_iter().take(k).map(|i| i as u32)
    };
    let indices = (0..t as u64).flat_map(of_token).collect();
    Tensor::from_u32(indices, [t, k]).unwrap()
}

fn reference(indices: &Tensor, d: usize, inputs: &[Vec<f64>]) -> Vec<f64> {
    let (_, k) = indices.matrix_dims();
    let [acts, w, b] = inputs else {
        panic!("three inputs")
    };
    let tokens = acts.chunks(k).zip(indices.u32s().unwrap().chunks(k));
    let mut out = Vec::new();
    for (acts, indices) in tokens {
        for c in 0..d {
            let pairs = acts.iter().zip(indices);
            let sum: f64 = pairs.map(|(a, &i)| a * w[i as usize * d + c]).sum();
            out.push(sum + b[c]);
        }
    }
    out
}

fn inputs(t: usize, d: usize, m: usize, k: usize) -> [Tensor; 3] {
    [
        random(1, &[t, k], 1.0),
        random(2, &[m, d], 1.0),
        random(3, &[d], 1.0),
    ]
}

#[test]
fn outputs_and_gradients_agree_with_float64() {
    for (t, d, m, k) in [
        (1, 1, 1, 1),
        (5, 7, 11, 3),
        (37, 65, 131, 6),
        (129, 32, 64, 5),
    ] {
        let indices = random_indices(9, t, m, k);
        let make = || SparseDecode {
            indices: indices.clone(),
            groups: SharedGroups::default(),
        };
        let reference = |inputs: &[Vec<f64>]| vec![reference(&indices, d, inputs)];
        check(make, &inputs(t, d, m, k), reference, 1e-5);
    }
}

/// The gradient of the activations for a random one of the outputs, with the decoder frozen or not.
fn gradient_of_acts(
    device: &Device,
    inputs: &[Tensor; 3],
    indices: &Tensor,
    frozen: bool,
) -> Vec<f64> {
    let mut tape = Tape::new(device);
    let acts = tape.parameter(inputs[0].clone());
    let mut weight = |i: usize| match frozen {
        true => Var::constant(inputs[i].clone()),
        false => tape.parameter(inputs[i].clone()),
    };
    let (w, b) = (weight(1), weight(2));
    let op = SparseDecode {
        indices: indices.clone(),
        groups: SharedGroups::default(),
    };
    let out = tape.apply(op, &[&acts, &w, &b]).unwrap();
    let upstream = random(5, out.value().shape(), 1.0);
    let loss = tape.apply(Dot(vec![upstream]), &[&out]).unwrap();
    to_f64(&tape.backward(&loss, 1.0).unwrap().take(&acts).unwrap())
}

#[test]
fn a_frozen_decoder_passes_the_same_gradient_to_the_activations() {
    let (t, d, m, k) = (19, 33, 70, 4);
    let (inputs, indices) = (inputs(t, d, m, k), random_indices(9, t, m, k));
    for device in devices("sparse_decode") {
        let [frozen, trained] =
            [true, false].map(|frozen| gradient_of_acts(&device, &inputs, &indices, frozen));
        assert!(relative_error(&frozen, &trained) < 1e-6);
    }
}

#[test]
fn an_index_out_of_range_is_an_error() {
    for device in devices("sparse_decode") {
        let op = SparseDecode {
            indices: Tensor::from_u32(vec![0, 4], [1, 2]).unwrap(),
            groups: SharedGroups::default(),
        };
        let inputs = inputs(1, 3, 4, 2);
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let error = op.forward(&device, &inputs, &[false; 3]).err().unwrap();
        assert!(error.to_string().contains("below 4"), "{error}");
    }
}

#[test]
fn an_index_on_the_gpu_that_is_of_no_latent_has_no_gradient() {
    let Some(device) = cuda() else { return };
    let Device::Cuda(gpu) = device else { return };
    let inputs = inputs(1, 8, 4, 2);
    let indices = Tensor::from_u32(vec![0, 4], [1, 2]).unwrap();
    let indices = gpu.resident(&indices, DType::U32).unwrap();
    for frozen in [true, false] {
        let grad = gradient_of_acts(device, &inputs, &indices, frozen);
        assert!(grad[0] != 0.0 && grad[1] == 0.0, "{grad:?}");
    }
}

/// A latent in every token, latents in none, more latents than one digit of the sort has and a
/// row longer than a block covers at once.
#[test]
fn latents_of_very_different_use_have_the_gradients_of_float64() {
    let (t, d, m, k) = (70, 2056, 700, 3);
    let mut indices = random_indices(9, t, m - 1, k).u32s().unwrap().to_vec();
    for token in indices.chunks_mut(k) {
        token[0] = m as u32 - 1;
    }
    let indices = Tensor::from_u32(indices, [t, k]).unwrap();
    let inputs = inputs(t, d, m, k).map(|t| round_bf16(&t));
    let upstream = round_bf16(&random(5, &[t, d], 1.0));
    let [acts, w, g] = [&inputs[0], &inputs[1], &upstream].map(to_f64);
    let (mut want_acts, mut want_w) = (vec![0.0; t * k], vec![0.0; m * d]);
    for (pair, &latent) in indices.u32s().unwrap().iter().enumerate() {
        let (row, latent) = (&g[pair / k * d..][..d], latent as usize * d);
        for (c, g) in row.iter().enumerate() {
            want_acts[pair] += g * w[latent + c];
            want_w[latent + c] += acts[pair] * g;
        }
    }
    for device in devices("sparse_decode") {
        let op = SparseDecode {
            indices: indices.clone(),
            groups: SharedGroups::default(),
        };
        let mut tape = Tape::new(&device);
        let vars = inputs.each_ref().map(|t| tape.parameter(t.clone()));
        let out = tape.apply(op, &vars.each_ref()).unwrap();
        let loss = tape.apply(Dot(vec![upstream.clone()]), &[&out]).unwrap();
        let mut grads = tape.backward(&loss, 1.0).unwrap();
        for (var, want) in vars.iter().zip([&want_acts, &want_w]) {
            let error = relative_error(&to_f64(&grads.take(var).unwrap()), want);
            assert!(error < 1e-6, "{} {error:e}", device.name());
        }
    }
}

#[test]
fn whole_rows_are_read_once() {
    let Some(device) = cuda() else { return };
    // Sixteen pairs a latent, as 32 of 65 536 latents in a step of 32 768 tokens have.
    let (t, d, m, k) = (64, 512, 128, 32);
    let Device::Cuda(gpu) = device else {
        panic!("not a GPU")
    };
    let inputs = inputs(t, d, m, k).map(|t| gpu.resident(&t, DType::F32).unwrap());
    let op = SparseDecode {
        indices: gpu
            .resident(&random_indices(9, t, m, k), DType::U32)
            .unwrap(),
        groups: SharedGroups::default(),
    };
    let rows = 2 * t * k * d;
    let (_, saved) = op.forward(device, &inputs.each_ref(), &[true; 3]).unwrap();
    assert_least_traffic(2 * rows);
    let grad = gpu.resident(&random(5, &[t, d], 1.0), DType::Bf16).unwrap();
    let needed = [true, true, false];
    let grads = op.backward(device, saved.clone(), vec![Some(grad.clone())], &needed);
    assert_eq!(grads.unwrap().len(), 3);
    assert_least_traffic(rows + 8 * m * d);
    let frozen = op.backward(device, saved, vec![Some(grad)], &[true, false, false]);
    assert_eq!(frozen.unwrap().len(), 3);
    assert_least_traffic(2 * rows);
}

#[test]
fn groups_are_not_taken_for_a_selection_of_another_size() {
    let groups = SharedGroups::default();
    assert_eq!(groups.get(&[1, 0, 1], 2).unwrap().pairs_of(1), [0, 2]);
    assert!(groups.get(&[1, 0], 2).is_err());
    assert!(groups.get(&[1, 0, 1], 3).is_err());
}

proptest! {
    #[test]
    fn groups_hold_every_pair_once_by_latent_and_ascending(
        indices in prop::collection::vec(0u32..50, 0..400),
    ) {
        let groups = LatentGroups::new(&indices, 50).unwrap();
        prop_assert_eq!(groups.pairs().len(), indices.len());
        for latent in 0..50 {
            let positions = (0u32..).zip(&indices).filter(|&(_, &i)| i == latent);
            let want: Vec<u32> = positions.map(|(p, _)| p).collect();
            prop_assert_eq!(groups.pairs_of(latent as usize), &want);
        }
    }
}
