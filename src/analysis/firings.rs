//! Which latents fire where.

use crate::device::Device;
use crate::error::Result;
use crate::eval::Inference;
use crate::model::{Adapters, Layout, Sae};
use crate::ops::fvu::{squared_error, total_variance};
use crate::tape::Tape;
use crate::tensor::Tensor;

use super::MarkedText;

/// A token that a latent fired on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Firing {
    pub text: u32,
    pub position: u32,
    pub activation: f32,
}

/// What one latent did on all texts.
#[derive(Clone)]
enum Fired {
    /// It fired on these marked tokens and on no other token: on none at all, or as a reasoning
    /// feature does. Marks are few, so that these take little memory.
    OnMarks(Vec<Firing>),
    /// It fired on a token that is no mark.
    Elsewhere,
}

/// What one SAE did on all texts.
pub(super) struct LayerFirings {
    latents: Vec<Fired>,
    /// Firings of all latents.
    pub count: u64,
    /// Sums over all tokens of the squared error and of the squared distance from the mean of
    /// the token's text.
    pub error: f64,
    pub variance: f64,
}

impl LayerFirings {
    fn new(latents: usize) -> Self {
        Self {
            latents: vec![Fired::OnMarks(Vec::new()); latents],
            count: 0,
            error: 0.0,
            variance: 0.0,
        }
    }

    /// The latents that fired on a marked token of any text and on no other token, ascending, each
    /// with the tokens it fired on, in their order.
    pub fn reasoning_features(&self) -> impl Iterator<Item = (u32, &[Firing])> {
        let latents = self.latents.iter().zip(0..);
        latents.filter_map(|(fired, latent)| match fired {
            Fired::OnMarks(firings) if !firings.is_empty() => Some((latent, &firings[..])),
            _ => None,
        })
    }

    /// The share of latents that fired on no token.
    pub fn silent_fraction(&self) -> f64 {
        let silent =
            |fired: &&Fired| matches!(fired, Fired::OnMarks(firings) if firings.is_empty());
        self.latents.iter().filter(silent).count() as f64 / self.latents.len() as f64
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
    let empty = |(_, sae): &(usize, Sae)| LayerFirings::new(sae.config.num_latents);
    let mut layers: Vec<LayerFirings> = saes.iter().map(empty).collect();
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
                found.add(device, sae, x.value(), number as u32, &text.marked)?;
            }
            Ok(())
        })?;
        done(number + 1);
    }
    Ok(layers)
}

impl LayerFirings {
    /// Adds what the SAE makes of the activations `x` of a text, of whose tokens some are marked.
    fn add(
        &mut self,
        device: &Device,
        sae: &Sae,
        x: &Tensor,
        text: u32,
        marked: &[bool],
    ) -> Result<()> {
        let (acts, indices) = sae.encode(device, x)?;
        let x_hat = sae.decode(device, &acts, indices.clone())?;
        self.error += squared_error(device, x, &x_hat, None)?;
        self.variance += total_variance(device, x, None)?;
        let (acts, indices) = (acts.to_f32()?, indices.to_u32()?);
        let k = sae.config.k;
        for (i, (&activation, &latent)) in acts.f32s()?.iter().zip(indices.u32s()?).enumerate() {
            if activation > 0.0 {
                self.count += 1;
                match &mut self.latents[latent as usize] {
                    Fired::OnMarks(firings) if marked[i / k] => firings.push(Firing {
                        text,
                        position: (i / k) as u32,
                        activation,
                    }),
                    fired => *fired = Fired::Elsewhere,
                }
            }
        }
        Ok(())
    }
}
