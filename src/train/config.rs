//! Every setting of a training run, with the names of the command line.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::memory::available_memory;
use super::settings::{
    self, DeviceSetting, DtypeSetting, Method, SaeGrad, SaeInit, SaeOptimizer, Stage,
};
use crate::error::{Error, Result};
use crate::model::{LoraConfig, Module};

/// The settings of a training run. Written to and read from TOML with the keys of the command
/// line (`sae_batch` is `sae-batch`); the file `config.toml` of a run folder is this struct.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Which stages run. Default: all.
    pub stage: Stage,
    /// SAE-Tuning, or plain supervised fine-tuning as the baseline. Default: sae-tuning.
    pub method: Method,
    /// Hugging Face folder or hub id of the model whose activations the SAE learns. Default: the
    /// target.
    pub source: Option<String>,
    /// PEFT adapter merged into the source model: folder or hub id. Default: none.
    pub source_adapter: Option<String>,
    /// Hugging Face folder or hub id of the model that is tuned. Default: the embedded example,
    /// where neither a source nor data are given either.
    pub target: Option<String>,
    /// Trigger data (Stage I): JSON, JSON Lines or Parquet file, or hub id. Default: the embedded
    /// example's.
    pub data: Option<String>,
    /// Elicitation data (Stage II): JSON, JSON Lines or Parquet file, or hub id. Default: the
    /// trigger data.
    pub elicitation_data: Option<String>,
    /// Jinja file that turns a record into text. Default: the built-in template.
    pub template: Option<PathBuf>,
    /// Decoder layers (0-based) on whose output an SAE is trained; Stage II uses the first.
    /// Default (empty): layer 12 of 28, and the same fraction of another depth.
    #[serde(rename = "hookpoint", alias = "layer", with = "settings::hookpoints")]
    pub hookpoints: Vec<usize>,
    /// SAE to start from: a sparsify folder or hub id. Default: none.
    pub sae: Option<PathBuf>,
    /// How the SAE starts. Default: scratch.
    pub sae_init: SaeInit,
    /// Number of latents. Default: `expansion` times the hidden size.
    pub latents: Option<usize>,
    /// Latents per hidden dimension, where `latents` is not given. Default: 64.
    pub expansion: usize,
    /// Active latents a token. Default: 32.
    pub k: usize,
    /// Weight of the auxiliary loss on dead latents. Default: 0, which is off.
    pub auxk_alpha: f64,
    /// Whether the Multi-TopK loss (4k latents, weight 1/8) is added. Default: false.
    pub multi_topk: bool,
    /// Whether Stage I leaves out sink tokens (norm at least 10 times the median). Default: false.
    pub exclude_sinks: bool,
    /// Tokens in a sequence. Default: 2048.
    pub seq_len: usize,
    /// Sequences in a step of Stage I. Default: 16.
    pub sae_batch: usize,
    /// Sequences in a forward pass of Stage II. Default: 1.
    pub sft_batch: usize,
    /// Forward passes of Stage II whose gradients make one step. Default: 1.
    pub grad_accum: usize,
    /// Passes of Stage II over the data. Default: 2.
    pub epochs: usize,
    /// Passes of Stage I over the data. Default: 1.
    pub sae_epochs: usize,
    /// Most steps of Stage I. Default: no limit.
    pub max_sae_steps: Option<usize>,
    /// Most steps of Stage II. Default: no limit.
    pub max_sft_steps: Option<usize>,
    /// Optimizer of Stage I. Default: signum.
    pub sae_optimizer: SaeOptimizer,
    /// Learning rate of Stage I. Default: 5e-3 (signum) or 2e-4 (adam), divided by
    /// √(latents / 2^14).
    pub sae_lr: Option<f64>,
    /// Learning rate of Stage II. Default: 1e-6.
    pub lr: f64,
    /// Decoupled weight decay of Stage II. Default: 0.01.
    pub weight_decay: f64,
    /// Largest gradient norm of Stage II. Default: 1.0.
    pub clip: f64,
    /// Rank of the adapters. Default: 32.
    pub lora_r: usize,
    /// Numerator of the adapters' scale. Default: 128.
    pub lora_alpha: f64,
    /// Probability that an input of an adapter is dropped in training. Default: 0.05.
    pub lora_dropout: f64,
    /// Linear modules with an adapter. Default: all seven.
    #[serde(with = "settings::modules")]
    pub lora_targets: Vec<Module>,
    /// PEFT adapter whose weights Stage II starts from: folder or hub id. Default: none.
    pub adapter: Option<PathBuf>,
    /// Whether Stage II's gradient stops at the SAE or flows through it. Default: stop.
    pub sae_grad: SaeGrad,
    /// Whether attention is kept within a document. Default: false.
    pub document_mask: bool,
    /// Whether sequences are shuffled, by `seed`. Default: false, the data's own order.
    pub shuffle: bool,
    /// Most memory of the activation caches in GiB; beyond it files are used. Default: a quarter
    /// of the memory available at the start.
    pub cache_memory: Option<f64>,
    /// Where operators run. Default: auto.
    pub device: DeviceSetting,
    /// Floating-point type of the frozen weights and of activations. Default: auto.
    pub dtype: DtypeSetting,
    /// Worker threads; 0 means one for each core. Default: 0.
    pub threads: usize,
    /// Run folder. Default: `resa-run`.
    pub out: PathBuf,
    /// Steps between two checkpoints; 0 means only at the end of a stage. Default: 100.
    pub checkpoint_every: usize,
    /// Checkpoints kept, newest first. Default: 3.
    pub keep: usize,
    /// Steps between two lines of progress where no bar is shown. Default: 1.
    pub log_every: usize,
    /// Seed of everything random. Default: 42.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            stage: Stage::All,
            method: Method::SaeTuning,
            source: None,
            source_adapter: None,
            target: None,
            data: None,
            elicitation_data: None,
            template: None,
            hookpoints: Vec::new(),
            sae: None,
            sae_init: SaeInit::Scratch,
            latents: None,
            expansion: 64,
            k: 32,
            auxk_alpha: 0.0,
            multi_topk: false,
            exclude_sinks: false,
            seq_len: 2048,
            sae_batch: 16,
            sft_batch: 1,
            grad_accum: 1,
            epochs: 2,
            sae_epochs: 1,
            max_sae_steps: None,
            max_sft_steps: None,
            sae_optimizer: SaeOptimizer::Signum,
            sae_lr: None,
            lr: 1e-6,
            weight_decay: 0.01,
            clip: 1.0,
            lora_r: 32,
            lora_alpha: 128.0,
            lora_dropout: 0.05,
            lora_targets: Module::ALL.to_vec(),
            adapter: None,
            sae_grad: SaeGrad::Stop,
            document_mask: false,
            shuffle: false,
            cache_memory: None,
            device: DeviceSetting::Auto,
            dtype: DtypeSetting::Auto,
            threads: 0,
            out: PathBuf::from("resa-run"),
            checkpoint_every: 100,
            keep: 3,
            log_every: 1,
            seed: 42,
        }
    }
}

/// Settings that a resumed run may change: they have no part in what is computed (device and
/// dtype in nothing but the rounding).
const FREE_ON_RESUME: [&str; 8] = [
    "device",
    "dtype",
    "threads",
    "out",
    "checkpoint-every",
    "keep",
    "log-every",
    "cache-memory",
];

/// What TOML's reader says, without the list of all keys that follows an unknown one.
fn reason(error: &toml::de::Error) -> &str {
    let message = error.message();
    match message.starts_with("unknown field") {
        true => message.split(", expected").next().unwrap_or(message),
        false => message,
    }
}

impl TrainConfig {
    /// Reads settings from TOML text; keys that are absent keep their defaults.
    ///
    /// # Errors
    /// [`Error::File`] naming `path` for an unknown key, a wrong type or broken TOML.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            let line = e
                .span()
                .map(|span| text[..span.start].matches('\n').count() + 1);
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            Error::file(path, format!("{place}{}", reason(&e)))
        })
    }

    /// Settings from a table of options as they are named on the command line.
    ///
    /// # Errors
    /// [`Error::File`] naming `path` for an unknown key or a wrong type.
    pub fn from_table(table: toml::Table, path: &Path) -> Result<Self> {
        let config = Self::deserialize(table);
        config.map_err(|e| Error::file(path, reason(&e)))
    }

    /// The settings as a table; those that are not set are absent.
    pub fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|e| Error::setting("configuration", e.to_string()))
    }

    /// The settings as TOML text.
    pub fn to_toml(&self) -> Result<String> {
        Ok(self.to_table()?.to_string())
    }

    /// Whether the embedded example is what is trained: no model and no data are named.
    pub fn is_example(&self) -> bool {
        self.source.is_none() && self.target.is_none() && self.data.is_none()
    }

    /// Whether Stage I is part of the run.
    pub fn runs_sae(&self) -> bool {
        self.method == Method::SaeTuning && self.stage != Stage::Sft
    }

    /// Whether Stage II is part of the run.
    pub fn runs_sft(&self) -> bool {
        self.stage != Stage::Sae
    }

    /// Whether the run starts from the SAE in `sae`.
    pub(super) fn needs_sae(&self) -> bool {
        self.method == Method::SaeTuning && (self.sae_init != SaeInit::Scratch || !self.runs_sae())
    }

    /// Most memory of the activation caches in bytes.
    pub fn cache_bytes(&self) -> u64 {
        match self.cache_memory {
            Some(gib) => (gib * f64::from(1u32 << 30)) as u64,
            // Where the system does not say what it has, 1 GiB is what a laptop can spare.
            None => available_memory().map_or(1 << 30, |bytes| bytes / 4),
        }
    }

    /// The adapters' settings.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.lora_r,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout as f32,
            use_rslora: false,
            targets: self.lora_targets.clone(),
        }
    }

    /// Number of latents for a model of that hidden size.
    ///
    /// # Errors
    /// [`Error::Setting`] where there are fewer latents than are active, or too many to count.
    pub fn latents_for(&self, hidden_size: usize) -> Result<usize> {
        let latents = match self.latents {
            Some(latents) => latents,
            None => self.expansion.checked_mul(hidden_size).ok_or_else(|| {
                Error::setting("--expansion", format!("{} is too large", self.expansion))
            })?,
        };
        if self.k > latents {
            return Err(Error::setting(
                "--k",
                format!("at most the number of latents, {latents}, found {}", self.k),
            ));
        }
        if self.multi_topk && self.k.saturating_mul(4) > latents {
            return Err(Error::setting(
                "--multi-topk",
                format!("needs 4 times k = {} latents, found {latents}", self.k),
            ));
        }
        if latents > u32::MAX as usize {
            return Err(Error::setting(
                "--latents",
                format!("at most {}, found {latents}", u32::MAX),
            ));
        }
        Ok(latents)
    }

    /// The hookpoints for a model of `layers` layers, the default filled in.
    ///
    /// # Errors
    /// [`Error::Setting`] for a layer that the model does not have, and for the last layer
    /// where Stage II would have no layer left to train.
    pub fn hookpoints_for(&self, layers: usize) -> Result<Vec<usize>> {
        let hookpoints = match self.hookpoints.as_slice() {
            [] => vec![layers * 3 / 7],
            given => given.to_vec(),
        };
        if let Some(layer) = hookpoints.iter().find(|&&l| l >= layers) {
            return Err(Error::setting(
                "--hookpoint",
                format!(
                    "the model has {layers} layers (0 to {}), found layer {layer}",
                    layers.saturating_sub(1)
                ),
            ));
        }
        let tunes = self.runs_sft() && self.method == Method::SaeTuning;
        if tunes && self.sae_grad == SaeGrad::Stop && hookpoints[0] + 1 == layers {
            return Err(Error::setting(
                "--hookpoint",
                format!(
                    "layer {} is the model's last: no layer after it could be trained",
                    hookpoints[0]
                ),
            ));
        }
        Ok(hookpoints)
    }

    /// Checks that a run made with `stored` may go on with these settings.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first option that has another value and a part in the numbers.
    pub fn check_resumes(&self, stored: &Self) -> Result<()> {
        let (now, then) = (self.to_table()?, stored.to_table()?);
        let keys = now.keys().chain(then.keys());
        let changed = keys
            .filter(|key| !FREE_ON_RESUME.contains(&key.as_str()))
            .find(|key| now.get(*key) != then.get(*key));
        let Some(key) = changed else {
            return Ok(());
        };
        let show = |table: &toml::Table| match table.get(key) {
            Some(value) => value.to_string(),
            None => "not set".to_owned(),
        };
        Err(Error::setting(
            format!("--{key}"),
            format!(
                "the run was started with {}, so it cannot go on with {}",
                show(&then),
                show(&now)
            ),
        ))
    }
}
