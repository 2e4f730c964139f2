//! `eval`: how good a model is.

use resa_engine::data::{Template, records};
use resa_engine::eval::{pass, perplexity::perplexity};
use resa_engine::report::Progress;
use resa_engine::train::inputs::{check_vocabulary, read_texts};
use resa_engine::train::{Event, Observer};
use serde_json::json;

use super::Failure;
use super::args::EvalArgs;
use super::model::Loaded;

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let loaded = Loaded::new(
        args.model.as_deref().unwrap_or_default(),
        &args.with,
        !args.perplexity,
    )?;
    let template = match &args.template {
        Some(path) => Template::from_file(path)?,
        None => Template::builtin(),
    };
    match args.perplexity {
        true => measure_perplexity(args, &loaded, &template),
        false => measure_answers(args, &loaded, &template),
    }
}

fn measure_perplexity(
    args: &EvalArgs,
    loaded: &Loaded,
    template: &Template,
) -> Result<(), Failure> {
    let data = args.data.clone().unwrap_or_default();
    let device = &loaded.device;
    let (_, mut packed) =
        device.run(|| read_texts(&data, template, &loaded.tokenizer, args.seq_len, false))?;
    check_vocabulary(loaded.model(), &packed, &loaded.dir)?;
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
    let result = perplexity(device, &loaded.inference(), &packed, |done| {
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

fn measure_answers(args: &EvalArgs, loaded: &Loaded, template: &Template) -> Result<(), Failure> {
    let mut records = records::read(args.data.clone().unwrap_or_default())?;
    records.truncate(args.limit.unwrap_or(usize::MAX));
    let graded = pass::greedy_answers(
        &loaded.device,
        &loaded.inference(),
        &loaded.tokenizer,
        template,
        &records,
        args.sampling.max_new_tokens,
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
