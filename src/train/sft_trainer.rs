//! Stage II, one step at a time: adapters learn so that the model with the SAE inserted gives
//! what the model alone gives (Resa, arXiv 2506.09967; adapters for SAEs: arXiv 2501.19406), or,
//! as the baseline, so that it gives the answers.

use std::ops::Range;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{Adapters, Layout, Lora, Module, Qwen2, Sae, StepDropout};
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::kl_div::KlDiv;
use crate::optim::{AdamW, AdamWConfig, Update, clip_grad_norm};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Where the student's forward pass begins.
pub enum Student<'a> {
    /// At the SAE's reconstruction \[T, d\] of layer `layer`'s output: no gradient passes the SAE.
    Reconstruction { x: Tensor, layer: usize },
    /// At the token ids, through an SAE that gradients pass.
    ThroughSae {
        ids: Tensor,
        sae: &'a Sae,
        layer: usize,
    },
    /// At the token ids, without an SAE.
    Plain { ids: Tensor },
}

/// What the student is to match.
pub enum Target {
    /// The teacher's hidden states \[T, d\] after the final norm; the KL divergence of the logits
    /// is summed over tokens and divided by `batch`.
    Teacher { hidden: Tensor, batch: f32 },
    /// The next tokens, where they count.
    Tokens(Vec<Option<u32>>),
}

/// A part of a step whose gradients are computed at once.
pub struct MicroBatch<'a> {
    /// How the tokens lie.
    pub layout: Layout,
    /// What is computed.
    pub student: Student<'a>,
    /// What it is compared with.
    pub target: Target,
}

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
pub struct SftTrainer {
    lora: Lora,
    /// The adapters that get gradients, in the optimizer's order.
    trained: Vec<(usize, Module)>,
    optimizer: AdamW,
    options: SftOptions,
}

impl SftTrainer {
    /// Trains those of `lora`'s adapters that sit on `layers`; the others act unchanged where
    /// the student's forward pass goes through them.
    pub fn new(
        device: &Device,
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
            lora,
            trained,
            optimizer,
            options,
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
    pub fn step<'a>(
        &mut self,
        device: &Device,
        model: &Qwen2,
        count: usize,
        mut micro_batch: impl FnMut(usize) -> Result<MicroBatch<'a>>,
    ) -> Result<SftStep> {
        let mut loss = 0.0;
        let mut sums: Vec<Tensor> = Vec::new();
        for i in 0..count {
            let dropout = StepDropout {
                p: self.options.dropout,
                seed: self.options.seed,
                // The last step of an epoch may have fewer micro-batches: no two share a number.
                step: self.step_count() << 32 | i as u64,
            };
            let (value, grads) =
                self.gradients(device, model, micro_batch(i)?, dropout, 1.0 / count as f32)?;
            loss += value / count as f64;
            if sums.is_empty() {
                sums = grads;
            } else {
                for (sum, grad) in sums.iter_mut().zip(&grads) {
                    device.add_assign(sum, grad)?;
                }
            }
        }
        let mut grads: Vec<_> = sums.iter_mut().collect();
        let grad_norm = clip_grad_norm(device, &mut grads, self.options.clip)?;
        if !grad_norm.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the gradient norm is {grad_norm}"),
            });
        }
        self.update(device, sums)?;
        Ok(SftStep { loss, grad_norm })
    }

    /// The loss of a micro-batch and the gradients of A and B of each trained adapter.
    fn gradients(
        &self,
        device: &Device,
        model: &Qwen2,
        micro: MicroBatch,
        dropout: StepDropout,
        seed: f32,
    ) -> Result<(f64, Vec<Tensor>)> {
        let mut tape = Tape::new(device);
        let layers = match self.trained.first() {
            Some(&(first, _)) => first..model.layers.len(),
            None => 0..0,
        };
        let adapters = Adapters::trained(&mut tape, &self.lora, layers, Some(dropout));
        let hidden = forward(&mut tape, model, &micro.layout, micro.student, &adapters)?;
        let hidden = model.final_norm(&mut tape, &hidden)?;
        let head = model.lm_head.clone();
        let loss = match micro.target {
            Target::Teacher {
                hidden: teacher,
                batch,
            } => tape.apply(
                KlDiv {
                    teacher,
                    head,
                    batch,
                },
                &[&hidden],
            )?,
            Target::Tokens(targets) => tape
                .apply_all(CrossEntropy { targets, head }, &[&hidden])?
                .swap_remove(0),
        };
        drop(hidden);
        let value = loss.value().f32s()?[0].into();
        let mut grads = tape.backward(&loss, seed)?;
        let mut factors = Vec::with_capacity(2 * self.trained.len());
        for ((layer, module), (a, b)) in adapters.pairs() {
            for factor in [a, b] {
                factors.push(grads.take(factor).ok_or_else(|| {
                    let name = format!("a gradient of layer {layer}'s {}", module.name());
                    Error::operand("lora", name, "none")
                })?);
            }
        }
        Ok((value, factors))
    }

    fn update(&mut self, device: &Device, grads: Vec<Tensor>) -> Result<()> {
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
            .step(device, self.options.lr, updates.collect())
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
        device: &Device,
        steps: u64,
        mut take: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<()> {
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

/// The student's hidden states before the final norm.
fn forward(
    tape: &mut Tape,
    model: &Qwen2,
    layout: &Layout,
    student: Student,
    adapters: &Adapters,
) -> Result<Var> {
    let layers = model.layers.len();
    match student {
        Student::Reconstruction { x, layer } => model.decode(
            tape,
            Var::constant(x),
            layer + 1..layers,
            layout,
            Some(adapters),
        ),
        Student::ThroughSae { ids, sae, layer } => {
            let x = model.embed(tape, ids)?;
            let x = model.decode(tape, x, 0..layer + 1, layout, Some(adapters))?;
            let x = sae.pass_through(tape, &x)?;
            model.decode(tape, x, layer + 1..layers, layout, Some(adapters))
        }
        Student::Plain { ids } => {
            let x = model.embed(tape, ids)?;
            model.decode(tape, x, 0..layers, layout, Some(adapters))
        }
    }
}
