//! What `train` can be given on the command line.

use std::path::PathBuf;

use clap::Args;
use resa_engine::Error;
use resa_engine::model::Module;
use resa_engine::train::{DeviceSetting, settings::parse_hookpoint};
use serde::Serialize;

use super::args::threads;

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub settings: TrainSettings,
    /// TOML file of settings, keys named as these options; options win over it
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub config: Option<PathBuf>,
    /// Go on with the run in --out from its last checkpoint, with the settings it was started with;
    /// only --device, --dtype, --threads, --cache-memory, --checkpoint-every, --keep and --log-every
    /// may change
    #[arg(long, help_heading = "Run")]
    pub resume: bool,
    /// Check settings and files, print steps, tokens, FLOP, memory and time to expect, and stop
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,
    /// Print the result as JSON
    #[arg(long, help_heading = "Run")]
    pub json: bool,
}

/// The settings that a TOML file can also hold; those that are given overwrite its keys.
#[derive(Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrainSettings {
    /// Which stages to run
    #[arg(long, value_parser = ["all", "sae", "sft"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<String>,
    /// SAE-Tuning, or LoRA with cross-entropy on the text as the baseline
    #[arg(long, value_parser = ["sae-tuning", "sft"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,

    /// Model whose activations the SAE learns: Hugging Face folder or hub id; the target where
    /// not given
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// PEFT adapter that is merged into the source model: folder or hub id
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    #[serde(skip_serializing_if = "Option::is_none")]
    source_adapter: Option<String>,
    /// Model to tune: Hugging Face folder or hub id (org/name, org/name@revision)
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,

    /// Trigger data for Stage I: JSON, JSON Lines or Parquet file, or hub id, with the keys problem
    /// (else question, else prompt) and answer
    #[arg(long, value_name = "FILE|ID", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    /// Elicitation data for Stage II, with the same keys; the trigger data where not given
    #[arg(long, value_name = "FILE|ID", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    elicitation_data: Option<String>,
    /// Jinja file that turns a record into text, with the variables problem, question (the same)
    /// and answer; built in where not given
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    template: Option<PathBuf>,
    /// Tokens in a sequence
    #[arg(long, value_name = "N", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seq_len: Option<u32>,
    /// Keep attention within a document
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    document_mask: Option<bool>,
    /// Shuffle sequences by --seed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shuffle: Option<bool>,

    /// Layer whose output the SAE learns, as model.layers.N (0-based); repeat for several SAEs,
    /// Stage II uses the first
    #[arg(long, value_name = "NAME", value_parser = hookpoint, help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    hookpoint: Option<Vec<String>>,
    /// The same by its number; repeatable
    #[arg(long, value_name = "N", value_parser = hookpoint, conflicts_with = "hookpoint", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<Vec<String>>,
    /// Trained SAE (sparsify folder or hub id): needed by --sae-init finetune or pretrained and by
    /// --stage sft
    #[arg(
        long,
        value_name = "DIR",
        help_heading = "Sparse autoencoder (Stage I)"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae: Option<PathBuf>,
    /// Start at random, train --sae further, or use it as it is
    #[arg(long, value_parser = ["scratch", "finetune", "pretrained"], help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_init: Option<String>,
    /// Number of latents; --expansion times the hidden size where not given
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "expansion",
        help_heading = "Sparse autoencoder (Stage I)"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    latents: Option<u32>,
    /// Latents per hidden dimension
    #[arg(long, value_name = "N", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expansion: Option<u32>,
    /// Active latents per token
    #[arg(long, value_name = "N", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    k: Option<u32>,
    /// Weight of the auxiliary loss on dead latents; 0 is off
    #[arg(long, value_name = "X", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    auxk_alpha: Option<f64>,
    /// Add the Multi-TopK loss (4k latents, weight 1/8)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    multi_topk: Option<bool>,
    /// Train without sink tokens (norm at least 10 times the batch's median)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    exclude_sinks: Option<bool>,
    /// Sequences in a step
    #[arg(long, value_name = "N", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_batch: Option<u32>,
    /// Passes over the data
    #[arg(long, value_name = "N", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_epochs: Option<u32>,
    /// Maximum steps; no limit where not given
    #[arg(long, value_name = "N", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_sae_steps: Option<u32>,
    /// Sign descent under schedule-free averaging, or Adam with warm-up and decay
    #[arg(long, value_parser = ["signum", "adam"], help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_optimizer: Option<String>,
    /// Learning rate [default: 5e-3 (signum) or 2e-4 (adam) / sqrt(latents / 16384)]
    #[arg(long, value_name = "X", help_heading = "Sparse autoencoder (Stage I)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_lr: Option<f64>,

    /// PEFT adapter whose weights to start from: folder or hub id
    #[arg(long, value_name = "DIR", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<PathBuf>,
    /// Sequences in a forward pass
    #[arg(long, value_name = "N", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sft_batch: Option<u32>,
    /// Forward passes whose gradients make one step
    #[arg(long, value_name = "N", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    grad_accum: Option<u32>,
    /// Passes over the data
    #[arg(long, value_name = "N", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    epochs: Option<u32>,
    /// Maximum steps; no limit where not given
    #[arg(long, value_name = "N", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_sft_steps: Option<u32>,
    /// Learning rate (AdamW, constant)
    #[arg(long, value_name = "X", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lr: Option<f64>,
    /// Decoupled weight decay
    #[arg(long, value_name = "X", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_decay: Option<f64>,
    /// Largest gradient norm
    #[arg(long, value_name = "X", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    clip: Option<f64>,
    /// Rank of the adapters
    #[arg(long, value_name = "N", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_r: Option<u32>,
    /// Numerator of the adapters' scale alpha / r
    #[arg(long, value_name = "X", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_alpha: Option<f64>,
    /// Probability that an input of an adapter is dropped in training
    #[arg(long, value_name = "P", help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_dropout: Option<f64>,
    /// Linear modules with an adapter, separated by commas
    #[arg(long, value_name = "MODULES", value_delimiter = ',', value_parser = module_names(), help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_targets: Option<Vec<String>>,
    /// Stop the gradient at the SAE, or let it through and train all layers
    #[arg(long, value_parser = ["stop", "through"], help_heading = "Tuning (Stage II)")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sae_grad: Option<String>,

    /// Where to compute: auto (the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", value_parser = device, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// Floating-point type of frozen weights and products; auto is f32 on the CPU, bf16 on a GPU
    #[arg(long, value_parser = ["auto", "f32", "bf16"], help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    /// Worker threads; 0 is one for each core
    #[arg(long, value_name = "N", value_parser = threads, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    /// Maximum memory of the activation caches in GiB; beyond it files are used [default: a quarter of the available memory]
    #[arg(long, value_name = "GIB", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_memory: Option<f64>,
    /// Run folder
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) out: Option<PathBuf>,
    /// Steps between checkpoints; 0 is only at the end of a stage
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_every: Option<u32>,
    /// Checkpoints to keep
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    keep: Option<u32>,
    /// Steps between lines of progress where there is no terminal for a bar
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_every: Option<u32>,
    /// Seed of everything random
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64), help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

impl TrainSettings {
    /// An error that names the first option with a path that the run folder could not note down.
    pub(super) fn check_paths(&self) -> Result<(), Error> {
        let paths = [
            ("--template", &self.template),
            ("--sae", &self.sae),
            ("--adapter", &self.adapter),
            ("--out", &self.out),
        ];
        for (option, path) in paths {
            if let Some(path) = path.as_ref().filter(|path| path.to_str().is_none()) {
                let what = format!("expected a path in UTF-8, found {path:?}");
                return Err(Error::setting(option, what));
            }
        }
        Ok(())
    }
}

fn hookpoint(text: &str) -> Result<String, String> {
    parse_hookpoint(text).map(|_| text.to_owned())
}

fn device(text: &str) -> Result<String, String> {
    text.parse::<DeviceSetting>().map(|_| text.to_owned())
}

fn module_names() -> clap::builder::PossibleValuesParser {
    Module::ALL.map(Module::name).into()
}
