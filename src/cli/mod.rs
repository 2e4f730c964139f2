//! The command line: one file per command, no computation.

mod args;
mod bench_kernels;
mod completions;
mod config_file;
mod doctor;
mod eval;
mod features;
mod generate;
mod interrupt;
mod merge;
mod model;
mod output;
mod report;
mod show;
mod train;
mod train_args;

use std::process::ExitCode;

use clap::FromArgMatches;
use resa_engine::Error;

use args::{Cli, Command};

/// Why a command ended without a result.
enum Failure {
    /// The command line or the settings make no sense: exit code 2.
    Usage(anyhow::Error),
    /// The work could not be done: exit code 1.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Runs the program: 0 is success, 1 an error, 2 a usage error, 130 an interruption. Where the
/// reader of standard output has gone, the program ends quietly and with 0, as ripgrep does:
/// `| head` under `set -o pipefail` is no failure.
pub fn main() -> ExitCode {
    let matches = args::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let result = match cli.command {
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Features(args) => features::run(&args),
        Command::Report(args) => report::run(&args),
        Command::BenchKernels(args) => bench_kernels::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
    };
    let (error, code) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => (error, 2),
        Err(Failure::Failed(error)) if output::is_closed(&error) => return ExitCode::SUCCESS,
        Err(Failure::Failed(error)) if is_cancelled(&error) => (error, interrupt::EXIT_CODE),
        Err(Failure::Failed(error)) => (error, 1),
    };
    output::note(format_args!("error: {}", chain(&error)));
    ExitCode::from(code)
}

fn is_cancelled(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::Cancelled))
}

/// The error and its causes on one line, leaving out causes that the line names already.
fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', ", ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}
