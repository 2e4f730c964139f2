//! A model as it is used after training: alone, with adapters, or with an SAE inserted.

use crate::device::Device;
use crate::error::Result;
use crate::model::{Adapters, Layout, Lora, Qwen2, Sae};
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
        let layers = self.model.layers.len();
        let mut x = self.model.embed(&mut tape, ids)?;
        let mut next = 0;
        if let Some((sae, layer)) = self.sae {
            next = layer + 1;
            x = self
                .model
                .decode(&mut tape, x, 0..next, layout, adapters.as_ref())?;
            x = Var::constant(sae.reconstruct(device, x.value())?);
        }
        x = self
            .model
            .decode(&mut tape, x, next..layers, layout, adapters.as_ref())?;
        Ok(self.model.final_norm(&mut tape, &x)?.into_value())
    }
}
