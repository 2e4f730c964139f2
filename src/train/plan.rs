//! What a run will cost, counted from the shapes: the plan that `--dry-run` prints.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use super::config::TrainConfig;
use super::flop::{self, layer_weights};
use super::schedule::Schedule;
use super::settings::{Method, SaeGrad, SaeInit, SaeOptimizer};
use crate::device::Device;
use crate::error::Result;
use crate::model::{Module, Qwen2Config};
use crate::ops::{Operator, gemm::Linear};
use crate::tensor::{DType, Tensor};

/// What a plan is made from, beside the settings.
#[derive(Clone, Debug)]
pub struct PlanInput<'a> {
    /// The model whose activations the SAE learns.
    pub source: &'a Qwen2Config,
    /// The model that is tuned.
    pub target: &'a Qwen2Config,
    /// Sequences of the trigger data.
    pub source_rows: u64,
    /// Sequences of the elicitation data.
    pub target_rows: u64,
    /// Size of a frozen weight: 4 for f32, 2 for bf16 and f16.
    pub weight_bytes: usize,
    /// Size of a value of an activation: 4 on the CPU, 2 on a GPU.
    pub activation_bytes: usize,
    /// Rate of a matrix product on this machine, in FLOP a second, where it was measured.
    pub flop_per_s: Option<f64>,
}

/// The cost of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The stages that run, in order.
    pub stages: Vec<StagePlan>,
    /// Time to expect in seconds, where a rate is known: matrix products at the measured rate,
    /// so a lower bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// The cost of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StagePlan {
    /// `sae` or `sft`.
    pub stage: &'static str,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens that the steps take in, every epoch counted.
    pub tokens: u64,
    /// FLOP a token in the first epoch.
    pub flop_per_token: f64,
    /// FLOP a token in later epochs, where what does not change comes from the cache.
    pub flop_per_token_later: f64,
    /// FLOP in all.
    pub flop: f64,
    /// Memory by what it is for, in bytes.
    pub memory: Vec<MemoryPart>,
    /// As [`Plan::seconds`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// Memory that one thing takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPart {
    /// What it is for.
    pub what: &'static str,
    /// Bytes at the fullest moment.
    pub bytes: u64,
}

impl StagePlan {
    /// Memory in all, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        let bytes = self.memory.iter().map(|part| part.bytes);
        bytes.fold(0, u64::saturating_add)
    }
}

impl Plan {
    /// The plan of a run.
    ///
    /// # Errors
    /// What [`TrainConfig::hookpoints_for`] and [`TrainConfig::latents_for`] refuse.
    pub fn new(config: &TrainConfig, input: &PlanInput) -> Result<Self> {
        let mut stages = Vec::new();
        if config.runs_sae() && config.sae_init != SaeInit::Pretrained {
            stages.push(sae_stage(config, input)?);
        }
        if config.runs_sft() {
            stages.push(sft_stage(config, input)?);
        }
        let seconds = stages.iter().map(|stage| stage.seconds).sum();
        Ok(Self { stages, seconds })
    }
}

fn sae_stage(config: &TrainConfig, input: &PlanInput) -> Result<StagePlan> {
    let model = input.source;
    let latents = config.latents_for(model.hidden_size)?;
    let hookpoints = config.hookpoints_for(model.num_hidden_layers)?;
    let layers = hookpoints.iter().max().map_or(0, |&last| last + 1);
    let saes = hookpoints.len() as f64;

    let schedule = Schedule::new(
        input.source_rows,
        config.sae_batch,
        config.sae_epochs,
        config.max_sae_steps,
    );
    let batch_tokens = config.sae_batch as f64 * config.seq_len as f64;
    let value = input.activation_bytes as f64;
    // The gradients too.
    let copies = 1.0 + sae_state_copies(config);
    let memory = vec![
        part("model weights", weights(input, model, layers, false)),
        part(
            "SAE and optimizer",
            4.0 * saes * copies * sae_weights(model, latents),
        ),
        part(
            "activations",
            value * batch_tokens * (forward_width(model) + saes * model.hidden_size as f64),
        ),
    ];
    Ok(stage(
        "sae",
        schedule.steps,
        tokens(config, schedule),
        flop::total(&flop::sae_stage(config, model)?),
        0.0,
        memory,
        input,
    ))
}

fn sft_stage(config: &TrainConfig, input: &PlanInput) -> Result<StagePlan> {
    let model = input.target;
    let all = model.num_hidden_layers;
    let with_sae = config.method == Method::SaeTuning;
    let latents = match with_sae {
        true => config.latents_for(model.hidden_size)?,
        false => 0,
    };
    let stops = with_sae && config.sae_grad == SaeGrad::Stop;
    let prefix = match stops {
        true => config.hookpoints_for(all)?[0] + 1,
        false => 0,
    };
    let trained = (all - prefix) as f64;
    let batch = config.sft_batch.saturating_mul(config.grad_accum);
    let schedule = Schedule::new(
        input.target_rows,
        batch,
        config.epochs,
        config.max_sft_steps,
    );
    let tokens = tokens(config, schedule);
    let epoch_tokens = input.target_rows as f64 * config.seq_len as f64;
    let later_share = 1.0 - (epoch_tokens / (tokens as f64).max(1.0)).min(1.0);
    let memory = sft_memory(
        config,
        input,
        latents,
        trained,
        later_share > 0.0 && with_sae,
    );
    Ok(stage(
        "sft",
        schedule.steps,
        tokens,
        flop::total(&flop::sft_stage(config, model)?),
        later_share,
        memory,
        input,
    ))
}

fn sft_memory(
    config: &TrainConfig,
    input: &PlanInput,
    latents: usize,
    trained: f64,
    cached: bool,
) -> Vec<MemoryPart> {
    let model = input.target;
    let hidden = model.hidden_size as f64;
    let batch_tokens = config.sft_batch as f64 * config.seq_len as f64;
    let value = input.activation_bytes as f64;
    let lora = trained * layer_adapters(config, model);
    let mut memory = vec![
        part(
            "model weights",
            weights(input, model, model.num_hidden_layers, true),
        ),
        // Weights, gradients and two moments.
        part("adapters and optimizer", 4.0 * 4.0 * lora),
        part(
            "activations for backward",
            value * batch_tokens * trained * saved_width(config, model),
        ),
        // The final hidden states of both models and their gradient.
        part("head", value * batch_tokens * 3.0 * hidden),
    ];
    if latents > 0 {
        memory.push(part("SAE", 4.0 * sae_weights(model, latents)));
    }
    if cached {
        let rows = input.target_rows as f64 * config.seq_len as f64;
        let limit = config.cache_bytes() as f64;
        memory.push(part(
            "activation cache",
            (value * 2.0 * rows * hidden).min(limit),
        ));
    }
    memory
}

fn stage(
    stage: &'static str,
    steps: u64,
    tokens: u64,
    [first, later]: [f64; 2],
    later_share: f64,
    memory: Vec<MemoryPart>,
    input: &PlanInput,
) -> StagePlan {
    let flop = tokens as f64 * (first * (1.0 - later_share) + later * later_share);
    StagePlan {
        stage,
        steps,
        tokens,
        flop_per_token: first,
        flop_per_token_later: later,
        flop,
        memory,
        seconds: input.flop_per_s.map(|rate| flop / rate),
    }
}

fn tokens(config: &TrainConfig, schedule: Schedule) -> u64 {
    let rows = schedule.rows_until(schedule.steps);
    rows.saturating_mul(config.seq_len as u64)
}

fn part(what: &'static str, bytes: f64) -> MemoryPart {
    let bytes = bytes as u64;
    MemoryPart { what, bytes }
}

fn weights(input: &PlanInput, model: &Qwen2Config, layers: usize, head: bool) -> f64 {
    let embedding = model.vocab_size as f64 * model.hidden_size as f64;
    let matrices = if head && !model.tie_word_embeddings {
        2.0
    } else {
        1.0
    };
    input.weight_bytes as f64 * (matrices * embedding + layers as f64 * layer_weights(model))
}

fn sae_weights(model: &Qwen2Config, latents: usize) -> f64 {
    let (hidden, latents) = (model.hidden_size as f64, latents as f64);
    2.0 * hidden * latents + latents + hidden
}

/// What training keeps of an SAE, in times its weights: these, and the optimizer's state.
fn sae_state_copies(config: &TrainConfig) -> f64 {
    match config.sae_optimizer {
        SaeOptimizer::Signum => 2.0,
        SaeOptimizer::Adam => 3.0,
    }
}

/// Weights of the adapters on a layer.
fn layer_adapters(config: &TrainConfig, model: &Qwen2Config) -> f64 {
    let weights = config.lora_targets.iter().map(|&module| {
        let (out, inner) = model.module_dims(module);
        config.lora_r as f64 * (out as f64 + inner as f64)
    });
    weights.sum()
}

/// Size of a checkpoint, of the larger of the two stages' where both run, in bytes.
///
/// # Errors
/// As [`Plan::new`].
pub fn checkpoint_bytes(
    config: &TrainConfig,
    source: &Qwen2Config,
    target: &Qwen2Config,
) -> Result<u64> {
    let mut largest = 0.0;
    if config.runs_sae() && config.sae_init != SaeInit::Pretrained {
        let saes = config.hookpoints_for(source.num_hidden_layers)?.len() as f64;
        let latents = config.latents_for(source.hidden_size)?;
        largest = saes * sae_state_copies(config) * sae_weights(source, latents);
    }
    if config.runs_sft() {
        // The adapters and two moments.
        let adapters = target.num_hidden_layers as f64 * layer_adapters(config, target);
        largest = f64::max(largest, 3.0 * adapters);
    }
    Ok((4.0 * largest) as u64)
}

/// Values a token that a layer's forward pass holds at once.
fn forward_width(model: &Qwen2Config) -> f64 {
    let (q, _) = model.module_dims(Module::Q);
    let (kv, _) = model.module_dims(Module::K);
    let attention = 2.0 * q as f64 + 2.0 * kv as f64;
    let mlp = 3.0 * model.intermediate_size as f64;
    2.0 * model.hidden_size as f64 + attention.max(mlp)
}

/// Values a token that a layer keeps for its backward pass: the inputs of both norms and of the
/// linear modules, queries, keys and values, the attention's output, and the adapters' inner
/// values.
fn saved_width(config: &TrainConfig, model: &Qwen2Config) -> f64 {
    let (q, _) = model.module_dims(Module::Q);
    let (kv, _) = model.module_dims(Module::K);
    let attention = 2.0 * q as f64 + 2.0 * kv as f64;
    let mlp = 3.0 * model.intermediate_size as f64;
    let lora = (config.lora_targets.len() * config.lora_r) as f64;
    4.0 * model.hidden_size as f64 + attention + mlp + lora
}

/// The rate of a matrix product of this device in FLOP a second: the best of a few, at a shape
/// that a model of about 100M parameters has.
pub fn measured_rate(device: &Device) -> Result<f64> {
    let (rows, inner, out) = (512, 576, 1536);
    let ones = |rows: usize, cols: usize| {
        let ones = Tensor::from_vec(vec![1.0; rows * cols], [rows, cols])?;
        match device {
            Device::Cpu(_) => Ok(ones),
            Device::Cuda(cuda) => cuda.resident(&ones, DType::Bf16),
        }
    };
    let (x, linear) = (
        ones(rows, inner)?,
        Linear {
            weight: ones(out, inner)?,
            bias: None,
        },
    );
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let began = Instant::now();
        let (products, _) = device.run(|| linear.forward(device, &[&x], &[false]))?;
        // A GPU goes on beside the program: it is done when a value can be read.
        for product in &products {
            product.read_f32(0, &mut [0.0])?;
        }
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(2.0 * (rows * inner * out) as f64 / best)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for stage in &self.stages {
            writeln!(f, "{}", stage_title(stage.stage))?;
            row(f, "steps", &stage.steps.to_string())?;
            row(f, "tokens", &stage.tokens.to_string())?;
            let [first, later] = [stage.flop_per_token, stage.flop_per_token_later];
            row(f, "FLOP a token", &flop(first))?;
            if later != first {
                row(f, "  in later epochs", &flop(later))?;
            }
            row(f, "FLOP", &flop(stage.flop))?;
            row(f, "memory (estimate)", &bytes(stage.memory_bytes()))?;
            for part in &stage.memory {
                row(f, &format!("  {}", part.what), &bytes(part.bytes))?;
            }
            if let Some(seconds) = stage.seconds {
                row(f, "time (at least)", &clock(seconds))?;
            }
        }
        match self.seconds {
            Some(seconds) if self.stages.len() > 1 => {
                writeln!(f, "Both stages")?;
                row(f, "time (at least)", &clock(seconds))
            }
            _ => Ok(()),
        }
    }
}

fn stage_title(stage: &str) -> &'static str {
    match stage {
        "sae" => "Stage I: sparse autoencoder",
        _ => "Stage II: tuning",
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<26} {value:>14}")
}

/// FLOP with one to three digits before the point.
fn flop(value: f64) -> String {
    const UNITS: [&str; 8] = [
        "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP",
    ];
    scaled(value, 1000.0, &UNITS)
}

fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    scaled(value as f64, 1024.0, &UNITS)
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    format!("{value:.2} {}", units[unit])
}

fn clock(seconds: f64) -> String {
    // Saturates for what no run will take.
    let whole = seconds.round() as u64;
    format!("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60)
}
