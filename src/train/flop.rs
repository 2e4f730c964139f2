//! FLOP a token of both stages, counted from the shapes, a multiply and an add as two: what a
//! plan is made from, and what `bench-kernels` holds measured rates against.

use serde::Serialize;

use super::config::TrainConfig;
use super::settings::{Method, SaeGrad};
use crate::error::Result;
use crate::model::{Module, Qwen2Config};

/// FLOP a token of one part of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlopPart {
    /// What is computed.
    pub what: &'static str,
    /// In the first epoch.
    pub first: f64,
    /// In later epochs, where what does not change comes from the cache.
    pub later: f64,
}

/// FLOP of all parts in the first and in later epochs.
pub fn total(parts: &[FlopPart]) -> [f64; 2] {
    let sum = |of: fn(&FlopPart) -> f64| parts.iter().map(of).sum();
    [sum(|part| part.first), sum(|part| part.later)]
}

/// A part that every epoch computes.
fn always(what: &'static str, flop: f64) -> FlopPart {
    FlopPart {
        what,
        first: flop,
        later: flop,
    }
}

/// A part that only the first epoch computes.
fn once(what: &'static str, flop: f64) -> FlopPart {
    FlopPart {
        what,
        first: flop,
        later: 0.0,
    }
}

/// FLOP a token of one model's parts.
struct Cost {
    /// The linear modules of a layer; as much again for the gradient of their input.
    linear: f64,
    /// Two products over the keys before a query, half of the sequence on average.
    attention: f64,
    /// Forward and backward of one layer's adapters.
    lora: f64,
    head: f64,
    sae_encode: f64,
    /// Decoding and the gradients of the active latents.
    sae_sparse: f64,
}

/// Attention has four products in its backward pass and computes its scores again.
const ATTENTION_BACKWARD: f64 = 2.5;

impl Cost {
    fn new(config: &TrainConfig, model: &Qwen2Config, latents: usize) -> Self {
        let hidden = model.hidden_size as f64;
        let heads = (model.num_attention_heads * model.head_dim) as f64;
        let ranks = config.lora_targets.iter().map(|&module| {
            let (out, inner) = model.module_dims(module);
            2.0 * config.lora_r as f64 * (out as f64 + inner as f64)
        });
        let k = config.k as f64;
        let multi = if config.multi_topk { 4.0 * k } else { 0.0 };
        let dead = match config.auxk_alpha > 0.0 {
            true => hidden / 2.0,
            false => 0.0,
        };
        Self {
            linear: 2.0 * layer_weights(model),
            attention: 2.0 * config.seq_len as f64 * heads,
            lora: 3.0 * ranks.sum::<f64>(),
            head: 2.0 * hidden * model.vocab_size as f64,
            sae_encode: 2.0 * hidden * latents as f64,
            sae_sparse: 8.0 * hidden * (k + multi + dead),
        }
    }
}

/// Stage I on activations of `model`: the layers up to the last hookpoint, then the SAEs.
///
/// # Errors
/// What [`TrainConfig::hookpoints_for`] and [`TrainConfig::latents_for`] refuse.
pub fn sae_stage(config: &TrainConfig, model: &Qwen2Config) -> Result<Vec<FlopPart>> {
    let latents = config.latents_for(model.hidden_size)?;
    let hookpoints = config.hookpoints_for(model.num_hidden_layers)?;
    let layers = hookpoints.iter().max().map_or(0, |&last| last + 1) as f64;
    let saes = hookpoints.len() as f64;
    let cost = Cost::new(config, model, latents);
    Ok(vec![
        always("layers up to the hookpoint", layers * cost.linear),
        always("attention", layers * cost.attention),
        always("SAE encoder", saes * cost.sae_encode),
        always("SAE, active latents", saes * cost.sae_sparse),
    ])
}

/// Stage II on `model`, or the supervised baseline.
///
/// # Errors
/// As [`sae_stage`].
pub fn sft_stage(config: &TrainConfig, model: &Qwen2Config) -> Result<Vec<FlopPart>> {
    let all = model.num_hidden_layers;
    if config.method == Method::Sft {
        let cost = Cost::new(config, model, 0);
        let mut parts = student(&cost, all as f64);
        parts.push(always("head", cost.head));
        return Ok(parts);
    }
    let cost = Cost::new(config, model, config.latents_for(model.hidden_size)?);
    let heads = always("heads of teacher and student", 2.0 * cost.head);
    if config.sae_grad == SaeGrad::Through {
        let mut parts = vec![
            once("layers of the teacher", all as f64 * cost.linear),
            once("attention of the teacher", all as f64 * cost.attention),
            once("SAE encoder of the teacher", cost.sae_encode),
            always("SAE encoder", cost.sae_encode),
            always("SAE, active latents", cost.sae_sparse),
        ];
        parts.extend(student(&cost, all as f64));
        parts.push(heads);
        return Ok(parts);
    }
    let prefix = config.hookpoints_for(all)?[0] + 1;
    let (prefix, trained) = (prefix as f64, (all - prefix) as f64);
    // An adapter to start from acts on the student's first layers too.
    let passes = if config.adapter.is_some() { 2.0 } else { 1.0 };
    let attention = (passes * prefix + trained) * cost.attention;
    let mut parts = vec![
        once("layers up to the hookpoint", passes * prefix * cost.linear),
        once("SAE encoder", passes * cost.sae_encode),
        once("layers after it, teacher", trained * cost.linear),
        once("attention of the teacher", attention),
    ];
    parts.extend(student(&cost, trained));
    parts.push(heads);
    Ok(parts)
}

/// What trains adapters on `layers` layers, the student's head left out of the forward pass.
fn student(cost: &Cost, layers: f64) -> Vec<FlopPart> {
    // Weights are frozen, so only activations have gradients.
    let attention = (1.0 + ATTENTION_BACKWARD) * cost.attention;
    vec![
        always("layers of the student", layers * cost.linear),
        always(
            "backward of layers and head",
            layers * cost.linear + cost.head,
        ),
        always("attention of the student", layers * attention),
        always("adapters", layers * cost.lora),
    ]
}

/// Weights of the linear modules of a layer.
pub(super) fn layer_weights(model: &Qwen2Config) -> f64 {
    let sizes = Module::ALL.map(|module| {
        let (out, inner) = model.module_dims(module);
        out as f64 * inner as f64
    });
    sizes.iter().sum()
}
