//! Whole stages: tokens a second as a run has them, and the FLOP that they stand for.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::shapes::ModelShape;
use crate::data::Tokenizer;
use crate::device::Precision;
use crate::error::{Error, Result};
use crate::formats::huggingface;
use crate::train::flop::{self, FlopPart};
use crate::train::inputs::{Sources, read_texts};
use crate::train::{
    CancelFlag, DeviceSetting, Event, RunOptions, SaeInit, Stage, StepMetrics, TrainConfig, example,
};

/// How fast a stage goes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageRate {
    /// The model whose shape it is.
    pub model: String,
    /// `sae` or `sft`.
    pub stage: &'static str,
    /// `first`, or `later` for epochs that take what does not change from the cache.
    pub epoch: &'static str,
    /// What its matrix products compute with: what a run takes by default.
    pub precision: &'static str,
    /// Steps measured, the first one left out.
    pub steps: usize,
    /// Tokens by seconds of these steps.
    pub tokens_per_s: f64,
    /// Counted from the shapes.
    pub flop_per_token: f64,
    /// The product of both.
    pub flop_per_s: f64,
    /// That by the ceiling of arithmetic in the precision that runs take by default, where it
    /// was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
}

/// Sizes of a measured run.
struct Size {
    seq_len: usize,
    sae_batch: usize,
    sft_batch: usize,
    layer: usize,
    /// Steps of Stage I, and of each of two epochs of Stage II.
    steps: usize,
}

fn size(model: &ModelShape) -> Size {
    match model.config.num_hidden_layers {
        layers if layers <= 6 => Size {
            seq_len: 256,
            sae_batch: 8,
            sft_batch: 4,
            layer: 3,
            steps: 12,
        },
        _ => Size {
            seq_len: 512,
            sae_batch: 4,
            sft_batch: 1,
            layer: 12,
            steps: 4,
        },
    }
}

/// Trains a model of that shape with random weights on the example's problems, in a temporary
/// folder, and takes the times of its steps.
///
/// # Errors
/// What [`train`](crate::train::run) refuses; the operating system's.
pub(super) fn measure(
    model: &ModelShape,
    device: DeviceSetting,
    threads: usize,
) -> Result<Vec<StageRate>> {
    let dir = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let dir = dir.path();
    let sources = example::unpack(&dir.join("example"))?;
    let folder = dir.join("model");
    huggingface::save_random(&folder, &model.config, 1)?;
    huggingface::copy_tokenizer(&sources.target, &folder)?;
    let size = size(model);
    let config = TrainConfig {
        target: Some(text(&folder)),
        template: sources.template.clone(),
        hookpoints: vec![size.layer],
        latents: Some(model.latents),
        k: model.k,
        seq_len: size.seq_len,
        sae_batch: size.sae_batch,
        sft_batch: size.sft_batch,
        device,
        threads,
        ..TrainConfig::default()
    };
    let data = |batch: usize, name: &str| {
        let path = dir.join(name);
        shorten(&sources, &path, size.seq_len * batch * size.steps)?;
        Ok::<_, Error>(Some(text(&path)))
    };
    let sae = TrainConfig {
        stage: Stage::Sae,
        data: data(size.sae_batch, "sae.jsonl")?,
        out: dir.join("sae-run"),
        ..config.clone()
    };
    // Its own run, since the first epoch would else begin with Stage I's activations.
    let sft = TrainConfig {
        stage: Stage::Sft,
        sae: Some(dir.join("sae-run/sae")),
        sae_init: SaeInit::Pretrained,
        data: data(size.sft_batch, "sft.jsonl")?,
        out: dir.join("sft-run"),
        ..config
    };
    let one = steps(&sae)?;
    let two = steps(&sft)?;
    let precision = match device {
        DeviceSetting::Cuda(_) => Precision::Bf16,
        _ => sae.dtype.precision(),
    };
    let precision = precision.name();
    let mut rates = Vec::new();
    let parts = flop::sae_stage(&sae, &model.config)?;
    rates.extend(rate(model.name, "sae", &one, &parts, false, precision));
    let parts = flop::sft_stage(&sft, &model.config)?;
    rates.extend(rate(model.name, "sft", &two, &parts, false, precision));
    rates.extend(rate(model.name, "sft", &two, &parts, true, precision));
    Ok(rates)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The metrics of all steps of a run.
fn steps(config: &TrainConfig) -> Result<Vec<StepMetrics>> {
    let mut steps = Vec::new();
    let mut observer = |event: &Event| {
        if let Event::Step(metrics) = event {
            steps.push(metrics.clone());
        }
    };
    let cancel = CancelFlag::new();
    crate::train::run(config, RunOptions::default(), &mut observer, &cancel)?;
    Ok(steps)
}

/// Tokens a second of the steps in the first epoch or in later ones; `None` without any.
fn rate(
    model: &str,
    stage: &'static str,
    steps: &[StepMetrics],
    parts: &[FlopPart],
    later: bool,
    precision: &'static str,
) -> Option<StageRate> {
    // The first step allocates what the others use again.
    let steps: Vec<_> = steps
        .iter()
        .skip(1)
        .filter(|m| (m.epoch > 1.0) == later)
        .collect();
    let seconds: f64 = steps.iter().map(|m| m.seconds).sum();
    let tokens: f64 = steps.iter().map(|m| m.tokens_per_s * m.seconds).sum();
    let flop_per_token = flop::total(parts)[usize::from(later)];
    let tokens_per_s = tokens / seconds;
    (!steps.is_empty()).then(|| StageRate {
        model: model.to_owned(),
        stage,
        epoch: if later { "later" } else { "first" },
        precision,
        steps: steps.len(),
        tokens_per_s,
        flop_per_token,
        flop_per_s: tokens_per_s * flop_per_token,
        fraction: None,
    })
}

/// Copies so many of the example's problems that they pack into `tokens` tokens; repeats them
/// where there are too few.
fn shorten(sources: &Sources, to: &Path, tokens: usize) -> Result<()> {
    let tokenizer = Tokenizer::from_dir(&sources.target)?;
    let template = sources.template()?;
    // Rows of two tokens: as good as counting all.
    let (records, packed) = read_texts(&sources.data, &template, &tokenizer, 2, false)?;
    let each = packed.tokens.len() as f64 / records.len().max(1) as f64;
    let wanted = (1.02 * tokens as f64 / each).ceil() as usize;
    let read = |path: &PathBuf| fs::read_to_string(path).map_err(|e| Error::io(path, e));
    let all: String = sources.data.iter().map(read).collect::<Result<_>>()?;
    let lines: Vec<&str> = all.lines().cycle().take(wanted).collect();
    fs::write(to, lines.join("\n")).map_err(|e| Error::io(to, e))
}

impl fmt::Display for StageRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match (self.stage, self.epoch) {
            ("sae", _) => "Stage I",
            (_, "first") => "Stage II, first epoch",
            _ => "Stage II, later epochs",
        };
        let (rate, flop) = (self.tokens_per_s, self.flop_per_token / 1e6);
        write!(
            f,
            "  {:<11} {stage:<24} {:<5} {rate:9.0} tokens/s  {flop:8.1} MFLOP a token  {:7.1} GFLOP/s",
            self.model,
            self.precision,
            self.flop_per_s / 1e9
        )?;
        match self.fraction {
            Some(fraction) => writeln!(f, "  {:5.1} % of the ceiling", 100.0 * fraction),
            None => writeln!(f),
        }
    }
}
