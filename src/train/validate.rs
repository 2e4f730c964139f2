//! Which settings make sense, alone and together.

use super::config::TrainConfig;
use super::settings::{Method, SaeInit, Stage};
use crate::device::check_threads;
use crate::error::{Error, Result};

/// The most of anything that is counted: products of two such counts cannot overflow.
const MOST: usize = 1 << 31;

impl TrainConfig {
    /// Checks every setting that can be checked without a model or data.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first option with a value the engine cannot work with.
    pub fn validate(&self) -> Result<()> {
        self.check_counts()?;
        self.check_numbers()?;
        self.check_lists()?;
        self.check_models()
    }

    fn check_counts(&self) -> Result<()> {
        let counts = [
            ("--expansion", Some(self.expansion)),
            ("--latents", self.latents),
            ("--k", Some(self.k)),
            ("--sae-batch", Some(self.sae_batch)),
            ("--sft-batch", Some(self.sft_batch)),
            ("--grad-accum", Some(self.grad_accum)),
            ("--epochs", Some(self.epochs)),
            ("--sae-epochs", Some(self.sae_epochs)),
            ("--max-sae-steps", self.max_sae_steps),
            ("--max-sft-steps", self.max_sft_steps),
            ("--lora-r", Some(self.lora_r)),
            ("--keep", Some(self.keep)),
            ("--log-every", Some(self.log_every)),
        ];
        for (option, count) in counts {
            if let Some(found) = count.filter(|n| !(1..=MOST).contains(n)) {
                return Err(Error::setting(
                    option,
                    format!("expected 1 to {MOST}, found {found}"),
                ));
            }
        }
        if !(2..=MOST).contains(&self.seq_len) {
            return Err(Error::setting(
                "--seq-len",
                format!("expected 2 to {MOST}, found {}", self.seq_len),
            ));
        }
        if let Some(latents) = self.latents.filter(|&latents| self.k > latents) {
            return Err(Error::setting(
                "--k",
                format!("expected at most the {latents} latents, found {}", self.k),
            ));
        }
        check_threads(self.threads)?;
        // TOML's integers end here, and the seed has to come back from the run folder.
        if self.seed > i64::MAX as u64 {
            return Err(Error::setting(
                "--seed",
                format!("expected at most {}, found {}", i64::MAX, self.seed),
            ));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let positive = [
            ("--lr", Some(self.lr)),
            ("--sae-lr", self.sae_lr),
            ("--clip", Some(self.clip)),
            ("--lora-alpha", Some(self.lora_alpha)),
        ];
        for (option, value) in positive {
            check_number(option, value, "a finite number above 0", |v| v > 0.0)?;
        }
        let not_negative = [
            ("--auxk-alpha", Some(self.auxk_alpha)),
            ("--weight-decay", Some(self.weight_decay)),
            ("--cache-memory", self.cache_memory),
        ];
        for (option, value) in not_negative {
            check_number(option, value, "a finite number of at least 0", |v| v >= 0.0)?;
        }
        check_number(
            "--lora-dropout",
            Some(self.lora_dropout),
            "a probability of at least 0 and under 1",
            |p| (0.0..1.0).contains(&p),
        )
    }

    fn check_lists(&self) -> Result<()> {
        if self.lora_targets.is_empty() {
            return Err(Error::setting(
                "--lora-targets",
                "expected at least one module",
            ));
        }
        if let Some(module) = first_repeated(&self.lora_targets) {
            return Err(Error::setting(
                "--lora-targets",
                format!("{} is given twice", module.name()),
            ));
        }
        match first_repeated(&self.hookpoints) {
            Some(layer) => Err(Error::setting(
                "--hookpoint",
                format!("layer {layer} is given twice"),
            )),
            None => Ok(()),
        }
    }

    fn check_models(&self) -> Result<()> {
        if self.method == Method::Sft && self.stage == Stage::Sae {
            return Err(Error::setting(
                "--stage",
                "the method sft has no SAE stage: expected all or sft, found sae",
            ));
        }
        if self.stage == Stage::Sae && self.sae_init == SaeInit::Pretrained {
            return Err(Error::setting(
                "--sae-init",
                "a pretrained SAE is used as it is: with --stage sae nothing would be trained",
            ));
        }
        if self.out.as_os_str().is_empty() {
            return Err(Error::setting("--out", "expected a folder, found nothing"));
        }
        if self.needs_sae() && self.sae.is_none() {
            return Err(Error::setting(
                "--sae",
                "expected a folder with an SAE: neither --sae-init finetune or pretrained nor \
                 --stage sft can start without one",
            ));
        }
        if self.is_example() {
            return Ok(());
        }
        let has_model = self.target.is_some() || (!self.runs_sft() && self.source.is_some());
        if !has_model {
            return Err(Error::setting(
                "--target",
                "expected the model to tune, found none",
            ));
        }
        if self.data.is_none() {
            return Err(Error::setting(
                "--data",
                "expected the data to train on, found none",
            ));
        }
        Ok(())
    }
}

fn check_number(
    option: &str,
    value: Option<f64>,
    expected: &str,
    works: impl Fn(f64) -> bool,
) -> Result<()> {
    match value {
        Some(v) if !(v.is_finite() && works(v)) => Err(Error::setting(
            option,
            format!("expected {expected}, found {v}"),
        )),
        _ => Ok(()),
    }
}

fn first_repeated<T: PartialEq>(items: &[T]) -> Option<&T> {
    let mut numbered = items.iter().enumerate();
    numbered
        .find(|(at, item)| items[..*at].contains(item))
        .map(|(_, item)| item)
}
