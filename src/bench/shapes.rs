//! The three models whose shapes are measured.

use crate::model::{Module, Qwen2Config};

/// A model, and what SAE-Tuning adds to it.
#[derive(Clone, Debug)]
pub struct ModelShape {
    /// What it is called in results.
    pub name: &'static str,
    /// The decoder.
    pub config: Qwen2Config,
    /// Tokens that operators see at a time: one sequence of the authors' recipe.
    pub tokens: usize,
    /// Latents of the SAE.
    pub latents: usize,
    /// Active latents a token.
    pub k: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// Layers that Stage II trains.
    pub trained_layers: usize,
}

/// Names of the models, smallest first.
pub const NAMES: [&str; 3] = ["example", "smollm2", "qwen2-1.5b"];

/// The embedded example, SmolLM2-135M and Qwen2 1.5B (DeepSeek-R1-Distill-Qwen-1.5B).
pub fn models() -> [ModelShape; 3] {
    let [example, smollm2, qwen2] = NAMES;
    [
        ModelShape {
            name: example,
            config: Qwen2Config {
                vocab_size: 352,
                hidden_size: 96,
                intermediate_size: 256,
                num_hidden_layers: 6,
                num_attention_heads: 6,
                num_key_value_heads: 2,
                head_dim: 16,
                max_position_embeddings: 1024,
                rms_norm_eps: 1e-6,
                rope_theta: 10_000.0,
                tie_word_embeddings: true,
                attention_bias: true,
            },
            tokens: 2048,
            latents: 1024,
            k: 16,
            rank: 32,
            trained_layers: 2,
        },
        ModelShape {
            name: smollm2,
            config: Qwen2Config {
                vocab_size: 49_152,
                hidden_size: 576,
                intermediate_size: 1536,
                num_hidden_layers: 30,
                num_attention_heads: 9,
                num_key_value_heads: 3,
                head_dim: 64,
                max_position_embeddings: 8192,
                rms_norm_eps: 1e-5,
                rope_theta: 100_000.0,
                tie_word_embeddings: true,
                attention_bias: false,
            },
            tokens: 2048,
            latents: 8192,
            k: 32,
            rank: 32,
            trained_layers: 17,
        },
        ModelShape {
            name: qwen2,
            config: Qwen2Config {
                vocab_size: 151_936,
                hidden_size: 1536,
                intermediate_size: 8960,
                num_hidden_layers: 28,
                num_attention_heads: 12,
                num_key_value_heads: 2,
                head_dim: 128,
                max_position_embeddings: 131_072,
                rms_norm_eps: 1e-6,
                rope_theta: 10_000.0,
                tie_word_embeddings: false,
                attention_bias: true,
            },
            tokens: 2048,
            latents: 65_536,
            k: 32,
            rank: 32,
            trained_layers: 15,
        },
    ]
}

impl ModelShape {
    /// Values of all adapters that Stage II trains.
    pub fn adapter_values(&self) -> usize {
        let sizes = Module::ALL.map(|module| {
            let (out, inner) = self.config.module_dims(module);
            self.rank * (out + inner)
        });
        self.trained_layers * sizes.iter().sum::<usize>()
    }
}
