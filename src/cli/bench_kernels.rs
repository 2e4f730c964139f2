//! `bench-kernels`: how fast operators and stages are.

use std::time::Duration;

use resa_engine::bench::{self, Options};
use resa_engine::report::Progress;

use super::Failure;
use super::args::BenchArgs;

pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.static_table {
        print!("{}", bench::STATIC);
        return Ok(());
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
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(())
}
