//! What can be given on the command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use resa_engine::device::MOST_THREADS;
use resa_engine::eval::generate::BATCH;
use resa_engine::train::{DeviceSetting, DtypeSetting, TrainConfig, settings::parse_hookpoint};

use super::doctor::DoctorArgs;
use super::features::FeaturesArgs;
use super::report::ReportArgs;
use super::train_args::TrainArgs;

/// What the help says after the commands.
const AFTER_HELP: &str = "\
Exit codes: 0 success, 1 error, 2 wrong usage, 130 interrupted.
For hub ids HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH and HF_HUB_OFFLINE mean \
what they mean to the Python tools.";

/// Turns a language model into a reasoning model with SAE-Tuning.
#[derive(Parser)]
#[command(name = "resa-engine", version, propagate_version = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a sparse autoencoder and tune a model with it; without --target, --source and --data,
    /// the embedded example with defaults of its own
    Train(Box<TrainArgs>),
    /// Measure a model: Pass@1 and pass@k on problems with answers, or the perplexity of a text
    Eval(Box<EvalArgs>),
    /// Generate text
    Generate(GenerateArgs),
    /// Merge adapters into the weights of their base, or of any model of the same shape
    Merge(MergeArgs),
    /// Find the reasoning features of SAEs, layer by layer, and what each SAE costs the model
    Features(FeaturesArgs),
    /// Write one HTML page about one or several runs
    Report(ReportArgs),
    /// Measure every operator at the shapes of three models, and whole stages
    BenchKernels(BenchArgs),
    /// Say what this machine can do, test every operator on it, and what to do next
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// The command with the defaults of the settings in its help: they are stated once, in
/// `TrainConfig::default`.
pub fn command() -> clap::Command {
    let defaults = TrainConfig::default().to_table().unwrap_or_default();
    Cli::command().mut_subcommand("train", |train| {
        train.mut_args(|arg| {
            let value = arg.get_long().and_then(|long| defaults.get(long));
            match (value, arg.get_help()) {
                (Some(value), Some(help)) => {
                    let help = format!("{help} [default: {}]", plain(value));
                    arg.help(help)
                }
                _ => arg,
            }
        })
    })
}

/// A value as it is written on the command line.
fn plain(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(items) if items.is_empty() => {
            "layer 12 of 28, the same fraction of another depth".to_owned()
        }
        toml::Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        // 1e-6 rather than 0.000001, 1 rather than 1.0.
        toml::Value::Float(x) => format!("{x:?}").trim_end_matches(".0").to_owned(),
        other => other.to_string(),
    }
}

/// The model that is used, and how.
#[derive(Args)]
pub struct ModelArgs {
    /// PEFT adapter on top of the model: folder or hub id
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub adapter: Option<PathBuf>,
    /// SAE through which the output of --layer goes: a sparsify folder or hub id
    #[arg(long, value_name = "DIR", requires = "layer", help_heading = "Model")]
    pub sae: Option<PathBuf>,
    /// Layer (0-based) whose output --sae replaces: N or model.layers.N
    #[arg(long, value_name = "N", value_parser = parse_hookpoint, requires = "sae", help_heading = "Model")]
    pub layer: Option<usize>,
    /// Where to compute: auto (the CPU), cpu, cuda or cuda:N
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        help_heading = "Model"
    )]
    pub device: DeviceSetting,
    /// Worker threads; 0 is one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads, help_heading = "Model")]
    pub threads: usize,
    /// Floating-point type of weights: f32, bf16, or auto: bf16 for generating (f16 and f32 weights
    /// are rounded), f32 for --perplexity, bf16 on a GPU
    #[arg(long, value_parser = dtype, default_value = "auto", help_heading = "Model")]
    pub dtype: DtypeSetting,
}

/// How tokens are drawn.
#[derive(Args)]
pub struct SamplingArgs {
    /// Divides the logits; 0 is greedy
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.6,
        help_heading = "Sampling"
    )]
    pub temperature: f32,
    /// Draw from the smallest set of tokens with this probability; 1 is all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.95,
        help_heading = "Sampling"
    )]
    pub top_p: f32,
    /// Draw from the N likeliest tokens; 0 is all
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Sampling")]
    pub top_k: usize,
    /// Seed of the draws
    #[arg(
        long,
        value_name = "N",
        default_value_t = 42,
        help_heading = "Sampling"
    )]
    pub seed: u64,
    /// Maximum new tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least::<1>, help_heading = "Sampling")]
    pub max_new_tokens: usize,
    /// Completions for a prompt or problem
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..1 << 24), help_heading = "Sampling")]
    pub samples: u32,
    /// Sequences decoded together; does not change the results
    #[arg(long, value_name = "N", default_value_t = BATCH, value_parser = at_least::<1>, help_heading = "Sampling")]
    pub batch: usize,
}

#[derive(Args)]
#[command(
    override_usage = "resa-engine eval --model <MODEL> --data <FILE|ID> [OPTIONS]
       resa-engine eval --regrade <FILE> [OPTIONS]"
)]
pub struct EvalArgs {
    /// Model to measure: Hugging Face folder or hub id
    #[arg(long, value_name = "MODEL", required_unless_present = "regrade")]
    pub model: Option<String>,
    #[command(flatten)]
    pub with: ModelArgs,
    /// Problems with answers: JSON, JSON Lines or Parquet file, or hub id
    #[arg(long, value_name = "FILE|ID", required_unless_present = "regrade")]
    pub data: Option<PathBuf>,
    /// Jinja file that turns a record into text, with the variables problem, question (the same)
    /// and answer; built in where not given, whatever training used
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Put problems to the model by its chat template, as a user's message, instead of --template
    #[arg(long, conflicts_with = "template")]
    pub chat: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Use only the first N records (with --perplexity: sequences)
    #[arg(long, value_name = "N", value_parser = at_least::<1>)]
    pub limit: Option<usize>,
    /// JSON Lines file for the completions with their grades, written as they come
    #[arg(long, value_name = "FILE", conflicts_with = "perplexity")]
    pub out: Option<PathBuf>,
    /// Go on with the completions in --out, made with the same settings
    #[arg(long, requires = "out", conflicts_with = "regrade")]
    pub resume: bool,
    /// Grade the completions in this file again, without a model: JSON Lines with `answer`,
    /// `completion` and, to tell problems apart, `index` or `problem`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "data", "perplexity", "adapter", "sae"])]
    pub regrade: Option<PathBuf>,
    /// Measure the loss per token on the data's text, packed as in training, instead of answers
    #[arg(long, conflicts_with = "chat")]
    pub perplexity: bool,
    /// Tokens in a sequence, with --perplexity
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least::<2>)]
    pub seq_len: usize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// Model to use: Hugging Face folder or hub id
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub with: ModelArgs,
    /// Prompt; - reads standard input; repeatable
    #[arg(long, value_name = "TEXT", required = true, allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    /// System message for the model's chat template
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Give the prompt as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,
    /// Text that ends a completion and is no part of it; repeatable
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Token id that ends a completion, beside the model's own; repeatable
    #[arg(long, value_name = "ID")]
    pub stop_token: Vec<u32>,
    /// Go on past the model's own end of text
    #[arg(long)]
    pub ignore_eos: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print one JSON object for each completion
    #[arg(long)]
    pub json: bool,
}

pub(super) fn dtype(text: &str) -> Result<DtypeSetting, String> {
    match text {
        "auto" => Ok(DtypeSetting::Auto),
        "f32" => Ok(DtypeSetting::F32),
        "bf16" => Ok(DtypeSetting::Bf16),
        _ => Err("expected auto, f32 or bf16".to_owned()),
    }
}

pub(super) fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("expected a whole number of at least {MIN}")),
    }
}

#[derive(Args)]
pub struct MergeArgs {
    /// Model to merge into: Hugging Face folder or hub id
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// PEFT adapter to merge (folder or hub id) and the optional weight it is multiplied by
    /// (default 1); repeatable
    #[arg(long, value_name = "DIR[=WEIGHT]", required = true)]
    pub adapter: Vec<String>,
    /// Folder for the merged model; must be absent or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Args)]
pub struct BenchArgs {
    /// Rows whose name holds all these words, such as "gemm backward smollm2" or "stages";
    /// repeatable
    #[arg(long, value_name = "NAME")]
    pub filter: Vec<String>,
    /// The model whose shapes are measured; repeatable
    #[arg(long, value_name = "MODEL", value_parser = resa_engine::bench::shapes::NAMES)]
    pub model: Vec<String>,
    /// Where to compute: auto (the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceSetting,
    /// Worker threads; 0 is one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    pub threads: usize,
    /// Seconds for the repetitions of a row (three of them at least)
    #[arg(long, value_name = "S", default_value_t = 0.2, value_parser = seconds)]
    pub seconds: f64,
    /// Earlier results, as --json prints them: every row gets a verdict
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// Print the committed table of registers, shared memory and spills of each kernel, and stop
    #[arg(long = "static")]
    pub static_table: bool,
    /// Print the results as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number <= MOST_THREADS => Ok(number),
        _ => Err(format!("expected a whole number of at most {MOST_THREADS}")),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number from 0 to 3600".to_owned()),
    }
}

#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell that reads the script
    pub shell: clap_complete::Shell,
}
