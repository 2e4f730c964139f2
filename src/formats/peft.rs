//! Adapters as Hugging Face's peft stores them: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::atomic::FileSet;
use super::hub::Id;
use super::json::JsonObject;
use super::safetensors::{self, Entry, SafeTensors};
use super::{check_finite, check_shape};
use crate::error::{Error, Result};
use crate::model::{Lora, LoraConfig, LoraPair, Module, Qwen2Config};
use crate::tensor::{DType, Tensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Loads an adapter for a model of this shape; weights become f32.
///
/// # Errors
/// Where a file is missing or damaged, the adapter is of a kind the engine does not compute, a
/// tensor is missing, not expected, not finite, or does not fit the model.
pub fn load(dir: &Path, model: &Qwen2Config) -> Result<Lora> {
    let json = JsonObject::read(&dir.join(CONFIG))?;
    let config = read_config(&json)?;
    let layers = read_layers(&json, model.num_hidden_layers)?;
    let base_model = json.string("base_model_name_or_path")?.unwrap_or("");
    let base_model = match json.string("revision")? {
        Some(revision) => format!("{base_model}@{revision}"),
        None => base_model.to_owned(),
    };
    let file = SafeTensors::open(dir.join(WEIGHTS))?;
    let mut expected = BTreeSet::new();
    let mut pairs = BTreeMap::new();
    for &layer in &layers {
        for &module in &config.targets {
            let (rows, cols) = model.module_dims(module);
            let mut read = |factor, shape: [usize; 2]| {
                let name = tensor_name(layer, module, factor);
                let tensor = file.tensor_f32(&name)?;
                check_shape(file.path(), &name, &tensor, &shape)?;
                check_finite(file.path(), &name, &tensor)?;
                expected.insert(name);
                Ok::<Tensor, Error>(tensor)
            };
            let a = read('A', [config.r, cols])?;
            let b = read('B', [rows, config.r])?;
            pairs.insert((layer, module), LoraPair { a, b });
        }
    }
    if let Some(name) = file.names().find(|&name| !expected.contains(name)) {
        return Err(Error::tensor(
            file.path(),
            name,
            format!("not expected: {CONFIG} or the model has no such module"),
        ));
    }
    Ok(Lora {
        config,
        base_model,
        pairs,
    })
}

/// Writes an adapter as f32; both files are replaced together.
///
/// # Errors
/// Where the adapter is empty, some layer with adapters lacks one of the target modules, or a
/// file cannot be written.
pub fn save(dir: &Path, lora: &Lora) -> Result<()> {
    let layers: BTreeSet<usize> = lora.pairs.keys().map(|&(layer, _)| layer).collect();
    let targets: BTreeSet<Module> = lora.config.targets.iter().copied().collect();
    let wanted = layers.len() * targets.len();
    let regular = lora.pairs.keys().all(|(_, m)| targets.contains(m)) && lora.pairs.len() == wanted;
    if !regular || wanted == 0 {
        return Err(Error::operand(
            "save adapter",
            format!(
                "an adapter on each target module of {} layers",
                layers.len()
            ),
            format!("{} adapters, {wanted} wanted", lora.pairs.len()),
        ));
    }
    let path = dir.join(WEIGHTS);
    let mut entries = Vec::new();
    for (&(layer, module), pair) in &lora.pairs {
        for (factor, tensor) in [('A', &pair.a), ('B', &pair.b)] {
            let entry = Entry::new(tensor_name(layer, module, factor), tensor);
            entries.push(entry.stored_as(DType::F32));
        }
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let config = config_json(lora, &layers, &targets);
    let mut files = FileSet::new(dir)?;
    files.stage(WEIGHTS, |out| {
        safetensors::write_to(out, &path, entries, &metadata)
    })?;
    files.stage_json(CONFIG, &config)?;
    files.commit()
}

/// `base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight`, …
fn tensor_name(layer: usize, module: Module, factor: char) -> String {
    let path = module.path();
    format!("base_model.model.model.layers.{layer}.{path}.lora_{factor}.weight")
}

fn config_json(lora: &Lora, layers: &BTreeSet<usize>, targets: &BTreeSet<Module>) -> Value {
    let names: Vec<_> = targets.iter().map(|module| module.name()).collect();
    // peft keeps a hub id's revision under a key of its own.
    let id = Id::parse(&lora.base_model).filter(|_| !Path::new(&lora.base_model).exists());
    let (base_model, revision) = match id {
        Some(Id { name, revision }) => (name, revision),
        None => (lora.base_model.clone(), None),
    };
    json!({
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        // peft looks for the number behind this name when layers_to_transform is set.
        "layers_pattern": "layers",
        "layers_to_transform": layers,
        "lora_alpha": whole_if_possible(lora.config.alpha),
        "lora_dropout": shortest(lora.config.dropout),
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.config.r,
        "revision": revision,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.config.use_rslora,
    })
}

/// peft declares `lora_alpha` an integer; other numbers work too.
fn whole_if_possible(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 {
        json!(number as i64)
    } else {
        json!(number)
    }
}

/// The shortest decimal that reads back as the same f32: 0.1, not 0.10000000149011612.
fn shortest(number: f32) -> Value {
    number
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, |n| json!(n))
}

fn read_config(json: &JsonObject) -> Result<LoraConfig> {
    if json.string("peft_type")? != Some("LORA") {
        return Err(json.error("peft_type", "\"LORA\""));
    }
    if !matches!(json.string("bias")?, None | Some("none")) {
        return Err(json.error("bias", "\"none\""));
    }
    refuse_variants(json)?;
    let dropout = json.number_or("lora_dropout", 0.0)?;
    if !(0.0..1.0).contains(&dropout) {
        return Err(json.error("lora_dropout", "a number from 0 to below 1"));
    }
    Ok(LoraConfig {
        r: json.size("r")?,
        alpha: json.number("lora_alpha")?,
        dropout: dropout as f32,
        use_rslora: json.bool_or("use_rslora", false)?,
        targets: read_targets(json)?,
    })
}

/// Refuses what changes the computation beyond plain LoRA.
fn refuse_variants(json: &JsonObject) -> Result<()> {
    json.refuse_set(
        &[
            "use_dora",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "lora_bias",
            "layer_replication",
            "target_parameters",
            "trainable_token_indices",
            "exclude_modules",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
            "use_bdlora",
            "use_qalora",
        ],
        "plain LoRA adapters of one rank are read",
    )?;
    // These take a part out of the base model's weights when they begin.
    let residual = ["pissa", "corda", "olora", "loftq"];
    let start = json.get("init_lora_weights").and_then(Value::as_str);
    if start.is_some_and(|start| residual.iter().any(|name| start.starts_with(name))) {
        return Err(json.error("init_lora_weights", "a start that keeps the base model"));
    }
    Ok(())
}

/// The target modules in the order of a forward pass.
fn read_targets(json: &JsonObject) -> Result<Vec<Module>> {
    const KEY: &str = "target_modules";
    let wrong = || {
        json.error(KEY, "\"all-linear\" or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")
    };
    let names = match json.get(KEY) {
        Some(Value::String(name)) if name == "all-linear" => return Ok(Module::ALL.to_vec()),
        Some(Value::Array(names)) if !names.is_empty() => names,
        _ => return Err(wrong()),
    };
    let modules = names
        .iter()
        .map(|name| {
            let module = Module::from_name(name.as_str()?.rsplit('.').next()?)?;
            // A longer name must be the end of the module's own path.
            format!(".{}", module.path())
                .ends_with(&format!(".{}", name.as_str()?))
                .then_some(module)
        })
        .collect::<Option<BTreeSet<_>>>()
        .ok_or_else(wrong)?;
    Ok(modules.into_iter().collect())
}

/// The layers that have adapters: those listed, or all.
fn read_layers(json: &JsonObject, count: usize) -> Result<BTreeSet<usize>> {
    const KEY: &str = "layers_to_transform";
    let layer = |value: &Value| {
        let layer = value.as_u64().and_then(|n| usize::try_from(n).ok());
        layer
            .filter(|&layer| layer < count)
            .ok_or_else(|| json.error(KEY, &format!("layers from 0 to {}", count - 1)))
    };
    match json.get(KEY) {
        None => Ok((0..count).collect()),
        Some(Value::Array(items)) if items.is_empty() => Ok((0..count).collect()),
        Some(Value::Array(items)) => items.iter().map(layer).collect(),
        Some(other) => Ok(BTreeSet::from([layer(other)?])),
    }
}
