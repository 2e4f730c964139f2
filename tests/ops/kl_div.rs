use resa_engine::ops::kl_div::KlDiv;
use resa_engine::{Device, ops::Operator};

use crate::gemm::affine;
use crate::harness::{check, log_softmax, random, round_bf16, to_f64};

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

#[test]
fn kl_divergence_and_its_gradient_match_float64() {
    for (t, d, vocab) in [(1, 1, 2), (7, 5, 33), (13, 31, 101)] {
        let teacher = round_bf16(&random(1, &[t, d], 1.0));
        let student = random(2, &[t, d], 1.0);
        let w = round_bf16(&random(3, &[vocab, d], 2.0));
        let (w64, teacher64) = (to_f64(&w), to_f64(&teacher));
        let logits = affine(&teacher64, &w64, None, None, d);
        check(
            || KlDiv {
                teacher: teacher.clone(),
                head: w.clone(),
                batch: 3.0,
            },
            &[student],
            |i| {
                vec![vec![kl(
                    &logits,
                    &affine(&i[0], &w64, None, None, d),
                    vocab,
                    3.0,
                )]]
            },
            2e-5,
        );
    }
}

#[test]
fn chunks_of_tokens_add_up_to_the_whole() {
    // 32 MiB hold 20 token pairs at this vocabulary, so 97 tokens take five chunks.
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
    let device = Device::cpu(1).unwrap();
    let (loss, grad) = op.forward(&device, &[&h], &[true]).unwrap();
    assert!(loss[0].f32s().unwrap()[0].abs() < 1e-5);
    assert!(grad.unwrap().f32s().unwrap().iter().all(|g| g.abs() < 1e-6));
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
    let device = Device::cpu(1).unwrap();
    let error = op.forward(&device, &[&h], &[true]).err().unwrap();
    assert!(
        error.to_string().contains("KL divergence is NaN"),
        "{error}"
    );
}
