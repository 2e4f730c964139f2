use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::json;

use super::load::{EMBED_TOKENS, LM_HEAD, NORM, has_bias, module_tensor, norm_tensor};
use crate::error::{Error, Result};
use crate::formats::atomic;
use crate::formats::safetensors::{self, Entry};
use crate::model::{Module, Qwen2Config};
use crate::rng::{Purpose, Stream};
use crate::tensor::{DType, Tensor};

/// Writes `config.json` and `model.safetensors` of a model of that shape with random weights in
/// bf16, into a folder that is made where it is not there: for measuring speed and memory at the
/// sizes of real models. Matrices are uniform with variance 1 / inputs, so that activations keep
/// their size; norms are one. One tensor at a time is in memory.
///
/// # Errors
/// The operating system's.
pub fn save_random(dir: &Path, config: &Qwen2Config, seed: u64) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let shapes = shapes(config);
    let entries = shapes.iter().enumerate().map(|(i, (name, shape))| {
        let stream = Stream::new(seed, Purpose::Init, 2, i as u32);
        Entry::computed(name, DType::Bf16, shape.as_slice(), move || {
            values(stream, shape)
        })
    });
    // transformers wants to know which framework's layout the matrices have.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::write(&dir.join("model.safetensors"), entries.collect(), &metadata)?;
    let text = format!("{:#}", config_json(config));
    atomic::write_bytes(&dir.join("config.json"), text.as_bytes())
}

fn config_json(config: &Qwen2Config) -> serde_json::Value {
    let (model_type, architecture) = match config.attention_bias {
        true => ("qwen2", "Qwen2ForCausalLM"),
        false => ("llama", "LlamaForCausalLM"),
    };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    })
}

/// Name and shape of every tensor.
fn shapes(config: &Qwen2Config) -> Vec<(String, Vec<usize>)> {
    let (v, d) = (config.vocab_size, config.hidden_size);
    let mut shapes = vec![(EMBED_TOKENS.to_owned(), vec![v, d])];
    for layer in 0..config.num_hidden_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((norm_tensor(layer, norm), vec![d]));
        }
        for module in Module::ALL {
            let (rows, cols) = config.module_dims(module);
            shapes.push((module_tensor(layer, module, "weight"), vec![rows, cols]));
            if has_bias(config, module) {
                shapes.push((module_tensor(layer, module, "bias"), vec![rows]));
            }
        }
    }
    shapes.push((NORM.to_owned(), vec![d]));
    if !config.tie_word_embeddings {
        shapes.push((LM_HEAD.to_owned(), vec![v, d]));
    }
    shapes
}

/// Ones for a vector; a matrix \[out, in\] uniform in ±√(3 / in).
fn values(stream: Stream, shape: &[usize]) -> Result<Tensor> {
    let len: usize = shape.iter().product();
    let mut values = vec![1.0f32; len];
    if let &[_, cols] = shape {
        let bound = (3.0 / cols as f32).sqrt();
        let chunks = values.par_chunks_mut(4).enumerate();
        chunks.for_each(|(block, out)| {
            for (v, word) in out.iter_mut().zip(stream.block(block as u32)) {
                *v = ((word >> 8) as f32 / (1 << 23) as f32 - 1.0) * bound;
            }
        });
    }
    Tensor::from_vec(values, shape)
}

#[cfg(test)]
mod tests {
    use super::super::{load, read_config};
    use super::*;

    #[test]
    fn a_random_model_is_loaded_with_the_shape_that_was_asked_for() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        for model in ["golden/model", "example/target"] {
            let config = read_config(&golden.join(model)).unwrap();
            for tied in [false, true] {
                let config = Qwen2Config {
                    tie_word_embeddings: tied,
                    ..config.clone()
                };
                let dir = tempfile::tempdir().unwrap();
                save_random(dir.path(), &config, 1).unwrap();
                let model = load(dir.path()).unwrap();
                assert_eq!(model.config, config);
                let weight = model.layers[0].down.weight.to_f32().unwrap();
                let values = weight.f32s().unwrap();
                let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
                let wanted = 1.0 / config.intermediate_size as f32;
                assert!(
                    (variance / wanted - 1.0).abs() < 0.1,
                    "{variance} for {wanted}"
                );
            }
        }
    }
}
