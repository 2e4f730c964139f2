use half::bf16;
use resa_engine::device::Precision;
use resa_engine::ops::kl_div::KlDiv;
use resa_engine::tape::Tape;
use resa_engine::tensor::Tensor;
use resa_engine::{Device, ops::Operator};

use crate::gemm::affine;
use crate::harness::{
    assert_least_traffic, check_in_steps, cuda, devices, log_softmax, random, relative_error,
    round_bf16, to_f64,
};

/// The divergence of each token.
fn kl(teacher: &[f64], student: &[f64], vocab: usize) -> Vec<f64> {
    let rows = teacher.chunks(vocab).zip(student.chunks(vocab));
    rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
    })
    .collect()
}

/// The gradient of hidden states from that of their logits \[T, V\], the head `w` \[V, d\] and the
/// gradient of the loss, each step rounded as `round` says.
pub fn hidden_gradient(
    dlogits: &[f64],
    w: &[f64],
    d: usize,
    upstream: f64,
    round: fn(f64) -> f64,
) -> Vec<f64> {
    let vocab = w.len() / d;
    let mut dx = vec![0.0; dlogits.len() / vocab * d];
    for (row, dlogits) in dx.chunks_mut(d).zip(dlogits.chunks(vocab)) {
        for (&g, w) in dlogits.iter().zip(w.chunks(d)) {
            row.iter_mut().zip(w).for_each(|(s, w)| *s += round(g) * w);
        }
        row.iter_mut().for_each(|v| *v = round(*v * upstream));
    }
    dx
}

pub fn to_bf16(v: f64) -> f64 {
    bf16::from_f64(v).to_f64()
}

/// The gradient of [`kl`] with respect to the student's logits.
fn logits_gradient(teacher: &[f64], student: &[f64], vocab: usize) -> Vec<f64> {
    let rows = teacher.chunks(vocab).zip(student.chunks(vocab));
    let gradients = rows.map(|(p, q)| {
        let pairs = log_softmax(p).into_iter().zip(log_softmax(q));
        pairs.map(|(p, q)| q.exp() - p.exp()).collect::<Vec<_>>()
    });
    gradients.collect::<Vec<_>>().concat()
}

/// Checks `t` tokens of size `d` on every device.
fn matches_float64(t: usize, d: usize, vocab: usize) {
    let student = random(2, &[t, d], 1.0);
    let [teacher, w] =
        [random(1, &[t, d], 1.0), random(3, &[vocab, d], 2.0)].map(|t| round_bf16(&t));
    let (w64, teacher64) = (to_f64(&w), to_f64(&teacher));
    let logits = |h: &[f64]| affine(h, &w64, None, None, d);
    let p = logits(&teacher64);
    let losses = |i: &[Vec<f64>]| kl(&p, &logits(&i[0]), vocab);
    check_in_steps(
        || KlDiv {
            teacher: teacher.clone(),
            head: w.clone(),
        },
        &[student],
        |i| vec![losses(i)],
        2e-5,
        |i, upstream| {
            let dlogits = logits_gradient(&p, &logits(&i[0]), vocab);
            let tokens = dlogits.chunks(vocab).zip(&upstream[0]);
            let dx = tokens.flat_map(|(row, &up)| hidden_gradient(row, &w64, d, up, to_bf16));
            let losses = losses(i).into_iter().map(to_bf16);
            (vec![losses.collect()], vec![dx.collect()])
        },
    );
}

#[test]
fn kl_divergence_and_its_gradient_match_float64() {
    for (t, d, vocab) in [
        // Of one value alone, roundings may cancel out.
        (1, 5, 2),
        (7, 1, 33),
        (13, 31, 101),
        (5, 8, 516),
        (3, 8, 2053),
    ] {
        matches_float64(t, d, vocab);
    }
}

/// Checks many logits, too many for finite differences of all.
fn many_match_float64(devices: &[Device], t: usize, d: usize, vocab: usize) {
    let shapes = [[t, d], [t, d], [vocab, d]];
    let [teacher, student, w] =
        [1, 2, 3].map(|i| round_bf16(&random(i, &shapes[i as usize - 1], 1.0)));
    let w64 = to_f64(&w);
    let [p, q] = [&teacher, &student].map(|h| affine(&to_f64(h), &w64, None, None, d));
    let want: f64 = kl(&p, &q, vocab).iter().sum();
    let dlogits = logits_gradient(&p, &q, vocab);
    let want_dx = hidden_gradient(&dlogits, &w64, d, 1.0, |v| v);
    let in_steps = hidden_gradient(&dlogits, &w64, d, 1.0, to_bf16);
    for device in devices {
        let op = KlDiv {
            teacher: teacher.clone(),
            head: w.clone(),
        };
        let (loss, dx) = loss_and_gradient(device, op, &student);
        assert!((loss / want - 1.0).abs() < 1e-5, "{loss} {want}");
        let limit = match device.precision() {
            Precision::Bf16 => 2.0 * relative_error(&in_steps, &want_dx),
            Precision::F32 => 2e-5,
        };
        let error = relative_error(&dx, &want_dx);
        assert!(error < limit, "{}: {error:e}, {limit:e}", device.name());
    }
}

#[test]
fn the_largest_vocabulary_of_the_models_matches_float64() {
    many_match_float64(&devices("kl_div"), 3, 8, 151_936);
}

#[test]
fn tokens_of_several_chunks_on_the_gpu_match_float64() {
    many_match_float64(&devices("kl_div"), 401, 7, 37);
}

/// The sum of what `op` gives first for `input`, and the input's gradient.
pub fn loss_and_gradient(device: &Device, op: impl Operator, input: &Tensor) -> (f64, Vec<f64>) {
    device.run(|| {
        let mut tape = Tape::new(device);
        let x = tape.parameter(input.clone());
        let loss = tape.apply_all(op, &[&x]).unwrap().swap_remove(0);
        let value = to_f64(loss.value()).iter().sum();
        let mut grads = tape.backward(&loss, 1.0).unwrap();
        (value, to_f64(&grads.take(&x).unwrap()))
    })
}

#[test]
fn tokens_of_several_chunks_the_last_one_smaller_match_float64_on_the_cpu() {
    // 64 MiB hold 41 tokens' pairs of rows at this vocabulary: three chunks of 33 tokens and one of
    // 32. In bf16 groups of 112 and 19 tokens, in chunks of 16 and a last one of 3.
    let device = || Device::cpu(2).unwrap();
    let devices = [device(), device().with_precision(Precision::Bf16)];
    many_match_float64(&devices, 131, 3, 200_003);
}

#[test]
fn equal_hidden_states_have_no_divergence() {
    let h = random(1, &[5, 7], 3.0);
    let op = KlDiv {
        teacher: h.clone(),
        head: random(2, &[50, 7], 3.0),
    };
    for device in devices("kl_div") {
        let (loss, grad) = op.forward(&device, &[&h], &[true]).unwrap();
        assert!(to_f64(&loss[0]).iter().all(|loss| loss.abs() < 1e-5));
        assert!(to_f64(&grad.unwrap()).iter().all(|g| g.abs() < 1e-6));
    }
}

#[test]
fn a_hidden_state_that_is_not_a_number_shows_in_its_tokens_loss() {
    let mut h = random(1, &[2, 3], 1.0);
    h.f32s_mut().unwrap()[1] = f32::NAN;
    let op = KlDiv {
        teacher: random(2, &[2, 3], 1.0),
        head: random(3, &[5, 3], 1.0),
    };
    for device in devices("kl_div") {
        let (loss, _) = op.forward(&device, &[&h], &[true]).unwrap();
        let loss = to_f64(&loss[0]);
        assert!(loss[0].is_nan() && loss[1].is_finite(), "{loss:?}");
    }
}

#[test]
fn each_logit_is_read_twice_and_its_gradient_written_once_on_the_gpu() {
    let Some(device) = cuda() else { return };
    // With hidden states of no width the product after the softmax has nothing to do, which is
    // then the last kernel.
    let (t, vocab) = (5, 20_000);
    let op = KlDiv {
        teacher: random(1, &[t, 0], 1.0),
        head: random(3, &[vocab, 0], 1.0),
    };
    for (needed, bytes) in [(false, 4 * 4), (true, 4 * 4 + 2)] {
        let student = random(2, &[t, 0], 1.0);
        op.forward(device, &[&student], &[needed]).unwrap();
        assert_least_traffic(bytes * t * vocab);
    }
}

#[test]
fn backward_moves_each_value_once_in_and_once_out_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let (t, d) = (40, 1000);
    let op = KlDiv {
        teacher: random(1, &[t, d], 1.0),
        head: random(3, &[3, d], 1.0),
    };
    let student = random(2, &[t, d], 1.0);
    let (loss, saved) = op.forward(device, &[&student], &[true]).unwrap();
    op.backward(device, saved, vec![Some(loss[0].clone())], &[true])
        .unwrap();
    assert_least_traffic((4 + 2) * t * d);
}
