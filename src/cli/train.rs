//! `train`: both stages, or one of them.

use std::fmt::Write;

use resa_engine::report::Progress;
use resa_engine::train::{self, PassAt1, RunOptions, Summary, TrainConfig};

use super::output::{print, print_json};
use super::show::Show;
use super::train_args::TrainArgs;
use super::{Failure, config_file, interrupt};

pub fn run(args: &TrainArgs) -> Result<(), Failure> {
    let config = config_file::resolve(args)?;
    let options = RunOptions {
        resume: args.resume,
    };
    if args.dry_run {
        let plan = train::dry_run(&config, options, &mut Progress::stderr(config.log_every))?;
        match args.json {
            true => print_json(&plan)?,
            false => print(plan)?,
        }
        return Ok(());
    }
    let cancel = interrupt::cancel_flag()?;
    let mut show = Show::new(&config);
    let summary = train::run(&config, options, &mut show, &cancel)?;
    match args.json {
        true => print_json(&summary)?,
        false => print(table(&config, &summary))?,
    }
    Ok(())
}

/// What the run measured, as aligned text.
fn table(config: &TrainConfig, summary: &Summary) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<44} {value}");
    };
    for (layer, start, end) in &summary.fvu {
        line(
            &format!("FVU at layer {layer}, first and last step"),
            format!("{start:.4} -> {end:.4}"),
        );
    }
    if let Some((start, end)) = summary.loss {
        let name = match config.method {
            train::Method::SaeTuning => "KL divergence a token, start and end",
            train::Method::Sft => "Cross-entropy a token, start and end",
        };
        line(name, format!("{start:.4} -> {end:.4}"));
    }
    if let Some(PassAt1 {
        problems,
        target,
        target_with_sae,
        tuned,
        source,
    }) = summary.pass_at_1
    {
        let share = |value: f64| format!("{:5.1} %", 100.0 * value);
        line("", String::new());
        line(
            &format!("Pass@1 on {problems} held-out problems"),
            String::new(),
        );
        line("  target", share(target));
        line("  target with the SAE inserted", share(target_with_sae));
        line("  tuned target, without the SAE", share(tuned));
        line("  source (what the SAE was trained on)", share(source));
    }
    line("Run folder", summary.out.display().to_string());
    text
}
