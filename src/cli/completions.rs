//! `completions`: a script that teaches a shell the options.

use super::Failure;
use super::args::{self, CompletionsArgs};
use super::output::print;

pub fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "resa-engine", &mut script);
    Ok(print(String::from_utf8_lossy(&script))?)
}
