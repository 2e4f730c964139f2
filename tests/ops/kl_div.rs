use half::bf16;
use resa_engine::ops::kl_div::KlDiv;
use resa_engine::tape::Tape;
use resa_engine::tensor::Tensor;
use resa_engine::{Device, ops::Operator};

use crate::gemm::affine;
use crate::harness::{
    assert_least_traffic, check_in_steps, cuda, devices, log_softmax, random, relative_error,
    round_bf16, to_f64,
};

fn kl(teacher: &[f64], student: &[f64], vocab: usize, batch: f64) -> f64 {
    let rows = teacher.chunks(vocab).zip(student.chunks(vocab));
    rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter()
            .zip(&q)
            .map(|(p, q)| p.exp() * (p - q))
            .sum::<f64>()
    })
    .sum::<f64>()
        / batch
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
fn logits_gradient(teacher: &[f64], student: &[f64], vocab: usize, batch: f64) -> Vec<f64> {
    let rows = teacher.chunks(vocab).zip(student.chunks(vocab));
    let gradients = rows.map(|(p, q)| {
        let pairs = log_softmax(p).into_iter().zip(log_softmax(q));
        pairs
            .map(|(p, q)| (q.exp() - p.exp()) / batch)
            .collect::<Vec<_>>()
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
    let batch = 3.0;
    let loss = |i: &[Vec<f64>]| kl(&p, &logits(&i[0]), vocab, batch);
    check_in_steps(
        || KlDiv {
            teacher: teacher.clone(),
            head: w.clone(),
            batch: batch as f32,
        },
        &[student],
        |i| vec![vec![loss(i)]],
        2e-5,
        |i, upstream| {
            let dlogits = logits_gradient(&p, &logits(&i[0]), vocab, batch);
            let dx = hidden_gradient(&dlogits, &w64, d, upstream[0][0], to_bf16);
            (vec![vec![to_bf16(loss(i))]], vec![dx])
        },
    );
}

#[test]
fn kl_divergence_and_its_gradient_match_float64() {
    for (t, d, vocab) in [
        (1, 1, 2),
        (7, 5, 33),
        (13, 31, 101),
        (5, 8, 516),
        (3, 8, 2053),
    ] {
        matches_float64(t, d, vocab);
    }
}

/// Checks many logits, too many for finite differences of all.
fn many_match_float64(t: usize, d: usize, vocab: usize) {
    let shapes = [[t, d], [t, d], [vocab, d]];
    let [teacher, student, w] =
        [1, 2, 3].map(|i| round_bf16(&random(i, &shapes[i as usize - 1], 1.0)));
    let w64 = to_f64(&w);
    let [p, q] = [&teacher, &student].map(|h| affine(&to_f64(h), &w64, None, None, d));
    let want = kl(&p, &q, vocab, 1.0);
    let dlogits = logits_gradient(&p, &q, vocab, 1.0);
    let want_dx = hidden_gradient(&dlogits, &w64, d, 1.0, |v| v);
    let in_steps = hidden_gradient(&dlogits, &w64, d, 1.0, to_bf16);
    for device in devices("kl_div") {
        let op = KlDiv {
            teacher: teacher.clone(),
            head: w.clone(),
            batch: 1.0,
        };
        let (loss, dx) = loss_and_gradient(&device, op, &student);
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
    many_match_float64(3, 8, 151_936);
}

#[test]
fn tokens_of_several_chunks_on_the_gpu_match_float64() {
    many_match_float64(401, 7, 37);
}

/// The loss of `op` for `input` and the input's gradient.
pub fn loss_and_gradient(device: &Device, op: impl Operator, input: &Tensor) -> (f64, Vec<f64>) {
    device.run(|| {
        let mut tape = Tape::new(device);
        let x = tape.parameter(input.clone());
        let loss = tape.apply_all(op, &[&x]).unwrap().swap_remove(0);
        let value = loss.value().f32s().unwrap()[0].into();
        let mut grads = tape.backward(&loss, 1.0).unwrap();
        (value, to_f64(&grads.take(&x).unwrap()))
    })
}

#[test]
fn chunks_of_tokens_add_up_to_the_whole() {
    // 64 MiB hold 40 token pairs at this vocabulary, so 97 tokens take three chunks.
    let (t, d, vocab) = (97, 3, 200_003);
    let (teacher, student) = (random(1, &[t, d], 1.0), random(2, &[t, d], 1.0));
    let w = random(3, &[vocab, d], 1.0);
    let device = Device::cpu(2).unwrap();
    let op = KlDiv {
        teacher: teacher.clone(),
        head: w.clone(),
        batch: 1.0,
    };
    let (got, _) = device
        .run(|| op.forward(&device, &[&student], &[true]))
        .unwrap();
    let w64 = to_f64(&w);
    let logits = |h| affine(&to_f64(h), &w64, None, None, d);
    let want = kl(&logits(&teacher), &logits(&student), vocab, 1.0);
    let got = f64::from(got[0].f32s().unwrap()[0]);
    assert!((got / want - 1.0).abs() < 1e-5, "{got} {want}");
}

#[test]
fn equal_hidden_states_have_no_divergence() {
    let h = random(1, &[5, 7], 3.0);
    let op = KlDiv {
        teacher: h.clone(),
        head: random(2, &[50, 7], 3.0),
        batch: 1.0,
    };
    for device in devices("kl_div") {
        let (loss, grad) = op.forward(&device, &[&h], &[true]).unwrap();
        assert!(loss[0].f32s().unwrap()[0].abs() < 1e-5);
        assert!(to_f64(&grad.unwrap()).iter().all(|g| g.abs() < 1e-6));
    }
}

#[test]
fn a_hidden_state_that_is_not_a_number_is_an_error() {
    let mut h = random(1, &[2, 3], 1.0);
    h.f32s_mut().unwrap()[1] = f32::NAN;
    let op = KlDiv {
        teacher: random(2, &[2, 3], 1.0),
        head: random(3, &[5, 3], 1.0),
        batch: 1.0,
    };
    for device in devices("kl_div") {
        let error = op.forward(&device, &[&h], &[true]).err().unwrap();
        assert!(
            error.to_string().contains("KL divergence is NaN"),
            "{error}"
        );
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
        batch: 1.0,
    };
    for (needed, bytes) in [(false, 4 * 4), (true, 4 * 4 + 2)] {
        let student = random(2, &[t, 0], 1.0);
        op.forward(device, &[&student], &[needed]).unwrap();
        assert_least_traffic(bytes * t * vocab);
    }
}
