//! The model's forward pass, and Stage I on its activations.

use resa_engine::device::Device;
use resa_engine::eval::Inference;
use resa_engine::formats::huggingface;
use resa_engine::model::{Layout, Qwen2};
use resa_engine::ops::Operator;
use resa_engine::ops::gemm::Linear;
use resa_engine::tape::Tape;
use resa_engine::tensor::Tensor;
use resa_engine::train::sae_trainer::{SaeTrainOptions, SaeTrainer};

use crate::golden::{assert_close, every_eighth_row, golden, golden_sae, json, path, tensor};

const LAYER: usize = 1;

fn flat(ids: &Tensor) -> Tensor {
    ids.reshape([ids.len()]).unwrap()
}

/// The output of layer 1 for token ids of any shape \[…, 48\].
fn layer_output(device: &Device, model: &Qwen2, ids: &Tensor) -> Tensor {
    let layout = Layout::new(&model.config, ids.len() / 48, 48).unwrap();
    let mut tape = Tape::new(device);
    let x = model.embed(&mut tape, flat(ids)).unwrap();
    model
        .decode(&mut tape, x, 0..LAYER + 1, &layout, None)
        .unwrap()
        .into_value()
}

#[test]
fn logits_and_layer_outputs_match_transformers() {
    let device = Device::cpu(2).unwrap();
    let model = huggingface::load(&path("model")).unwrap();
    let bytes = golden("golden.safetensors");
    let ids = tensor(&bytes, "input_ids");
    let x = layer_output(&device, &model, &ids);
    assert_close("layer_out", &x, &tensor(&bytes, "layer_out"), 1e-5);
    let layout = Layout::new(&model.config, 2, 48).unwrap();
    let hidden = Inference::new(&model)
        .hidden(&device, flat(&ids), &layout)
        .unwrap();
    let head = Linear {
        weight: model.lm_head.clone(),
        bias: None,
    };
    let (logits, _) = head.forward(&device, &[&hidden], &[false]).unwrap();
    let logits = logits[0].reshape([2, 48, 512]).unwrap();
    assert_close("logits", &logits, &tensor(&bytes, "logits"), 1e-5);
}

#[test]
fn three_steps_of_stage_one_end_at_pytorchs_weights() {
    let device = Device::cpu(2).unwrap();
    let model = huggingface::load(&path("model")).unwrap();
    let (bytes, numbers) = (golden("golden.safetensors"), json("golden.json"));
    let ids = tensor(&bytes, "stage1.ids");
    let options = SaeTrainOptions::default();
    let mut trainer = SaeTrainer::new(golden_sae(), options).unwrap();
    for (step, ids) in ids.u32s().unwrap().chunks(2 * 48).enumerate() {
        let ids = Tensor::from_u32(ids.to_vec(), [2 * 48]).unwrap();
        let x = layer_output(&device, &model, &ids);
        let metrics = trainer.step(&device, &x).unwrap();
        let want = numbers["stage1.steps"]["fvu"][step].as_f64().unwrap();
        assert!(
            (metrics.fvu / want - 1.0).abs() < 1e-5,
            "step {step}: {} {want}",
            metrics.fvu
        );
    }
    for (tag, sae) in [
        ("y3", trainer.sae().clone()),
        ("x3", trainer.averaged().unwrap()),
    ] {
        let want = |name: &str| tensor(&bytes, &format!("stage1.{tag}.{name}"));
        assert_close(
            tag,
            &every_eighth_row(&sae.w_enc),
            &want("encoder.weight.rows"),
            1e-4,
        );
        assert_close(
            tag,
            &every_eighth_row(&sae.w_dec),
            &want("W_dec.rows"),
            1e-4,
        );
        assert_close(tag, &sae.b_enc, &want("encoder.bias"), 1e-4);
        assert_close(tag, &sae.b_dec, &want("b_dec"), 1e-4);
        for (name, tensor) in [("encoder.weight", &sae.w_enc), ("W_dec", &sae.w_dec)] {
            let got: f64 = tensor
                .f32s()
                .unwrap()
                .iter()
                .map(|&v| f64::from(v).powi(2))
                .sum();
            let key = format!("sum_sq_{}", &tag[..1]);
            let want = numbers["stage1.steps"][key][name].as_f64().unwrap();
            assert!(
                (got / want - 1.0).abs() < 1e-4,
                "{tag} {name}: {got} {want}"
            );
        }
    }
}
