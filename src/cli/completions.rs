//! `completions`: a script that teaches a shell the options.

use super::Failure;
use super::args::{self, CompletionsArgs};

pub fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "resa-engine", &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)?;
    Ok(())
}
