//! Stage I: SAEs learn the activations of the source model, at one or several hookpoints in one
//! pass over the data.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::frozen::Frozen;
use super::metrics::{StepMetrics, StepStage};
use super::row_cache::RowCache;
use super::sae_trainer::{SaeTrainOptions, SaeTrainer};
use super::schedule::{Schedule, StepRows};
use super::session::{Session, StageState};
use super::settings::hookpoint_name;
use super::{Event, SaeInit, TrainConfig};
use crate::data::Packed;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::sparsify;
use crate::model::{Layout, Qwen2, Sae, SaeConfig};
use crate::tensor::Tensor;

pub(super) struct StageOne<'a> {
    pub device: &'a Device,
    pub model: &'a Qwen2,
    pub packed: &'a Packed,
    /// Folder of the SAEs to start from, where one is given.
    pub start: Option<&'a Path>,
    /// Layers whose output is learnt, ascending.
    pub hookpoints: &'a [usize],
    pub schedule: Schedule,
}

/// One SAE in training.
struct Hook {
    layer: usize,
    trainer: SaeTrainer,
    /// Lowest mean FVU of a checkpoint's interval so far.
    best: f64,
    /// Sum of FVU and number of steps since the last checkpoint.
    interval: (f64, u64),
}

/// What Stage I leaves.
pub(super) struct Trained {
    /// The SAE of each hookpoint, as saved.
    pub saes: Vec<(usize, Sae)>,
    /// FVU of the first and of the last step of each hookpoint, where this process ran them.
    pub fvu: Vec<(usize, f64, f64)>,
}

impl StageOne<'_> {
    /// Trains and saves. `activations` gives layer outputs, one part a hookpoint.
    pub fn run(&self, session: &mut Session, activations: &mut RowCache) -> Result<Trained> {
        let config = session.config;
        let mut hooks = self.hooks(config)?;
        let start = match session.take_state(StepStage::Sae) {
            Some(state) => restore(&mut hooks, state)?,
            None => 0,
        };
        let name = "Stage I: sparse autoencoder".to_owned();
        session.tell(Event::Phase {
            name,
            steps: self.schedule.steps,
            done: start,
        });
        let layout = Layout::new(&self.model.config, config.sae_batch, self.packed.seq_len)?;
        let mut frozen = Frozen::new(
            self.device,
            self.model,
            self.packed,
            self.hookpoints.to_vec(),
        );
        let mut rows = StepRows::new(self.schedule, config.shuffle.then_some(config.seed));
        let mut fvu = Vec::new();
        for step in start..self.schedule.steps {
            session.check_cancelled()?;
            let began = Instant::now();
            let rows = rows.of(step);
            let outputs = self
                .device
                .run(|| activations.get(rows, |rows| frozen.outputs(rows, &layout)))?;
            let mut measured = Vec::new();
            for (hook, x) in hooks.iter_mut().zip(&outputs) {
                let metrics = hook.trainer.step(self.device, x)?;
                hook.interval.0 += metrics.fvu;
                hook.interval.1 += 1;
                measured.push(metrics);
            }
            let seconds = began.elapsed().as_secs_f64();
            let tokens = rows.len() * self.packed.seq_len;
            for (i, (hook, m)) in hooks.iter().zip(&measured).enumerate() {
                if fvu.len() <= i {
                    fvu.push((hook.layer, m.fvu, m.fvu));
                }
                fvu[i].2 = m.fvu;
                session.record(StepMetrics {
                    epoch: (step + 1) as f64 / self.schedule.steps_per_epoch as f64,
                    tokens: self.schedule.rows_until(step + 1) * self.packed.seq_len as u64,
                    seconds,
                    tokens_per_s: tokens as f64 / seconds,
                    lr: m.lr,
                    hookpoint: Some(hookpoint_name(hook.layer)),
                    fvu: Some(m.fvu),
                    fvu_no_sinks: m.fvu_no_sinks,
                    dead_fraction: Some(m.dead_fraction),
                    ..StepMetrics::new(StepStage::Sae, step + 1)
                })?;
            }
            let done = step + 1;
            if done.is_multiple_of(config.checkpoint_every as u64) || done == self.schedule.steps {
                save_best(session, &mut hooks)?;
            }
            let is_last = done == self.schedule.steps;
            session.step_done(StepStage::Sae, done, is_last, || state(&hooks))?;
        }
        let saes = self.save(session, &hooks)?;
        Ok(Trained { saes, fvu })
    }

    fn hooks(&self, config: &TrainConfig) -> Result<Vec<Hook>> {
        let hooks = self.hookpoints.iter().map(|&layer| {
            let sae = start_sae(self.device, config, self.start, &self.model.config, layer)?;
            let options = SaeTrainOptions {
                optimizer: config.sae_optimizer,
                total_steps: self.schedule.steps,
                lr: config.sae_lr,
                exclude_sinks: config.exclude_sinks,
                auxk_alpha: config.auxk_alpha as f32,
                ..SaeTrainOptions::default()
            };
            let trainer = SaeTrainer::new(sae, options)?;
            Ok(Hook {
                layer,
                trainer,
                best: f64::INFINITY,
                interval: (0.0, 0),
            })
        });
        hooks.collect()
    }

    fn save(&self, session: &mut Session, hooks: &[Hook]) -> Result<Vec<(usize, Sae)>> {
        let mut saes = Vec::new();
        for hook in hooks {
            let sae = hook.trainer.averaged()?;
            let dir = session.run.sae_dir(hook.layer);
            sparsify::save(&dir, &sae)?;
            session.tell(Event::Saved(dir));
            saes.push((hook.layer, sae));
        }
        Ok(saes)
    }
}

/// The SAE that a stage starts from.
pub(super) fn start_sae(
    device: &Device,
    config: &TrainConfig,
    root: Option<&Path>,
    model: &crate::model::Qwen2Config,
    layer: usize,
) -> Result<Sae> {
    let d = model.hidden_size;
    if config.sae_init == SaeInit::Scratch {
        let sae = SaeConfig {
            d_in: d,
            num_latents: config.latents_for(d)?,
            k: config.k,
            expansion_factor: config.expansion,
            normalize_decoder: true,
            multi_topk: config.multi_topk,
        };
        return Sae::scratch(device, sae, config.seed, layer as u32);
    }
    let root = root.ok_or_else(|| {
        Error::setting(
            "--sae",
            "expected the folder of an SAE to start from, found none",
        )
    })?;
    sparsify::load_at(root, layer, model)
}

/// Saves each SAE whose mean FVU since the last look is the lowest so far.
fn save_best(session: &mut Session, hooks: &mut [Hook]) -> Result<()> {
    for hook in hooks {
        let (sum, steps) = std::mem::take(&mut hook.interval);
        let mean = sum / steps.max(1) as f64;
        if mean < hook.best {
            hook.best = mean;
            let dir = session
                .run
                .path()
                .join("sae")
                .join("best")
                .join(hookpoint_name(hook.layer));
            sparsify::save(&dir, &hook.trainer.averaged()?)?;
        }
    }
    Ok(())
}

fn state(hooks: &[Hook]) -> Result<(Vec<(String, Tensor)>, Value)> {
    let (mut tensors, mut states) = (Vec::new(), Vec::new());
    for hook in hooks {
        let (own, state) = hook.trainer.state()?;
        tensors.extend(
            own.into_iter()
                .map(|(name, t)| (format!("{}.{name}", hook.layer), t)),
        );
        // JSON has no infinity; `best` is one before the first interval.
        let best = hook.best.is_finite().then_some(hook.best.to_bits());
        states.push(json!({
            "layer": hook.layer, "trainer": state, "best_bits": best,
            "interval_sum_bits": hook.interval.0.to_bits(), "interval_steps": hook.interval.1,
        }));
    }
    Ok((tensors, Value::Array(states)))
}

/// Puts the SAEs where a checkpoint left them; the step to go on with.
fn restore(hooks: &mut [Hook], saved: StageState) -> Result<u64> {
    let StageState {
        step,
        mut tensors,
        state,
    } = saved;
    for (i, hook) in hooks.iter_mut().enumerate() {
        let prefix = format!("{}.", hook.layer);
        let names: Vec<_> = tensors
            .keys()
            .filter(|n| n.starts_with(&prefix))
            .cloned()
            .collect();
        let own = names
            .into_iter()
            .filter_map(|n| Some((n[prefix.len()..].to_owned(), tensors.remove(&n)?)))
            .collect();
        let state = &state[i];
        hook.trainer.restore(own, &state["trainer"])?;
        hook.best = state["best_bits"]
            .as_u64()
            .map_or(f64::INFINITY, f64::from_bits);
        let sum = state["interval_sum_bits"]
            .as_u64()
            .map_or(0.0, f64::from_bits);
        hook.interval = (sum, state["interval_steps"].as_u64().unwrap_or(0));
    }
    Ok(step)
}
