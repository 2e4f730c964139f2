//! Adapters merged into the weights they sit on: W + s B A.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::json;

use super::checkpoint::Checkpoint;
use super::copy::{copy_present, copy_tokenizer};
use super::load::{EMBED_TOKENS, LM_HEAD, NORM, has_bias, load, module_tensor, norm_tensor};
use crate::error::{Error, Result};
use crate::formats::atomic;
use crate::formats::safetensors::{self, Entry};
use crate::model::{Lora, LoraPair, Module, Qwen2, Qwen2Config};
use crate::tensor::Tensor;

/// Largest file of a saved model, in bytes.
const MAX_SHARD: usize = 5_000_000_000;

/// Merges an adapter into a loaded model; the weights it sits on become f32 tensors in memory.
///
/// # Errors
/// Where the adapter does not fit the model; the model is left as it was.
pub fn merge_into(model: &mut Qwen2, lora: &Lora) -> Result<()> {
    check_fit(&model.config, lora)?;
    for (&(layer, module), pair) in &lora.pairs {
        // The layer exists: check_fit has seen to that.
        let linear = model.layers[layer].module_mut(module);
        linear.weight = merged(&linear.weight, &[(pair, lora.config.scale())])?;
    }
    Ok(())
}

/// Writes the model in `model_dir` with adapters merged into it to the new folder `out_dir`:
/// weights in the dtype they are stored in (computed in f32, rounded once), in files of at most
/// 5 GB, with `config.json` and the tokenizer's files. One tensor at a time is in memory.
///
/// # Errors
/// Where the model cannot be loaded, an adapter does not fit it, `out_dir` holds files already,
/// or a file cannot be written; `out_dir` is complete or not there.
pub fn save_merged(model_dir: &Path, loras: &[Lora], out_dir: &Path) -> Result<()> {
    save_merged_in_shards(model_dir, loras, out_dir, MAX_SHARD)
}

fn save_merged_in_shards(
    model_dir: &Path,
    loras: &[Lora],
    out_dir: &Path,
    max_shard: usize,
) -> Result<()> {
    // Loading checks every tensor; what is written comes from the files again, since loading
    // widens norms and biases.
    let config = load(model_dir)?.config;
    let files = Checkpoint::open(model_dir)?;
    for lora in loras {
        check_fit(&config, lora)?;
    }
    atomic::create_dir(out_dir, |dir| {
        copy_present(model_dir, dir, &["config.json", "generation_config.json"])?;
        copy_tokenizer(model_dir, dir)?;
        write_weights(&files, &config, loras, dir, max_shard)
    })
}

/// A tensor of the model to be written, with its adapters and their scales.
struct Part<'a> {
    name: String,
    stored: Tensor,
    pairs: Vec<(&'a LoraPair, f32)>,
}

impl Part<'_> {
    fn bytes(&self) -> usize {
        self.stored.len() * self.stored.dtype().size()
    }
}

fn write_weights(
    files: &Checkpoint,
    config: &Qwen2Config,
    loras: &[Lora],
    dir: &Path,
    max_shard: usize,
) -> Result<()> {
    let mut shards: Vec<Vec<Part>> = vec![Vec::new()];
    let mut filled = 0;
    let mut total = 0;
    for (name, place) in tensors(config) {
        let pair = |lora| pair_of(lora, place);
        let part = Part {
            stored: files.file(&name)?.tensor(&name)?,
            pairs: loras.iter().filter_map(pair).collect(),
            name,
        };
        total += part.bytes();
        filled += part.bytes();
        if filled > max_shard && shards.last().is_some_and(|shard| !shard.is_empty()) {
            shards.push(Vec::new());
            filled = part.bytes();
        }
        if let Some(shard) = shards.last_mut() {
            shard.push(part);
        }
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        write_shard(&dir.join(&name), shard)?;
        weight_map.extend(shard.iter().map(|part| (part.name.clone(), name.clone())));
    }
    if count == 1 {
        return Ok(());
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    let path = dir.join("model.safetensors.index.json");
    atomic::write(&path, |out| {
        serde_json::to_writer_pretty(out, &index).map_err(|e| Error::io(&path, e.into()))
    })
}

/// The adapter's factors for a module, and their scale.
fn pair_of(lora: &Lora, place: Option<(usize, Module)>) -> Option<(&LoraPair, f32)> {
    Some((lora.pairs.get(&place?)?, lora.config.scale()))
}

fn write_shard(path: &Path, parts: &[Part]) -> Result<()> {
    let entries = parts
        .iter()
        .map(|part| {
            let stored = &part.stored;
            Entry::computed(
                &part.name,
                stored.dtype(),
                stored.shape(),
                move || match &part.pairs[..] {
                    [] => Ok(stored.clone()),
                    pairs => merged(stored, pairs),
                },
            )
        })
        .collect();
    // transformers wants to know which framework's layout the matrices have.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::write(path, entries, &metadata)
}

/// The names of all tensors of a model, with layer and module where an adapter can sit.
fn tensors(config: &Qwen2Config) -> Vec<(String, Option<(usize, Module)>)> {
    let mut names = vec![(EMBED_TOKENS.to_owned(), None)];
    for layer in 0..config.num_hidden_layers {
        names.push((norm_tensor(layer, "input_layernorm"), None));
        names.push((norm_tensor(layer, "post_attention_layernorm"), None));
        for module in Module::ALL {
            let weight = module_tensor(layer, module, "weight");
            names.push((weight, Some((layer, module))));
            if has_bias(config, module) {
                names.push((module_tensor(layer, module, "bias"), None));
            }
        }
    }
    names.push((NORM.to_owned(), None));
    if !config.tie_word_embeddings {
        names.push((LM_HEAD.to_owned(), None));
    }
    names
}

/// An error unless every adapter has its layer in the model and the shapes of its module.
fn check_fit(config: &Qwen2Config, lora: &Lora) -> Result<()> {
    let r = lora.config.r;
    if r == 0 {
        return Err(Error::operand("merge", "a rank of at least 1", "0"));
    }
    for (&(layer, module), pair) in &lora.pairs {
        let tensor = module_tensor(layer, module, "lora");
        if layer >= config.num_hidden_layers {
            let layers = config.num_hidden_layers;
            let expected = format!("{tensor} to be of a model with {layers} layers");
            return Err(Error::operand("merge", expected, format!("layer {layer}")));
        }
        let (rows, cols) = config.module_dims(module);
        let factors = [("A", &pair.a, [r, cols]), ("B", &pair.b, [rows, r])];
        for (factor, found, shape) in factors {
            if found.shape() != shape {
                return Err(Error::operand(
                    "merge",
                    format!("{tensor}_{factor} of shape {shape:?}"),
                    format!("shape {:?}", found.shape()),
                ));
            }
        }
    }
    Ok(())
}

/// W + Σ s B A in f32; `weight` \[out, in\], each A \[r, in\], B \[out, r\], shapes checked before.
fn merged(weight: &Tensor, pairs: &[(&LoraPair, f32)]) -> Result<Tensor> {
    let (rows, cols) = weight.matrix_dims();
    let mut sum = vec![0.0f32; rows * cols];
    sum.par_chunks_mut(cols)
        .enumerate()
        .try_for_each_init(Vec::new, |delta, (row, out)| {
            weight.read_f32(row * cols, out)?;
            for (pair, scale) in pairs {
                let r = pair.a.matrix_dims().0;
                delta.clear();
                delta.resize(cols, 0.0f32);
                let b = &pair.b.f32s()?[row * r..(row + 1) * r];
                for (&b, a) in b.iter().zip(pair.a.f32s()?.chunks(cols)) {
                    for (delta, &a) in delta.iter_mut().zip(a) {
                        *delta += b * a;
                    }
                }
                for (out, &delta) in out.iter_mut().zip(delta.iter()) {
                    *out += scale * delta;
                }
            }
            Ok(())
        })?;
    Tensor::from_vec(sum, weight.shape())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::slice::from_ref;

    use super::*;
    use crate::formats::peft;

    #[test]
    fn a_model_larger_than_a_shard_is_written_in_several_with_an_index() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        let mut model = load(&golden.join("model")).unwrap();
        let lora = peft::load(&golden.join("lora"), &model.config).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("merged");
        save_merged_in_shards(&golden.join("model"), from_ref(&lora), &out, 300_000).unwrap();
        let index = fs::read(out.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        // 959 816 bytes in one file, less its header of 5 192 bytes.
        assert_eq!(index["metadata"]["total_size"], 954_624);
        for part in 1..=4 {
            let name = format!("model-{part:05}-of-00004.safetensors");
            assert!(fs::metadata(out.join(name)).unwrap().len() <= 300_000 + 5_192);
        }
        merge_into(&mut model, &lora).unwrap();
        let back = load(&out).unwrap();
        let weights = |model: &Qwen2| model.layers[3].down.weight.to_f32().unwrap();
        assert_eq!(
            weights(&back).f32s().unwrap(),
            weights(&model).f32s().unwrap()
        );
    }
}
