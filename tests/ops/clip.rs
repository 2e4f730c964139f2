use resa_engine::optim::clip_grad_norm;
use resa_engine::tensor::Tensor;

use crate::harness::{devices, random, relative_error, to_f64};

fn gradients() -> Vec<Tensor> {
    let shapes: [&[usize]; 4] = [&[1], &[37, 45], &[0, 3], &[40_001]];
    let seeds = 1..;
    let pairs = shapes.into_iter().zip(seeds);
    pairs.map(|(s, seed)| random(seed, s, 2.0)).collect()
}

fn all(tensors: &[Tensor]) -> Vec<f64> {
    tensors.iter().flat_map(to_f64).collect()
}

#[test]
fn the_common_norm_is_brought_to_the_limit_as_pytorch_does() {
    let want: f64 = all(&gradients()).iter().map(|g| g * g).sum::<f64>().sqrt();
    for device in devices("clip") {
        let mut grads = gradients();
        let clip = || clip_grad_norm(&mut grads.iter_mut().collect::<Vec<_>>(), 1.5);
        let norm = device.run(clip).unwrap();
        assert!((norm / want - 1.0).abs() < 1e-12, "{norm} {want}");
        // torch.nn.utils.clip_grad_norm_ multiplies by max_norm / (norm + 1e-6).
        let scaled: Vec<f64> = all(&gradients())
            .iter()
            .map(|g| g * 1.5 / (want + 1e-6))
            .collect();
        assert!(relative_error(&all(&grads), &scaled) < 1e-6);
    }
}

#[test]
fn gradients_within_the_limit_keep_their_bits() {
    let mut grads = gradients();
    let norm = clip_grad_norm(&mut grads.iter_mut().collect::<Vec<_>>(), 1e6).unwrap();
    assert!(norm > 1.0);
    assert_eq!(all(&grads), all(&gradients()));
}

#[test]
fn a_gradient_that_is_not_finite_shows_in_the_norm() {
    let mut grads = gradients();
    grads[1].f32s_mut().unwrap()[7] = f32::NAN;
    let norm = clip_grad_norm(&mut grads.iter_mut().collect::<Vec<_>>(), 1.0).unwrap();
    assert!(norm.is_nan());
}

#[test]
fn the_norm_has_the_same_bits_on_any_number_of_threads() {
    let norms = devices("clip").into_iter().map(|device| {
        let mut grads = gradients();
        let clip = || clip_grad_norm(&mut grads.iter_mut().collect::<Vec<_>>(), 1.0);
        device.run(clip).unwrap().to_bits()
    });
    let norms: Vec<u64> = norms.collect();
    assert!(norms.iter().all(|&norm| norm == norms[0]), "{norms:?}");
}
