//! Decoding with a key/value cache: the forward pass of one more token for each of several
//! sequences.

use std::ops::Range;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{DecoderLayer, Lora, Module, Qwen2, Qwen2Config};
use crate::ops::decode::{Batch, Heads, KvCache, Map, add_low_rank, linear};
use crate::ops::rmsnorm::RmsNorm;
use crate::ops::rope::RopeTable;
use crate::ops::swiglu::SwiGlu;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

impl Qwen2 {
    /// An empty cache for one sequence.
    pub fn cache(&self, device: &Device) -> KvCache {
        let heads = heads(&self.config);
        KvCache::new(device, self.config.num_hidden_layers, heads.kv * heads.dim)
    }

    /// Runs decoder layers `layers` on the hidden states \[B, d\] of the next token of each of B
    /// sequences, and adds their keys and values to the sequences' caches.
    ///
    /// # Errors
    /// When a layer does not exist, or `rope` does not hold a sequence's next position.
    pub fn decode_next(
        &self,
        device: &Device,
        x: Tensor,
        layers: Range<usize>,
        caches: &mut [&mut KvCache],
        rope: &RopeTable,
        adapters: Option<&Lora>,
    ) -> Result<Tensor> {
        let mut x = x;
        let heads = heads(&self.config);
        let mut batch = Batch::new(device, heads, rope, caches, layers.start)?;
        for index in layers {
            let step = LayerStep {
                device,
                config: &self.config,
                layer: self.layer(index)?,
                index,
                adapters,
            };
            x = step.run(x, &mut batch)?;
        }
        Ok(x)
    }
}

/// One decoder layer on one token of each sequence.
struct LayerStep<'a> {
    device: &'a Device,
    config: &'a Qwen2Config,
    layer: &'a DecoderLayer,
    index: usize,
    adapters: Option<&'a Lora>,
}

impl LayerStep<'_> {
    fn run(&self, mut x: Tensor, batch: &mut Batch) -> Result<Tensor> {
        let normed = self.norm(&self.layer.input_norm, &x)?;
        let [q, k, v] = self.linear([Module::Q, Module::K, Module::V], &normed)?;
        let attended = batch.attention(self.index, q, k, &v)?;
        let [o] = self.linear([Module::O], &attended)?;
        self.device.add_assign(&mut x, &o)?;
        let normed = self.norm(&self.layer.post_attention_norm, &x)?;
        let [gate, up] = self.linear([Module::Gate, Module::Up], &normed)?;
        let inputs = [&Var::constant(gate), &Var::constant(up)];
        let activated = Tape::new(self.device).apply(SwiGlu, &inputs)?;
        let [down] = self.linear([Module::Down], activated.value())?;
        self.device.add_assign(&mut x, &down)?;
        Ok(x)
    }

    fn norm(&self, weight: &Tensor, x: &Tensor) -> Result<Tensor> {
        let norm = RmsNorm {
            weight: weight.clone(),
            eps: self.config.rms_norm_eps,
        };
        let normed = Tape::new(self.device).apply(norm, &[&Var::constant(x.clone())])?;
        Ok(normed.into_value())
    }

    /// X Wᵀ + b of modules with the same input, and what their adapters add to it.
    fn linear<const N: usize>(&self, modules: [Module; N], x: &Tensor) -> Result<[Tensor; N]> {
        let maps = modules.map(|module| {
            let linear = self.layer.module(module);
            Map {
                weight: &linear.weight,
                bias: linear.bias.as_ref(),
            }
        });
        let mut outputs = linear(self.device, x, &maps)?;
        for (y, module) in outputs.iter_mut().zip(modules) {
            let pair = self
                .adapters
                .and_then(|lora| Some((lora, lora.pairs.get(&(self.index, module))?)));
            if let Some((lora, pair)) = pair {
                let scale = lora.config.scale();
                add_low_rank(self.device, y, x, [&pair.a, &pair.b], scale)?;
            }
        }
        let count = |outputs: Vec<_>| {
            Error::operand("decode", format!("{N} outputs"), outputs.len().to_string())
        };
        outputs.try_into().map_err(count)
    }
}

fn heads(config: &Qwen2Config) -> Heads {
    Heads {
        queries: config.num_attention_heads,
        kv: config.num_key_value_heads,
        dim: config.head_dim,
    }
}
