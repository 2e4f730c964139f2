//! `train`: both stages, or one of them.

use super::args::TrainArgs;
use super::show::Show;
use super::{Failure, config_file, interrupt};

pub fn run(args: &TrainArgs) -> Result<(), Failure> {
    let config = config_file::resolve(args)?;
    let _cancel = interrupt::cancel_flag()?;
    let _observer = Show::new(&config);
    Err(super::not_built("train"))
}
