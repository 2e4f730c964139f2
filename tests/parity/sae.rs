//! The sparse autoencoder on one layer's output: selection, reconstruction, FVU and gradients.

use std::path::PathBuf;

use resa_engine::device::Device;
use resa_engine::model::{Sae, SaeConfig};
use resa_engine::ops::fvu::Fvu;
use resa_engine::ops::sparse_decode::{SharedGroups, SparseDecode};
use resa_engine::ops::topk::TopK;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;
use resa_engine::train::sae_trainer::{SaeTrainOptions, SaeTrainer};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn golden(file: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    std::fs::read(folder.join(file)).unwrap()
}

fn json(file: &str) -> Value {
    serde_json::from_slice(&golden(file)).unwrap()
}

/// A float32 or int32 tensor of a file; the latter as u32.
fn tensor(bytes: &[u8], name: &str) -> Tensor {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let words = view.data().as_chunks::<4>().0;
    match view.dtype() {
        Dtype::F32 => {
            let data = words.iter().map(|&b| f32::from_le_bytes(b)).collect();
            Tensor::from_vec(data, view.shape()).unwrap()
        }
        Dtype::I32 => {
            let data = words.iter().map(|&b| u32::from_le_bytes(b)).collect();
            Tensor::from_u32(data, view.shape()).unwrap()
        }
        other => panic!("{name}: {other:?}"),
    }
}

fn golden_sae() -> Sae {
    let config = json("sae/cfg.json");
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let bytes = golden("sae/sae.safetensors");
    Sae {
        config: SaeConfig {
            d_in: number("d_in"),
            num_latents: number("num_latents"),
            k: number("k"),
            expansion_factor: number("expansion_factor"),
            normalize_decoder: true,
            multi_topk: false,
        },
        w_enc: tensor(&bytes, "encoder.weight"),
        b_enc: tensor(&bytes, "encoder.bias"),
        w_dec: tensor(&bytes, "W_dec"),
        b_dec: tensor(&bytes, "b_dec"),
    }
}

fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    let (got, want) = (got.f32s().unwrap(), want.f32s().unwrap());
    let pairs = got.iter().zip(want);
    let difference: f64 = pairs.map(|(g, w)| f64::from(g - w).powi(2)).sum();
    let size: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
    let error = (difference / size).sqrt();
    assert!(error < tolerance, "{name} is off by {error:e}");
}

/// Rows 0, 8, 16, … of a matrix.
fn every_eighth_row(matrix: &Tensor) -> Tensor {
    let (rows, cols) = matrix.matrix_dims();
    let data = matrix.f32s().unwrap().chunks(cols).step_by(8);
    let data = data.flatten().copied().collect();
    Tensor::from_vec(data, [rows.div_ceil(8), cols]).unwrap()
}

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
