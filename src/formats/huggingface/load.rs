use std::path::Path;

use super::checkpoint::Checkpoint;
use super::read_config;
use crate::error::{Error, Result};
use crate::formats::{check_finite, check_shape};
use crate::model::{DecoderLayer, Linear, Module, Qwen2, Qwen2Config};
use crate::tensor::{DType, Tensor};

/// Loads a model folder. Matrices stay in the memory-mapped files in the dtype they are stored
/// in; norms and biases are widened to f32. Every number is read once, to see that it is finite.
///
/// # Errors
/// Where a file is missing or damaged, the architecture is another, a tensor is missing, has
/// another shape than `config.json` says or a dtype other than f32, f16 and bf16, or holds NaN or
/// infinity.
pub fn load(dir: &Path) -> Result<Qwen2> {
    read(dir, true)
}

/// Checks a model folder as [`load`] does, but for whether the numbers of matrices are finite:
/// they are not read.
///
/// # Errors
/// As [`load`].
pub fn check(dir: &Path) -> Result<()> {
    read(dir, false).map(drop)
}

fn read(dir: &Path, reads_matrices: bool) -> Result<Qwen2> {
    let reader = Reader {
        config: read_config(dir)?,
        files: Checkpoint::open(dir)?,
        reads_matrices,
    };
    let (d, v) = (reader.config.hidden_size, reader.config.vocab_size);
    let embed_tokens = reader.matrix(EMBED_TOKENS, &[v, d])?;
    let lm_head = if reader.config.tie_word_embeddings {
        embed_tokens.clone()
    } else {
        reader.matrix(LM_HEAD, &[v, d])?
    };
    let norm = reader.vector(NORM, d)?;
    let layers = (0..reader.config.num_hidden_layers)
        .map(|layer| reader.layer(layer))
        .collect::<Result<_>>()?;
    Ok(Qwen2 {
        config: reader.config,
        embed_tokens,
        layers,
        norm,
        lm_head,
    })
}

pub(super) const EMBED_TOKENS: &str = "model.embed_tokens.weight";
pub(super) const LM_HEAD: &str = "lm_head.weight";
pub(super) const NORM: &str = "model.norm.weight";

/// The name of a tensor of a module, such as `model.layers.0.self_attn.q_proj.weight`.
pub(super) fn module_tensor(layer: usize, module: Module, kind: &str) -> String {
    format!("model.layers.{layer}.{}.{kind}", module.path())
}

/// The name of a norm's scale, such as `model.layers.0.input_layernorm.weight`.
pub(super) fn norm_tensor(layer: usize, norm: &str) -> String {
    format!("model.layers.{layer}.{norm}.weight")
}

/// Whether a module of this model has a bias.
pub(super) fn has_bias(config: &Qwen2Config, module: Module) -> bool {
    config.attention_bias && matches!(module, Module::Q | Module::K | Module::V)
}

struct Reader {
    files: Checkpoint,
    config: Qwen2Config,
    /// Whether every number of a matrix is looked at.
    reads_matrices: bool,
}

impl Reader {
    fn layer(&self, layer: usize) -> Result<DecoderLayer> {
        let norm = |name| self.vector(&norm_tensor(layer, name), self.config.hidden_size);
        Ok(DecoderLayer {
            input_norm: norm("input_layernorm")?,
            q: self.linear(layer, Module::Q)?,
            k: self.linear(layer, Module::K)?,
            v: self.linear(layer, Module::V)?,
            o: self.linear(layer, Module::O)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate: self.linear(layer, Module::Gate)?,
            up: self.linear(layer, Module::Up)?,
            down: self.linear(layer, Module::Down)?,
        })
    }

    fn linear(&self, layer: usize, module: Module) -> Result<Linear> {
        let (rows, cols) = self.config.module_dims(module);
        let weight = self.matrix(&module_tensor(layer, module, "weight"), &[rows, cols])?;
        let name = module_tensor(layer, module, "bias");
        let bias = if has_bias(&self.config, module) {
            Some(self.vector(&name, rows)?)
        } else if self.files.contains(&name) {
            let path = self.files.file(&name)?.path();
            let what = "expected no bias here for the model_type in config.json";
            return Err(Error::tensor(path, name, what));
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    /// A tensor as it is stored.
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let file = self.files.file(name)?;
        let tensor = file.tensor(name)?;
        if tensor.dtype() == DType::U32 {
            let what = "expected dtype F32, F16 or BF16, found U32";
            return Err(Error::tensor(file.path(), name, what));
        }
        check_shape(file.path(), name, &tensor, shape)?;
        if self.reads_matrices {
            check_finite(file.path(), name, &tensor)?;
            tensor.release_pages();
        }
        Ok(tensor)
    }

    /// A one-dimensional tensor in f32.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.matrix(name, &[len])?.to_f32()
    }
}
