use resa_engine::ops::cross_entropy::CrossEntropy;
use resa_engine::{Device, ops::Operator};

use crate::gemm::affine;
use crate::harness::{check, log_softmax, random, round_bf16, to_f64};

#[test]
fn cross_entropy_of_the_counting_tokens_matches_float64() {
    for (t, d, vocab) in [(1, 1, 2), (7, 5, 33), (13, 31, 101)] {
        let w = round_bf16(&random(3, &[vocab, d], 2.0));
        let w64 = to_f64(&w);
        let targets: Vec<Option<u32>> = (0..t)
            .map(|i| (i % 3 != 1).then_some((i * 17 % vocab) as u32))
            .collect();
        check(
            || CrossEntropy {
                targets: targets.clone(),
                head: w.clone(),
            },
            &[random(2, &[t, d], 1.0)],
            |i| {
                let logits = affine(&i[0], &w64, None, None, d);
                let rows = logits.chunks(vocab).zip(&targets);
                let losses: Vec<f64> = rows
                    .filter_map(|(r, y)| Some(-log_softmax(r)[(*y)? as usize]))
                    .collect();
                vec![vec![losses.iter().sum::<f64>() / losses.len() as f64]]
            },
            2e-5,
        );
    }
}

#[test]
fn targets_outside_the_vocabulary_are_refused() {
    let device = Device::cpu(1).unwrap();
    let h = random(1, &[2, 3], 1.0);
    for targets in [vec![Some(5), Some(1)], vec![None, None], vec![Some(1)]] {
        let op = CrossEntropy {
            targets,
            head: random(3, &[5, 3], 1.0),
        };
        assert!(op.forward(&device, &[&h], &[true]).is_err());
    }
}
