//! Stage II: the KL divergence, every adapter's gradient, and three optimizer steps. The golden
//! adapter acts in all layers, so the student's layers up to the SAE differ from the teacher's. Both
//! with the gradient ending at the SAE's reconstruction and with one that goes through the SAE.

use resa_engine::device::Device;
use resa_engine::eval::Inference;
use resa_engine::formats::{huggingface, peft};
use resa_engine::model::{Adapters, Layout, Lora, Qwen2};
use resa_engine::ops::kl_div::KlDiv;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;
use resa_engine::train::sft_trainer::{MicroBatch, SftOptions, SftTrainer, Student, Target};

use crate::golden::{assert_close, golden, golden_sae, json, path, tensor};

const LAYER: usize = 1;
const ROWS: usize = 2;

struct Golden {
    device: Device,
    model: Qwen2,
    lora: Lora,
    layout: Layout,
    bytes: Vec<u8>,
}

impl Golden {
    fn new() -> Self {
        let model = huggingface::load(&path("model")).unwrap();
        let lora = peft::load(&path("lora"), &model.config).unwrap();
        let layout = Layout::new(&model.config, ROWS, 48).unwrap();
        let bytes = golden("golden.safetensors");
        Self {
            device: Device::cpu(2).unwrap(),
            model,
            lora,
            layout,
            bytes,
        }
    }

    /// The batches of three steps.
    fn ids(&self) -> Vec<Tensor> {
        let ids = tensor(&self.bytes, "stage1.ids");
        let steps = ids.u32s().unwrap().chunks(ROWS * 48);
        steps
            .map(|ids| Tensor::from_u32(ids.to_vec(), [ROWS * 48]).unwrap())
            .collect()
    }

    fn teacher(&self, ids: &Tensor) -> Tensor {
        Inference::new(&self.model)
            .hidden(&self.device, ids.clone(), &self.layout)
            .unwrap()
    }

    /// The SAE's reconstruction of the student's layer 1.
    fn reconstruction(&self, ids: &Tensor) -> Tensor {
        let mut tape = Tape::new(&self.device);
        let adapters = Adapters::frozen(&self.lora);
        let x = self.model.embed(&mut tape, ids.clone()).unwrap();
        let layers = 0..LAYER + 1;
        let x = self
            .model
            .decode(&mut tape, x, layers, &self.layout, Some(&adapters))
            .unwrap();
        golden_sae().reconstruct(&self.device, x.value()).unwrap()
    }
}

/// Where the gradient of the golden loss goes.
#[derive(Clone, Copy)]
enum Way {
    /// To the SAE's reconstruction, so to the adapters after it.
    ToTheSae,
    /// Through the SAE, so to the adapters of all layers.
    ThroughTheSae,
}

/// The loss and the adapters' gradients of the first batch are PyTorch's.
fn matches_pytorch(way: Way) {
    let golden = Golden::new();
    let ids = &golden.ids()[0];
    let mut tape = Tape::new(&golden.device);
    let late = LAYER + 1..golden.model.layers.len();
    let trained = match way {
        Way::ToTheSae => late.clone(),
        Way::ThroughTheSae => 0..late.end,
    };
    let adapters = Adapters::trained(&mut tape, &golden.lora, trained.clone(), None);
    let (model, layout) = (&golden.model, &golden.layout);
    let x = match way {
        Way::ToTheSae => Var::constant(golden.reconstruction(ids)),
        Way::ThroughTheSae => {
            let x = model.embed(&mut tape, ids.clone()).unwrap();
            let x = model.decode(&mut tape, x, 0..LAYER + 1, layout, Some(&adapters));
            golden_sae().pass_through(&mut tape, &x.unwrap()).unwrap()
        }
    };
    let x = model.decode(&mut tape, x, late, layout, Some(&adapters));
    let hidden = model.final_norm(&mut tape, &x.unwrap()).unwrap();
    let (teacher, head) = (golden.teacher(ids), model.lm_head.clone());
    let kl = KlDiv { teacher, head };
    let loss = tape.apply(kl, &[&hidden]).unwrap();
    let want = json("golden.json")["stage2.kl_batchmean"].as_f64().unwrap();
    let each = loss.value().f32s().unwrap();
    let got = each.iter().map(|&v| f64::from(v)).sum::<f64>() / ROWS as f64;
    assert!((got / want - 1.0).abs() < 1e-5, "{got} {want}");
    let mut grads = tape.backward(&loss, 1.0 / ROWS as f32).unwrap();
    let mut compared = 0;
    for ((layer, module), (a, b)) in adapters.parameters() {
        // After the SAE both ways are one.
        let kind = if *layer > LAYER {
            "grad"
        } else {
            "through.grad"
        };
        for (factor, letter) in [(a, 'A'), (b, 'B')] {
            let path = module.path();
            let name = format!("stage2.{kind}.model.layers.{layer}.{path}.lora_{letter}.weight");
            let got = grads.take(factor).unwrap();
            assert_close(&name, &got, &tensor(&golden.bytes, &name), 1e-4);
            compared += 1;
        }
    }
    assert_eq!(compared, trained.len() * 7 * 2);
}

#[test]
fn kl_and_every_adapter_gradient_match_pytorch() {
    matches_pytorch(Way::ToTheSae);
}

#[test]
fn gradients_through_the_sae_match_pytorch_in_every_layer() {
    matches_pytorch(Way::ThroughTheSae);
}

/// Losses and gradient norms of three optimizer steps are PyTorch's, and the loss after them.
fn three_steps_match_pytorch(way: Way) {
    let golden = Golden::new();
    let (numbers, sae) = (json("golden.json"), golden_sae());
    let options = SftOptions {
        lr: 1e-3,
        weight_decay: 0.01,
        clip: 1.0,
        dropout: 0.0,
        seed: 0,
    };
    let (first, numbers) = match way {
        Way::ToTheSae => (LAYER + 1, &numbers["stage2.steps"]),
        Way::ThroughTheSae => (0, &numbers["stage2.through.steps"]),
    };
    let mut trainer = SftTrainer::new(
        &golden.device,
        &golden.model,
        golden.lora.clone(),
        first..golden.model.layers.len(),
        options,
    )
    .unwrap();
    let mut ids = golden.ids();
    ids.push(ids[0].clone());
    for (step, ids) in ids.iter().enumerate() {
        let micro_batch = |_| {
            Ok(MicroBatch {
                layout: golden.layout.clone(),
                student: match way {
                    Way::ToTheSae => Student::Reconstruction {
                        x: golden.reconstruction(ids),
                        layer: LAYER,
                    },
                    Way::ThroughTheSae => Student::ThroughSae {
                        ids: ids.clone(),
                        sae: &sae,
                        layer: LAYER,
                    },
                },
                target: Target::Teacher {
                    hidden: golden.teacher(ids),
                    batch: ROWS as f32,
                },
            })
        };
        let measured = trainer.step(1, micro_batch).unwrap();
        let want = numbers["kl"][step].as_f64().unwrap();
        assert!(
            (measured.loss / want - 1.0).abs() < 1e-5,
            "step {step}: {} {want}",
            measured.loss
        );
        if let Some(want) = numbers["grad_norm"][step].as_f64() {
            let got = measured.grad_norm;
            assert!((got / want - 1.0).abs() < 1e-4, "step {step}: {got} {want}");
        }
    }
}

#[test]
fn three_steps_of_stage_two_give_pytorchs_losses_and_norms() {
    three_steps_match_pytorch(Way::ToTheSae);
}

#[test]
fn three_steps_with_gradients_through_the_sae_give_pytorchs_losses_and_norms() {
    three_steps_match_pytorch(Way::ThroughTheSae);
}
