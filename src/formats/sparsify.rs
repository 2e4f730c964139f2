//! Sparse autoencoders as EleutherAI's sparsify stores them: a folder for each hookpoint, with
//! `cfg.json` and `sae.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::atomic::FileSet;
use super::json::JsonObject;
use super::safetensors::{self, Entry, SafeTensors};
use super::{check_finite, check_shape};
use crate::error::{Error, Result};
use crate::model::{Qwen2Config, Sae, SaeConfig};
use crate::tensor::DType;

const CONFIG: &str = "cfg.json";
const WEIGHTS: &str = "sae.safetensors";

/// The folder of a layer's SAE: `root` itself where it holds one, else `model.layers.N` or
/// `layers.N` below it.
///
/// # Errors
/// Where there is none.
pub fn hookpoint_dir(root: &Path, layer: usize) -> Result<PathBuf> {
    let names = [format!("model.layers.{layer}"), format!("layers.{layer}")];
    let below = names.iter().map(|name| root.join(name));
    std::iter::once(root.to_owned())
        .chain(below)
        .find(|dir| dir.join(CONFIG).exists())
        .ok_or_else(|| {
            let [long, short] = &names;
            let what = format!("expected {CONFIG}, {long}/{CONFIG} or {short}/{CONFIG}");
            Error::file(root, format!("{what}, found none of them"))
        })
}

/// Loads the SAE of a layer from below `root` (see [`hookpoint_dir`]).
///
/// # Errors
/// As [`load`], and where the SAE is made for activations of another size than the model's.
pub fn load_at(root: &Path, layer: usize, model: &Qwen2Config) -> Result<Sae> {
    check_at(root, layer, model)?;
    load(&hookpoint_dir(root, layer)?)
}

/// Checks an SAE as [`load_at`] does, but for whether its numbers are finite: they are not read.
///
/// # Errors
/// As [`load_at`].
pub fn check_at(root: &Path, layer: usize, model: &Qwen2Config) -> Result<SaeConfig> {
    let dir = hookpoint_dir(root, layer)?;
    let (config, _) = open(&dir)?;
    if config.d_in == model.hidden_size {
        return Ok(config);
    }
    let (expected, found) = (model.hidden_size, config.d_in);
    let what = format!("expected d_in {expected}, the model's hidden size, found {found}");
    Err(Error::file(dir.join(CONFIG), what))
}

/// Loads the SAE of one hookpoint; weights become f32.
///
/// # Errors
/// Where a file is missing or damaged, the SAE is of a kind the engine does not compute, or a
/// tensor is missing, not expected, not finite, or of another shape than `cfg.json` says.
pub fn load(dir: &Path) -> Result<Sae> {
    let (config, file) = open(dir)?;
    let read = |name| {
        let tensor = file.tensor_f32(name)?;
        check_finite(file.path(), name, &tensor)?;
        Ok::<_, Error>(tensor)
    };
    let [w_enc, b_enc, w_dec, b_dec] = Sae::TENSORS;
    let tensors = [read(w_enc)?, read(b_enc)?, read(w_dec)?, read(b_dec)?];
    Ok(Sae::new(config, tensors))
}

/// The configuration of an SAE, and its file, which holds the tensors of that shape alone.
fn open(dir: &Path) -> Result<(SaeConfig, SafeTensors)> {
    let config = read_config(&dir.join(CONFIG))?;
    let (m, d) = (config.num_latents, config.d_in);
    let file = SafeTensors::open(dir.join(WEIGHTS))?;
    let shapes: [&[usize]; 4] = [&[m, d], &[m], &[m, d], &[d]];
    for (name, shape) in Sae::TENSORS.into_iter().zip(shapes) {
        check_shape(file.path(), name, &file.tensor(name)?, shape)?;
    }
    if let Some(name) = file.names().find(|name| !Sae::TENSORS.contains(name)) {
        let what = "not expected in a TopK sparse autoencoder";
        return Err(Error::tensor(file.path(), name, what));
    }
    Ok((config, file))
}

/// Writes an SAE as f32; both files are replaced together.
///
/// # Errors
/// Where a tensor's shape is not the configuration's or a file cannot be written.
pub fn save(dir: &Path, sae: &Sae) -> Result<()> {
    let config = &sae.config;
    let (m, d) = (config.num_latents, config.d_in);
    let path = dir.join(WEIGHTS);
    let tensors = [
        ("encoder.weight", &sae.w_enc, vec![m, d]),
        ("encoder.bias", &sae.b_enc, vec![m]),
        ("W_dec", &sae.w_dec, vec![m, d]),
        ("b_dec", &sae.b_dec, vec![d]),
    ];
    let mut entries = Vec::new();
    for (name, tensor, shape) in tensors {
        check_shape(&path, name, tensor, &shape)?;
        entries.push(Entry::new(name, tensor).stored_as(DType::F32));
    }
    let cfg = json!({
        "activation": "topk",
        "expansion_factor": config.expansion_factor,
        "normalize_decoder": config.normalize_decoder,
        "num_latents": config.num_latents,
        "k": config.k,
        "multi_topk": config.multi_topk,
        "skip_connection": false,
        "transcode": false,
        "d_in": config.d_in,
    });
    let mut files = FileSet::new(dir)?;
    files.stage(WEIGHTS, |out| {
        safetensors::write_to(out, &path, entries, &BTreeMap::new())
    })?;
    files.stage_json(CONFIG, &cfg)?;
    files.commit()
}

/// Reads `cfg.json`; keys that a file leaves out have sparsify's defaults, others are passed over.
fn read_config(path: &Path) -> Result<SaeConfig> {
    let json = JsonObject::read(path)?;
    if !matches!(json.string("activation")?, None | Some("topk")) {
        return Err(json.error("activation", "\"topk\""));
    }
    let refused = ["skip_connection", "transcode", "signed"];
    json.refuse_set(&refused, "plain TopK autoencoders are read")?;
    let d_in = json.size("d_in")?;
    let expansion_factor = json.optional_size("expansion_factor")?.unwrap_or(32);
    let num_latents = match json.get("num_latents").and_then(|n| n.as_u64()) {
        // sparsify's way to say: as the expansion factor has it.
        Some(0) => expansion_factor * d_in,
        _ => json
            .optional_size("num_latents")?
            .unwrap_or(expansion_factor * d_in),
    };
    let k = json.size("k")?;
    if k > num_latents {
        return Err(json.error("k", &format!("at most num_latents, {num_latents}")));
    }
    Ok(SaeConfig {
        d_in,
        num_latents,
        k,
        expansion_factor,
        normalize_decoder: json.bool_or("normalize_decoder", true)?,
        multi_topk: json.bool_or("multi_topk", false)?,
    })
}
