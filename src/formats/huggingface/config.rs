use std::path::Path;

use crate::error::Result;
use crate::formats::json::JsonObject;
use crate::model::Qwen2Config;

/// Reads the `config.json` of a model folder: `model_type` qwen2, or llama without attention
/// bias.
///
/// # Errors
/// Where the file is missing or damaged, or asks for something the engine does not compute; the
/// error names the key and what was found.
pub fn read_config(dir: &Path) -> Result<Qwen2Config> {
    let json = JsonObject::read(&dir.join("config.json"))?;
    let attention_bias = match json.string("model_type")? {
        Some("qwen2") => true,
        Some("llama") => false,
        _ => return Err(json.error("model_type", "\"qwen2\" or \"llama\"")),
    };
    refuse_other_architectures(&json, attention_bias)?;
    let hidden_size = json.size("hidden_size")?;
    let num_attention_heads = json.size("num_attention_heads")?;
    let config = Qwen2Config {
        vocab_size: json.size("vocab_size")?,
        hidden_size,
        intermediate_size: json.size("intermediate_size")?,
        num_hidden_layers: num_hidden_layers(&json)?,
        num_attention_heads,
        num_key_value_heads: json
            .optional_size("num_key_value_heads")?
            .unwrap_or(num_attention_heads),
        head_dim: match json.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!("a divisor of hidden_size {hidden_size}");
                return Err(json.error("num_attention_heads", &expected));
            }
        },
        max_position_embeddings: json.size("max_position_embeddings")?,
        rms_norm_eps: rms_norm_eps(&json)?,
        rope_theta: rope_theta(&json)?,
        tie_word_embeddings: json.bool_or("tie_word_embeddings", false)?,
        attention_bias,
    };
    if !config.head_dim.is_multiple_of(2) {
        return Err(json.error("head_dim", "an even number, for rotary embeddings"));
    }
    if !num_attention_heads.is_multiple_of(config.num_key_value_heads) {
        let expected = format!("a divisor of num_attention_heads {num_attention_heads}");
        return Err(json.error("num_key_value_heads", &expected));
    }
    Ok(config)
}

/// Refuses settings under which the same weights mean another computation.
fn refuse_other_architectures(json: &JsonObject, attention_bias: bool) -> Result<()> {
    json.refuse_set(&["quantization_config"], "quantised weights are not read")?;
    json.refuse_set(&["use_sliding_window"], "attention is over all tokens")?;
    json.refuse_set(
        &[
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
        ],
        "mixtures of experts are not computed",
    )?;
    json.refuse_set(&["mlp_bias"], "the MLP has no biases")?;
    json.refuse_set(&["use_mrope"], "positions are one-dimensional")?;
    if json.bool_or("attention_bias", attention_bias)? != attention_bias {
        let expected = format!("{attention_bias}, as its model_type has it");
        return Err(json.error("attention_bias", &expected));
    }
    if !matches!(json.string("hidden_act")?, None | Some("silu")) {
        return Err(json.error("hidden_act", "\"silu\""));
    }
    for key in ["pretraining_tp", "partial_rotary_factor"] {
        if json.number_or(key, 1.0)? != 1.0 {
            return Err(json.error(key, "1"));
        }
    }
    if let Some(types) = json.get("layer_types") {
        let full = |types: &Vec<_>| types.iter().all(|kind| kind == "full_attention");
        if !types.as_array().is_some_and(full) {
            return Err(json.error("layer_types", "\"full_attention\" everywhere"));
        }
    }
    Ok(())
}

/// Bounded, since layers are counted up before the first of their tensors is looked for.
fn num_hidden_layers(json: &JsonObject) -> Result<usize> {
    const KEY: &str = "num_hidden_layers";
    match json.size(KEY)? {
        layers if layers <= 1 << 16 => Ok(layers),
        _ => Err(json.error(KEY, "at most 65536")),
    }
}

fn rms_norm_eps(json: &JsonObject) -> Result<f32> {
    let eps = json.number_or("rms_norm_eps", 1e-6)?;
    if (0.0..=1.0).contains(&eps) {
        return Ok(eps as f32);
    }
    Err(json.error("rms_norm_eps", "a number from 0 to 1"))
}

/// The base of the rotary embedding's wavelengths: at the top level as transformers 4 writes it,
/// or inside `rope_parameters` as transformers 5 does.
fn rope_theta(json: &JsonObject) -> Result<f64> {
    let mut theta = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = json.object(key)? else {
            continue;
        };
        for kind in ["rope_type", "type"] {
            if !matches!(rope.string(kind)?, None | Some("default")) {
                return Err(rope.error(kind, "\"default\" (no scaling)"));
            }
        }
        let known = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        if let Some(other) = rope.keys().find(|key| !known.contains(key)) {
            return Err(rope.error(other, "it to be unset (no scaling)"));
        }
        if rope.number_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(rope.error("partial_rotary_factor", "1"));
        }
        if rope.get("rope_theta").is_some() {
            theta = Some(positive(&rope, "rope_theta")?);
        }
    }
    match (json.get("rope_theta"), theta) {
        // What transformers takes where a file does not say.
        (None, None) => Ok(10_000.0),
        (None, Some(theta)) => Ok(theta),
        (Some(_), inner) => {
            let outer = positive(json, "rope_theta")?;
            if inner.is_some_and(|inner| inner != outer) {
                return Err(json.error("rope_theta", "the value in rope_parameters"));
            }
            Ok(outer)
        }
    }
}

fn positive(json: &JsonObject, key: &str) -> Result<f64> {
    match json.number(key)? {
        number if number > 0.0 => Ok(number),
        _ => Err(json.error(key, "a number above 0")),
    }
}
