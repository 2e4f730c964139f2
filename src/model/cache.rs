//! Decoding with a key/value cache: what a sequence's tokens so far left behind in each layer,
//! and the forward pass of one more token for each of several sequences.

use std::ops::Range;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{DecoderLayer, Lora, Module, Qwen2, Qwen2Config};
use crate::ops::decode::{Heads, Map, attention, linear};
use crate::ops::rmsnorm::RmsNorm;
use crate::ops::rope::RopeTable;
use crate::ops::swiglu::SwiGlu;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The keys (rotated) and values of one sequence's tokens, f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// For each layer keys and values, \[tokens, kv_heads * D\] each.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// kv_heads * D
    width: usize,
}

impl KvCache {
    /// An empty cache for a model of this shape.
    pub fn new(config: &Qwen2Config) -> Self {
        Self {
            layers: vec![Default::default(); config.num_hidden_layers],
            width: config.num_key_value_heads * config.head_dim,
        }
    }

    /// Tokens that layer `layer` holds.
    pub fn tokens(&self, layer: usize) -> usize {
        let keys = self.layers.get(layer).map_or(0, |(keys, _)| keys.len());
        keys / self.width.max(1)
    }

    /// Adds tokens to a layer: keys and values \[tokens, kv_heads * D\].
    pub(super) fn extend(&mut self, layer: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let layers = self.layers.len();
        let Some(held) = self.layers.get_mut(layer) else {
            let expected = format!("a layer below {layers}");
            return Err(Error::operand("decode", expected, layer.to_string()));
        };
        held.0.extend_from_slice(keys);
        held.1.extend_from_slice(values);
        Ok(())
    }

    fn layer(&self, layer: usize) -> (&[f32], &[f32]) {
        let held = self.layers.get(layer);
        held.map_or((&[], &[]), |(keys, values)| (keys, values))
    }
}

impl Qwen2 {
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
        for index in layers {
            let step = LayerStep {
                device,
                config: &self.config,
                layer: self.layer(index)?,
                index,
                adapters,
            };
            x = step.run(x, caches, rope)?;
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
    fn run(&self, mut x: Tensor, caches: &mut [&mut KvCache], rope: &RopeTable) -> Result<Tensor> {
        let normed = self.norm(&self.layer.input_norm, &x)?;
        let attended = self.attention(&normed, caches, rope)?;
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

    fn attention(
        &self,
        x: &Tensor,
        caches: &mut [&mut KvCache],
        rope: &RopeTable,
    ) -> Result<Tensor> {
        let [mut q, mut k, v] = self.linear([Module::Q, Module::K, Module::V], x)?;
        let (heads, width) = (self.heads(), self.heads().kv * self.heads().dim);
        let q_rows = q.f32s_mut()?.chunks_exact_mut(heads.queries * heads.dim);
        let kv_rows = k.f32s_mut()?.chunks_exact_mut(width);
        let kv_rows = kv_rows.zip(v.f32s()?.chunks_exact(width));
        for ((cache, q), (k, v)) in caches.iter_mut().zip(q_rows).zip(kv_rows) {
            let position = cache.tokens(self.index);
            rope.rotate(position, q)?;
            rope.rotate(position, k)?;
            cache.extend(self.index, k, v)?;
        }
        let held: Vec<_> = caches.iter().map(|cache| cache.layer(self.index)).collect();
        attention(self.device, &q, &held, heads)
    }

    fn heads(&self) -> Heads {
        Heads {
            queries: self.config.num_attention_heads,
            kv: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
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
                let low = self.factor(&pair.a, x)?;
                let mut delta = self.factor(&pair.b, &low)?;
                let scale = lora.config.scale();
                delta.f32s_mut()?.iter_mut().for_each(|v| *v *= scale);
                self.device.add_assign(y, &delta)?;
            }
        }
        let count = |outputs: Vec<_>| {
            Error::operand("decode", format!("{N} outputs"), outputs.len().to_string())
        };
        outputs.try_into().map_err(count)
    }

    fn factor(&self, weight: &Tensor, x: &Tensor) -> Result<Tensor> {
        let map = Map { weight, bias: None };
        let outputs = linear(self.device, x, &[map])?;
        let missing = || Error::operand("decode", "one output", "none");
        outputs.into_iter().next().ok_or_else(missing)
    }
}
