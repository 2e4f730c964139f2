//! `merge`: adapters become part of a model's weights.

use std::path::Path;

use resa_engine::Error;
use resa_engine::formats::hub::Want;
use resa_engine::formats::{huggingface, peft};
use resa_engine::model::Lora;
use resa_engine::report::Progress;
use resa_engine::train::fetch;

use super::Failure;
use super::args::MergeArgs;
use super::output::print_line;

pub fn run(args: &MergeArgs) -> Result<(), Failure> {
    let mut progress = Progress::stderr(1);
    let mut folder = |given: &str, want| fetch::folder(given.as_ref(), want, &mut progress);
    let model = &folder(&args.model, Want::Model)?;
    let config = huggingface::read_config(model)?;
    let mut loras = Vec::new();
    for given in &args.adapter {
        let (dir, weight) = weighted(given).map_err(|e| Failure::Usage(e.into()))?;
        let lora: Lora = peft::load(&folder(dir, Want::Adapter)?, &config)?;
        loras.push(lora.weighted(weight));
    }
    huggingface::save_merged(model, &loras, &args.out)?;
    Ok(print_line(args.out.display())?)
}

/// Folder and weight in DIR or DIR=WEIGHT. A folder that exists under the whole name is meant.
fn weighted(given: &str) -> Result<(&str, f64), Error> {
    match given.rsplit_once('=') {
        Some((dir, weight)) if !Path::new(given).exists() => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() => Ok((dir, weight)),
            _ => Err(Error::setting(
                "--adapter",
                format!("expected DIR or DIR=WEIGHT with a number, found {given}"),
            )),
        },
        _ => Ok((given, 1.0)),
    }
}
