use proptest::prelude::*;
use resa_engine::device::Device;
use resa_engine::error::{Error, Result};
use resa_engine::ops::Operator;
use resa_engine::ops::sparse_decode::SharedGroups;
use resa_engine::ops::topk::{Fired, TopK};
use resa_engine::tensor::Tensor;

use crate::harness::{assert_least_traffic, check, cuda, devices, random, round_bf16, to_f64};

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

/// x \[t, d\], W_enc \[m, d\], b_enc \[m\] and b_dec \[d\] of these sizes.
pub fn encoder_inputs(seed: u64, [t, d, m]: [usize; 3], scales: [f32; 4]) -> [Tensor; 4] {
    let shapes = [&[t, d][..], &[m, d], &[m], &[d]];
    std::array::from_fn(|i| random(seed + i as u64, shapes[i], scales[i]))
}

/// Inputs for t tokens, d dimensions and m latents whose selection no small change flips: all
/// pre-activations of a token lie at least 1e-3 apart from the border between k and k + 1.
fn inputs_with_margin(t: usize, d: usize, m: usize, k: usize) -> Vec<Tensor> {
    (0u64..)
        .map(|seed| encoder_inputs(4 * seed + 1, [t, d, m], [1.0, 1.0, 0.5, 0.3]).to_vec())
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
    let among = Tensor::from_u32(vec![2, 3, 11, 17, 22], [5]).unwrap();
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
        frozen: None,
    };
    check(make, &inputs, reference, 1e-5);
}

fn forward(device: &Device, k: usize, inputs: &[Tensor]) -> Result<(Vec<f32>, Vec<u32>)> {
    let op = TopK::new(k, SharedGroups::default());
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let (outputs, _) = device.run(|| op.forward(device, &inputs, &[false; 4]))?;
    let (acts, indices) = (outputs[0].to_f32()?, outputs[1].to_u32()?);
    Ok((acts.f32s()?.to_vec(), indices.u32s()?.to_vec()))
}

/// One-dimensional tokens of value 1 and weights `rows`: pre-activations are the weights.
fn with_pre_activations(row: &[f32]) -> Vec<Tensor> {
    in_dimensions(1, row)
}

/// The same with more dimensions, which are zero.
fn in_dimensions(d: usize, row: &[f32]) -> Vec<Tensor> {
    let m = row.len();
    let first = |values: &[f32]| {
        let mut matrix = vec![0.0; values.len() * d];
        let places = matrix.iter_mut().step_by(d);
        places
            .zip(values)
            .for_each(|(place, value)| *place = *value);
        Tensor::from_vec(matrix, [values.len(), d]).unwrap()
    };
    vec![
        first(&[1.0]),
        first(row),
        Tensor::from_vec(vec![0.0; m], [m]).unwrap(),
        Tensor::from_vec(vec![0.0; d], [d]).unwrap(),
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
        let mut inputs = encoder_inputs(1, [400, 3, 40], [1.0; 4]).to_vec();
        inputs[0].f32s_mut().unwrap()[350 * 3] = f32::NAN;
        let error = forward(&device, 2, &inputs).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert!(error.to_string().contains("token 350"), "{error}");
        let infinite = with_pre_activations(&[1.0, f32::INFINITY]);
        assert!(forward(&device, 1, &infinite).is_err());
        let mut row = vec![1.0; 3000];
        row[2900] = f32::INFINITY;
        let error = forward(&device, 1, &in_dimensions(8, &row)).unwrap_err();
        assert!(error.to_string().contains("token 0"), "{error}");
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
    let inputs = encoder_inputs(1, [700, 24, 4100], [1.0, 1.0, 0.1, 1.0]);
    let of = |threads| forward(&Device::cpu(threads).unwrap(), 9, &inputs).unwrap();
    assert_eq!(of(1), of(3));
}

fn assert_full_sort(device: &Device, d: usize, row: &[f32], k: usize) {
    let (acts, indices) = forward(device, k, &in_dimensions(d, row)).unwrap();
    let rectified: Vec<f64> = row.iter().map(|&v| f64::from(v).max(0.0)).collect();
    let want = sorted_selection(&rectified, k);
    let got: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
    assert_eq!(got, want, "k = {k} on {}", device.name());
    for (act, i) in acts.iter().zip(want) {
        assert_eq!(f64::from(*act), rectified[i]);
    }
}

/// Values that bf16 holds are often equal. In ascending order a running threshold helps least,
/// and lists of what exceeds one overflow. On CUDA there are lists where rows are multiples of 16
/// bytes and k is small.
#[test]
fn long_rows_in_any_order_are_selected_from_as_by_a_full_sort() {
    let sizes = [
        (1023, 7),
        (1024, 1024),
        (2048, 128),
        (5000, 33),
        (20_003, 768),
        (4097, 3072),
    ];
    for device in devices("topk") {
        for ((m, k), d) in sizes.into_iter().zip([1, 1, 8, 8, 8, 1]) {
            let mut row = round_bf16(&random(5, &[m], 1.0)).f32s().unwrap().to_vec();
            assert_full_sort(&device, d, &row, k);
            row.sort_by(f32::total_cmp);
            assert_full_sort(&device, d, &row, k);
            row.fill(0.5);
            assert_full_sort(&device, d, &row, k);
            row.fill(-0.5);
            row[m - 1] = 0.5;
            assert_full_sort(&device, d, &row, k);
        }
    }
}

/// The set may differ from float64's only where pre-activations lie closer together than an f32
/// product of this length rounds.
#[test]
fn what_is_selected_is_as_large_as_what_float64_selects() {
    // On Hopper the second has rows enough for its own product.
    for (t, d, m, k) in [(37, 96, 3001, 16), (300, 200, 2601, 16)] {
        let inputs = encoder_inputs(1, [t, d, m], [4.0, 1.0, 1.0, 3.0]).map(|t| round_bf16(&t));
        let rows = rectified(&inputs.each_ref().map(to_f64), d);
        for device in devices("topk") {
            let (acts, indices) = forward(&device, k, &inputs).unwrap();
            let tokens = acts.chunks(k).zip(indices.chunks(k));
            for (row, (acts, indices)) in rows.iter().zip(tokens) {
                assert!(indices.is_sorted_by(|a, b| a < b), "{indices:?}");
                let want = sorted_selection(row, k);
                let least = want.iter().map(|&i| row[i]).fold(f64::INFINITY, f64::min);
                for (&act, &i) in acts.iter().zip(indices) {
                    let value = row[i as usize];
                    assert!((f64::from(act) - value).abs() < 1e-4, "{act} {value}");
                    assert!(
                        value > least - 2e-4,
                        "{value} is not among the largest: {least}"
                    );
                }
            }
        }
    }
}

#[test]
fn more_tokens_than_are_worked_on_at_a_time_keep_their_order() {
    let Some(device) = cuda() else { return };
    // 64 MB of pre-activations are for 255 of the first tokens; lists are for 1024 at a time.
    for (t, m, d, border) in [(300, 65_537, 1, 255), (1100, 2049, 8, 1024)] {
        let mut row = vec![-1.0; m];
        (row[m - 1], row[7]) = (3.0, 0.5);
        let mut inputs = in_dimensions(d, &row);
        let mut x = vec![1.0; t];
        x[border..].fill(2.0);
        x[t - 1] = -1.0;
        let rows = x
            .iter()
            .flat_map(|&v| (0..d).map(move |c| if c == 0 { v } else { 0.0 }));
        inputs[0] = Tensor::from_vec(rows.collect(), [t, d]).unwrap();
        let (acts, indices) = forward(device, 2, &inputs).unwrap();
        for (token, x) in x.into_iter().enumerate() {
            let got = (&acts[2 * token..][..2], &indices[2 * token..][..2]);
            match x {
                -1.0 => assert_eq!(got, (&[1.0; 2][..], &[0, 1][..])),
                x => assert_eq!(got, (&[0.5 * x, 3.0 * x][..], &[7, m as u32 - 1][..])),
            }
        }
    }
}

#[test]
fn a_k_that_the_selection_has_no_room_for_is_an_error_that_names_the_limit() {
    let Some(device) = cuda() else { return };
    let error = forward(device, 3073, &with_pre_activations(&[1.0; 4000])).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("at most 3072") && error.contains("3073"),
        "{error}"
    );
}

#[test]
fn each_pre_activation_is_read_once_by_the_selection() {
    let Some(device) = cuda() else { return };
    // Rows of 24 bytes: no lists.
    let (t, d, m) = (4, 12, 16_384);
    let inputs = encoder_inputs(1, [t, d, m], [1.0; 4]);
    let op = TopK::new(32, SharedGroups::default());
    // On this thread, whose last kernel the counters are of.
    op.forward(device, &inputs.each_ref(), &[false; 4]).unwrap();
    assert_least_traffic(4 * t * m);
}

#[test]
fn the_encoders_gradient_reads_each_row_once() {
    let Some(device) = cuda() else { return };
    let (t, d, m, k) = (64, 512, 128, 32);
    let inputs = encoder_inputs(1, [t, d, m], [1.0; 4]);
    let op = TopK::new(k, SharedGroups::default());
    let needed = [false, true, true, false];
    let (_, saved) = op.forward(device, &inputs.each_ref(), &needed).unwrap();
    let grad = random(5, &[t, k], 1.0);
    let grads = op.backward(device, saved, vec![Some(grad), None], &needed);
    assert_eq!(grads.unwrap().len(), 4);
    assert_least_traffic(2 * t * k * d + 4 * m * d);
}

#[test]
fn latents_that_are_not_active_for_long_are_dead() {
    let m = 3000;
    for device in devices("topk") {
        let mut fired = Fired::new(m).unwrap();
        let mut record = |acts: [f32; 4], indices: [u32; 4]| {
            let acts = Tensor::from_vec(acts.to_vec(), [2, 2]).unwrap();
            let indices = Tensor::from_u32(indices.to_vec(), [2, 2]).unwrap();
            fired.record(&device, &acts, &indices).unwrap();
            let dead = fired.dead(&device, 3).unwrap().to_u32().unwrap();
            dead.u32s().unwrap().to_vec()
        };
        assert!(record([1.0, 2.0, 0.0, 1.0], [5, 2999, 7, 5]).is_empty());
        // A zero activation is none.
        let dead = record([1.0, 2.0, 0.0, 1.0], [0, 1, 5, 1500]);
        let alive = [0, 1, 5, 1500, 2999];
        let want: Vec<u32> = (0..m as u32).filter(|i| !alive.contains(i)).collect();
        assert_eq!(dead, want);
        let counts = fired.counts().unwrap();
        let counts = counts.u32s().unwrap();
        assert_eq!([counts[0], counts[5], counts[7]], [0, 2, 4]);

        let old = Tensor::from_u32(vec![u32::MAX - 1; m], [m]).unwrap();
        fired.restore(old).unwrap();
        let none = Tensor::from_vec(vec![0.0; 4], [4, 1]).unwrap();
        let zero = Tensor::from_u32(vec![0; 4], [4, 1]).unwrap();
        fired.record(&device, &none, &zero).unwrap();
        assert_eq!(fired.counts().unwrap().u32s().unwrap()[9], u32::MAX);
        assert!(fired.restore(zero).is_err());
        assert!(fired.restore(random(1, &[m], 1.0)).is_err());
    }
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
        assert_full_sort(&device, 1, &row, k);
    }
}
