//! `bench-kernels`: how fast operators and stages are.

use std::time::Duration;

use resa_engine::bench::{self, Options};
use resa_engine::report::Progress;

use super::Failure;
use super::args::BenchArgs;
use super::output::{print, print_json};

pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.static_table {
        return Ok(print(bench::STATIC)?);
    }
    let options = Options {
        device: args.device,
        threads: args.threads,
        filter: args.filter.clone(),
        models: args.model.clone(),
        budget: Duration::from_secs_f64(args.seconds),
        compare: args.compare.clone(),
    };
    let report = bench::run(&options, &mut Progress::stderr(1))?;
    match args.json {
        true => print_json(&report)?,
        false => print(report)?,
    }
    Ok(())
}
