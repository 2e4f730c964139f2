//! Stage II: adapters of the target model learn to undo what the frozen SAE costs.
//!
//! No gradient passes the SAE, so adapters up to its layer never learn. That layer's output, its
//! reconstruction and the teacher's final hidden state are therefore the same in every epoch:
//! computed once, by one pass for teacher and student together, and kept.

use std::time::Instant;

use super::frozen::Frozen;
use super::inputs::batch;
use super::metrics::{StepMetrics, StepStage};
use super::row_cache::{CacheSpace, RowCache};
use super::schedule::{Schedule, StepRows};
use super::session::{Session, StageState};
use super::sft_trainer::{MicroBatch, SftOptions, SftStep, SftTrainer, Student, Target};
use super::{Event, Method, SaeGrad, TrainConfig};
use crate::data::{Packed, order};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft;
use crate::model::{Adapters, Layout, Lora, Qwen2, Sae};
use crate::ops::fvu;
use crate::tape::{Tape, Var};

pub(super) struct StageTwo<'a> {
    pub device: &'a Device,
    pub model: &'a Qwen2,
    pub packed: &'a Packed,
    /// The frozen SAE and its layer; none for the supervised baseline.
    pub sae: Option<(&'a Sae, usize)>,
    pub schedule: Schedule,
    /// What the caches of both stages may take together.
    pub space: CacheSpace<'a>,
    /// An adapter to start from.
    pub adapter: Option<Lora>,
}

/// What Stage II leaves.
pub(super) struct Tuned {
    pub lora: Lora,
    /// Loss a token at the start and at the end: means over up to ten steps, where this process
    /// ran them.
    pub loss: Option<(f64, f64)>,
}

/// What is computed of a row once: the student's input after the SAE (where no gradient passes
/// it), the teacher's final hidden state, and how well the SAE reconstructs.
struct Teacher<'a> {
    stage: &'a StageTwo<'a>,
    /// The model up to the SAE's layer.
    frozen: Frozen<'a>,
    sae: &'a Sae,
    layer: usize,
    /// Adapters of the layers up to the SAE's, where the start adapter has some that act.
    prefix: Option<Adapters>,
    through: bool,
    layout: Layout,
    cache: RowCache,
    mse: Vec<f64>,
}

impl StageTwo<'_> {
    /// Tunes and saves. `activations`, where given, holds outputs of the SAE's layer from Stage I.
    pub fn run(&self, session: &mut Session, activations: Option<RowCache>) -> Result<Tuned> {
        let config = session.config;
        let (lora, first) = self.start_adapter(config)?;
        let options = SftOptions {
            lr: config.lr,
            weight_decay: config.weight_decay,
            clip: config.clip,
            dropout: lora.config.dropout,
            seed: config.seed,
        };
        let space = match &activations {
            Some(stage_one) => self.space.beside(stage_one),
            None => self.space,
        };
        let mut teacher = self.teacher(space, &lora, first, config)?;
        let layers = first..self.model.layers.len();
        let mut trainer = SftTrainer::new(self.device, self.model, lora, layers, options)?;
        let mut activations = activations;
        let start = match session.take_state(StepStage::Sft) {
            Some(StageState {
                step, mut tensors, ..
            }) => {
                trainer.restore(step, |name| {
                    tensors.remove(name).ok_or_else(|| {
                        Error::operand("checkpoint", format!("tensor {name}"), "none")
                    })
                })?;
                step
            }
            None => 0,
        };
        let name = match config.method {
            Method::SaeTuning => "Stage II: SAE-guided adapters",
            Method::Sft => "Supervised baseline: adapters on answers",
        };
        let steps = self.schedule.steps;
        session.tell(Event::Phase {
            name: name.to_owned(),
            steps,
            done: start,
        });
        let layout = Layout::new(&self.model.config, config.sft_batch, self.packed.seq_len)?;
        let mut losses = Vec::new();
        let mut rows_of = StepRows::new(self.schedule, config.shuffle.then_some(config.seed));
        let mut upcoming = rows_of.of(start).to_vec();
        for step in start..steps {
            session.check_cancelled()?;
            let began = Instant::now();
            let rows = std::mem::replace(&mut upcoming, rows_of.of(step + 1).to_vec());
            let micro: Vec<&[usize]> = rows.chunks(config.sft_batch).collect();
            // What the step after this one begins with.
            let next = upcoming.chunks(config.sft_batch).next();
            let measured = self.device.run(|| {
                trainer.step(micro.len(), |i| match &mut teacher {
                    Some(teacher) => {
                        let made = teacher.micro_batch(micro[i], activations.as_mut())?;
                        if let Some(rows) = micro.get(i + 1).copied().or(next) {
                            teacher.cache.prefetch(rows)?;
                        }
                        Ok(made)
                    }
                    None => self.supervised(micro[i], &layout),
                })
            })?;
            let seconds = began.elapsed().as_secs_f64();
            let metrics = self.metrics(config, step, &rows, measured, seconds, teacher.as_ref());
            losses.extend(metrics.kl_per_token.or(metrics.loss));
            session.record(metrics)?;
            session.step_done(StepStage::Sft, step + 1, step + 1 == steps, || {
                Ok((trainer.tensors(), serde_json::Value::Null))
            })?;
            if let (Some(teacher), Some(_)) = (&mut teacher, &activations)
                && teacher.cache.is_complete()?
            {
                // From here on all comes from the teacher's own cache.
                activations = None;
            }
        }
        let dir = session.run.adapter_dir();
        peft::save(&dir, trainer.lora())?;
        session.tell(Event::Saved(dir));
        Ok(Tuned {
            lora: trainer.lora().to_host()?,
            loss: ends(&losses),
        })
    }

    /// The adapter to start from and the first layer that is trained.
    fn start_adapter(&self, config: &TrainConfig) -> Result<(Lora, usize)> {
        let first = match self.sae {
            Some((_, layer)) if config.sae_grad == SaeGrad::Stop => layer + 1,
            _ => 0,
        };
        let layers = first..self.model.layers.len();
        let lora = match &self.adapter {
            Some(adapter) => {
                let mut lora = adapter.clone();
                lora.config.dropout = config.lora_dropout as f32;
                lora
            }
            None => Lora::new(config.lora(), &self.model.config, layers, config.seed)?,
        };
        let base_model = config
            .target
            .clone()
            .unwrap_or_else(|| lora.base_model.clone());
        Ok((Lora { base_model, ..lora }, first))
    }

    fn teacher(
        &self,
        space: CacheSpace,
        lora: &Lora,
        first: usize,
        config: &TrainConfig,
    ) -> Result<Option<Teacher<'_>>> {
        let Some((sae, layer)) = self.sae else {
            return Ok(None);
        };
        let acts = |(&(l, _), pair): (&(usize, _), &crate::model::LoraPair)| {
            l < first && pair.b.f32s().is_ok_and(|b| b.iter().any(|&v| v != 0.0))
        };
        let prefix = lora.pairs.iter().any(acts).then(|| Adapters::frozen(lora));
        let seed = config.shuffle.then_some(config.seed);
        let width = self.model.config.hidden_size;
        let through = config.sae_grad == SaeGrad::Through;
        let parts = if through { 1 } else { 2 };
        let cache = RowCache::new(
            self.device,
            &order(self.packed.rows(), seed, 0),
            config.sft_batch,
            [parts, self.packed.seq_len, width],
            self.schedule.repeats().then_some(space),
        )?;
        let layout = Layout::new(&self.model.config, config.sft_batch, self.packed.seq_len)?;
        let mse = vec![f64::NAN; self.packed.rows()];
        Ok(Some(Teacher {
            stage: self,
            frozen: Frozen::new(self.device, self.model, self.packed, vec![layer]),
            sae,
            layer,
            prefix,
            through,
            layout,
            cache,
            mse,
        }))
    }

    fn supervised(&self, rows: &[usize], layout: &Layout) -> Result<MicroBatch<'static>> {
        let (ids, layout) = batch(self.packed, rows, layout)?;
        let layout = layout.on(self.device)?;
        let mut targets = Vec::with_capacity(ids.len());
        for &row in rows {
            let (ids, in_answer) = (self.packed.row(row), self.packed.row_answer_mask(row));
            let next = ids.iter().zip(in_answer).skip(1);
            targets.extend(next.map(|(&id, &counts)| counts.then_some(id)));
            targets.push(None);
        }
        let target = Target::Tokens(targets);
        Ok(MicroBatch {
            layout,
            student: Student::Plain { ids },
            target,
        })
    }

    fn metrics(
        &self,
        config: &TrainConfig,
        step: u64,
        rows: &[usize],
        measured: SftStep,
        seconds: f64,
        teacher: Option<&Teacher>,
    ) -> StepMetrics {
        let tokens = rows.len() * self.packed.seq_len;
        let common = StepMetrics {
            epoch: (step + 1) as f64 / self.schedule.steps_per_epoch as f64,
            tokens: self.schedule.rows_until(step + 1) * self.packed.seq_len as u64,
            seconds,
            tokens_per_s: tokens as f64 / seconds,
            lr: config.lr,
            grad_norm: Some(measured.grad_norm),
            ..StepMetrics::new(StepStage::Sft, step + 1)
        };
        match teacher {
            Some(teacher) => StepMetrics {
                kl: Some(measured.loss),
                kl_per_token: Some(measured.loss / self.packed.seq_len as f64),
                sae_mse: Some(
                    rows.iter().map(|&r| teacher.mse[r]).sum::<f64>() / rows.len() as f64,
                ),
                ..common
            },
            None => StepMetrics {
                loss: Some(measured.loss),
                ..common
            },
        }
    }
}

impl<'a> Teacher<'a> {
    fn micro_batch(
        &mut self,
        rows: &[usize],
        activations: Option<&mut RowCache>,
    ) -> Result<MicroBatch<'a>> {
        let Self {
            stage,
            frozen,
            sae,
            layer,
            prefix,
            through,
            layout,
            cache,
            mse,
        } = self;
        let (sae, layer, through) = (*sae, *layer, *through);
        let mut activations = activations;
        let mut parts = cache.get(rows, |rows| {
            let x = match activations.as_deref_mut() {
                Some(stage_one) => stage_one.get(rows, |rows| frozen.outputs(rows, layout))?,
                None => frozen.outputs(rows, layout)?,
            }
            .swap_remove(0);
            let reconstruction = sae.reconstruct(stage.device, &x)?;
            let errors = fvu::mse(stage.device, &x, &reconstruction, rows.len())?;
            for (&row, error) in rows.iter().zip(errors) {
                mse[row] = error;
            }
            let (ids, layout) = batch(stage.packed, rows, layout)?;
            let layout = layout.on(stage.device)?;
            let student = match prefix {
                Some(adapters) if !through => {
                    let mut tape = Tape::new(stage.device);
                    let x = stage.model.embed(&mut tape, ids)?;
                    let x =
                        stage
                            .model
                            .decode(&mut tape, x, 0..layer + 1, &layout, Some(adapters))?;
                    sae.reconstruct(stage.device, x.value())?
                }
                _ => reconstruction,
            };
            let mut tape = Tape::new(stage.device);
            let layers = layer + 1..stage.model.layers.len();
            let hidden = stage
                .model
                .decode(&mut tape, Var::constant(x), layers, &layout, None)?;
            let hidden = stage.model.final_norm(&mut tape, &hidden)?.into_value();
            Ok(if through {
                vec![hidden]
            } else {
                vec![hidden, student]
            })
        })?;
        let (ids, layout) = batch(stage.packed, rows, layout)?;
        let layout = layout.on(stage.device)?;
        let student = match through {
            true => Student::ThroughSae { ids, sae, layer },
            false => Student::Reconstruction {
                x: parts.swap_remove(1),
                layer,
            },
        };
        let target = Target::Teacher {
            hidden: parts.swap_remove(0),
            batch: rows.len() as f32,
        };
        Ok(MicroBatch {
            layout,
            student,
            target,
        })
    }
}

/// Means over the first and over the last steps, ten of them at most.
fn ends(losses: &[f64]) -> Option<(f64, f64)> {
    let n = losses.len().min(10);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    (n > 0).then(|| (mean(&losses[..n]), mean(&losses[losses.len() - n..])))
}
