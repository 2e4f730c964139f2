//! What a training step measures, and the file that keeps it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The stage that a step belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepStage {
    /// Stage I.
    Sae,
    /// Stage II, or the supervised baseline.
    Sft,
}

impl StepStage {
    /// `sae` or `sft`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sae => "sae",
            Self::Sft => "sft",
        }
    }
}

/// The measurements of one step (of one hookpoint, where Stage I trains several SAEs): a line
/// of `metrics.jsonl`. What a stage does not measure is `None` and absent from the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The stage that the step belongs to.
    pub stage: StepStage,
    /// Step of this stage, from 1.
    pub step: u64,
    /// Passes over the data behind this step, a fraction within a pass.
    pub epoch: f64,
    /// Tokens of this stage up to and with this step.
    pub tokens: u64,
    /// Seconds that this step took.
    pub seconds: f64,
    /// Tokens of this step by its seconds.
    pub tokens_per_s: f64,
    /// Learning rate.
    pub lr: f64,
    /// Where the SAE sits: `model.layers.12` (Stage I).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hookpoint: Option<String>,
    /// Fraction of variance unexplained (Stage I).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fvu: Option<f64>,
    /// FVU over the tokens whose norm is under 10 times the batch's median (Stage I).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fvu_no_sinks: Option<f64>,
    /// Share of latents that have not fired for 10 000 000 tokens (Stage I).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_fraction: Option<f64>,
    /// KL divergence in nats, summed over tokens and divided by the batch (Stage II).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// KL divergence in nats a token (Stage II).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_per_token: Option<f64>,
    /// Cross-entropy in nats a token (the supervised baseline).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean squared error of the SAE's reconstruction of the teacher's activations (Stage II).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sae_mse: Option<f64>,
    /// Gradient norm before clipping (Stage II).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
}

impl StepMetrics {
    /// Measurements of a step with everything that belongs to one stage absent.
    pub fn new(stage: StepStage, step: u64) -> Self {
        Self {
            stage,
            step,
            epoch: 0.0,
            tokens: 0,
            seconds: 0.0,
            tokens_per_s: 0.0,
            lr: 0.0,
            hookpoint: None,
            fvu: None,
            fvu_no_sinks: None,
            dead_fraction: None,
            kl: None,
            kl_per_token: None,
            loss: None,
            sae_mse: None,
            grad_norm: None,
        }
    }

    /// The measurements that are there, by their names in the file, counters left out.
    pub fn scalars(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all = [
            ("fvu", self.fvu),
            ("fvu_no_sinks", self.fvu_no_sinks),
            ("dead_fraction", self.dead_fraction),
            ("kl", self.kl),
            ("kl_per_token", self.kl_per_token),
            ("loss", self.loss),
            ("sae_mse", self.sae_mse),
            ("grad_norm", self.grad_norm),
            ("lr", Some(self.lr)),
            ("tokens_per_s", Some(self.tokens_per_s)),
        ];
        all.into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
    }
}

/// The file `metrics.jsonl`: one JSON object a line, each written whole at once.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    offset: u64,
}

impl MetricsLog {
    /// Opens the log at `path` (made where absent) and cuts it back to its first `offset` bytes:
    /// 0 for a new run, what the checkpoint kept for a resumed one.
    ///
    /// # Errors
    /// [`Error::File`] where the file is shorter than `offset`, or `offset` is within a line.
    pub fn open(path: impl AsRef<Path>, offset: u64) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(|e| Error::io(&path, e))?;
        let length = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        if offset > length {
            return Err(Error::file(
                &path,
                format!("expected at least the {offset} bytes of the checkpoint, found {length}"),
            ));
        }
        if offset > 0 {
            let mut last = [0];
            file.seek(SeekFrom::Start(offset - 1))
                .and_then(|_| file.read_exact(&mut last))
                .map_err(|e| Error::io(&path, e))?;
            if last != *b"\n" {
                return Err(Error::file(
                    &path,
                    format!(
                        "expected a line to end at byte {offset}, where the checkpoint was made"
                    ),
                ));
            }
        }
        file.set_len(offset)
            .and_then(|()| file.seek(SeekFrom::Start(offset)))
            .map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file, offset })
    }

    /// Appends one line.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_vec(metrics)
            .map_err(|e| Error::file(&self.path, format!("step {}: {e}", metrics.step)))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|e| Error::io(&self.path, e))?;
        self.offset += line.len() as u64;
        Ok(())
    }

    /// Bytes written so far: what a checkpoint keeps.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Brings what was written to the disk; called before a checkpoint that keeps the offset.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io(&self.path, e))
    }
}
