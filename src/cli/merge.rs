//! `merge`: an adapter becomes part of a model's weights.

use super::Failure;
use super::args::MergeArgs;

pub fn run(args: &MergeArgs) -> Result<(), Failure> {
    Err(super::not_built(&format!("merge into {}", args.model)))
}
