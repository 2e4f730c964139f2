//! `report`: runs as a page to look at.

use std::path::PathBuf;

use clap::Args;
use resa_engine::formats::atomic;
use resa_engine::report;

use super::Failure;
use super::output::print_line;

#[derive(Args)]
pub struct ReportArgs {
    /// Run folders, shown side by side
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
}

pub fn run(args: &ReportArgs) -> Result<(), Failure> {
    let page = report::html(&args.runs)?;
    atomic::write_bytes(&args.out, page.as_bytes())?;
    Ok(print_line(args.out.display())?)
}
