use serde::Serialize;

use crate::data::Tokenizer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{Inference, perplexity::token_losses};
use crate::model::{Layout, Sae, SaeConfig};
use crate::tensor::Tensor;

use super::firings::{Firing, firings};
use super::{Features, MarkedText, Mixture};

/// Tokens shown on either side of the one that a latent fires on.
const AROUND: usize = 8;

/// What to look for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Contexts to keep of each reasoning feature: those of its highest activations.
    pub contexts: usize,
    /// Seed of the mixture's starting points.
    pub seed: u64,
}

/// One layer and its SAE.
#[derive(Clone, Debug, Serialize)]
pub struct Hookpoint {
    /// The layer whose output the SAE reconstructs, 0-based.
    pub layer: usize,
    /// Latents that fire on marks and nowhere else.
    pub reasoning_features: usize,
    /// Fraction of variance unexplained over all tokens, about the mean of each text.
    pub fvu: f64,
    /// Mean number of latents that fire on a token.
    pub l0: f64,
    /// Share of latents that fire on none of the tokens.
    pub silent_fraction: f64,
    /// The model's loss in nats a token with the SAE's reconstruction in the layer's place.
    pub loss_with_sae: f64,
    /// The same with zeros in the layer's place.
    pub loss_with_zeros: f64,
    /// (zeros − SAE) / (zeros − model alone): 1 where the SAE costs nothing, 0 where it is no
    /// better than zeros.
    pub loss_recovered: f64,
    /// The reasoning features, by their latent's number.
    pub features: Vec<Feature>,
}

/// A latent and where it fires.
#[derive(Clone, Debug, Serialize)]
pub struct Feature {
    /// The latent's number.
    pub latent: u32,
    /// Tokens it fires on.
    pub firings: usize,
    /// Where it fires most strongly, strongest first.
    pub contexts: Vec<Context>,
}

/// A token that a latent fires on, and what stands around it.
#[derive(Clone, Debug, Serialize)]
pub struct Context {
    /// The text's number, from 0.
    pub text: usize,
    /// The latent's activation.
    pub activation: f32,
    /// Text of the tokens before.
    pub before: String,
    /// Text of the token.
    pub token: String,
    /// Text of the tokens after.
    pub after: String,
}

/// Finds the reasoning features of SAEs at several layers (ascending) of a model on texts, and
/// what each SAE costs. `done` is called with the passes over a text behind it, of
/// `texts x (2 + 2 x layers)` in all.
///
/// # Errors
/// No text, none with a mark, or a layer that the model lacks.
pub fn analyse(
    device: &Device,
    inference: &Inference,
    tokenizer: &Tokenizer,
    saes: &[(usize, Sae)],
    texts: &[MarkedText],
    options: Options,
    mut done: impl FnMut(usize),
) -> Result<Features> {
    let marked_tokens = texts.iter().flat_map(|t| &t.marked).filter(|&&m| m).count();
    if marked_tokens == 0 {
        let what = "expected texts with <think> or </think>, found none";
        return Err(Error::setting("--template", what));
    }
    let tokens: usize = texts.iter().map(|t| t.ids.len()).sum();
    let mut passes = 0;
    let mut pass = |_| {
        passes += 1;
        done(passes);
    };
    let found = firings(device, inference, saes, texts, &mut pass)?;
    let loss = mean_loss(device, inference, texts, &mut pass)?;
    let mut hookpoints = Vec::new();
    for ((layer, sae), found) in saes.iter().zip(&found) {
        let mut loss_with = |sae: &Sae| {
            let with_sae = Inference {
                sae: Some((sae, *layer)),
                ..*inference
            };
            mean_loss(device, &with_sae, texts, &mut pass)
        };
        let (loss_with_sae, loss_with_zeros) = (loss_with(sae)?, loss_with(&zeros(sae)?)?);
        let features = found.reasoning_features().map(|(latent, firings)| {
            feature(latent, firings.to_vec(), tokenizer, texts, options.contexts)
        });
        let features = features.collect::<Result<Vec<_>>>()?;
        hookpoints.push(Hookpoint {
            layer: *layer,
            reasoning_features: features.len(),
            fvu: found.error / found.variance,
            l0: found.count as f64 / tokens as f64,
            silent_fraction: found.silent_fraction(),
            loss_with_sae,
            loss_with_zeros,
            loss_recovered: (loss_with_zeros - loss_with_sae) / (loss_with_zeros - loss),
            features,
        });
    }
    let points: Vec<(f64, f64)> = hookpoints
        .iter()
        .map(|h| (h.layer as f64, h.reasoning_features as f64))
        .collect();
    Ok(Features {
        texts: texts.len(),
        tokens,
        marked_tokens,
        loss,
        hookpoints,
        mixture: Mixture::fit(&points, options.seed),
    })
}

/// Mean loss over all tokens but the first of each text.
fn mean_loss(
    device: &Device,
    inference: &Inference,
    texts: &[MarkedText],
    mut done: impl FnMut(usize),
) -> Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0);
    for (number, text) in texts.iter().enumerate() {
        let layout = Layout::new(&inference.model.config, 1, text.ids.len())?;
        sum += token_losses(device, inference, &text.ids, &layout)?
            .iter()
            .sum::<f64>();
        tokens += text.ids.len() - 1;
        done(number + 1);
    }
    Ok(sum / tokens.max(1) as f64)
}

/// An autoencoder whose reconstruction is zero.
fn zeros(like: &Sae) -> Result<Sae> {
    let d = like.config.d_in;
    let zeros = |shape: &[usize]| Tensor::from_vec(vec![0.0; shape.iter().product()], shape);
    let tensors = [zeros(&[1, d])?, zeros(&[1])?, zeros(&[1, d])?, zeros(&[d])?];
    Ok(Sae::new(SaeConfig::new(d, 1, 1), tensors))
}

fn feature(
    latent: u32,
    mut firings: Vec<Firing>,
    tokenizer: &Tokenizer,
    texts: &[MarkedText],
    contexts: usize,
) -> Result<Feature> {
    let count = firings.len();
    firings.sort_by(|a, b| b.activation.total_cmp(&a.activation));
    let contexts = firings.iter().take(contexts).map(|firing| {
        let ids = &texts[firing.text as usize].ids;
        let at = firing.position as usize;
        let text = |ids: &[u32]| tokenizer.decode(ids, false);
        Ok(Context {
            text: firing.text as usize,
            activation: firing.activation,
            before: text(&ids[at.saturating_sub(AROUND)..at])?,
            token: text(&ids[at..at + 1])?,
            after: text(&ids[at + 1..ids.len().min(at + 1 + AROUND)])?,
        })
    });
    Ok(Feature {
        latent,
        firings: count,
        contexts: contexts.collect::<Result<_>>()?,
    })
}
