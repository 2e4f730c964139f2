use resa_engine::optim::clip_grad_norm;
use resa_engine::tensor::Tensor;

use crate::harness::{assert_least_traffic, cuda, devices, random, relative_error, to_f64};

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
        let clip = || clip_grad_norm(&device, &mut grads.iter_mut().collect::<Vec<_>>(), 1.5);
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
    for device in devices("clip") {
        let mut grads = gradients();
        let norm = clip_grad_norm(&device, &mut grads.iter_mut().collect::<Vec<_>>(), 1e6);
        assert!(norm.unwrap() > 1.0);
        assert_eq!(all(&grads), all(&gradients()));
    }
}

#[test]
fn a_gradient_that_is_not_finite_shows_in_the_norm() {
    for device in devices("clip") {
        let mut grads = gradients();
        grads[1].f32s_mut().unwrap()[7] = f32::NAN;
        let norm = clip_grad_norm(&device, &mut grads.iter_mut().collect::<Vec<_>>(), 1.0);
        assert!(norm.unwrap().is_nan());
    }
}

#[test]
fn no_gradients_have_the_norm_zero() {
    for device in devices("clip") {
        assert_eq!(clip_grad_norm(&device, &mut [], 1.0).unwrap(), 0.0);
    }
}

#[test]
fn the_norm_has_the_same_bits_on_any_number_of_threads_and_when_repeated() {
    let mut on_cpu = None;
    for device in devices("clip") {
        let norm = || {
            let mut grads = gradients();
            let clip = || clip_grad_norm(&device, &mut grads.iter_mut().collect::<Vec<_>>(), 1.0);
            device.run(clip).unwrap().to_bits()
        };
        let first = norm();
        assert_eq!(first, norm());
        if device.name() == "cpu" {
            assert_eq!(*on_cpu.get_or_insert(first), first);
        }
    }
}

#[test]
fn scaling_moves_each_value_once_in_and_once_out_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let mut grads = [random(1, &[40_000], 1.0), random(2, &[64, 1000], 1.0)];
    clip_grad_norm(device, &mut grads.iter_mut().collect::<Vec<_>>(), 1.0).unwrap();
    assert_least_traffic(8 * grads.iter().map(Tensor::len).sum::<usize>());
}
