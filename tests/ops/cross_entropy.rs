use resa_engine::ops::cross_entropy::CrossEntropy;
use resa_engine::tensor::Tensor;
use resa_engine::{Device, ops::Operator};

use crate::gemm::affine;
use crate::harness::{
    assert_least_traffic, check_in_steps, cuda, devices, log_softmax, random, relative_error,
    round_bf16, to_f64,
};
use crate::kl_div::{hidden_gradient, loss_and_gradient, to_bf16};

/// Every third token does not count.
fn targets(t: usize, vocab: usize) -> Vec<Option<u32>> {
    (0..t)
        .map(|i| (i % 3 != 1).then_some((i * 17 % vocab) as u32))
        .collect()
}

/// The mean loss and its gradient with respect to the logits.
fn mean_and_gradient(logits: &[f64], targets: &[Option<u32>], vocab: usize) -> (f64, Vec<f64>) {
    let counted = targets.iter().flatten().count() as f64;
    let (mut loss, mut gradient) = (0.0, Vec::new());
    for (row, y) in logits.chunks(vocab).zip(targets) {
        let log_p = log_softmax(row);
        let count = if y.is_some() { 1.0 / counted } else { 0.0 };
        let start = gradient.len();
        gradient.extend(log_p.iter().map(|v| count * v.exp()));
        if let Some(y) = *y {
            loss -= count * log_p[y as usize];
            gradient[start + y as usize] -= count;
        }
    }
    (loss, gradient)
}

#[test]
fn cross_entropy_of_the_counting_tokens_matches_float64() {
    for (t, d, vocab) in [
        (1, 1, 2),
        (7, 5, 33),
        (13, 31, 101),
        (5, 8, 516),
        (3, 8, 2053),
    ] {
        let w = round_bf16(&random(3, &[vocab, d], 2.0));
        let w64 = to_f64(&w);
        let targets = targets(t, vocab);
        let loss = |hidden: &[f64]| {
            let logits = affine(hidden, &w64, None, None, d);
            mean_and_gradient(&logits, &targets, vocab)
        };
        check_in_steps(
            || CrossEntropy {
                targets: targets.clone(),
                head: w.clone(),
            },
            &[random(2, &[t, d], 1.0)],
            |i| vec![vec![loss(&i[0]).0]],
            2e-5,
            |i, upstream| {
                let (loss, dlogits) = loss(&i[0]);
                let dx = hidden_gradient(&dlogits, &w64, d, upstream[0][0], to_bf16);
                (vec![vec![to_bf16(loss)]], vec![dx])
            },
        );
    }
}

/// Checks many logits, too many for finite differences of all.
fn many_match_float64(t: usize, d: usize, vocab: usize) {
    let h = round_bf16(&random(2, &[t, d], 1.0));
    let w = round_bf16(&random(3, &[vocab, d], 1.0));
    let w64 = to_f64(&w);
    let targets = targets(t, vocab);
    let logits = affine(&to_f64(&h), &w64, None, None, d);
    let (want, dlogits) = mean_and_gradient(&logits, &targets, vocab);
    let want_dx = hidden_gradient(&dlogits, &w64, d, 1.0, |v| v);
    let in_steps = hidden_gradient(&dlogits, &w64, d, 1.0, to_bf16);
    for device in devices("cross_entropy") {
        let op = CrossEntropy {
            targets: targets.clone(),
            head: w.clone(),
        };
        let (loss, dx) = loss_and_gradient(&device, op, &h);
        assert!((loss / want - 1.0).abs() < 1e-5, "{loss} {want}");
        let limit = match device.name() {
            "cuda" => 2.0 * relative_error(&in_steps, &want_dx),
            _ => 2e-5,
        };
        let error = relative_error(&dx, &want_dx);
        assert!(error < limit, "{}: {error:e}, {limit:e}", device.name());
    }
}

#[test]
fn the_largest_vocabulary_of_the_models_matches_float64() {
    many_match_float64(4, 8, 151_936);
}

#[test]
fn tokens_of_several_chunks_on_the_gpu_match_float64() {
    // 934 of them count.
    many_match_float64(1401, 7, 37);
}

#[test]
fn the_loss_of_each_token_is_zero_where_it_does_not_count() {
    let (t, d, vocab) = (11, 5, 33);
    let [h, w] = [random(2, &[t, d], 1.0), random(3, &[vocab, d], 2.0)].map(|t| round_bf16(&t));
    let logits = affine(&to_f64(&h), &to_f64(&w), None, None, d);
    let op = CrossEntropy {
        targets: targets(t, vocab),
        head: w,
    };
    for device in devices("cross_entropy") {
        let forward = || op.forward(&device, &[&h], &[false]).unwrap();
        let (outputs, _) = device.run(forward);
        let each = outputs[1].f32s().unwrap();
        for ((row, y), &got) in logits.chunks(vocab).zip(&op.targets).zip(each) {
            let want = y.map_or(0.0, |y| -log_softmax(row)[y as usize]);
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
        }
    }
}

#[test]
fn targets_outside_the_vocabulary_are_refused() {
    let device = Device::cpu(1).unwrap();
    let h = random(1, &[2, 3], 1.0);
    for targets in [vec![Some(5), Some(1)], vec![Some(1)]] {
        let op = CrossEntropy {
            targets,
            head: random(3, &[5, 3], 1.0),
        };
        assert!(op.forward(&device, &[&h], &[true]).is_err());
    }
}

#[test]
fn where_no_token_counts_loss_and_gradient_are_zero() {
    let (t, d, vocab) = (5, 8, 33);
    let h = round_bf16(&random(2, &[t, d], 1.0));
    for device in devices("cross_entropy") {
        let op = CrossEntropy {
            targets: vec![None; t],
            head: round_bf16(&random(3, &[vocab, d], 2.0)),
        };
        let (loss, dx) = loss_and_gradient(&device, op, &h);
        assert_eq!(loss, 0.0, "{}", device.name());
        assert_eq!(dx, vec![0.0; t * d], "{}", device.name());
    }
}

#[test]
fn a_hidden_state_that_is_not_a_number_is_an_error() {
    let mut h = random(1, &[2, 3], 1.0);
    h.f32s_mut().unwrap()[1] = f32::NAN;
    let op = CrossEntropy {
        targets: vec![Some(1), None],
        head: random(3, &[5, 3], 1.0),
    };
    for device in devices("cross_entropy") {
        let error = op.forward(&device, &[&h], &[true]).err().unwrap();
        let error = error.to_string();
        assert!(error.contains("cross-entropy is NaN"), "{error}");
    }
}

#[test]
fn each_logit_is_read_twice_and_its_gradient_written_once_on_the_gpu() {
    let Some(device) = cuda() else { return };
    // With hidden states of no width the product after the softmax has nothing to do, which is
    // then the last kernel.
    let (t, vocab) = (5, 20_000);
    let op = CrossEntropy {
        targets: vec![Some(7); t],
        head: random(3, &[vocab, 0], 1.0),
    };
    // Without a gradient once is enough.
    for (needed, bytes) in [(false, 4), (true, 2 * 4 + 2)] {
        let h: Tensor = random(2, &[t, 0], 1.0);
        op.forward(device, &[&h], &[needed]).unwrap();
        assert_least_traffic(bytes * t * vocab);
    }
}

#[test]
fn backward_moves_each_value_once_in_and_once_out_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let (t, d, vocab) = (41, 1536, 3);
    let op = CrossEntropy {
        targets: targets(t, vocab),
        head: random(3, &[vocab, d], 1.0),
    };
    let counted = op.targets.iter().flatten().count();
    let h = random(2, &[t, d], 1.0);
    let (losses, saved) = op.forward(device, &[&h], &[true]).unwrap();
    op.backward(device, saved, vec![Some(losses[0].clone()), None], &[true])
        .unwrap();
    assert_least_traffic((4 * counted + 2 * t) * d);
}
