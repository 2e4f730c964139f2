//! The embedded example: a tiny pair of Qwen2 models trained on arithmetic, their tokenizer, 2 000
//! problems to train on and 200 to measure with. How they were made: tests/fixtures/example.

use std::fs;
use std::path::Path;

use super::inputs::Sources;
use super::{RunDir, TrainConfig};
use crate::data::records::{self, Record};
use crate::error::{Error, Result};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../tests/fixtures/example/", $name)) as &[u8])),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "target/config.json",
    "target/model.safetensors",
    "target/tokenizer.json",
    "target/tokenizer_config.json",
    "source/config.json",
    "source/model.safetensors",
    "source/tokenizer.json",
    "source/tokenizer_config.json",
    "template.jinja",
    "problems.jsonl",
    "eval.jsonl",
];

/// The folder of a run that holds the files.
pub(super) const DIR: &str = "example";

/// Longest answer that is waited for when the example is evaluated.
pub(super) const MAX_NEW_TOKENS: usize = 24;

/// Settings that suit the example: a target of `None` stands for its models and data.
pub fn config() -> TrainConfig {
    TrainConfig {
        hookpoints: vec![3],
        latents: Some(1024),
        k: 16,
        seq_len: 256,
        sae_batch: 8,
        sft_batch: 4,
        sae_epochs: 2,
        epochs: 2,
        lr: 3e-4,
        ..TrainConfig::default()
    }
}

/// Writes the example's files below `dir` (those that are there already are left alone) and
/// says where they are.
pub fn unpack(dir: &Path) -> Result<Sources> {
    for (name, bytes) in FILES {
        let path = dir.join(name);
        if fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64) {
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        }
        fs::write(&path, bytes).map_err(|e| Error::io(&path, e))?;
    }
    Ok(Sources {
        target: dir.join("target"),
        source: Some(dir.join("source")),
        source_adapter: None,
        data: vec![dir.join("problems.jsonl")],
        elicitation_data: None,
        template: Some(dir.join("template.jinja")),
        sae: None,
        adapter: None,
    })
}

/// The problems that no stage sees.
pub(super) fn held_out(run: &RunDir) -> Result<Vec<Record>> {
    records::read(run.path().join(DIR).join("eval.jsonl"))
}
