//! `eval`: how good a model is.

use std::path::Path;

use resa_engine::data::{Template, Tokenizer, records};
use resa_engine::eval::{Inference, pass, perplexity::perplexity};
use resa_engine::formats::{huggingface, peft, sparsify};
use resa_engine::train::inputs::{check_vocabulary, prepare, read_texts};
use resa_engine::train::{Event, Observer};
use resa_engine::{Device, report::Progress};
use serde_json::json;

use super::Failure;
use super::args::EvalArgs;

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let device = Device::cpu(args.threads)?.with_precision(args.dtype.precision());
    let dir = Path::new(&args.model);
    let dtype = args.dtype;
    let mut model = huggingface::load(dir)?;
    let layers = 0..model.layers.len();
    device.run(|| prepare(&device, &mut model, dtype, layers, true))?;
    let lora = args
        .adapter
        .as_ref()
        .map(|dir| peft::load(dir, &model.config))
        .transpose()?;
    let sae = match (&args.sae, args.layer) {
        (Some(root), Some(layer)) => Some((sparsify::load_at(root, layer, &model.config)?, layer)),
        _ => None,
    };
    let inference = Inference {
        model: &model,
        adapters: lora.as_ref(),
        sae: sae.as_ref().map(|(sae, layer)| (sae, *layer)),
    };
    let tokenizer = Tokenizer::from_dir(dir)?;
    let template = match &args.template {
        Some(path) => Template::from_file(path)?,
        None => Template::builtin(),
    };
    match args.perplexity {
        true => measure_perplexity(args, &device, &inference, &tokenizer, &template),
        false => measure_answers(args, &device, &inference, &tokenizer, &template),
    }
}

fn measure_perplexity(
    args: &EvalArgs,
    device: &Device,
    inference: &Inference,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<(), Failure> {
    let data = Path::new(&args.data);
    let (_, mut packed) =
        device.run(|| read_texts(data, template, tokenizer, args.seq_len, false))?;
    check_vocabulary(inference.model, &packed, Path::new(&args.model))?;
    if let Some(limit) = args.limit {
        packed.tokens.truncate(limit.saturating_mul(args.seq_len));
    }
    let mut progress = Progress::stderr(10);
    let steps = packed.rows() as u64;
    progress.on_event(&Event::Phase {
        name: "Perplexity".to_owned(),
        steps,
        done: 0,
    });
    let result = perplexity(device, inference, &packed, |done| {
        progress.on_event(&Event::Progress { done: done as u64 });
    })?;
    match args.json {
        true => println!("{}", serde_json::to_string(&result)?),
        false => println!(
            "perplexity {:.4}, {:.5} nats a token over {} tokens",
            result.perplexity, result.mean_nll, result.tokens
        ),
    }
    Ok(())
}

fn measure_answers(
    args: &EvalArgs,
    device: &Device,
    inference: &Inference,
    tokenizer: &Tokenizer,
    template: &Template,
) -> Result<(), Failure> {
    let mut records = records::read(&args.data)?;
    records.truncate(args.limit.unwrap_or(usize::MAX));
    let graded = pass::greedy_answers(
        device,
        inference,
        tokenizer,
        template,
        &records,
        args.max_new_tokens,
    )?;
    let share = pass::pass_at_1(&graded);
    let correct = graded.iter().filter(|g| g.correct).count();
    match args.json {
        true => println!(
            "{}",
            json!({ "pass_at_1": share, "correct": correct, "problems": graded.len() })
        ),
        false => println!(
            "Pass@1 {:.1} % ({correct} of {})",
            100.0 * share,
            graded.len()
        ),
    }
    Ok(())
}
