//! The sparse autoencoder on one layer's output: selection, reconstruction, FVU and gradients.

use resa_engine::device::Device;
use resa_engine::model::Sae;
use resa_engine::ops::fvu::Fvu;
use resa_engine::ops::sparse_decode::{SharedGroups, SparseDecode};
use resa_engine::ops::topk::TopK;
use resa_engine::tape::{Tape, Var};
use resa_engine::train::sae_trainer::{SaeTrainOptions, SaeTrainer};

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
