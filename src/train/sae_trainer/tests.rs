use std::collections::BTreeMap;

use super::loss::gradients;
use super::*;
use crate::model::SaeConfig;
use crate::rng::{Purpose, Stream};

const D: usize = 6;
const LATENTS: usize = 20;
const K: usize = 2;
const TOKENS: usize = 9;

fn random(seed: u64, shape: &[usize]) -> Tensor {
    let stream = Stream::new(seed, Purpose::Init, 0, 0);
    let len = shape.iter().product::<usize>() as u64;
    let values = (0..len).map(|i| 2.0 * stream.uniform(i) - 1.0);
    Tensor::from_vec(values.collect(), shape).unwrap()
}

fn sae(device: &Device, multi_topk: bool) -> Sae {
    let config = SaeConfig {
        d_in: D,
        num_latents: LATENTS,
        k: K,
        expansion_factor: 0,
        normalize_decoder: true,
        multi_topk,
    };
    let mut sae = Sae::scratch(device, config, 3, 0).unwrap();
    // Positive pre-activations: no selection ends at the rectifier's edge.
    sae.b_enc = Tensor::from_vec(vec![4.0; LATENTS], [LATENTS]).unwrap();
    sae
}

/// The k largest of some latents, and what the decoder makes of them (without b_dec).
fn decoded(p: &[Vec<f64>; 4], x: &[f64], k: usize, among: &[u32]) -> Vec<f64> {
    let [w_enc, b_enc, w_dec, b_dec] = p;
    let mut acts: Vec<(f64, usize)> = among
        .iter()
        .map(|&i| {
            let i = i as usize;
            let terms = x.iter().zip(b_dec).zip(&w_enc[i * D..]);
            let sum: f64 = terms.map(|((x, c), w)| (x - c) * w).sum();
            ((sum + b_enc[i]).max(0.0), i)
        })
        .collect();
    acts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut out = vec![0.0; D];
    for (act, i) in acts.into_iter().take(k) {
        for (o, w) in out.iter_mut().zip(&w_dec[i * D..]) {
            *o += act * w;
        }
    }
    out
}

/// FVU + Multi-TopK / 8 + alpha AuxK, written from the papers' equations; `fixed` holds the
/// parameters that the detached residual of AuxK is taken at.
fn loss64(p: &[Vec<f64>; 4], fixed: &[Vec<f64>; 4], x: &[f64], dead: &[u32], alpha: f64) -> f64 {
    let all: Vec<u32> = (0..LATENTS as u32).collect();
    let tokens = || x.chunks(D);
    let mean: Vec<f64> = (0..D)
        .map(|c| tokens().map(|t| t[c]).sum::<f64>() / TOKENS as f64)
        .collect();
    let squares =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum() };
    let add =
        |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let variance: f64 = tokens().map(|t| squares(t, &mean)).sum();
    let mut sum = 0.0;
    for t in tokens() {
        sum += squares(t, &add(decoded(p, t, K, &all), &p[3]));
        sum += squares(t, &add(decoded(p, t, 4 * K, &all), &p[3])) / 8.0;
        let x_hat = add(decoded(fixed, t, K, &all), &fixed[3]);
        let residual: Vec<f64> = t.iter().zip(&x_hat).map(|(t, x)| t - x).collect();
        let k_aux = D / 2;
        let scale = (dead.len() as f64 / k_aux as f64).min(1.0);
        let e_hat = decoded(p, t, k_aux.min(dead.len()), dead);
        sum += alpha * scale * squares(&e_hat, &residual);
    }
    sum / variance
}

#[test]
fn gradients_with_auxk_and_multi_topk_match_finite_differences() {
    let device = Device::cpu(2).unwrap();
    for dead in [vec![4, 9], vec![0, 3, 8, 15, 19]] {
        let sae = sae(&device, true);
        let x = random(1, &[TOKENS, D]);
        let latents = Tensor::from_u32(dead.clone(), [dead.len()]).unwrap();
        let pass = gradients(&device, &sae, &x, Some(latents), 0.5).unwrap();
        let wide =
            |t: &Tensor| -> Vec<f64> { t.f32s().unwrap().iter().map(|&v| f64::from(v)).collect() };
        let fixed = sae.tensors().map(wide);
        let x = wide(&x);
        for (which, grad) in pass.grads.iter().enumerate() {
            let (mut difference, mut size) = (0.0, 0.0);
            for (i, &got) in grad.f32s().unwrap().iter().enumerate() {
                let at = |h: f64| {
                    let mut moved = fixed.clone();
                    moved[which][i] += h;
                    loss64(&moved, &fixed, &x, &dead, 0.5)
                };
                let want = (at(1e-6) - at(-1e-6)) / 2e-6;
                difference += (f64::from(got) - want).powi(2);
                size += want * want;
            }
            let error = (difference / size).sqrt();
            assert!(error < 1e-4, "{}: {error:e}", Sae::TENSORS[which]);
        }
    }
}

fn options(optimizer: SaeOptimizer) -> SaeTrainOptions {
    SaeTrainOptions {
        optimizer,
        total_steps: 20,
        auxk_alpha: 0.1,
        dead_after: 3 * TOKENS as u32,
        ..SaeTrainOptions::default()
    }
}

fn bits(sae: &Sae) -> Vec<u32> {
    let values = |t: &Tensor| t.f32s().unwrap().to_vec();
    let all = sae.tensors().into_iter().flat_map(values);
    all.map(f32::to_bits).collect()
}

#[test]
fn a_restored_trainer_goes_on_to_the_same_bits() {
    let (one, three) = (Device::cpu(1).unwrap(), Device::cpu(3).unwrap());
    for optimizer in [SaeOptimizer::Signum, SaeOptimizer::Adam] {
        let mut left_alone = SaeTrainer::new(sae(&one, true), options(optimizer)).unwrap();
        let mut stopped = SaeTrainer::new(sae(&one, true), options(optimizer)).unwrap();
        for step in 0..12 {
            let x = random(50 + step, &[TOKENS, D]);
            let want = left_alone.step(&one, &x).unwrap();
            // A new trainer before every step, step 0 included, and another thread count.
            let (tensors, json) = stopped.state().unwrap();
            stopped = SaeTrainer::new(sae(&one, true), options(optimizer)).unwrap();
            let tensors: BTreeMap<_, _> = tensors.into_iter().collect();
            stopped.restore(tensors, &json).unwrap();
            assert_eq!(stopped.step(&three, &x).unwrap(), want);
        }
        assert_eq!(bits(left_alone.sae()), bits(stopped.sae()));
        let averaged = (left_alone.averaged().unwrap(), stopped.averaged().unwrap());
        assert_eq!(bits(&averaged.0), bits(&averaged.1));
    }
}

#[test]
fn a_state_that_does_not_fit_is_an_error_and_changes_nothing() {
    let device = Device::cpu(1).unwrap();
    let signum = options(SaeOptimizer::Signum);
    let mut trainer = SaeTrainer::new(sae(&device, false), signum.clone()).unwrap();
    trainer.step(&device, &random(1, &[TOKENS, D])).unwrap();
    let (tensors, json) = trainer.state().unwrap();
    let tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
    let mut fresh = SaeTrainer::new(sae(&device, false), signum).unwrap();
    let before = bits(fresh.sae());
    for name in tensors.keys() {
        let mut without = tensors.clone();
        without.remove(name);
        let error = fresh.restore(without, &json).unwrap_err().to_string();
        assert!(error.contains(name.as_str()), "{error}");
        let mut misshapen = tensors.clone();
        misshapen.insert(name.clone(), random(1, &[1, 1]));
        let error = fresh.restore(misshapen, &json).unwrap_err().to_string();
        assert!(error.contains(name.as_str()), "{error}");
    }
    let other = json!({ "optimizer": "adam", "steps": 1 });
    assert!(fresh.restore(tensors.clone(), &other).is_err());
    let other = json!({ "optimizer": "signum" });
    assert!(fresh.restore(tensors, &other).is_err());
    assert_eq!(bits(fresh.sae()), before);
    assert_eq!(fresh.steps(), 0);
}

#[test]
fn a_latent_is_dead_after_the_given_number_of_tokens_without_firing() {
    let device = Device::cpu(1).unwrap();
    let mut sae = sae(&device, false);
    // Latents 0 and 1 always win, with a margin no training step here can close.
    sae.b_enc.f32s_mut().unwrap()[..2].fill(1000.0);
    let mut options = options(SaeOptimizer::Signum);
    options.auxk_alpha = 0.0;
    let mut trainer = SaeTrainer::new(sae, options).unwrap();
    let mut step = || trainer.step(&device, &random(1, &[TOKENS, D])).unwrap();
    for _ in 0..3 {
        assert_eq!(step().dead_fraction, 0.0);
    }
    let metrics = step();
    let want = (LATENTS - K) as f64 / LATENTS as f64;
    assert_eq!((metrics.dead_fraction, metrics.auxk), (want, None));
}

#[test]
fn sinks_are_left_out_of_training_where_asked() {
    let device = Device::cpu(1).unwrap();
    let mut x = random(1, &[TOKENS, D]);
    x.f32s_mut().unwrap()[..D].fill(500.0);
    let rest = x.f32s().unwrap()[D..].to_vec();
    let rest = Tensor::from_vec(rest, [TOKENS - 1, D]).unwrap();
    let mut options = options(SaeOptimizer::Signum);
    let mut with_sink = SaeTrainer::new(sae(&device, false), options.clone()).unwrap();
    let metrics = with_sink.step(&device, &x).unwrap();
    assert!(
        metrics.fvu_no_sinks.unwrap() > 2.0 * metrics.fvu,
        "{metrics:?}"
    );

    options.exclude_sinks = true;
    let mut trainer = SaeTrainer::new(sae(&device, false), options.clone()).unwrap();
    let metrics = trainer.step(&device, &x).unwrap();
    let mut on_rest = SaeTrainer::new(sae(&device, false), options).unwrap();
    assert_eq!(on_rest.step(&device, &rest).unwrap(), metrics);
    assert_eq!(bits(trainer.sae()), bits(on_rest.sae()));
    assert_eq!(metrics.tokens, TOKENS - 1);
}

#[test]
fn training_lowers_the_fvu_of_sparse_data() {
    let device = Device::cpu(2).unwrap();
    let mut start = sae(&device, false);
    start.b_enc = Tensor::from_vec(vec![0.0; LATENTS], [LATENTS]).unwrap();
    let mut trainer = SaeTrainer::new(
        start,
        SaeTrainOptions {
            lr: Some(0.005),
            ..SaeTrainOptions::default()
        },
    )
    .unwrap();
    // Tokens near six directions, one of which holds for each.
    let directions = random(9, &[6, D]);
    let batch = |step: u64| {
        let noise = random(100 + step, &[64, D]);
        let rows = noise.f32s().unwrap().chunks(D).enumerate();
        let token = |(t, noise): (usize, &[f32])| -> Vec<f32> {
            let direction = &directions.f32s().unwrap()[t % 6 * D..][..D];
            let pairs = direction.iter().zip(noise);
            pairs.map(|(d, n)| 5.0 * d + 0.1 * n).collect()
        };
        Tensor::from_vec(rows.flat_map(token).collect(), [64, D]).unwrap()
    };
    let first = trainer.step(&device, &batch(0)).unwrap().fvu;
    let mut last = first;
    for step in 1..200 {
        last = trainer.step(&device, &batch(step)).unwrap().fvu;
    }
    assert!(last < 0.2 * first, "{first} {last}");
}

#[test]
fn a_batch_that_cannot_be_trained_on_is_an_error() {
    let device = Device::cpu(1).unwrap();
    let new = || SaeTrainer::new(sae(&device, false), SaeTrainOptions::default()).unwrap();
    let mut nan = random(1, &[TOKENS, D]);
    nan.f32s_mut().unwrap()[7] = f32::NAN;
    let error = new().step(&device, &nan).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    let equal = Tensor::from_vec(vec![1.0; 3 * D], [3, D]).unwrap();
    assert!(new().step(&device, &equal).is_err());
    let empty = Tensor::from_vec(vec![], [0, D]).unwrap();
    assert!(new().step(&device, &empty).is_err());
    assert!(new().step(&device, &random(1, &[4, D + 1])).is_err());
}

#[test]
fn adam_warms_up_from_nothing_and_falls_to_nothing_in_lines() {
    // 2e-4 / √(latents / 2^14), after a warm-up of 1000 steps, or of a fifth of them if fewer.
    let full = 2e-4 / (LATENTS as f64 / 16_384.0).sqrt();
    let device = Device::cpu(1).unwrap();
    for (total_steps, shares) in [
        (20, [(0, 0.0), (1, 0.25), (4, 1.0), (12, 0.5), (19, 0.0625)]),
        (
            10_000,
            [
                (0, 0.0),
                (1, 0.001),
                (1000, 1.0),
                (5500, 0.5),
                (9999, 1.0 / 9000.0),
            ],
        ),
    ] {
        let options = SaeTrainOptions {
            optimizer: SaeOptimizer::Adam,
            total_steps,
            ..SaeTrainOptions::default()
        };
        let mut trainer = SaeTrainer::new(sae(&device, false), options).unwrap();
        for (steps, share) in shares {
            trainer.steps = steps;
            let off = (trainer.current_lr() - share * full).abs();
            assert!(off < 1e-12 * full, "step {steps} of {total_steps}: {off:e}");
        }
    }
}

#[test]
fn settings_out_of_range_are_errors_that_name_the_option() {
    let device = Device::cpu(1).unwrap();
    let error = |sae: Sae, options: SaeTrainOptions| {
        SaeTrainer::new(sae, options).err().unwrap().to_string()
    };
    let lr = SaeTrainOptions {
        lr: Some(-1.0),
        ..SaeTrainOptions::default()
    };
    assert!(error(sae(&device, false), lr).contains("--sae-lr"));
    let endless = SaeTrainOptions {
        optimizer: SaeOptimizer::Adam,
        ..SaeTrainOptions::default()
    };
    assert!(error(sae(&device, false), endless).contains("--sae-optimizer"));
    let alpha = SaeTrainOptions {
        auxk_alpha: f32::NAN,
        ..SaeTrainOptions::default()
    };
    assert!(error(sae(&device, false), alpha).contains("--auxk-alpha"));
    let mut wide = sae(&device, true);
    wide.config.k = 6;
    assert!(error(wide, SaeTrainOptions::default()).contains("--multi-topk"));
    let mut misshapen = sae(&device, false);
    misshapen.b_dec = random(1, &[D + 1]);
    assert!(error(misshapen, SaeTrainOptions::default()).contains("b_dec"));
}
