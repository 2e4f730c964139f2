//! What both stages share while a run goes on: its folder, metrics, checkpoints and the caller.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{self, Snapshot};
use super::{CancelFlag, Event, MetricsLog, Observer, RunDir, StepMetrics, StepStage, TrainConfig};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// How far a run has come: the JSON part of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Position {
    stage: StepStage,
    /// Steps of that stage.
    step: u64,
    /// Steps of both stages.
    total_steps: u64,
    /// Length of metrics.jsonl.
    metrics_offset: u64,
    /// What the stage keeps beside tensors.
    stage_state: Value,
}

/// A stage's part of a checkpoint.
pub(super) struct StageState {
    pub step: u64,
    pub tensors: BTreeMap<String, Tensor>,
    pub state: Value,
}

pub(super) struct Session<'a> {
    pub config: &'a TrainConfig,
    pub run: RunDir,
    metrics: MetricsLog,
    pub observer: &'a mut dyn Observer,
    cancel: &'a CancelFlag,
    total_steps: u64,
    resumed: Option<(StepStage, StageState)>,
}

impl<'a> Session<'a> {
    /// Starts in an empty run folder, or where its last checkpoint was made.
    pub fn open(
        config: &'a TrainConfig,
        run: RunDir,
        resume: bool,
        observer: &'a mut dyn Observer,
        cancel: &'a CancelFlag,
    ) -> Result<Self> {
        let latest = if resume {
            checkpoint::latest(&run)?
        } else {
            None
        };
        let (mut offset, mut total_steps, mut resumed) = (0, 0, None);
        if let Some(latest) = latest {
            for warning in latest.warnings {
                observer.on_event(&Event::Warning(warning));
            }
            let position: Position =
                serde_json::from_value(latest.snapshot.state).map_err(|e| {
                    Error::file(run.checkpoints_dir(), format!("step-{}: {e}", latest.step))
                })?;
            (offset, total_steps) = (position.metrics_offset, position.total_steps);
            let tensors = latest.snapshot.tensors.into_iter().collect();
            let state = StageState {
                step: position.step,
                tensors,
                state: position.stage_state,
            };
            resumed = Some((position.stage, state));
        }
        let metrics = run.metrics(offset)?;
        Ok(Self {
            config,
            run,
            metrics,
            observer,
            cancel,
            total_steps,
            resumed,
        })
    }

    /// Whether the checkpoint that the run goes on from was made in a later stage than `stage`.
    pub fn is_past(&self, stage: StepStage) -> bool {
        stage == StepStage::Sae
            && self
                .resumed
                .as_ref()
                .is_some_and(|(reached, _)| *reached == StepStage::Sft)
    }

    /// Whether any step of the run is behind it.
    pub fn has_begun(&self) -> bool {
        self.metrics.offset() > 0
    }

    /// What the checkpoint holds for `stage`, where it was made in it.
    pub fn take_state(&mut self, stage: StepStage) -> Option<StageState> {
        match self.resumed.take() {
            Some((reached, state)) if reached == stage => Some(state),
            other => {
                self.resumed = other;
                None
            }
        }
    }

    /// Tells the caller something.
    pub fn tell(&mut self, event: Event) {
        self.observer.on_event(&event);
    }

    /// Keeps and reports a step's measurements.
    pub fn record(&mut self, metrics: StepMetrics) -> Result<()> {
        self.metrics.append(&metrics)?;
        self.tell(Event::Step(metrics));
        Ok(())
    }

    /// To be called after each step: writes a checkpoint where one is due, the stage ends or
    /// the caller wants to stop, and returns [`Error::Cancelled`] in the last case.
    pub fn step_done(
        &mut self,
        stage: StepStage,
        step: u64,
        is_last: bool,
        state: impl FnOnce() -> Result<(Vec<(String, Tensor)>, Value)>,
    ) -> Result<()> {
        self.total_steps += 1;
        let cancelled = self.cancel.is_cancelled();
        let due = self
            .total_steps
            .is_multiple_of(self.config.checkpoint_every as u64);
        if cancelled || due || is_last {
            let (tensors, stage_state) = state()?;
            self.checkpoint(stage, step, tensors, stage_state)?;
        }
        if cancelled {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Writes a checkpoint and removes the oldest that are too many.
    fn checkpoint(
        &mut self,
        stage: StepStage,
        step: u64,
        tensors: Vec<(String, Tensor)>,
        stage_state: Value,
    ) -> Result<()> {
        self.metrics.sync()?;
        let position = Position {
            stage,
            step,
            total_steps: self.total_steps,
            metrics_offset: self.metrics.offset(),
            stage_state,
        };
        let state = serde_json::to_value(position)
            .map_err(|e| Error::file(self.run.checkpoints_dir(), e.to_string()))?;
        let path = checkpoint::save(&self.run, self.total_steps, &Snapshot { tensors, state })?;
        checkpoint::prune(&self.run, self.total_steps, self.config.keep)?;
        self.tell(Event::Saved(path));
        Ok(())
    }

    /// [`Error::Cancelled`] where the caller wants to stop before any step.
    pub fn check_cancelled(&self) -> Result<()> {
        self.cancel.check()
    }
}
