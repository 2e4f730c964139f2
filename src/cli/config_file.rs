//! Where settings come from: options win over the file given by `--config`, the file over the
//! run that is resumed, and that over the defaults, which are the embedded example's where
//! neither model nor data are named.

use std::fs;
use std::path::{Path, PathBuf};

use resa_engine::Error;
use resa_engine::train::{self, RunDir, SaeInit, TrainConfig};
use toml::Table;

use super::Failure;
use super::train_args::TrainArgs;

/// Pairs of keys that say the same thing in two ways: giving one takes the other back.
const ALTERNATIVES: [[&str; 2]; 2] = [["hookpoint", "layer"], ["latents", "expansion"]];

/// Options that have no effect beside another setting.
struct Idle {
    /// Whether the other setting is so.
    when: fn(&TrainConfig) -> bool,
    options: &'static [&'static str],
    /// Why, naming the other option.
    why: &'static str,
}

const IDLE: [Idle; 4] = [
    Idle {
        when: TrainConfig::is_example,
        options: &["source-adapter", "elicitation-data", "template"],
        why: "has no effect on the embedded example: give --target and --data too",
    },
    Idle {
        when: |config| config.sae_init == SaeInit::Scratch && config.runs_sae(),
        options: &["sae"],
        why: "has no effect with --sae-init scratch: expected --sae-init finetune or pretrained",
    },
    Idle {
        when: |config| config.sae_init != SaeInit::Scratch,
        options: &["k", "latents", "expansion", "multi-topk"],
        why: "has no effect with --sae-init finetune or pretrained: the SAE of --sae has its own",
    },
    Idle {
        when: |config| config.adapter.is_some(),
        options: &["lora-r", "lora-alpha", "lora-targets"],
        why: "has no effect with --adapter, which has its own",
    },
];

/// The settings of a run, checked.
pub fn resolve(args: &TrainArgs) -> Result<TrainConfig, Failure> {
    let usage = |error: Error| Failure::Usage(error.into());
    let mut given = match &args.config {
        Some(path) => read(path).map_err(usage)?,
        None => Table::new(),
    };
    args.settings.check_paths().map_err(usage)?;
    let options = Table::try_from(&args.settings).map_err(|e| Failure::Usage(e.into()))?;
    overlay(&mut given, options);

    let out = match given.get("out").and_then(toml::Value::as_str) {
        Some(out) => PathBuf::from(out),
        None => TrainConfig::default().out,
    };
    let stored = match args.resume {
        true => Some(RunDir::read_config(&out)?),
        false => None,
    };
    let mut table = match &stored {
        Some(stored) => stored.to_table()?,
        None if !names_input(&given) => train::example::config().to_table()?,
        None => Table::new(),
    };
    overlay(&mut table, given.clone());
    let mut config = TrainConfig::from_table(table, Path::new("settings")).map_err(usage)?;
    config.out = out;
    config.validate().map_err(usage)?;
    match &stored {
        Some(stored) => config.check_resumes(stored),
        None => check_effects(&given, &config),
    }
    .map_err(usage)?;
    Ok(config)
}

/// An error that names the first option that was given and has no effect.
fn check_effects(given: &Table, config: &TrainConfig) -> Result<(), Error> {
    for idle in IDLE.iter().filter(|idle| (idle.when)(config)) {
        if let Some(option) = idle.options.iter().find(|&&key| given.contains_key(key)) {
            return Err(Error::setting(format!("--{option}"), idle.why));
        }
    }
    Ok(())
}

/// Reads a file of settings; it is checked on its own, so that an error names its line.
fn read(path: &Path) -> Result<Table, Error> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    TrainConfig::from_toml(&text, path)?;
    text.parse()
        .map_err(|e: toml::de::Error| Error::file(path, e.message()))
}

/// Whether a model or data are named; where none is, the embedded example is trained.
fn names_input(given: &Table) -> bool {
    ["target", "source", "data"]
        .iter()
        .any(|key| given.contains_key(*key))
}

fn overlay(below: &mut Table, above: Table) {
    for [one, other] in ALTERNATIVES {
        if above.contains_key(one) || above.contains_key(other) {
            below.remove(one);
            below.remove(other);
        }
    }
    below.extend(above);
}
