//! What a run will do, found out without doing it.

use super::inputs::{self, Sources};
use super::plan::{self, Plan, PlanInput};
use super::run::{Shapes, Texts, start_adapter};
use super::{Observer, RunOptions, SaeInit, TrainConfig, run_dir};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::{huggingface, peft, sparsify};
use crate::model::Lora;

/// What `config` will cost, without training; reads and packs the texts, and opens every other
/// file that the run will read. `observer` hears of downloads.
///
/// # Errors
/// What [`run`](super::run()) refuses before its first step, but for numbers of models and SAEs
/// that are not finite: these are not read.
pub fn dry_run(
    config: &TrainConfig,
    options: RunOptions,
    observer: &mut dyn Observer,
) -> Result<Plan> {
    config.validate()?;
    if !options.resume {
        run_dir::check_is_free(&config.out)?;
    }
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let sources = Sources::resolve(config, scratch.path(), observer)?;
    let device = inputs::device(config.device, config.dtype, config.threads)?;
    let shapes = Shapes::read(config, &sources)?;
    let adapter = start_adapter(config, &sources, &shapes)?;
    let planned = planned(config, &sources, &shapes, adapter.as_ref())?;
    check_models(config, &sources, &shapes)?;
    let texts = Texts::read(config, &sources)?;
    inputs::check_vocabulary(&shapes.source, &texts.trigger, &sources.target)?;
    inputs::check_vocabulary(&shapes.target, texts.elicitation(), &sources.target)?;
    Plan::new(
        &planned,
        &PlanInput {
            source: &shapes.source,
            target: &shapes.target,
            source_rows: texts.trigger.rows() as u64,
            target_rows: texts.elicitation().rows() as u64,
            weight_bytes: device.precision().dtype().size(),
            activation_bytes: match device {
                Device::Cpu(_) => 4,
                Device::Cuda(_) => 2,
            },
            flop_per_s: Some(plan::measured_rate(&device)?),
        },
    )
}

/// `config` with the sizes of the SAE and of the adapter that the run starts from, where it does.
///
/// # Errors
/// What is wrong with the SAE's files, its numbers apart.
pub(super) fn planned(
    config: &TrainConfig,
    sources: &Sources,
    shapes: &Shapes,
    adapter: Option<&Lora>,
) -> Result<TrainConfig> {
    let mut planned = config.clone();
    if let Some(lora) = adapter {
        planned.lora_r = lora.config.r;
        planned.lora_targets.clone_from(&lora.config.targets);
    }
    let Some(root) = sources.sae.as_ref().filter(|_| config.needs_sae()) else {
        return Ok(planned);
    };
    let is_trained = config.runs_sae() && config.sae_init == SaeInit::Finetune;
    let used = if is_trained {
        shapes.hookpoints.len()
    } else {
        1
    };
    for &layer in shapes.hookpoints[..used].iter().rev() {
        let sae = sparsify::check_at(root, layer, &shapes.source)?;
        planned.latents = Some(sae.num_latents);
        planned.k = sae.k;
        planned.multi_topk = sae.multi_topk && is_trained;
    }
    Ok(planned)
}

fn check_models(config: &TrainConfig, sources: &Sources, shapes: &Shapes) -> Result<()> {
    huggingface::check(&sources.target)?;
    if !config.runs_sae() {
        return Ok(());
    }
    if let Some(source) = &sources.source {
        huggingface::check(source)?;
    }
    if let Some(adapter) = &sources.source_adapter {
        peft::load(adapter, &shapes.source)?;
    }
    Ok(())
}
