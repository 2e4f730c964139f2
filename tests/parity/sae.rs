//! The sparse autoencoder on one layer's output: selection, reconstruction, FVU and gradients.

use half::bf16;
use resa_engine::device::{CudaDevice, Device};
use resa_engine::model::Sae;
use resa_engine::ops::fvu::Fvu;
use resa_engine::ops::sparse_decode::{SharedGroups, SparseDecode};
use resa_engine::ops::topk::TopK;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;
use resa_engine::train::SaeOptimizer;
use resa_engine::train::sae_trainer::{SaeStepMetrics, SaeTrainOptions, SaeTrainer};

use crate::golden::{assert_close, every_eighth_row, golden, golden_sae, json, tensor};

#[test]
fn selection_and_reconstruction_match_pytorch() {
    let (device, bytes, sae) = (
        Device::cpu(2).unwrap(),
        golden("golden.safetensors"),
        golden_sae(),
    );
    let x = tensor(&bytes, "layer_out");
    let (acts, indices) = sae.encode(&device, &x).unwrap();
    let want = tensor(&bytes, "sae.indices");
    assert_eq!(indices.u32s().unwrap(), want.u32s().unwrap());
    assert_close("acts", &acts, &tensor(&bytes, "sae.acts"), 1e-5);
    let out = sae.reconstruct(&device, &x).unwrap();
    assert_close("out", &out, &tensor(&bytes, "sae.out"), 1e-5);
}

#[test]
fn fvu_and_its_gradients_match_pytorch() {
    let (device, bytes, sae) = (
        Device::cpu(2).unwrap(),
        golden("golden.safetensors"),
        golden_sae(),
    );
    let x = tensor(&bytes, "layer_out");
    let mut tape = Tape::new(&device);
    let parameters = sae.tensors().map(|t| tape.parameter(t.clone()));
    let [w_enc, b_enc, w_dec, b_dec] = &parameters;
    let groups = SharedGroups::default();
    let encoder = TopK::new(sae.config.k, groups.clone());
    let input = Var::constant(x.clone());
    let selected = tape.apply_all(encoder, &[&input, w_enc, b_enc, b_dec]);
    let selected = selected.unwrap();
    let decoder = SparseDecode {
        indices: selected[1].value().clone(),
        groups,
    };
    let x_hat = tape.apply(decoder, &[&selected[0], w_dec, b_dec]).unwrap();
    let fvu = Fvu::new(&device, &x).unwrap();
    let fvu = tape.apply(fvu, &[&x_hat]).unwrap();
    let want = json("golden.json")["stage1.fvu"].as_f64().unwrap();
    let got = f64::from(fvu.value().f32s().unwrap()[0]);
    assert!((got - want).abs() < 1e-6 * want, "{got} {want}");

    let mut grads = tape.backward(&fvu, 1.0).unwrap();
    for (name, parameter) in Sae::TENSORS.iter().zip(&parameters) {
        let got = grads.take(parameter).unwrap();
        let want = tensor(&bytes, &format!("stage1.grad.{name}"));
        assert_close(name, &got, &want, 1e-4);
        if *name == "W_dec" {
            // Only the direction of a decoder row is trained.
            let mut projected = got.clone();
            let d = sae.config.d_in;
            let rows = projected.f32s_mut().unwrap().chunks_mut(d);
            for (g, w) in rows.zip(sae.w_dec.f32s().unwrap().chunks(d)) {
                resa_engine::optim::remove_parallel(g, w, d);
            }
            let want = tensor(&bytes, "stage1.grad_projected.W_dec.rows");
            assert_close(
                "projected W_dec",
                &every_eighth_row(&projected),
                &want,
                1e-4,
            );
        }
    }
}

#[test]
fn the_trainers_first_step_reports_pytorchs_fvu() {
    let (device, bytes) = (Device::cpu(2).unwrap(), golden("golden.safetensors"));
    let steps = &json("golden.json")["stage1.steps"];
    let mut trainer = SaeTrainer::new(golden_sae(), SaeTrainOptions::default()).unwrap();
    let metrics = trainer.step(&device, &tensor(&bytes, "layer_out")).unwrap();
    let want = steps["fvu"][0].as_f64().unwrap();
    assert!((metrics.fvu - want).abs() < 1e-6 * want, "{metrics:?}");
    let lr = steps["lr"].as_f64().unwrap();
    assert!((metrics.lr - lr).abs() < 1e-12, "{metrics:?}");
    // No token of this model is a sink.
    assert_eq!(metrics.fvu_no_sinks, Some(metrics.fvu));
}

/// The GPU or the emulator in its place; `None`, after saying so, in a build without kernels.
fn cuda() -> Option<Device> {
    cuda_emulator::install().unwrap();
    if CudaDevice::is_available() {
        return Some(Device::cuda(0, 2).unwrap());
    }
    println!("skipped: built without nvcc");
    None
}

/// Five batches made of the golden one, of values that bf16 holds.
fn batches() -> Vec<Tensor> {
    let x = tensor(&golden("golden.safetensors"), "layer_out");
    let (tokens, d) = x.matrix_dims();
    let batch = |step: usize| {
        let rows = x.f32s().unwrap();
        let values = rows[step * d..].iter().chain(&rows[..step * d]);
        let scale = 1.0 + 0.1 * step as f32;
        let values = values.map(|v| bf16::from_f32(v * scale).to_f32());
        Tensor::from_vec(values.collect(), [tokens, d]).unwrap()
    };
    (0..5).map(batch).collect()
}

/// A trainer with every term of the loss. Its learning rate is so small that one step does not
/// hang on the signs of gradients near zero.
fn trainer(optimizer: SaeOptimizer) -> SaeTrainer {
    let mut sae = golden_sae();
    sae.config.multi_topk = true;
    let options = SaeTrainOptions {
        optimizer,
        total_steps: 5,
        lr: Some(5e-4),
        auxk_alpha: 0.1,
        dead_after: 150,
        ..SaeTrainOptions::default()
    };
    SaeTrainer::new(sae, options).unwrap()
}

/// A new trainer in the state of another.
fn resumed(optimizer: SaeOptimizer, other: &SaeTrainer) -> SaeTrainer {
    let (tensors, json) = other.state().unwrap();
    let mut resumed = trainer(optimizer);
    resumed
        .restore(tensors.into_iter().collect(), &json)
        .unwrap();
    resumed
}

/// Fails where a loss differs by more than the spacing of bf16 numbers.
fn assert_near(got: &SaeStepMetrics, want: &SaeStepMetrics) {
    let losses = |m: &SaeStepMetrics| [Some(m.fvu), m.fvu_no_sinks, m.auxk, m.multi_topk_fvu];
    for (loss, want_loss) in losses(got).into_iter().zip(losses(want)) {
        let near = match (loss, want_loss) {
            (Some(loss), Some(want)) => (loss / want - 1.0).abs() < 1.0 / 128.0,
            (None, None) => true,
            _ => false,
        };
        assert!(near, "{got:?} {want:?}");
    }
    assert_eq!((got.lr, got.tokens), (want.lr, want.tokens));
    let dead = (got.dead_fraction - want.dead_fraction).abs();
    assert!(dead < 0.02, "{got:?} {want:?}");
}

fn bits(trainer: &SaeTrainer) -> Vec<u32> {
    let averaged = trainer.averaged().unwrap();
    let tensors = averaged.tensors().map(|t| t.f32s().unwrap().to_vec());
    tensors.concat().into_iter().map(f32::to_bits).collect()
}

#[test]
fn five_steps_on_a_gpu_lose_what_they_do_on_the_cpu() {
    let Some(gpu) = cuda() else { return };
    let cpu = Device::cpu(2).unwrap();
    for optimizer in [SaeOptimizer::Signum, SaeOptimizer::Adam] {
        let (mut on_gpu, mut on_cpu) = (trainer(optimizer), trainer(optimizer));
        for x in batches() {
            let got = on_gpu.step(&gpu, &x).unwrap();
            assert_near(&got, &on_cpu.step(&cpu, &x).unwrap());
        }
    }
}

#[test]
fn a_run_that_stops_after_every_step_on_a_gpu_ends_with_the_same_bits() {
    let Some(gpu) = cuda() else { return };
    for optimizer in [SaeOptimizer::Signum, SaeOptimizer::Adam] {
        let (mut left_alone, mut stopped) = (trainer(optimizer), trainer(optimizer));
        for x in batches() {
            let want = left_alone.step(&gpu, &x).unwrap();
            stopped = resumed(optimizer, &stopped);
            assert_eq!(stopped.step(&gpu, &x).unwrap(), want);
        }
        assert_eq!(bits(&stopped), bits(&left_alone));
    }
}

#[test]
fn a_run_begun_on_one_device_goes_on_on_the_other() {
    let Some(gpu) = cuda() else { return };
    let cpu = Device::cpu(2).unwrap();
    for optimizer in [SaeOptimizer::Signum, SaeOptimizer::Adam] {
        for devices in [[&gpu, &cpu], [&cpu, &gpu]] {
            let (mut moved, mut stayed) = (trainer(optimizer), trainer(optimizer));
            for (step, x) in batches().iter().enumerate() {
                if step == 2 {
                    moved = resumed(optimizer, &moved);
                }
                let got = moved.step(devices[usize::from(step >= 2)], x).unwrap();
                assert_near(&got, &stayed.step(devices[0], x).unwrap());
            }
        }
    }
}

#[test]
fn a_steady_step_on_a_gpu_takes_no_memory() {
    let Some(gpu) = cuda() else { return };
    let Device::Cuda(memory) = &gpu else {
        panic!("not a GPU")
    };
    let mut sae = golden_sae();
    sae.config.multi_topk = true;
    let mut trainer = SaeTrainer::new(sae, SaeTrainOptions::default()).unwrap();
    let mut reserved = Vec::new();
    for x in batches() {
        trainer.step(&gpu, &x).unwrap();
        reserved.push(memory.reserved_memory());
    }
    assert_eq!(reserved[1], reserved[4], "{reserved:?}");
}
