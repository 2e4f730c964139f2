//! `report`: runs as a page to look at.

use std::path::PathBuf;

use clap::Args;
use resa_engine::{Error, report};

use super::Failure;

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
    std::fs::write(&args.out, page).map_err(|e| Error::io(&args.out, e))?;
    println!("{}", args.out.display());
    Ok(())
}
