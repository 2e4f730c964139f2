//! Stage II, one step at a time: adapters learn so that the model with the SAE inserted gives
//! what the model alone gives (Resa, arXiv 2506.09967; adapters for SAEs: arXiv 2501.19406), or,
//! as the baseline, so that it gives the answers.

mod student;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use student::{MicroBatch, Student, Target};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{Lora, Module, Qwen2, StepDropout};
use crate::optim::{AdamW, AdamWConfig, Update, clip_grad_norm};
use crate::tensor::Tensor;
use student::StudentPass;

/// Settings of Stage II's optimisation.
#[derive(Clone, Copy, Debug)]
pub struct SftOptions {
    /// Learning rate, constant.
    pub lr: f64,
    /// As in [`AdamWConfig`].
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub clip: f64,
    /// Dropout on the adapters' inputs.
    pub dropout: f32,
    /// Seed of the dropout masks.
    pub seed: u64,
}

/// What a step measured.
#[derive(Clone, Copy, Debug)]
pub struct SftStep {
    /// Mean over micro-batches of the loss.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// Adapters in training and their optimizer.
pub struct SftTrainer<'a> {
    device: &'a Device,
    lora: Lora,
    /// The adapters that get gradients, in the optimizer's order.
    trained: Vec<(usize, Module)>,
    optimizer: AdamW,
    options: SftOptions,
    pass: StudentPass<'a>,
}

impl<'a> SftTrainer<'a> {
    /// Trains those of `lora`'s adapters to `model` that sit on `layers`; the others act unchanged,
    /// without dropout, where the student's forward pass goes through them.
    pub fn new(
        device: &'a Device,
        model: &'a Qwen2,
        mut lora: Lora,
        layers: Range<usize>,
        options: SftOptions,
    ) -> Result<Self> {
        let trained: Vec<_> = lora
            .pairs
            .keys()
            .copied()
            .filter(|(layer, _)| layers.contains(layer))
            .collect();
        if trained.is_empty() {
            return Err(Error::setting(
                "--lora-targets",
                format!("no adapter sits on a layer that is trained ({layers:?})"),
            ));
        }
        for pair in lora.pairs.values_mut() {
            pair.a = device.resident(&pair.a)?;
            pair.b = device.resident(&pair.b)?;
        }
        let config = AdamWConfig {
            weight_decay: options.weight_decay,
            ..AdamWConfig::default()
        };
        let factors = trained.iter().flat_map(|key| {
            let pair = &lora.pairs[key];
            [&pair.a, &pair.b]
        });
        let optimizer = AdamW::new(config, factors)?;
        Ok(Self {
            device,
            lora,
            trained,
            optimizer,
            options,
            pass: StudentPass::new(device, model, layers),
        })
    }

    /// The adapters as they are now, in the memory of the device.
    pub fn lora(&self) -> &Lora {
        &self.lora
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.optimizer.steps()
    }

    /// One optimizer step over `count` micro-batches, made one after another by `micro_batch`.
    pub fn step<'m>(
        &mut self,
        count: usize,
        mut micro_batch: impl FnMut(usize) -> Result<MicroBatch<'m>>,
    ) -> Result<SftStep> {
        let mut loss = 0.0;
        let mut sums: Vec<Tensor> = Vec::new();
        for i in 0..count {
            let dropout = StepDropout {
                p: self.options.dropout,
                seed: self.options.seed,
                // The last step of an epoch may have fewer micro-batches: no two share a number.
                step: self.step_count() << 32 | i as u64,
                in_memory: None,
            };
            let (micro, share) = (micro_batch(i)?, 1.0 / count as f32);
            loss += self.pass.run(&self.lora, micro, dropout, share)? / count as f64;
            if count > 1 {
                self.pass.add_gradients(&mut sums)?;
            }
        }
        let grads = match sums.is_empty() {
            true => self.pass.gradients(),
            false => &mut sums,
        };
        let mut grads: Vec<_> = grads.iter_mut().collect();
        let grad_norm = clip_grad_norm(self.device, &mut grads, self.options.clip)?;
        if !grad_norm.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the gradient norm is {grad_norm}"),
            });
        }
        let grads = match sums.is_empty() {
            true => self.pass.take_gradients(),
            false => sums,
        };
        self.update(grads)?;
        Ok(SftStep { loss, grad_norm })
    }

    fn update(&mut self, grads: Vec<Tensor>) -> Result<()> {
        let trained = &self.trained;
        let factors = self
            .lora
            .pairs
            .iter_mut()
            .filter(|(key, _)| trained.binary_search(key).is_ok())
            .flat_map(|(_, pair)| [&mut pair.a, &mut pair.b]);
        let updates = factors.zip(grads).map(|(value, grad)| Update {
            value,
            grad,
            unit_rows: false,
        });
        self.optimizer
            .step(self.device, self.options.lr, updates.collect())
    }

    /// The adapters and the optimizer's moments by name; with the step count all that a
    /// checkpoint needs.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for ((layer, module), pair) in &self.lora.pairs {
            tensors.push((format!("lora.{layer}.{}.a", module.name()), pair.a.clone()));
            tensors.push((format!("lora.{layer}.{}.b", module.name()), pair.b.clone()));
        }
        let (first, second) = self.optimizer.moments();
        for (i, (first, second)) in first.iter().zip(second).enumerate() {
            tensors.push((format!("adamw.{i}.first"), first.clone()));
            tensors.push((format!("adamw.{i}.second"), second.clone()));
        }
        tensors
    }

    /// Goes on from a checkpoint: `take` gives the tensor of a name.
    pub fn restore(
        &mut self,
        steps: u64,
        mut take: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<()> {
        let device = self.device;
        for ((layer, module), pair) in &mut self.lora.pairs {
            for (factor, letter) in [(&mut pair.a, 'a'), (&mut pair.b, 'b')] {
                let saved = take(&format!("lora.{layer}.{}.{letter}", module.name()))?;
                crate::ops::expect_shape("checkpoint", &saved, factor.shape())?;
                *factor = device.resident(&saved)?;
            }
        }
        let mut moments = |which: &str| {
            let names = (0..2 * self.trained.len()).map(|i| format!("adamw.{i}.{which}"));
            names
                .map(|name| device.resident(&take(&name)?))
                .collect::<Result<Vec<_>>>()
        };
        let (first, second) = (moments("first")?, moments("second")?);
        self.optimizer.restore(steps, first, second)
    }
}
