//! Stage I, one step at a time: a TopK sparse autoencoder learns to reconstruct activations.

mod loss;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::settings::SaeOptimizer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Sae;
use crate::ops::fvu::{Sinks, fvu_without, token_mean};
use crate::ops::topk::Fired;
use crate::optim::{AdamW, AdamWConfig, Update, signum::Signum};
use crate::tensor::{DType, Tensor};

/// Longest warm-up of Adam's learning rate, in steps.
const ADAM_WARMUP: u64 = 1000;
const FIRED: &str = "tokens_since_fired";

/// Settings of Stage I training that are not part of the autoencoder itself.
#[derive(Clone, Debug, PartialEq)]
pub struct SaeTrainOptions {
    pub optimizer: SaeOptimizer,
    /// Steps in all, which Adam's learning rate falls to zero at; signum does without.
    pub total_steps: u64,
    /// Learning rate; where `None`, [`SaeOptimizer::default_lr`].
    pub lr: Option<f64>,
    /// Sets b_dec to the first batch's mean before the first step (`scratch` and `finetune`).
    pub center: bool,
    /// Leaves sink tokens (norm of 10 times the batch's median and more) out of training.
    pub exclude_sinks: bool,
    /// Weight of the AuxK loss on dead latents; 0 turns it off.
    pub auxk_alpha: f32,
    /// A latent is dead when it has not fired for more than this many tokens.
    pub dead_after: u32,
}

impl Default for SaeTrainOptions {
    fn default() -> Self {
        Self {
            optimizer: SaeOptimizer::Signum,
            total_steps: 0,
            lr: None,
            center: true,
            exclude_sinks: false,
            auxk_alpha: 0.0,
            dead_after: 10_000_000,
        }
    }
}

/// What one step reports.
#[derive(Clone, Debug, PartialEq)]
pub struct SaeStepMetrics {
    /// Fraction of variance unexplained over the tokens trained on, before the step.
    pub fvu: f64,
    /// The same over tokens that are not sinks; `None` where their variance is zero.
    pub fvu_no_sinks: Option<f64>,
    /// AuxK loss before its weight; `None` where it is off or no latent is dead.
    pub auxk: Option<f64>,
    /// FVU of the reconstruction from 4k latents; `None` where it is off.
    pub multi_topk_fvu: Option<f64>,
    /// Share of latents that are dead after the step.
    pub dead_fraction: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Tokens trained on.
    pub tokens: usize,
}

enum Optimizer {
    Signum(Signum),
    Adam(AdamW),
}

/// Trains one autoencoder. The same calls give the same bits on any number of threads. On a GPU
/// weights and state are kept in its memory from the first step on, and a step copies nothing
/// but scalars to the host.
pub struct SaeTrainer {
    sae: Sae,
    options: SaeTrainOptions,
    optimizer: Optimizer,
    lr: f64,
    steps: u64,
    since_fired: Fired,
}

impl SaeTrainer {
    /// An error where a tensor does not fit the autoencoder's configuration or a setting is
    /// out of range.
    pub fn new(sae: Sae, options: SaeTrainOptions) -> Result<Self> {
        sae.check()?;
        let m = sae.config.num_latents;
        let default_lr = options.optimizer.default_lr(m);
        let lr = options.lr.unwrap_or(default_lr);
        if !(lr > 0.0 && lr.is_finite()) {
            return Err(Error::setting(
                "--sae-lr",
                format!("{lr} is not above zero"),
            ));
        }
        if options.optimizer == SaeOptimizer::Adam && options.total_steps == 0 {
            let what = "adam's schedule needs the number of steps, found 0";
            return Err(Error::setting("--sae-optimizer", what));
        }
        if !(options.auxk_alpha >= 0.0 && options.auxk_alpha.is_finite()) {
            let what = format!("{} is not zero or above", options.auxk_alpha);
            return Err(Error::setting("--auxk-alpha", what));
        }
        if sae.config.multi_topk && sae.config.k.checked_mul(4).is_none_or(|k| k > m) {
            let what = format!("4k latents of only {m} cannot be taken");
            return Err(Error::setting("--multi-topk", what));
        }
        let optimizer = match options.optimizer {
            SaeOptimizer::Signum => Optimizer::Signum(Signum::new(lr as f32)),
            SaeOptimizer::Adam => {
                let config = AdamWConfig {
                    weight_decay: 0.0,
                    ..AdamWConfig::default()
                };
                Optimizer::Adam(AdamW::new(config, sae.tensors())?)
            }
        };
        Ok(Self {
            sae,
            options,
            optimizer,
            lr,
            steps: 0,
            since_fired: Fired::new(m)?,
        })
    }

    /// The weights that are trained (signum's y), not those to save; after a step on a GPU they
    /// are in its memory.
    pub fn sae(&self) -> &Sae {
        &self.sae
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step on activations `x` \[T, d\] f32; bf16 on a GPU, whatever they come in. A loss that is not finite is
    /// [`Error::NotFinite`], and activations without variance are an error; nothing but the
    /// decoder's row norms and the first batch's b_dec has changed then.
    pub fn step(&mut self, device: &Device, x: &Tensor) -> Result<SaeStepMetrics> {
        device.run(|| self.step_on_device(device, x))
    }

    fn step_on_device(&mut self, device: &Device, x: &Tensor) -> Result<SaeStepMetrics> {
        self.sae.move_to(device)?;
        let x = match device {
            Device::Cuda(cuda) => cuda.resident(x, DType::Bf16)?,
            Device::Cpu(_) => x.clone(),
        };
        let sinks = Sinks::of(device, &x)?;
        let (x, sinks) = match self.options.exclude_sinks {
            true => (sinks.without(device, &x)?, Sinks::none(sinks.kept())?),
            false => (x, sinks),
        };
        if self.steps == 0 && self.options.center {
            self.sae.b_dec = token_mean(device, &x)?;
            self.sae.check()?;
        }
        if self.sae.config.normalize_decoder {
            self.sae.normalize_decoder(device)?;
        }
        let dead = match self.options.auxk_alpha > 0.0 {
            true => Some(self.dead(device)?),
            false => None,
        };
        let pass = loss::gradients(device, &self.sae, &x, dead, self.options.auxk_alpha)?;
        let fvu_no_sinks = match sinks.any() {
            true => fvu_without(device, &x, &pass.x_hat, &sinks)?,
            false => Some(pass.fvu),
        };
        let lr = self.current_lr();
        self.update(device, pass.grads, lr)?;
        self.since_fired.record(device, &pass.acts, &pass.indices)?;
        self.steps += 1;
        Ok(SaeStepMetrics {
            fvu: pass.fvu,
            fvu_no_sinks,
            auxk: pass.auxk,
            multi_topk_fvu: pass.multi_topk_fvu,
            dead_fraction: self.dead(device)?.len() as f64 / self.since_fired.latents() as f64,
            lr,
            tokens: x.matrix_dims().0,
        })
    }

    fn update(&mut self, device: &Device, grads: Vec<Tensor>, lr: f64) -> Result<()> {
        let normalized = self.sae.config.normalize_decoder;
        let tensors = self.sae.tensors_mut().into_iter().zip(grads);
        let updates = tensors
            .zip(Sae::TENSORS)
            .map(|((value, grad), name)| Update {
                value,
                grad,
                unit_rows: normalized && name == "W_dec",
            })
            .collect();
        match &mut self.optimizer {
            Optimizer::Signum(signum) => signum.step(device, updates),
            Optimizer::Adam(adam) => adam.step(device, lr, updates),
        }
    }

    /// Learning rate of the next step.
    fn current_lr(&self) -> f64 {
        let total = self.options.total_steps;
        let warmup = ADAM_WARMUP.min(total / 5);
        match self.options.optimizer {
            SaeOptimizer::Signum => self.lr,
            SaeOptimizer::Adam if self.steps < warmup => {
                self.lr * self.steps as f64 / warmup as f64
            }
            SaeOptimizer::Adam => {
                let left = total.saturating_sub(self.steps) as f64;
                self.lr * left / (total - warmup).max(1) as f64
            }
        }
    }

    /// The dead latents, ascending.
    fn dead(&self, device: &Device) -> Result<Tensor> {
        self.since_fired.dead(device, self.options.dead_after)
    }

    /// The autoencoder to save: signum's averaged weights (decoder rows as they come out, not
    /// renormalised), or Adam's weights; in host memory.
    pub fn averaged(&self) -> Result<Sae> {
        let mut sae = self.sae.clone();
        for (i, tensor) in sae.tensors_mut().into_iter().enumerate() {
            *tensor = match &self.optimizer {
                Optimizer::Signum(signum) => signum.averaged(i, tensor)?,
                Optimizer::Adam(_) => tensor.clone(),
            }
            .to_f32()?;
        }
        Ok(sae)
    }

    /// Everything that [`Self::restore`] needs to go on to the same bits: named tensors, in
    /// host memory, and a JSON object.
    pub fn state(&self) -> Result<(Vec<(String, Tensor)>, Value)> {
        let groups: Vec<(&str, &[Tensor])> = match &self.optimizer {
            Optimizer::Signum(signum) => vec![("z", signum.z())],
            Optimizer::Adam(adam) => {
                let (first, second) = adam.moments();
                vec![("first_moment", first), ("second_moment", second)]
            }
        };
        let mut tensors = Vec::new();
        for (name, tensor) in Sae::TENSORS.iter().zip(self.sae.tensors()) {
            tensors.push((name.to_string(), tensor.to_f32()?));
        }
        for (prefix, group) in &groups {
            for (name, tensor) in Sae::TENSORS.iter().zip(*group) {
                tensors.push((format!("{prefix}.{name}"), tensor.to_f32()?));
            }
        }
        tensors.push((FIRED.to_owned(), self.since_fired.counts()?));
        Ok((
            tensors,
            json!({ "optimizer": self.kind(), "steps": self.steps }),
        ))
    }

    /// Takes over a state made by [`Self::state`] of a trainer with the same options. An error
    /// names what is missing or does not fit; the trainer is unchanged then.
    pub fn restore(&mut self, mut tensors: BTreeMap<String, Tensor>, json: &Value) -> Result<()> {
        let steps = json["steps"]
            .as_u64()
            .ok_or_else(|| mismatch("a number of steps", json["steps"].to_string()))?;
        if json["optimizer"] != self.kind() {
            let expected = format!("optimizer {}", self.kind());
            return Err(mismatch(&expected, json["optimizer"].to_string()));
        }
        let weights = [
            take(&mut tensors, "encoder.weight")?,
            take(&mut tensors, "encoder.bias")?,
            take(&mut tensors, "W_dec")?,
            take(&mut tensors, "b_dec")?,
        ];
        let sae = Sae::new(self.sae.config.clone(), weights);
        sae.check()?;
        let fired = take(&mut tensors, FIRED)?;
        let latents = self.since_fired.latents();
        if fired.len() != latents || fired.dtype() != DType::U32 {
            let expected = format!("{FIRED} of {latents} latents");
            return Err(mismatch(&expected, format!("{}", fired.len())));
        }
        let mut group = |prefix: &str| like(&mut tensors, prefix, &sae);
        match &mut self.optimizer {
            Optimizer::Signum(signum) => {
                // z begins with the first step.
                let z = if steps == 0 { Vec::new() } else { group("z")? };
                *signum = Signum::restored(self.lr as f32, steps, z);
            }
            Optimizer::Adam(adam) => {
                adam.restore(steps, group("first_moment")?, group("second_moment")?)?;
            }
        }
        self.sae = sae;
        self.since_fired.restore(fired)?;
        self.steps = steps;
        Ok(())
    }

    fn kind(&self) -> &'static str {
        match self.optimizer {
            Optimizer::Signum(_) => "signum",
            Optimizer::Adam(_) => "adam",
        }
    }
}

fn mismatch(expected: &str, got: String) -> Error {
    Error::operand("state of stage 1", expected, got)
}

fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    let found = tensors.remove(name);
    found.ok_or_else(|| mismatch(&format!("tensor {name}"), "no such tensor".into()))
}

/// The optimizer's tensors of one kind, each of its parameter's shape.
fn like(tensors: &mut BTreeMap<String, Tensor>, prefix: &str, sae: &Sae) -> Result<Vec<Tensor>> {
    let parameters = Sae::TENSORS.iter().zip(sae.tensors());
    parameters
        .map(|(name, parameter)| {
            let name = format!("{prefix}.{name}");
            let tensor = take(tensors, &name)?;
            if tensor.shape() == parameter.shape() && tensor.dtype() == parameter.dtype() {
                return Ok(tensor);
            }
            let expected = format!("{name} of shape {:?}", parameter.shape());
            Err(mismatch(&expected, format!("{:?}", tensor.shape())))
        })
        .collect()
}

#[cfg(test)]
mod tests;
