//! `merge`: an adapter becomes part of a model's weights.

use std::path::Path;

use resa_engine::formats::{huggingface, peft};

use super::Failure;
use super::args::MergeArgs;

pub fn run(args: &MergeArgs) -> Result<(), Failure> {
    let model = Path::new(&args.model);
    let lora = peft::load(
        std::path::Path::new(&args.adapter[0]),
        &huggingface::read_config(model)?,
    )?;
    huggingface::save_merged(model, &lora, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}
