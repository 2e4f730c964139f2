use std::sync::Arc;

use proptest::prelude::*;
use resa_engine::device::Device;
use resa_engine::error::{Error, Result};
use resa_engine::ops::Operator;
use resa_engine::ops::sparse_decode::SharedGroups;
use resa_engine::ops::topk::TopK;
use resa_engine::tensor::Tensor;

use crate::harness::{check, devices, random};

/// relu((x − b_dec) W_encᵀ + b_enc), \[T, m\].
fn rectified(inputs: &[Vec<f64>], d: usize) -> Vec<Vec<f64>> {
    let [x, w, b, centre] = inputs else {
        panic!("four inputs")
    };
    let product = |x: &[f64], w: &[f64]| -> f64 {
        let terms = x.iter().zip(centre).zip(w);
        terms.map(|((x, c), w)| (x - c) * w).sum()
    };
    x.chunks(d)
        .map(|x| {
            let latents = w.chunks(d).zip(b);
            latents.map(|(w, b)| (product(x, w) + b).max(0.0)).collect()
        })
        .collect()
}

/// The first k of a full sort by value, then by index; ascending by index.
fn sorted_selection(row: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Inputs for t tokens, d dimensions and m latents whose selection no small change flips: all
/// pre-activations of a token lie at least 1e-3 apart from the border between k and k + 1.
fn inputs_with_margin(t: usize, d: usize, m: usize, k: usize) -> Vec<Tensor> {
    (0u64..)
        .map(|seed| {
            vec![
                random(4 * seed + 1, &[t, d], 1.0),
                random(4 * seed + 2, &[m, d], 1.0),
                random(4 * seed + 3, &[m], 0.5),
                random(4 * seed + 4, &[d], 0.3),
            ]
        })
        .find(|inputs| {
            let inputs: Vec<_> = inputs.iter().map(crate::harness::to_f64).collect();
            rectified(&inputs, d).into_iter().all(|mut row| {
                row.sort_by(|a, b| b.total_cmp(a));
                row[k - 1] > 1e-3 && row.get(k).is_none_or(|next| row[k - 1] - next > 1e-3)
            })
        })
        .unwrap()
}

fn agrees_with_float64(t: usize, d: usize, m: usize, k: usize) {
    let reference = |inputs: &[Vec<f64>]| {
        let rows = rectified(inputs, d);
        let pick = |row: Vec<f64>| sorted_selection(&row, k).into_iter().map(move |i| row[i]);
        vec![rows.into_iter().flat_map(pick).collect()]
    };
    check(
        || TopK::new(k, SharedGroups::default()),
        &inputs_with_margin(t, d, m, k),
        reference,
        1e-5,
    );
}

#[test]
fn activations_and_gradients_agree_with_float64() {
    agrees_with_float64(1, 1, 3, 1);
    agrees_with_float64(7, 13, 31, 5);
    agrees_with_float64(257, 9, 67, 3);
    agrees_with_float64(2, 33, 1031, 4);
}

#[test]
fn a_selection_among_some_latents_has_gradients_for_them_alone() {
    let (t, d, m, k) = (5, 7, 23, 2);
    let among: Arc<[u32]> = [2, 3, 11, 17, 22].into();
    let reference = |inputs: &[Vec<f64>]| {
        let mut acts = Vec::new();
        for row in rectified(inputs, d) {
            let kept: Vec<f64> = [2, 3, 11, 17, 22].map(|i: usize| row[i]).to_vec();
            acts.extend(sorted_selection(&kept, k).into_iter().map(|i| kept[i]));
        }
        vec![acts]
    };
    // A bias that keeps all pre-activations positive, so that no rectifier's edge is near.
    let mut inputs = inputs_with_margin(t, d, m, 4);
    inputs[2] = Tensor::from_vec(vec![9.0; m], [m]).unwrap();
    let make = || TopK {
        k,
        among: Some(among.clone()),
        groups: SharedGroups::default(),
    };
    check(make, &inputs, reference, 1e-5);
}

fn forward(device: &Device, k: usize, inputs: &[Tensor]) -> Result<(Vec<f32>, Vec<u32>)> {
    let op = TopK::new(k, SharedGroups::default());
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let (outputs, _) = device.run(|| op.forward(device, &inputs, &[false; 4]))?;
    let acts = outputs[0].f32s()?.to_vec();
    Ok((acts, outputs[1].u32s()?.to_vec()))
}

/// One-dimensional tokens of value 1 and weights `rows`: pre-activations are the weights.
fn with_pre_activations(row: &[f32]) -> Vec<Tensor> {
    let m = row.len();
    vec![
        Tensor::from_vec(vec![1.0], [1, 1]).unwrap(),
        Tensor::from_vec(row.to_vec(), [m, 1]).unwrap(),
        Tensor::from_vec(vec![0.0; m], [m]).unwrap(),
        Tensor::from_vec(vec![0.0], [1]).unwrap(),
    ]
}

#[test]
fn of_equal_values_the_lower_latent_is_taken() {
    for device in devices("topk") {
        let mut row = vec![1.0; 300];
        row[200] = 2.0;
        let (acts, indices) = forward(&device, 4, &with_pre_activations(&row)).unwrap();
        assert_eq!(indices, [0, 1, 2, 200]);
        assert_eq!(acts, [1.0, 1.0, 1.0, 2.0]);
    }
}

#[test]
fn a_token_without_positive_values_takes_zeros_of_the_lowest_latents() {
    for device in devices("topk") {
        let (acts, indices) = forward(&device, 3, &with_pre_activations(&[-1.0; 70])).unwrap();
        assert_eq!((acts, indices), (vec![0.0; 3], vec![0, 1, 2]));
        let row = [-1.0, 5.0, -1.0, f32::NEG_INFINITY, 2.0];
        let (acts, indices) = forward(&device, 4, &with_pre_activations(&row)).unwrap();
        assert_eq!(acts, [0.0, 5.0, 0.0, 2.0]);
        assert_eq!(indices, [0, 1, 2, 4]);
    }
}

#[test]
fn values_that_are_not_finite_are_an_error_that_names_the_token() {
    for device in devices("topk") {
        let mut inputs = vec![
            random(1, &[400, 3], 1.0),
            random(2, &[40, 3], 1.0),
            random(3, &[40], 1.0),
            random(4, &[3], 1.0),
        ];
        inputs[0].f32s_mut().unwrap()[350 * 3] = f32::NAN;
        let error = forward(&device, 2, &inputs).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert!(error.to_string().contains("token 350"), "{error}");
        let infinite = with_pre_activations(&[1.0, f32::INFINITY]);
        assert!(forward(&device, 1, &infinite).is_err());
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let device = Device::cpu(1).unwrap();
    let inputs = with_pre_activations(&[1.0, 2.0]);
    for k in [0, 3] {
        let error = forward(&device, k, &inputs).unwrap_err().to_string();
        assert!(
            error.contains("topk") && error.contains(&format!("k = {k}")),
            "{error}"
        );
    }
    let mut wide = inputs.clone();
    wide[0] = random(1, &[2, 5], 1.0);
    assert!(forward(&device, 1, &wide).is_err());
    let mut short_bias = inputs;
    short_bias[2] = random(1, &[1], 1.0);
    assert!(forward(&device, 1, &short_bias).is_err());
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let inputs = [
        random(1, &[700, 24], 1.0),
        random(2, &[4100, 24], 1.0),
        random(3, &[4100], 0.1),
        random(4, &[24], 1.0),
    ];
    let of = |device: &Device| forward(device, 9, &inputs).unwrap();
    let results: Vec<_> = devices("topk").iter().map(of).collect();
    assert_eq!(results[0], results[1]);
}

proptest! {
    /// Whole numbers make ties frequent and the products exact.
    #[test]
    fn the_selection_equals_a_full_sort(
        row in prop::collection::vec(-3i8..6, 1..2300),
        share in 0.0f64..=1.0,
        ascending in any::<bool>(),
    ) {
        let mut row: Vec<f32> = row.into_iter().map(f32::from).collect();
        if ascending {
            // The order in which a running threshold is least use.
            row.sort_by(f32::total_cmp);
        }
        let k = ((row.len() as f64 * share) as usize).max(1);
        let device = Device::cpu(1).unwrap();
        let (acts, indices) = forward(&device, k, &with_pre_activations(&row)).unwrap();
        let rectified: Vec<f64> = row.iter().map(|&v| f64::from(v).max(0.0)).collect();
        let want = sorted_selection(&rectified, k);
        let got: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
        prop_assert_eq!(&got, &want);
        for (act, i) in acts.iter().zip(want) {
            prop_assert_eq!(f64::from(*act), rectified[i]);
        }
    }
}
