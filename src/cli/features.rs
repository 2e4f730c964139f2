//! `features`: what the latents of SAEs stand for, layer by layer.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use resa_engine::analysis::{Features, MarkedText, Options, analyse, distance, plot};
use resa_engine::data::{Template, Tokenizer, records};
use resa_engine::eval::Inference;
use resa_engine::formats::hub::Want;
use resa_engine::formats::{atomic, huggingface, peft, sparsify};
use resa_engine::model::{Lora, Qwen2, Sae};
use resa_engine::report::Progress;
use resa_engine::train::inputs::prepare;
use resa_engine::train::{DtypeSetting, Event, Observer, fetch, settings::parse_hookpoint};
use resa_engine::{Device, Error};
use serde::Serialize;

use super::Failure;
use super::args::{at_least, dtype, threads};
use super::output::{print, print_json};

/// Contexts and reasoning features that the table shows; the JSON has them all.
const SHOWN: usize = 3;

#[derive(Args)]
pub struct FeaturesArgs {
    /// Model whose activations the SAEs reconstruct: Hugging Face folder or hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Folder or hub id of one SAE, or of several, one per layer (model.layers.N); repeatable
    #[arg(long, value_name = "DIR", required = true)]
    sae: Vec<PathBuf>,
    /// Another model of the same shape, or a PEFT adapter for --model, to compare with: folder or
    /// hub id
    #[arg(long, value_name = "MODEL")]
    compare: Option<PathBuf>,
    /// Problems with answers, whose texts are read: JSON, JSON Lines or Parquet file, or hub id
    #[arg(long, value_name = "FILE|ID")]
    data: String,
    /// Jinja file that turns a record into text, with the variables problem, question (the same)
    /// and answer; built in where not given
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Use only the first N records
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least::<1>)]
    limit: usize,
    /// Maximum tokens of a text
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least::<2>)]
    seq_len: usize,
    /// Contexts to keep of each reasoning feature, strongest first; the table shows 3, the JSON all
    #[arg(long, value_name = "N", default_value_t = 5)]
    contexts: usize,
    /// Folder for features.json and features.svg; made where it does not exist
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Seed of the mixture's starting points
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Worker threads; 0 is one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    threads: usize,
    /// Floating-point type of weights: auto (f32), f32 or bf16; activations are f32
    #[arg(long, value_parser = dtype, default_value = "auto")]
    dtype: DtypeSetting,
}

/// What the command prints and writes.
#[derive(Serialize)]
struct Result {
    model: String,
    #[serde(flatten)]
    features: Features,
    /// Layers, the one that offers itself most as a hookpoint first.
    ranking: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compare: Option<Comparison>,
}

#[derive(Serialize)]
struct Comparison {
    model: String,
    #[serde(flatten)]
    features: Features,
    /// Earth mover's distance of the two spreads over layers, in layers.
    distance: Option<f64>,
}

pub fn run(args: &FeaturesArgs) -> std::result::Result<(), Failure> {
    let device = Device::cpu(args.threads)?;
    let mut progress = Progress::stderr(1);
    let mut folder = |given: &Path, want| fetch::folder(given, want, &mut progress);
    let dir = folder(args.model.as_ref(), Want::Model)?;
    let roots = args.sae.iter().map(|root| folder(root, Want::Sae(None)));
    let roots: Vec<PathBuf> = roots.collect::<resa_engine::Result<_>>()?;
    let other = args.compare.as_deref();
    let other = other.map(|given| folder(given, Want::ModelOrAdapter));
    let other = other.transpose()?;
    let data = fetch::data(args.data.as_ref(), &mut progress)?;
    drop(progress);
    let names = names(args);
    let model = load(args, &device, &dir)?;
    let saes = saes(&roots, &model)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let texts = texts(args, &data, &tokenizer)?;
    let study = |name: &str, inference: &Inference| -> resa_engine::Result<Features> {
        let options = Options {
            contexts: args.contexts,
            seed: args.seed,
        };
        let mut progress = Progress::stderr(texts.len().max(1));
        progress.on_event(&Event::Phase {
            name: format!("Reading {name}"),
            steps: (texts.len() * (2 + 2 * saes.len())) as u64,
            done: 0,
        });
        analyse(
            &device,
            inference,
            &tokenizer,
            &saes,
            &texts,
            options,
            |done| {
                progress.on_event(&Event::Progress { done: done as u64 });
            },
        )
    };
    let features = study(&names[0], &Inference::new(&model))?;
    let compare = match other {
        Some(path) => {
            let other = Other::load(args, &device, &path, &model)?;
            let other = study(&names[1], &other.inference(&model))?;
            Some(Comparison {
                model: names[1].clone(),
                distance: distance(&features.counts(), &other.counts()),
                features: other,
            })
        }
        None => None,
    };
    let result = Result {
        model: names[0].clone(),
        ranking: features.ranking(),
        features,
        compare,
    };
    if let Some(out) = &args.out {
        write(out, &result)?;
    }
    match args.json {
        true => print_json(&result)?,
        false => print(table(&result))?,
    }
    Ok(())
}

/// What the models are called in files that others may see: a hub id, or the last part of a path,
/// and the part before it too where both models would have one name.
fn names(args: &FeaturesArgs) -> Vec<String> {
    let given = [Some(Path::new(&args.model)), args.compare.as_deref()];
    let given: Vec<&Path> = given.into_iter().flatten().collect();
    let names = |parts: usize| given.iter().map(move |path| name(path, parts));
    match names(1).collect::<Vec<_>>() {
        short if short.len() == 2 && short[0] == short[1] => names(2).collect(),
        short => short,
    }
}

fn name(given: &Path, parts: usize) -> String {
    // A path may end in `.` or be a link to what has a name that says more.
    let Ok(full) = fs::canonicalize(given) else {
        return given.display().to_string();
    };
    let all: Vec<_> = full.iter().map(|part| part.to_string_lossy()).collect();
    all[all.len().saturating_sub(parts)..].join("/")
}

fn load(args: &FeaturesArgs, device: &Device, dir: &Path) -> resa_engine::Result<Qwen2> {
    let mut model = huggingface::load(dir)?;
    let layers = 0..model.layers.len();
    device.run(|| prepare(device, &mut model, args.dtype, layers, true))?;
    Ok(model)
}

/// What `--compare` names: an adapter for the model, or another model of its shape.
enum Other {
    Adapter(Lora),
    Model(Box<Qwen2>),
}

impl Other {
    fn load(
        args: &FeaturesArgs,
        device: &Device,
        path: &Path,
        model: &Qwen2,
    ) -> resa_engine::Result<Self> {
        if path.join("adapter_config.json").exists() {
            return Ok(Self::Adapter(peft::load(path, &model.config)?));
        }
        let other = load(args, device, path)?;
        let shape = |m: &Qwen2| {
            (
                m.config.hidden_size,
                m.config.num_hidden_layers,
                m.config.vocab_size,
            )
        };
        if shape(&other) == shape(model) {
            return Ok(Self::Model(Box::new(other)));
        }
        let what = format!(
            "{}: expected (hidden size, layers, vocabulary) {:?} as of --model, found {:?}",
            path.display(),
            shape(model),
            shape(&other)
        );
        Err(Error::setting("--compare", what))
    }

    fn inference<'a>(&'a self, model: &'a Qwen2) -> Inference<'a> {
        match self {
            Self::Adapter(lora) => Inference {
                adapters: Some(lora),
                ..Inference::new(model)
            },
            Self::Model(other) => Inference::new(other),
        }
    }
}

/// The SAEs of all folders, ascending by layer.
fn saes(roots: &[PathBuf], model: &Qwen2) -> resa_engine::Result<Vec<(usize, Sae)>> {
    let mut places: Vec<(usize, PathBuf)> = Vec::new();
    for root in roots {
        places.extend(hookpoints(root)?);
    }
    places.sort();
    if let Some(pair) = places.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let (first, second) = (pair[0].1.display(), pair[1].1.display());
        let what = format!(
            "expected one SAE for layer {}, found {first} and {second}",
            pair[0].0
        );
        return Err(Error::setting("--sae", what));
    }
    let layers = model.layers.len();
    let load = |(layer, dir): (usize, PathBuf)| {
        if layer >= layers {
            let what = format!("{}: expected a layer below {layers}", dir.display());
            return Err(Error::setting("--sae", what));
        }
        Ok((layer, sparsify::load_at(&dir, layer, &model.config)?))
    };
    places.into_iter().map(load).collect()
}

/// Layer and folder of the SAE that `root` is, or of those right below it.
fn hookpoints(root: &Path) -> resa_engine::Result<Vec<(usize, PathBuf)>> {
    let layer_of = |dir: &Path| {
        let name = dir.file_name()?.to_str()?;
        parse_hookpoint(name)
            .ok()
            .filter(|_| name.contains("layers."))
    };
    // The name as the user wrote it may end in `.` or be a link.
    let full = fs::canonicalize(root).map_err(|e| Error::io(root, e))?;
    if let Some(layer) = layer_of(&full) {
        return Ok(vec![(layer, root.to_owned())]);
    }
    let entries = fs::read_dir(root).map_err(|e| Error::io(root, e))?;
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let found: Vec<_> = folders
        .filter_map(|dir| Some((layer_of(&dir)?, dir)))
        .collect();
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::file(
            root,
            "expected folders named model.layers.N, found none",
        )),
    }
}

fn texts(
    args: &FeaturesArgs,
    data: &[PathBuf],
    tokenizer: &Tokenizer,
) -> resa_engine::Result<Vec<MarkedText>> {
    let template = match &args.template {
        Some(path) => Template::from_file(path)?,
        None => Template::builtin(),
    };
    let mut records = records::read_all(data)?;
    records.truncate(args.limit);
    let text = |record| MarkedText::new(tokenizer, &template.render(record)?, args.seq_len);
    records.iter().map(text).collect()
}

fn write(out: &Path, result: &Result) -> std::result::Result<(), Failure> {
    let mut models = vec![(result.model.clone(), &result.features)];
    if let Some(other) = &result.compare {
        models.push((other.model.clone(), &other.features));
    }
    let files = [
        ("features.json", serde_json::to_string_pretty(result)?),
        ("features.svg", plot::svg(&models)?),
    ];
    for (name, text) in files {
        atomic::write_bytes(&out.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// The result as aligned text.
fn table(result: &Result) -> String {
    let features = &result.features;
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |content: String| {
        let _ = writeln!(text, "{}", content.trim_end());
    };
    line(format!(
        "{} texts, {} tokens ({} of <think> and </think>); loss {:.4} nats a token",
        features.texts, features.tokens, features.marked_tokens, features.loss
    ));
    line(String::new());
    let compared = result.compare.as_ref();
    line(format!(
        "{:>5} {:>9} {:>8} {:>7} {:>8} {:>9} {:>9} {}",
        "layer",
        "reasoning",
        "FVU",
        "L0",
        "silent",
        "loss",
        "recovered",
        if compared.is_some() {
            " reasoning (compared)"
        } else {
            ""
        }
    ));
    for (i, h) in features.hookpoints.iter().enumerate() {
        let other = compared.map(|c| c.features.hookpoints[i].reasoning_features);
        line(format!(
            "{:>5} {:>9} {:>8.4} {:>7.1} {:>6.1} % {:>9.4} {:>7.1} % {}",
            h.layer,
            h.reasoning_features,
            h.fvu,
            h.l0,
            100.0 * h.silent_fraction,
            h.loss_with_sae,
            100.0 * h.loss_recovered,
            other.map_or(String::new(), |n| format!(" {n:>20}"))
        ));
    }
    line(String::new());
    let layers: Vec<String> = result.ranking.iter().map(usize::to_string).collect();
    line(format!(
        "Layers by reasoning features: {}",
        layers.join(", ")
    ));
    match &features.mixture {
        Some(mixture) => {
            line(format!(
                "Mixture over layers, log-likelihood {:.2}:",
                mixture.log_likelihood
            ));
            for c in &mixture.components {
                let share = 100.0 * c.weight;
                line(format!(
                    "  {share:5.1} % at layer {:.1} +- {:.1}",
                    c.mean, c.sd
                ));
            }
        }
        None => line("No mixture: fewer than three layers have reasoning features".to_owned()),
    }
    if let Some(Comparison {
        model,
        distance: Some(distance),
        ..
    }) = compared
    {
        line(format!(
            "Distance of the spread over layers to that of {model}: {distance:.2} layers"
        ));
    }
    for h in &features.hookpoints {
        for feature in h.features.iter().take(SHOWN) {
            line(format!(
                "Layer {}, latent {}: {} firings",
                h.layer, feature.latent, feature.firings
            ));
            for c in feature.contexts.iter().take(SHOWN) {
                let shown = format!("{}[[{}]]{}", c.before, c.token, c.after);
                line(format!("  {:8.3}  {}", c.activation, shown.escape_debug()));
            }
        }
    }
    text
}
