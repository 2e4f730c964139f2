//! Which latents fire where.

use crate::device::Device;
use crate::error::Result;
use crate::eval::Inference;
use crate::model::{Adapters, Layout, Sae};
use crate::ops::fvu::{mse, token_mean};
use crate::tape::Tape;
use crate::tensor::Tensor;

use super::MarkedText;

/// A latent that fired on a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Firing {
    pub latent: u32,
    pub text: u32,
    pub position: u32,
    pub activation: f32,
}

/// What one SAE did on all texts.
pub(super) struct LayerFirings {
    pub firings: Vec<Firing>,
    /// Sums over all tokens of the squared error and of the squared distance from the mean of
    /// the token's text.
    pub error: f64,
    pub variance: f64,
}

impl LayerFirings {
    /// The latents that fired on a marked token of any text and on no other token, ascending.
    pub fn reasoning_features(&self, texts: &[MarkedText], latents: usize) -> Vec<u32> {
        let (mut on_mark, mut elsewhere) = (vec![false; latents], vec![false; latents]);
        for firing in &self.firings {
            let marked = texts[firing.text as usize].marked[firing.position as usize];
            let place = if marked { &mut on_mark } else { &mut elsewhere };
            place[firing.latent as usize] = true;
        }
        let latents = on_mark.iter().zip(&elsewhere).zip(0..);
        latents
            .filter(|&((&mark, &other), _)| mark && !other)
            .map(|(_, latent)| latent)
            .collect()
    }

    /// The share of latents that fired on no token.
    pub fn silent_fraction(&self, latents: usize) -> f64 {
        let mut fired = vec![false; latents];
        for firing in &self.firings {
            fired[firing.latent as usize] = true;
        }
        fired.iter().filter(|&&fired| !fired).count() as f64 / latents as f64
    }
}

/// Runs the texts through the model and the outputs of its layers through their SAEs (ascending
/// by layer); `done` is called with the number of texts behind it.
pub(super) fn firings(
    device: &Device,
    inference: &Inference,
    saes: &[(usize, Sae)],
    texts: &[MarkedText],
    mut done: impl FnMut(usize),
) -> Result<Vec<LayerFirings>> {
    let empty = || LayerFirings {
        firings: Vec::new(),
        error: 0.0,
        variance: 0.0,
    };
    let mut layers: Vec<LayerFirings> = saes.iter().map(|_| empty()).collect();
    let adapters = inference.adapters.map(Adapters::frozen);
    for (number, text) in texts.iter().enumerate() {
        let layout = Layout::new(&inference.model.config, 1, text.ids.len())?;
        let mut tape = Tape::new(device);
        let ids = Tensor::from_u32(text.ids.clone(), [text.ids.len()])?;
        device.run(|| -> Result<()> {
            let mut x = inference.model.embed(&mut tape, ids)?;
            let mut next = 0;
            for ((layer, sae), found) in saes.iter().zip(&mut layers) {
                let through = next..layer + 1;
                x = inference
                    .model
                    .decode(&mut tape, x, through, &layout, adapters.as_ref())?;
                next = layer + 1;
                found.add(device, sae, x.value(), number as u32)?;
            }
            Ok(())
        })?;
        done(number + 1);
    }
    Ok(layers)
}

impl LayerFirings {
    fn add(&mut self, device: &Device, sae: &Sae, x: &Tensor, text: u32) -> Result<()> {
        let (acts, indices) = sae.encode(device, x)?;
        let x_hat = sae.reconstruct(device, x)?;
        let (tokens, d) = x.matrix_dims();
        let mean = token_mean(device, x)?.to_f32()?;
        let mean = Tensor::from_vec(mean.f32s()?.repeat(tokens), [tokens, d])?;
        let sum = |other: &Tensor| -> Result<f64> {
            Ok(mse(device, x, other, 1)?[0] * (tokens * d) as f64)
        };
        self.error += sum(&x_hat)?;
        self.variance += sum(&mean)?;
        let (acts, indices) = (acts.to_f32()?, indices.to_u32()?);
        let k = sae.config.k;
        for (i, (&activation, &latent)) in acts.f32s()?.iter().zip(indices.u32s()?).enumerate() {
            if activation > 0.0 {
                let position = (i / k) as u32;
                self.firings.push(Firing {
                    latent,
                    text,
                    position,
                    activation,
                });
            }
        }
        Ok(())
    }
}
