//! A small model with random weights, for tests of what trains on it.

use crate::model::{DecoderLayer, Linear, Module, Qwen2, Qwen2Config};
use crate::rng::{Purpose, Stream};
use crate::tensor::Tensor;

/// Three small layers.
pub fn config() -> Qwen2Config {
    Qwen2Config {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        attention_bias: false,
    }
}

/// Values within half of zero.
pub fn random(seed: u64, shape: &[usize]) -> Tensor {
    let stream = Stream::new(seed, Purpose::Init, 0, 0);
    let n: usize = shape.iter().product();
    let values = (0..n as u64).map(|i| stream.uniform(i) - 0.5);
    Tensor::from_vec(values.collect(), shape).unwrap()
}

/// Random weights of that shape.
pub fn model() -> Qwen2 {
    let config = config();
    let linear = |layer: u64, module: Module| {
        let (out, cols) = config.module_dims(module);
        Linear {
            weight: random(10 * layer + module as u64, &[out, cols]),
            bias: None,
        }
    };
    let norm = || random(99, &[config.hidden_size]);
    let layers = (1..=3).map(|i| DecoderLayer {
        input_norm: norm(),
        q: linear(i, Module::Q),
        k: linear(i, Module::K),
        v: linear(i, Module::V),
        o: linear(i, Module::O),
        post_attention_norm: norm(),
        gate: linear(i, Module::Gate),
        up: linear(i, Module::Up),
        down: linear(i, Module::Down),
    });
    let layers = layers.collect();
    let embed_tokens = random(1, &[config.vocab_size, config.hidden_size]);
    Qwen2 {
        layers,
        norm: norm(),
        lm_head: embed_tokens.clone(),
        embed_tokens,
        config,
    }
}
