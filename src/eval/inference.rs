//! A model as it is used after training: alone, with adapters, or with an SAE inserted.

use std::ops::Range;

use crate::device::Device;
use crate::error::Result;
use crate::model::{Adapters, Layout, Lora, Qwen2, Sae};
use crate::ops::decode::{self, KvCache};
use crate::ops::embedding::Embedding;
use crate::ops::rope::RopeTable;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// What a forward pass goes through.
#[derive(Clone, Copy)]
pub struct Inference<'a> {
    /// The weights.
    pub model: &'a Qwen2,
    /// Adapters that act on them.
    pub adapters: Option<&'a Lora>,
    /// An SAE whose reconstruction takes the place of that layer's output.
    pub sae: Option<(&'a Sae, usize)>,
}

impl<'a> Inference<'a> {
    /// The model alone.
    pub fn new(model: &'a Qwen2) -> Self {
        Self {
            model,
            adapters: None,
            sae: None,
        }
    }

    /// The output \[T, d\] of decoder layer `layer` (0-based) for token ids \[T\]: what an
    /// autoencoder learns. An SAE inserted before it is not passed.
    pub fn layer_output(
        &self,
        device: &Device,
        ids: Tensor,
        layer: usize,
        layout: &Layout,
    ) -> Result<Tensor> {
        let mut tape = Tape::new(device);
        let adapters = self.adapters.map(Adapters::frozen);
        let x = self.model.embed(&mut tape, ids)?;
        let layers = 0..layer + 1;
        let x = self
            .model
            .decode(&mut tape, x, layers, layout, adapters.as_ref())?;
        Ok(x.into_value())
    }

    /// The hidden states \[T, d\] after the final norm for token ids \[T\].
    pub fn hidden(&self, device: &Device, ids: Tensor, layout: &Layout) -> Result<Tensor> {
        let mut tape = Tape::new(device);
        let adapters = self.adapters.map(Adapters::frozen);
        let mut x = self.model.embed(&mut tape, ids)?;
        for (layers, sae) in self.parts() {
            x = (self.model).decode(&mut tape, x, layers, layout, adapters.as_ref())?;
            if let Some(sae) = sae {
                x = Var::constant(sae.reconstruct(device, x.value())?);
            }
        }
        Ok(self.model.final_norm(&mut tape, &x)?.into_value())
    }

    /// Runs the first tokens \[n\] of one sequence: their cache, and the hidden state \[1, d\]
    /// of the last of them after the final norm.
    pub fn prefill(&self, device: &Device, ids: &[u32]) -> Result<(KvCache, Tensor)> {
        let layout = Layout::new(&self.model.config, 1, ids.len())?;
        let mut tape = Tape::new(device);
        let adapters = self.adapters.map(Adapters::frozen);
        let adapters = adapters.as_ref();
        let mut cache = self.model.cache(device);
        let last = Tensor::from_u32(vec![ids.len().saturating_sub(1) as u32], [1])?;
        let ids = Tensor::from_u32(ids.to_vec(), [ids.len()])?;
        let mut x = self.model.embed(&mut tape, ids)?;
        for (layers, sae) in self.parts() {
            x = (self.model).prefill(&mut tape, x, layers, &layout, adapters, &mut cache)?;
            if let Some(sae) = sae {
                x = Var::constant(sae.reconstruct(device, x.value())?);
            }
        }
        let last = tape.apply(Embedding { ids: last }, &[&x])?;
        let hidden = self.model.final_norm(&mut tape, &last)?;
        Ok((cache, hidden.into_value()))
    }

    /// Runs one more token \[B\] of each of B sequences and adds it to their caches: the hidden
    /// states \[B, d\] after the final norm.
    pub fn step(
        &self,
        device: &Device,
        ids: Vec<u32>,
        caches: &mut [&mut KvCache],
        rope: &RopeTable,
    ) -> Result<Tensor> {
        let mut tape = Tape::new(device);
        let batch = ids.len();
        let ids = Tensor::from_u32(ids, [batch])?;
        let mut x = self.model.embed(&mut tape, ids)?.into_value();
        for (layers, sae) in self.parts() {
            x = (self.model).decode_next(device, x, layers, caches, rope, self.adapters)?;
            if let Some(sae) = sae {
                x = sae.reconstruct(device, &x)?;
            }
        }
        let hidden = self.model.final_norm(&mut tape, &Var::constant(x))?;
        Ok(hidden.into_value())
    }

    /// The logits \[B, V\] f32 of hidden states \[B, d\] after the final norm, for a few tokens,
    /// where the device's operators leave them.
    pub fn logits(&self, device: &Device, hidden: &Tensor) -> Result<Tensor> {
        decode::logits(device, hidden, &self.model.lm_head)
    }

    /// The layers up to where the SAE is inserted, with it, and the others.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, Option<&'a Sae>)> {
        let layers = self.model.layers.len();
        let first = self.sae.map(|(sae, layer)| (0..layer + 1, Some(sae)));
        let next = self.sae.map_or(0, |(_, layer)| layer + 1);
        first.into_iter().chain([(next..layers, None)])
    }
}
