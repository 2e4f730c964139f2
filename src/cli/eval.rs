//! `eval`: how good a model is.

use std::path::{Path, PathBuf};

use resa_engine::Error;
use resa_engine::data::{Template, records};
use resa_engine::eval::pass::{self, Asking, Estimate, Solver, pass_at_k};
use resa_engine::eval::perplexity::perplexity;
use resa_engine::eval::results::{self, Results};
use resa_engine::eval::{FinishReason, GenerateOptions, Generator};
use resa_engine::report::Progress;
use resa_engine::train::inputs::{check_vocabulary, read_texts};
use resa_engine::train::{Event, Observer, fetch};
use serde_json::{Value, json};

use super::Failure;
use super::args::EvalArgs;
use super::model::Loaded;
use super::output::{note, print_line};

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    if let Some(file) = &args.regrade {
        return regrade(args, file);
    }
    let (Some(model), Some(data)) = (&args.model, &args.data) else {
        let missing = anyhow::anyhow!("--model and --data, or --regrade, must be given");
        return Err(Failure::Usage(missing));
    };
    let options = args.sampling.options(Vec::new(), Vec::new());
    let usage = |error: resa_engine::Error| Failure::Usage(error.into());
    options.sampling.check().map_err(usage)?;
    let loaded = Loaded::new(model, &args.with, !args.perplexity)?;
    let data = &fetch::data(data, &mut Progress::stderr(10))?;
    let template = match &args.template {
        Some(path) => Template::from_file(path)?,
        None => Template::builtin(),
    };
    match args.perplexity {
        true => measure_perplexity(args, data, &loaded, &template),
        false => measure_answers(args, data, &loaded, &template),
    }
}

fn measure_perplexity(
    args: &EvalArgs,
    data: &[PathBuf],
    loaded: &Loaded,
    template: &Template,
) -> Result<(), Failure> {
    let device = &loaded.device;
    let (_, mut packed) =
        device.run(|| read_texts(data, template, &loaded.tokenizer, args.seq_len, false))?;
    check_vocabulary(&loaded.model().config, &packed, &loaded.dir)?;
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
        true => print_line(serde_json::to_string(&result)?)?,
        false => print_line(format_args!(
            "perplexity {:.4}, {:.5} nats a token over {} tokens",
            result.perplexity, result.mean_nll, result.tokens
        ))?,
    }
    Ok(())
}

fn measure_answers(
    args: &EvalArgs,
    data: &[PathBuf],
    loaded: &Loaded,
    template: &Template,
) -> Result<(), Failure> {
    let mut records = records::read_all(data)?;
    records.truncate(args.limit.unwrap_or(usize::MAX));
    let chat = match args.chat {
        true => Some(loaded.chat_template()?.ok_or_else(|| {
            let what = "the model has no chat template; leave the option out to use --template";
            Failure::Usage(Error::setting("--chat", what).into())
        })?),
        false => None,
    };
    let asking = chat
        .as_ref()
        .map_or(Asking::Template(template), Asking::Chat);
    let stop_tokens = loaded.tokenizer.end_ids(&loaded.dir)?;
    let options = args.sampling.options(stop_tokens, asking.stop_strings());
    let settings = settings(args, loaded, &options, template);
    let (mut results, mut all) = match &args.out {
        Some(path) if args.resume => {
            let (results, known) = Results::resume(path, settings, &records)?;
            (Some(results), known)
        }
        Some(path) => (Some(Results::create(path, settings)?), Vec::new()),
        None => (None, Vec::new()),
    };
    all.retain(|graded| graded.sample < args.sampling.samples);
    let mut progress = Progress::stderr(10);
    progress.on_event(&Event::Phase {
        name: "Evaluation".to_owned(),
        steps: records.len() as u64 * u64::from(args.sampling.samples),
        done: all.len() as u64,
    });
    let known = all
        .iter()
        .map(|graded| (graded.index, graded.sample))
        .collect();
    let inference = loaded.inference();
    let solver = Solver {
        generator: Generator {
            device: &loaded.device,
            inference: &inference,
            tokenizer: &loaded.tokenizer,
            options: &options,
        },
        asking,
        samples: args.sampling.samples,
    };
    solver.solve(&records, &known, |graded| {
        if let Some(results) = &mut results {
            results.push(&graded)?;
        }
        all.push(graded);
        progress.on_event(&Event::Progress {
            done: all.len() as u64,
        });
        Ok(())
    })?;
    drop(progress);
    let cut = all
        .iter()
        .filter(|g| g.finish == FinishReason::Length)
        .count();
    if cut > 0 {
        note(format_args!(
            "{cut} of {} completions ended at --max-new-tokens",
            all.len()
        ));
    }
    report(args, &pass::counts(&all), json!({ "truncated": cut }))
}

/// What has a part in the completions, for the file that holds them.
fn settings(
    args: &EvalArgs,
    loaded: &Loaded,
    options: &GenerateOptions,
    template: &Template,
) -> Value {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    json!({
        "model": args.model,
        "adapter": path(&args.with.adapter),
        "sae": path(&args.with.sae),
        "layer": args.with.layer,
        "weights": loaded.model().lm_head.dtype().name(),
        "products": loaded.device.precision().dtype().name(),
        "prompt": if args.chat { "the model's chat template" } else { template.source() },
        "temperature": options.sampling.temperature,
        "top_p": options.sampling.top_p,
        "top_k": options.sampling.top_k,
        "seed": options.sampling.seed,
        "max_new_tokens": options.max_new_tokens,
    })
}

fn regrade(args: &EvalArgs, file: &Path) -> Result<(), Failure> {
    let regraded = results::regrade(file)?;
    if let Some(out) = &args.out {
        regraded.save(out)?;
    }
    report(
        args,
        &regraded.counts,
        json!({ "changed": regraded.changed }),
    )
}

/// Prints Pass@1, and pass@k for powers of two up to the number of samples.
fn report(args: &EvalArgs, counts: &[(u64, u64)], more: Value) -> Result<(), Failure> {
    let samples = counts.iter().map(|&(n, _)| n).min().unwrap_or(0);
    let mut ks: Vec<u64> = (0..63)
        .map(|i| 1 << i)
        .take_while(|&k| k < samples)
        .collect();
    ks.push(samples);
    let estimates = ks
        .into_iter()
        .filter_map(|k| Some((k, pass_at_k(counts, k)?)));
    let estimates: Vec<(u64, Estimate)> = estimates.collect();
    let correct: u64 = counts.iter().map(|&(_, c)| c).sum();
    let completions: u64 = counts.iter().map(|&(n, _)| n).sum();
    if args.json {
        let mut object = json!({
            "pass_at_1": estimates.first().map(|(_, estimate)| estimate.value),
            "correct": correct,
            "problems": counts.len(),
            "completions": completions,
            "pass_at_k": estimates.iter().map(|(k, e)| json!({
                "k": k, "value": e.value, "low": e.low, "high": e.high,
            })).collect::<Vec<_>>(),
            "interval": Estimate::interval_name(counts),
        });
        if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
            object.extend(more);
        }
        return Ok(print_line(object)?);
    }
    for (k, e) in &estimates {
        print_line(format_args!(
            "Pass@{k} {:.1} % (95 % interval {:.1} to {:.1} %)",
            100.0 * e.value,
            100.0 * e.low,
            100.0 * e.high
        ))?;
    }
    Ok(print_line(format_args!(
        "{correct} of {completions} completions right, {} problems; interval: {}",
        counts.len(),
        Estimate::interval_name(counts)
    ))?)
}
