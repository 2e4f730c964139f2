//! `doctor`: what this machine and this build can do, and what to do next.

use clap::Args;
use resa_engine::doctor::examine;

use super::Failure;
use super::args::threads;
use super::output::{print, print_json};

#[derive(Args)]
pub struct DoctorArgs {
    /// Worker threads; 0 is one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    threads: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let report = examine(args.threads)?;
    match args.json {
        true => print_json(&report)?,
        false => print(&report)?,
    }
    match report.is_sound() {
        true => Ok(()),
        false => Err(anyhow::anyhow!("a self-test failed").into()),
    }
}
