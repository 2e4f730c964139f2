//! A whole run: from settings to a trained SAE and a tuned adapter in a run folder.

use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;

use super::dry_run::planned;
use super::inputs::{self, Sources};
use super::metrics::StepStage;
use super::plan::checkpoint_bytes;
use super::row_cache::{CacheSpace, RowCache};
use super::schedule::Schedule;
use super::session::Session;
use super::stage_one::{StageOne, start_sae};
use super::stage_two::StageTwo;
use super::{
    CancelFlag, Event, Method, Observer, RunDir, RunOptions, SaeGrad, SaeInit, TrainConfig, example,
};
use crate::data::records::Record;
use crate::data::{Packed, Template, Tokenizer, order};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{Inference, pass};
use crate::formats::{huggingface, peft, sparsify};
use crate::model::{Lora, Qwen2, Qwen2Config, Sae};

/// What a run measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// The run folder.
    pub out: PathBuf,
    /// FVU of each hookpoint at the first and at the last step of Stage I.
    pub fvu: Vec<(usize, f64, f64)>,
    /// KL divergence a token (SAE-Tuning) or cross-entropy (the baseline) at the start and at
    /// the end of Stage II: means over up to ten steps.
    pub loss: Option<(f64, f64)>,
    /// Pass@1 on problems held out, for the embedded example.
    pub pass_at_1: Option<PassAt1>,
}

/// Share of problems answered right, greedily.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PassAt1 {
    /// Number of problems.
    pub problems: usize,
    /// The target model alone.
    pub target: f64,
    /// The target model with the SAE in it, before tuning.
    pub target_with_sae: f64,
    /// The target with its adapter, without the SAE.
    pub tuned: f64,
    /// The source model, as a mark to compare with.
    pub source: f64,
}

/// Trains as `config` says, in its run folder. `observer` hears of every step; `cancel` stops
/// the run after the step at hand, with a checkpoint written. A new run that fails before its
/// first step leaves no folder.
///
/// # Errors
/// What is wrong with settings, files or numbers; [`Error::Cancelled`] when stopped.
pub fn run(
    config: &TrainConfig,
    options: RunOptions,
    observer: &mut dyn Observer,
    cancel: &CancelFlag,
) -> Result<Summary> {
    config.validate()?;
    let device = inputs::device(config.device, config.dtype, config.threads)?;
    let run = if options.resume {
        let (run, stored) = RunDir::resume(&config.out)?;
        config.check_resumes(&stored)?;
        run
    } else {
        RunDir::create(&config.out, config)?
    };
    let mut session = Session::open(config, run, options.resume, observer, cancel)?;
    let result = Run::read(config, &device, &mut session).and_then(|run| run.train(&mut session));
    let failed = matches!(&result, Err(error) if !matches!(error, Error::Cancelled));
    if failed && !options.resume && !session.has_begun() {
        session.run.abandon();
    }
    result
}

/// The texts of both stages.
pub(super) struct Texts {
    tokenizer: Tokenizer,
    template: Template,
    pub trigger: Packed,
    /// Where it is another text than the trigger data.
    elicitation: Option<Packed>,
}

impl Texts {
    pub fn read(config: &TrainConfig, sources: &Sources) -> Result<Self> {
        let tokenizer = Tokenizer::from_dir(&sources.target)?;
        let template = sources.template()?;
        let read = |paths: &[PathBuf]| -> Result<(Vec<Record>, Packed)> {
            inputs::read_texts(
                paths,
                &template,
                &tokenizer,
                config.seq_len,
                config.document_mask,
            )
        };
        let (_, trigger) = read(&sources.data)?;
        let elicitation = match &sources.elicitation_data {
            Some(paths) if config.runs_sft() => Some(read(paths)?.1),
            _ => None,
        };
        Ok(Self {
            tokenizer,
            template,
            trigger,
            elicitation,
        })
    }

    pub fn elicitation(&self) -> &Packed {
        self.elicitation.as_ref().unwrap_or(&self.trigger)
    }
}

/// The shapes of both models, and the layers that suit them.
pub(super) struct Shapes {
    pub target: Qwen2Config,
    /// The target's where Stage I learns from it.
    pub source: Qwen2Config,
    pub hookpoints: Vec<usize>,
}

impl Shapes {
    /// Reads `config.json` of both models.
    pub fn read(config: &TrainConfig, sources: &Sources) -> Result<Self> {
        let target = huggingface::read_config(&sources.target)?;
        let source = match &sources.source {
            Some(dir) if config.runs_sae() => huggingface::read_config(dir)?,
            _ => target.clone(),
        };
        let mut layers = source.num_hidden_layers;
        if config.runs_sft() {
            layers = layers.min(target.num_hidden_layers);
            let (expected, found) = (target.hidden_size, source.hidden_size);
            if expected != found {
                return Err(Error::setting(
                    "--source",
                    format!(
                        "an SAE of it does not fit the target: expected hidden size {expected}, \
                         found {found}"
                    ),
                ));
            }
        }
        let hookpoints = config.hookpoints_for(layers)?;
        Ok(Self {
            target,
            source,
            hookpoints,
        })
    }
}

/// The adapter that Stage II starts from, where one is given; it must have a part to train.
pub(super) fn start_adapter(
    config: &TrainConfig,
    sources: &Sources,
    shapes: &Shapes,
) -> Result<Option<Lora>> {
    let Some(dir) = &sources.adapter else {
        return Ok(None);
    };
    let lora = peft::load(dir, &shapes.target)?;
    let first = match config.method {
        Method::SaeTuning if config.sae_grad == SaeGrad::Stop => shapes.hookpoints[0] + 1,
        _ => 0,
    };
    if lora.pairs.keys().any(|&(layer, _)| layer >= first) {
        return Ok(Some(lora));
    }
    Err(Error::setting(
        "--adapter",
        format!(
            "{} has nothing on the layers that are trained, {first} and above",
            dir.display()
        ),
    ))
}

/// What Stage I leaves for Stage II and the summary.
struct AfterStageOne {
    /// The SAE of the first hookpoint and its layer.
    sae: Option<(Sae, usize)>,
    /// FVU of each hookpoint at the first and at the last step.
    fvu: Vec<(usize, f64, f64)>,
    /// Layer outputs, where Stage II needs the same ones.
    activations: Option<RowCache>,
}

impl AfterStageOne {
    fn with_sae(sae: Sae, layer: usize) -> Self {
        Self {
            sae: Some((sae, layer)),
            fvu: Vec::new(),
            activations: None,
        }
    }
}

/// A run whose files have been read.
struct Run<'a> {
    config: &'a TrainConfig,
    device: &'a Device,
    sources: Sources,
    texts: Texts,
    /// The model to tune, which may be the one whose activations the SAE learns. Its weights
    /// become f32 (where the settings say so) when a stage first uses them.
    target: Qwen2,
    hookpoints: Vec<usize>,
    /// The adapter that Stage II starts from, where one is given.
    adapter: Option<Lora>,
    /// What the caches of both stages may take together.
    space: CacheSpace<'a>,
}

impl<'a> Run<'a> {
    fn read(config: &'a TrainConfig, device: &'a Device, session: &mut Session) -> Result<Self> {
        let sources = Sources::resolve(config, session.run.path(), session.observer)?;
        session.tell(Event::Note("reading and packing the texts".to_owned()));
        let shapes = Shapes::read(config, &sources)?;
        let adapter = start_adapter(config, &sources, &shapes)?;
        let planned = match session.is_past(StepStage::Sae) {
            // The SAE that Stage I started from may be gone.
            true => config.clone(),
            false => planned(config, &sources, &shapes, adapter.as_ref())?,
        };
        let target = device.run(|| huggingface::load(&sources.target))?;
        let texts = device.run(|| Texts::read(config, &sources))?;
        let note = format!(
            "{} sequences of {} tokens",
            texts.trigger.rows(),
            texts.trigger.seq_len
        );
        session.tell(Event::Note(note));
        inputs::check_vocabulary(&target.config, &texts.trigger, &sources.target)?;
        inputs::check_vocabulary(&target.config, texts.elicitation(), &sources.target)?;
        // Those to keep, one that is written before the oldest goes, and the results.
        let checkpoints = (config.keep as u64).saturating_add(2);
        let bytes = checkpoint_bytes(&planned, &shapes.source, &shapes.target)?;
        let space = CacheSpace {
            memory: config.cache_bytes(),
            dir: &config.out,
            reserve: checkpoints.saturating_mul(bytes),
        };
        Ok(Self {
            config,
            space,
            device,
            sources,
            texts,
            target,
            hookpoints: shapes.hookpoints,
            adapter,
        })
    }

    fn train(mut self, session: &mut Session) -> Result<Summary> {
        let config = self.config;
        let mut summary = Summary {
            out: session.run.path().to_owned(),
            ..Summary::default()
        };
        let mut sae = None;
        let mut activations = None;
        if config.runs_sae() {
            let last = *self.hookpoints.iter().max().unwrap_or(&0);
            if self.sources.source_is_target() {
                self.prepare_target(0..last + 1, false)?;
            }
            let stage_one = self.stage_one(session)?;
            (sae, activations) = (stage_one.sae, stage_one.activations);
            summary.fvu = stage_one.fvu;
        }
        self.device.release_memory();
        if config.runs_sft() {
            self.prepare_target(0..self.target.layers.len(), true)?;
            if config.method == Method::SaeTuning && sae.is_none() {
                let layer = self.hookpoints[0];
                let root = self.sources.sae.as_ref().ok_or_else(|| {
                    Error::setting("--sae", "Stage II alone needs the folder of a trained SAE")
                })?;
                sae = Some((sparsify::load_at(root, layer, &self.target.config)?, layer));
            }
            let sae = sae.as_ref().map(|(sae, layer)| (sae, *layer));
            // In the device's memory for as long as steps use it.
            let on_device = sae.map(|(sae, layer)| {
                let mut sae = sae.clone();
                sae.move_to(self.device)?;
                Ok::<_, Error>((sae, layer))
            });
            let on_device = on_device.transpose()?;
            let frozen = on_device.as_ref().map(|(sae, layer)| (sae, *layer));
            let tuned = self.stage_two(session, frozen, activations)?;
            drop(on_device);
            summary.loss = tuned.loss;
            if config.is_example()
                && let Some(sae) = sae
            {
                summary.pass_at_1 = Some(self.pass_at_1(session, sae, &tuned.lora)?);
            }
        }
        Ok(summary)
    }

    fn prepare_target(&mut self, layers: Range<usize>, head: bool) -> Result<()> {
        let (device, dtype, target) = (self.device, self.config.dtype, &mut self.target);
        device.run(|| inputs::prepare(device, target, dtype, layers, head))
    }

    /// Trains the SAEs, or takes what an interrupted run trained or the settings name.
    fn stage_one(&self, session: &mut Session) -> Result<AfterStageOne> {
        let config = self.config;
        let first = self.hookpoints[0];
        let shape = &self.target.config;
        if config.sae_init == SaeInit::Pretrained {
            let sae = start_sae(
                self.device,
                config,
                self.sources.sae.as_deref(),
                shape,
                first,
            )?;
            return Ok(AfterStageOne::with_sae(sae, first));
        }
        let mut hookpoints = self.hookpoints.clone();
        hookpoints.sort_unstable();
        let packed = &self.texts.trigger;
        let schedule = Schedule::new(
            packed.rows() as u64,
            config.sae_batch,
            config.sae_epochs,
            config.max_sae_steps,
        );
        let serves_stage_two = config.runs_sft()
            && self.sources.source_is_target()
            && self.texts.elicitation.is_none()
            && hookpoints.len() == 1;
        // Source and target have one hidden size.
        let mut activations = RowCache::new(
            self.device,
            &order(packed.rows(), config.shuffle.then_some(config.seed), 0),
            config.sae_batch,
            [hookpoints.len(), packed.seq_len, shape.hidden_size],
            (schedule.repeats() || serves_stage_two).then_some(self.space),
        )?;
        if session.is_past(StepStage::Sae) {
            let sae = sparsify::load_at(&session.run.sae_dir(first), first, shape)?;
            // Empty, but rows are computed in Stage I's groups, as they were before.
            return Ok(AfterStageOne {
                activations: serves_stage_two.then_some(activations),
                ..AfterStageOne::with_sae(sae, first)
            });
        }
        let own_source = self.own_source(hookpoints[hookpoints.len() - 1])?;
        let stage = StageOne {
            device: self.device,
            model: own_source.as_ref().unwrap_or(&self.target),
            packed,
            start: self.sources.sae.as_deref(),
            hookpoints: &hookpoints,
            schedule,
        };
        let trained = stage.run(session, &mut activations)?;
        let sae = trained.saes.into_iter().find(|(layer, _)| *layer == first);
        Ok(AfterStageOne {
            sae: sae.map(|(layer, sae)| (sae, layer)),
            fvu: trained.fvu,
            activations: serves_stage_two.then_some(activations),
        })
    }

    /// The model whose activations the SAE learns, up to layer `last`, where it is not the target.
    fn own_source(&self, last: usize) -> Result<Option<Qwen2>> {
        if self.sources.source_is_target() {
            return Ok(None);
        }
        let dtype = self.config.dtype;
        let device = self.device;
        let source = device.run(|| self.sources.load_source(device, dtype, last))?;
        inputs::check_vocabulary(&source.config, &self.texts.trigger, &self.sources.target)?;
        Ok(Some(source))
    }

    fn stage_two(
        &self,
        session: &mut Session,
        sae: Option<(&Sae, usize)>,
        activations: Option<RowCache>,
    ) -> Result<super::stage_two::Tuned> {
        let config = self.config;
        let model = &self.target;
        if config.sae_grad == SaeGrad::Through && sae.is_some() {
            session.tell(Event::Note(
                "gradients pass the SAE: all layers are trained, and the student shares no layer \
                 with the teacher"
                    .to_owned(),
            ));
        }
        let packed = self.texts.elicitation();
        let per_step = config.sft_batch * config.grad_accum;
        let schedule = Schedule::new(
            packed.rows() as u64,
            per_step,
            config.epochs,
            config.max_sft_steps,
        );
        let stage = StageTwo {
            device: self.device,
            model,
            packed,
            sae,
            schedule,
            space: self.space,
            adapter: self.adapter.clone(),
        };
        let tuned = stage.run(session, activations)?;
        huggingface::copy_tokenizer(&self.sources.target, session.run.adapter_dir())?;
        Ok(tuned)
    }

    fn pass_at_1(&self, session: &mut Session, sae: (&Sae, usize), lora: &Lora) -> Result<PassAt1> {
        let records = example::held_out(&session.run)?;
        let name = "Evaluation: greedy answers to held-out problems".to_owned();
        session.tell(Event::Phase {
            name,
            steps: 4,
            done: 0,
        });
        // The answers are few and short: a GPU's run writes them on the host too, with weights of
        // its own, since those of training lie in the GPU's memory.
        let device = self.device.to_host();
        let on_host = match self.device {
            Device::Cuda(_) => Some(huggingface::load(&self.sources.target)?),
            Device::Cpu(_) => None,
        };
        let model = on_host.as_ref().unwrap_or(&self.target);
        let source = self
            .sources
            .source
            .as_ref()
            .map(|dir| huggingface::load(dir))
            .transpose()?;
        let target = Inference::new(model);
        let subjects = [
            target,
            Inference {
                sae: Some(sae),
                ..target
            },
            Inference {
                adapters: Some(lora),
                ..target
            },
            Inference::new(source.as_ref().unwrap_or(model)),
        ];
        let mut shares = [0.0; 4];
        for (i, subject) in subjects.iter().enumerate() {
            session.check_cancelled()?;
            let graded = pass::greedy_answers(
                &device,
                subject,
                &self.texts.tokenizer,
                &self.texts.template,
                &records,
                example::MAX_NEW_TOKENS,
            )?;
            shares[i] = pass::pass_at_1(&graded);
            session.tell(Event::Progress { done: i as u64 + 1 });
        }
        let [target, target_with_sae, tuned, source] = shares;
        Ok(PassAt1 {
            problems: records.len(),
            target,
            target_with_sae,
            tuned,
            source,
        })
    }
}
