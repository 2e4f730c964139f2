//! What a run is made of, one step at a time and without a run folder: a model's activations
//! train a sparse autoencoder, and adapters learn to undo what it costs.
//! `cargo run --release --example stages -- MODEL DATA`

use std::path::Path;

use resa_engine::data::{Template, Tokenizer};
use resa_engine::eval::Inference;
use resa_engine::formats::huggingface;
use resa_engine::model::{Layout, Lora, Sae, SaeConfig};
use resa_engine::train::sae_trainer::{SaeTrainOptions, SaeTrainer};
use resa_engine::train::sft_trainer::{MicroBatch, SftOptions, SftTrainer, Student, Target};
use resa_engine::train::{TrainConfig, inputs};
use resa_engine::{Device, Error, Result};

const LAYER: usize = 2;
const SEQ_LEN: usize = 64;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, data] = &args[..] else {
        return Err(Error::setting("arguments", "expected MODEL DATA"));
    };
    let device = Device::cpu(0)?;
    // All that computes runs on the device's threads.
    device.run(|| train(&device, Path::new(model), Path::new(data)))
}

fn train(device: &Device, dir: &Path, data: &Path) -> Result<()> {
    let model = huggingface::load(dir)?;
    let tokenizer = Tokenizer::from_dir(dir)?;
    let (_, texts) = inputs::read_texts(&[data], &Template::builtin(), &tokenizer, SEQ_LEN, false)?;
    inputs::check_vocabulary(&model.config, &texts, dir)?;
    let layout = Layout::new(&model.config, 1, SEQ_LEN)?;
    let plain = Inference::new(&model);
    let rows = texts.rows().min(16);

    // Stage I: the output of a layer, [T, d], is what the autoencoder learns.
    let shape = SaeConfig::new(model.config.hidden_size, 512, 16);
    let sae = Sae::scratch(device, shape, 42, 0)?;
    let mut stage_one = SaeTrainer::new(sae, SaeTrainOptions::default())?;
    for row in 0..rows {
        let (ids, layout) = inputs::batch(&texts, &[row], &layout)?;
        let x = plain.layer_output(device, ids, LAYER, &layout)?;
        let measured = stage_one.step(device, &x)?;
        println!("Stage I, row {row}: FVU {:.4}", measured.fvu);
    }
    let sae = stage_one.averaged()?;

    // Stage II: the student goes on from the reconstruction and is to end where the teacher does.
    let layers = LAYER + 1..model.layers.len();
    let adapters = TrainConfig::default().lora();
    let lora = Lora::new(adapters, &model.config, layers.clone(), 42)?;
    let options = SftOptions {
        lr: 1e-3,
        weight_decay: 0.01,
        clip: 1.0,
        dropout: 0.05,
        seed: 42,
    };
    let mut stage_two = SftTrainer::new(device, &model, lora, layers, options)?;
    for row in 0..rows {
        let (ids, layout) = inputs::batch(&texts, &[row], &layout)?;
        let measured = stage_two.step(1, |_| {
            let x = plain.layer_output(device, ids.clone(), LAYER, &layout)?;
            let x = sae.reconstruct(device, &x)?;
            let hidden = plain.hidden(device, ids.clone(), &layout)?;
            let batch = 1.0;
            Ok(MicroBatch {
                layout: layout.clone(),
                student: Student::Reconstruction { x, layer: LAYER },
                target: Target::Teacher { hidden, batch },
            })
        })?;
        let kl = measured.loss / SEQ_LEN as f64;
        println!("Stage II, row {row}: KL divergence a token {kl:.4}");
    }
    // `formats::sparsify::save` and `formats::peft::save` write the two results.
    Ok(())
}
